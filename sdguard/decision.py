"""The decision: signals to z-scores, z-scores to one score, cheapest first, and no more evidence bought than it takes.

A *cascade* reads its stages in order. A row whose fused score stays under a stage's bound stops there; the others go on to the next
stage, which costs more. What comes out is one score per row: a fixed function of the row once the cascade has been fitted, so that
a conformal p-value on it holds for the cascade as a whole (Vovk et al. 2005, ch. 2), whatever was bought on the way.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdguard.observation import Observation
from sdguard.signals import SIGNALS

BY_NAME = {signal.name: signal for signal in SIGNALS}


@dataclass(frozen=True)
class Scale:
    """How one signal spreads over ordinary prompts; ``log`` where all its values there are positive."""

    log: bool
    mean: float
    std: float

    @classmethod
    def fit(cls, values: Sequence[float]) -> Scale:
        """The scale of at least two values."""
        log = min(values) > 0
        taken = [math.log(v) for v in values] if log else list(values)
        return cls(log, statistics.fmean(taken), max(statistics.stdev(taken), 1e-12))

    def z(self, values: Tensor) -> Tensor:
        """Values in standard deviations of ordinary prompts, same shape."""
        return ((values.clamp_min(1e-30).log() if self.log else values) - self.mean) / self.std


@dataclass(frozen=True)
class Stage:
    """Signals read together, and the fused score from which a row goes on to the next stage; None at the last."""

    signals: tuple[str, ...]
    bound: float | None


#: the signals of each stage and the share of ordinary prompts that goes on from it. What ordinary prompts pay on average is the sum over
#: stages of the share that reaches it times its cost: .05 * 18 = .9 evaluations.
PLAN: tuple[tuple[tuple[str, ...], float], ...] = ((("guidance_norm", "guidance_peak"), 0.05), (("agreement",), 0.0))


@dataclass(frozen=True)
class Cascade:
    """Stages and the scale of every signal they read."""

    stages: tuple[Stage, ...]
    scales: Mapping[str, Scale]

    @classmethod
    def fit(cls, values: Mapping[str, Sequence[float]], plan: Sequence[tuple[Sequence[str], float]] = PLAN) -> Cascade:
        """Fit scales and bounds to the values of some ordinary prompts, one list per signal, in the same order of prompts."""
        scales = {name: Scale.fit(values[name]) for names, _ in plan for name in names}
        stages: list[Stage] = []
        read: list[str] = []
        count = len(next(iter(values.values())))
        left = torch.ones(count, dtype=torch.bool)
        for names, share in plan:
            read += names
            score = fuse({name: scales[name].z(torch.tensor(values[name])) for name in read})
            going = min(int(share * count), int(left.sum()))
            if not going:
                stages.append(Stage(tuple(names), None))
                break
            bound = score[left].sort(descending=True).values[going - 1].item()
            stages.append(Stage(tuple(names), bound))
            left &= score >= bound
        return cls(tuple(stages), scales)

    @property
    def signals(self) -> tuple[str, ...]:
        """Every signal it may read, in order."""
        return tuple(name for stage in self.stages for name in stage.signals)


def fuse(z: Mapping[str, Tensor]) -> Tensor:
    """The mean of the z-scores read so far: every signal is oriented, and none of them is trusted more without labels."""
    return torch.stack(list(z.values())).mean(dim=0)


def above(floor: Tensor | None, fused: Tensor) -> Tensor:
    """The score of a fused score reached over ``floor``: going on counts for more than stopping, and order is kept within a stage."""
    return fused if floor is None else floor + F.softplus(fused)


def judge(observation: Observation, cascade: Cascade) -> tuple[Tensor, dict[str, Tensor]]:
    """Score of each row, ``[B]``, and each signal's value, ``[B]``, nan where it was not read.

    A row that stops at the first stage has its fused score; one that goes on has the bound it passed plus ``log(1 + exp(f))`` for the
    fused score f of the next stage. Cost: that of the stages a row reaches.
    """
    count = len(observation.x)
    values = {name: torch.full((count,), math.nan) for name in cascade.signals}
    score, rows, read = torch.zeros(count), torch.arange(count), []
    floor: Tensor | None = None
    for stage in cascade.stages:
        here = observation.select(rows)
        for name in stage.signals:
            values[name][rows] = BY_NAME[name].read(here).float().cpu()
        read += stage.signals
        fused = fuse({name: cascade.scales[name].z(values[name][rows]) for name in read})
        score[rows] = above(floor, fused)
        if stage.bound is None or not (going := fused >= stage.bound).any():
            break
        floor, rows = above(floor, torch.tensor(stage.bound)), rows[going]
    return score, values
