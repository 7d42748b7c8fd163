"""The engine for a corpus beyond one machine: the batches of a scan go through Ray Data, one pipeline a worker."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.probe import BATCH_SIZE
from sdguard.scan.scan import Batch, Row, cache_key, run_resumable, scan_batch


class Scanner:
    """An actor of Ray Data: a pipeline of its own, on the GPU that Ray gave it if it did, and `scan_batch`."""

    def __init__(self, load: Callable[[], Any], profile: Profile, options: dict[str, Any]) -> None:
        self.pipe = load().to("cuda" if torch.cuda.is_available() else "cpu")
        self.profile, self.options = profile, options
        profile_for(self.pipe, given=profile)

    def __call__(self, batches: dict[str, Any]) -> dict[str, list[str]]:
        return {"rows": [json.dumps(scan_batch(self.pipe, self.profile, json.loads(batch), **self.options)) for batch in batches["batch"]]}


def connect() -> Any:
    """The ``ray`` package, connected to the cluster that ``$RAY_ADDRESS`` names, else to one started on this machine.

    The latter listens on the loopback interface alone. Nothing is reported to Ray's makers.

    Raises:
        ValueError: Ray is not installed; the message says which extra has it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ:
        # Ray's own switch, in spite of its name, for a local instance that binds 127.0.0.1; an address asked for by argument is overruled
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ValueError("The ray engine needs Ray: pip install 'sdguard[ray]'.") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def scan_with_ray(
    load: Callable[[], Any],
    profile: Profile,
    prompts: Mapping[int, str],
    *,
    seeds: int = 1,
    false_positive_rate: float = 0.01,
    batch_size: int = BATCH_SIZE,
    work: Path | None = None,
) -> Iterator[list[Row]]:
    """What `scan` yields, in the order in which workers finish: one for each GPU of the cluster, without any one for each CPU.

    ``load`` gives a worker its pipeline, which ``profile`` must be of. A worker that is lost is started again, and its batch with it. What
    the calling process keeps in ``work`` is the same as the other engine's: what the one has done the other does not do again. A scan
    that is killed loses what the workers had under way. Cost: as `scan`.

    Raises:
        ValueError: Ray is not installed, or the profile is too small for the rate. A profile that does not match ends the workers.
    """
    profile.allowed(false_positive_rate)
    ray = connect()
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    options = {"seeds": seeds, "false_positive_rate": false_positive_rate}

    def scan_batches(batches: Sequence[Batch]) -> Iterator[list[Row]]:
        if not batches:
            return
        items = [{"batch": json.dumps(batch)} for batch in batches]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Scanner,
            fn_constructor_args=(load, profile, options),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=gpus or int(there["CPU"])),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
        for record in done.iter_rows():
            yield json.loads(record["rows"])

    key = cache_key(profile, seeds, false_positive_rate)
    yield from run_resumable(scan_batches, prompts, key, batch_size=batch_size, work=work)
