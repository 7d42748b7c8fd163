"""Reading a pipeline: what its denoiser shows for some prompts, without making their pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sdguard.correction import Correction
from sdguard.families import Encoder
from sdguard.hook import watched
from sdguard.observation import Observation


class _Enough(Exception):
    """Ends a run once everything has been read."""


class _Reader:
    """Hands the first ``calls`` observations to ``look`` and then ends the run; with ``calls`` None the run goes to its end."""

    def __init__(self, look: Callable[[Observation], None], calls: int | None) -> None:
        self.corrections: dict[int, Correction] = {}
        self.look, self.calls = look, calls

    def reads(self, step: int) -> bool:
        return True

    def observe(self, observation: Observation) -> None:
        self.look(observation)
        if observation.step + 1 == self.calls:
            raise _Enough


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline shows no progress bar of its own."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def for_each(count: int, value: Any) -> Any:
    """A picture or a text for each of ``count`` prompts, where ``value`` is a single one; everything else as it is."""
    if isinstance(value, (Image.Image, str)):
        return [value] * count
    if isinstance(value, Tensor) and value.ndim >= 3 and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value


def read(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], look: Callable[[Observation], None], calls: int | None = 1, **setting: Any
) -> None:
    """Show ``look`` the first ``calls`` denoiser calls (all of them with None) of one run of ``prompts``, one seed each.

    ``setting`` goes to the pipeline, a single picture or text in it as one for each prompt; of an IP-Adapter's there is one an adapter,
    whatever the number of prompts. No picture is decoded. Cost: 2 denoiser evaluations a prompt and call.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        with quiet(pipe), watched(Encoder(pipe, setting), _Reader(look, calls)):
            inputs = {name: value if name.startswith("ip_adapter") else for_each(len(prompts), value) for name, value in setting.items()}
            pipe(list(prompts), generator=generators, output_type="latent", **inputs)
    except _Enough:
        pass
