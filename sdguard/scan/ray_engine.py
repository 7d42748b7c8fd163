"""The engine for a corpus beyond one machine: the batches of a scan stream through Ray Data, one pipeline a worker."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdguard.choices import BATCH_SIZE
from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.scan.scan import Batch, Row, batches_of, cache_key, cut, keep_batch, piece_name, rows_in, scan_batch

#: bytes of prompts on their way to the workers, beyond which the file is read no further.
AHEAD = 4_000_000
#: batches that a worker is handed at once where there are plenty, since each handing over takes the calling process some milliseconds;
#: and how often each worker is handed some at least, so that all end together.
BATCHES, TURNS = 16, 64


class Scanner:
    """An actor of Ray Data: a pipeline of its own, on the device that ``load`` puts it on, and `scan_batch`."""

    def __init__(self, load: Callable[[], Any], profile: Profile, batch_size: int, options: dict[str, Any]) -> None:
        self.pipe = load()
        self.profile, self.batch_size, self.options = profile, batch_size, options
        profile_for(self.pipe, given=profile)

    def __call__(self, shares: dict[str, Any]) -> dict[str, list[str]]:
        return {"piece": list(shares["piece"]), "rows": [json.dumps(self.scan(json.loads(share))) for share in shares["prompts"]]}

    def scan(self, share: Batch) -> list[Row]:
        """The rows of a worker's share, scanned in batches."""
        return [row for batch in cut(share, self.batch_size) for row in scan_batch(self.pipe, self.profile, batch, **self.options)]


def connect(cpus: int | None = None) -> Any:
    """The ``ray`` package, connected to the cluster that ``$RAY_ADDRESS`` names, else to one of so many CPUs started on this machine.

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
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each share is a block: else those of many minutes would wait for each other
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=AHEAD)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def shares(
    pieces: Callable[[], Iterable[Mapping[int, str]]], done: Mapping[str, Container[int]], size: int
) -> Iterator[dict[str, list[str]]]:
    """A record for so many prompts at a time of those pieces that ``done`` has by name, without the rows that it has of them."""
    for prompts in pieces():
        if (name := piece_name(prompts)) in done:
            left = ((row, prompt) for row, prompt in prompts.items() if row not in done[name])
            yield from ({"piece": [name], "prompts": [json.dumps(share)]} for share in cut(left, size))


def scan_pieces_with_ray(
    load: Callable[[], Any],
    profile: Profile,
    pieces: Callable[[], Iterable[Mapping[int, str]]],
    left: Mapping[str, int],
    advance: Callable[[int], None],
    *,
    seeds: int = 1,
    false_positive_rate: float = 0.01,
    batch_size: int = BATCH_SIZE,
    work: Path,
) -> Iterator[tuple[str, list[Row]]]:
    """What `scan_pieces` yields, in the order in which workers finish: one for each GPU of the cluster, without any one for each CPU.

    ``load`` gives a worker its pipeline, which ``profile`` must be of. ``pieces`` is called on this machine, in a process of its own, and
    read as fast as workers take it; ``left`` has the number of prompts of each piece that is to be scanned, by `piece_name`. A worker
    that is lost is started again, and its share with it. What the calling process keeps in ``work`` is the same as the other engine's:
    what the one has done the other does not do again. A scan that is killed loses what the workers had under way. Cost: as `scan`.

    Raises:
        ValueError: Ray is not installed, or the profile is too small for the rate. A profile that does not match ends the workers.
    """
    profile.allowed(false_positive_rate)
    options = {"seeds": seeds, "false_positive_rate": false_positive_rate}
    key = cache_key(profile, seeds, false_positive_rate)
    held: dict[str, list[Row]] = {}
    for name in left:
        if known := rows_in(batches := batches_of(work, name, key), batches):
            held[name] = known
            advance(len(known))
    done = {name: {row["row"] for row in held.get(name, [])} for name in left}
    for name in [name for name in held if len(done[name]) == left[name]]:
        del done[name]
        yield name, held.pop(name)
    if not done:
        return
    ray = connect()
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    workers = gpus or int(there["CPU"])
    unread = sum(left[name] - len(rows) for name, rows in done.items())
    size = batch_size * min(BATCHES, max(1, unread // (batch_size * workers * TURNS)))
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    here = {name: 0.001 for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__"}
    results = (
        ray.data.from_items([{"read": True}])
        .map_batches(lambda _: shares(pieces, done, size), batch_size=1, num_cpus=0, resources=here)
        .map_batches(
            Scanner,
            fn_constructor_args=(load, profile, batch_size, options),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
        )
    )
    for record in results.iter_rows():
        name, rows = record["piece"], json.loads(record["rows"])
        keep_batch(batches_of(work, name, key), rows)
        advance(len(rows))
        held.setdefault(name, []).extend(rows)
        if len(held[name]) == left[name]:
            yield name, held.pop(name)
