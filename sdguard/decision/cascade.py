"""The decision: signals to z-scores, z-scores to one score, cheapest first, and no more evidence bought than it takes.

A *cascade* reads its stages in order. A row whose fused score stays under a stage's bound stops there; the others go on to the next
stage, which costs more. What comes out is one score per row: a fixed function of the row once the cascade has been fitted, so that
a conformal p-value on it holds for the cascade as a whole (Vovk et al. 2005, ch. 2), whatever was bought on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdguard.observation import Observation
from sdguard.signals import SIGNALS

BY_NAME = {signal.name: signal for signal in SIGNALS}


@dataclass(frozen=True)
class Scale:
    """How one signal spreads over ordinary prompts; ``log`` where all its values there are positive.

    Median and quantiles, so that a few memorized prompts among the ordinary ones move nothing. The median is that at the noise level
    ``log_snr``; near by it moves by ``slopes`` a unit of log-SNR, the first towards more noise, the second towards less.
    """

    log: bool
    median: float
    deviation: float
    slopes: tuple[float, float] = (0.0, 0.0)
    log_snr: float = 0.0

    @classmethod
    def fit(cls, values: Sequence[float]) -> Scale:
        """The scale of at least two values; its deviation is half of what lies between the 16% and the 84% quantile."""
        log = min(values) > 0
        taken = np.log(values) if log else np.asarray(values)
        low, median, high = np.quantile(taken, [0.16, 0.5, 0.84])
        return cls(log, float(median), max(float(high - low) / 2, 1e-12))

    def taken(self, values: Tensor) -> Tensor:
        """Values, or their logarithms."""
        return values.clamp_min(1e-30).log() if self.log else values

    def z(self, values: Tensor, log_snr: float | None = None) -> Tensor:
        """Values in standard deviations of ordinary prompts, same shape; read at the noise level ``log_snr``, if not at the scale's own."""
        away = 0.0 if log_snr is None else log_snr - self.log_snr
        return (self.taken(values) - self.median - self.slopes[away > 0] * away) / self.deviation

    def tilted(self, at: float, here: Sequence[float], others: Sequence[tuple[float, Sequence[float]]]) -> Scale:
        """The same with its slopes, from the values of some prompts at the log-SNR ``at`` of this scale, and at one below and one above."""
        moves = [(self.taken(torch.tensor(there)) - self.taken(torch.tensor(here)), level - at) for level, there in others]
        noisier, clearer = (float(move.median()) / away for move, away in sorted(moves, key=lambda move: move[1]))
        return replace(self, slopes=(noisier, clearer), log_snr=at)


@dataclass(frozen=True)
class Stage:
    """Signals read together, and the fused score from which a row goes on.

    Attributes:
        signals: what is read at this stage.
        fused: those of the signals read so far whose mean z-score is the stage's score.
        bound: a row of at least this score goes on to the next stage; None at the last.
    """

    signals: tuple[str, ...]
    fused: tuple[str, ...]
    bound: float | None


class StagePlan(NamedTuple):
    """What a stage reads, what of it decides, and the share of ordinary prompts that goes on from it."""

    signals: tuple[str, ...]
    fused: tuple[str, ...]
    share: float


#: The signals, their places and the shares are those of ``python -m benchmarks leave-one-out``; equal weights, since fitted ones did not
#: carry over to other models. Sharpness and dimension are read for every row that is not clearly clean and reported, but do not
#: decide: on models they were not chosen on they add nothing to what is there. An ordinary prompt pays .1 * 8 evaluations on average.
PLAN = (
    StagePlan(("guidance_detail",), ("guidance_detail",), 0.10),
    StagePlan(
        ("persistence", "estimate_agreement", "estimate_agreement_ahead", "sharpness", "lid_noisy"),
        ("persistence", "estimate_agreement", "estimate_agreement_ahead"),
        0.0,
    ),
)

#: z-scores count within these bounds, so that no single signal decides alone. Copies reach 6 on models whose ordinary prompts spread
#: little, and must not be cut off to a level that never-seen captions reach too.
CLIP = (-4.0, 10.0)


@dataclass(frozen=True)
class Cascade:
    """Stages, and the scale of every signal they read."""

    stages: tuple[Stage, ...]
    scales: Mapping[str, Scale]

    @classmethod
    def fit(cls, values: Mapping[str, Sequence[float]], plan: Sequence[StagePlan] = PLAN) -> Cascade:
        """Fit scales and bounds to the values of some ordinary prompts, one list per signal, in the same order of prompts.

        Those that decide have a value for each prompt, the others may have been read on fewer. Signals of the plan without values are left
        out: the denoiser has no part for them.
        """
        scales = {name: Scale.fit(values[name]) for stage in plan for name in stage.signals if name in values}
        deciding = {name for stage in plan for name in stage.fused if name in scales}
        z = {name: scales[name].z(torch.tensor(values[name])) for name in deciding}
        stages: list[Stage] = []
        count = max(map(len, z.values()))
        left = torch.ones(count, dtype=torch.bool)
        for stage in plan:
            signals, fused = (tuple(name for name in names if name in scales) for names in (stage.signals, stage.fused))
            score = fuse([z[name] for name in fused])
            going = min(int(stage.share * count), int(left.sum()))
            if not going:
                stages.append(Stage(signals, fused, None))
                break
            bound = score[left].sort(descending=True).values[going - 1].item()
            stages.append(Stage(signals, fused, bound))
            left &= score >= bound
        return cls(tuple(stages), scales)

    def suspicion(self, values: Mapping[str, Sequence[float]]) -> Tensor:
        """The last stage's score of prompts whose signals have all been read, ``[n]``, whether or not they would have come so far."""
        return fuse([self.scales[name].z(torch.tensor(values[name])) for name in self.stages[-1].fused])

    @property
    def signals(self) -> tuple[str, ...]:
        """Every signal it may read, in order."""
        return tuple(name for stage in self.stages for name in stage.signals)


def fuse(z: Sequence[Tensor]) -> Tensor:
    """The mean of z-scores, each within `CLIP`."""
    return torch.stack([values.clamp(*CLIP) for values in z]).mean(dim=0)


def above(floor: Tensor | None, fused: Tensor) -> Tensor:
    """The score of a fused score reached over ``floor``: going on counts for more than stopping, and order is kept within a stage."""
    return fused if floor is None else floor + F.softplus(fused)


def judge(observation: Observation, cascade: Cascade) -> tuple[Tensor, dict[str, Tensor]]:
    """Score of each row, ``[B]``, and each signal's value, ``[B]``, nan where it was not read.

    A row that stops at the first stage has its fused score; one that goes on has the bound it passed plus ``log(1 + exp(f))`` for the
    fused score f of the next stage. Cost: that of the stages a row reaches.
    """
    count = len(observation.x)
    values = {name: torch.full((count,), math.nan, dtype=torch.float) for name in cascade.signals}
    score, rows = torch.zeros(count, dtype=torch.float), torch.arange(count)
    floor: Tensor | None = None
    for stage in cascade.stages:
        here = observation.select(rows)
        for name in stage.signals:
            values[name][rows] = BY_NAME[name].read(here).float().cpu()
        fused = fuse([cascade.scales[name].z(values[name][rows], here.level.log_snr) for name in stage.fused])
        score[rows] = above(floor, fused)
        if stage.bound is None or not (going := fused >= stage.bound).any():
            break
        floor, rows = above(floor, torch.tensor(stage.bound)), rows[going]
    return score, values
