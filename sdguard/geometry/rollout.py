"""A short deterministic rollout: where would this sample end, before a single step of the run is taken?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdguard.noise import independent_noise
from sdguard.observation import CLEAN, NoiseLevel, Observation, denoised

ROLLOUT_STEPS = 4


class Step(NamedTuple):
    """One DDIM step: the point, its timestep and noise level, the guided noise prediction, and the noise level it goes to."""

    x: Tensor
    timestep: float
    level: NoiseLevel
    eps: Tensor
    following: NoiseLevel

    def taken(self) -> Tensor:
        """The point it leads to (Song et al. 2021, eq. 12 with sigma = 0)."""
        return self.following.a * denoised(self.x, self.eps, self.level) + self.following.s * self.eps


def grid(observation: Observation, steps: int = ROLLOUT_STEPS) -> list[float]:
    """The short rollout's timesteps, from the observation's own down."""
    return [observation.timestep, *torch.linspace(observation.timestep, 0, steps + 1)[1:-1].round().tolist()]


def observations(observation: Observation, noise: Tensor | None = None, steps: int = ROLLOUT_STEPS) -> Iterator[Observation]:
    """The calls of a `trajectory`, at its cost."""
    timesteps = grid(observation, steps)
    here = observation if noise is None else observation.from_start(noise)
    for timestep in [*timesteps[1:], None]:
        yield here
        if timestep is not None:
            step = Step(here.x, here.timestep, here.level, here.prediction, here.level_at(timestep))
            here = here.at(step.taken(), timestep)


def trajectory(observation: Observation, noise: Tensor | None = None, steps: int = ROLLOUT_STEPS) -> Iterator[Step]:
    """The guided DDIM steps from the observation's own ``x_t`` and predictions, or from ``noise`` in their place, to the end.

    Rows that have a rule follow it. Cost: 2 evaluations per image a step, the first from the observation's own point excepted, and the
    rules'.
    """
    timesteps = grid(observation, steps)
    here = observation if noise is None else observation.from_start(noise)
    for timestep, following in zip([*timesteps[1:], None], [*map(observation.level_at, timesteps[1:]), CLEAN], strict=True):
        step = Step(here.x, here.timestep, here.level, here.prediction, following)
        yield step
        if timestep is not None:
            here = here.at(step.taken(), timestep)


def short_rollout(observation: Observation, noise: Tensor | None = None, steps: int = ROLLOUT_STEPS) -> Tensor:
    """The denoised estimate at the end of `trajectory`, ``[B, C, H, W]``. Cost: that of the trajectory."""
    *_, last = trajectory(observation, noise, steps)
    return last.taken()


def once_a_row(observation: Observation, key: Hashable, make: Callable[[Observation], Tensor]) -> Tensor:
    """What ``make`` gives for the observation's rows, ``[B, ...]``, made once for each row of a run: what was bought is there for all."""
    known = {} if observation.memo is None else observation.memo
    keys = [(row, key) for row in observation.rows.tolist()]
    if missing := [i for i, entry in enumerate(keys) if entry not in known]:
        made = make(observation.select(torch.tensor(missing)))
        known.update({keys[i]: value for i, value in zip(missing, made, strict=True)})
    return torch.stack([known[entry] for entry in keys])


def rollout_end(observation: Observation, independent: bool = False) -> Tensor:
    """`short_rollout` from the rows' own noise or from independent noise, ``[B, C, H, W]``; made once for each row of a run."""

    def end(here: Observation) -> Tensor:
        return short_rollout(here, independent_start(here) if independent else None)

    return once_a_row(observation, ("rollout end", independent), end)


def independent_start(observation: Observation, draw: int = 0) -> Tensor:
    """Where each row could have started from independent noise: that noise, or its own origin under that noise."""
    noise, level = independent_noise(observation.x, draw), observation.level
    return noise if observation.origin is None else level.a * observation.origin + level.s * noise


def probe(x: Tensor, draw: int = 0) -> Tensor:
    """Independent signs like ``x``, a fixed function of each row alone: a probe for a stochastic trace."""
    return independent_noise(x, draw + 1).sign()
