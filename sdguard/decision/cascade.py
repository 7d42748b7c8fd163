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

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
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
    """Signals read together, and the fused score from which a row goes on.

    Attributes:
        signals: what is read at this stage.
        weights: of the z-score of every signal read so far in the fused score; their sizes sum to 1.
        bound: a row of at least this fused score goes on to the next stage; None at the last.
    """

    signals: tuple[str, ...]
    weights: Mapping[str, float]
    bound: float | None


#: the signals of each stage and the share of ordinary prompts that goes on from it. What ordinary prompts pay on average is the sum over
#: stages of the share that reaches it times its cost: .05 * 18 = .9 evaluations.
PLAN: tuple[tuple[tuple[str, ...], float], ...] = ((("guidance_norm", "guidance_peak"), 0.05), (("agreement",), 0.0))


#: calls after the first whose guidance norm is watched; Wen et al. 2024 (2407.21720) read the second to fifth of 50.
LATER_CALLS = 4


@dataclass(frozen=True)
class Cascade:
    """Stages of the first call, the scale of every signal they read, and that of the guidance norm at each later call that is watched."""

    stages: tuple[Stage, ...]
    scales: Mapping[str, Scale]
    later: tuple[Scale, ...] = ()

    @classmethod
    def fit(
        cls,
        values: Mapping[str, Sequence[float]],
        memorized: Mapping[str, Sequence[float]] | None = None,
        plan: Sequence[tuple[Sequence[str], float]] = PLAN,
        later: Sequence[Sequence[float]] = (),
    ) -> Cascade:
        """Fit scales and bounds to the values of some ordinary prompts, one list per signal, in the same order of prompts.

        Without labels every signal read so far weighs the same. With values of ``memorized`` prompts the weights are those of
        a ridge-regularised logistic regression (`logistic_weights`), which also finds the sign of a signal. ``later`` has the guidance
        norms at later calls.
        """
        scales = {name: Scale.fit(values[name]) for names, _ in plan for name in names}
        stages: list[Stage] = []
        read: list[str] = []
        count = len(next(iter(values.values())))
        left = torch.ones(count, dtype=torch.bool)
        for names, share in plan:
            read += names
            z = {name: scales[name].z(torch.tensor(values[name])) for name in read}
            weights = dict.fromkeys(read, 1 / len(read))
            if memorized:
                labelled = torch.stack([scales[name].z(torch.tensor(memorized[name])) for name in read], 1)
                weights = dict(zip(read, logistic_weights(torch.stack(list(z.values()), 1), labelled), strict=True))
            score = fuse(z, weights)
            going = min(int(share * count), int(left.sum()))
            if not going:
                stages.append(Stage(tuple(names), weights, None))
                break
            bound = score[left].sort(descending=True).values[going - 1].item()
            stages.append(Stage(tuple(names), weights, bound))
            left &= score >= bound
        return cls(tuple(stages), scales, tuple(map(Scale.fit, later)))

    @property
    def signals(self) -> tuple[str, ...]:
        """Every signal it may read, in order."""
        return tuple(name for stage in self.stages for name in stage.signals)


def fuse(z: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of z-scores."""
    return torch.stack([weights[name] * values for name, values in z.items()]).sum(dim=0)


def logistic_weights(ordinary: Tensor, memorized: Tensor, ridge: float = 0.01) -> list[float]:
    """Weights of z-scores, sizes summing to 1, by logistic regression of memorized ``[m, k]`` against ordinary ``[n, k]`` prompts.

    Both classes count the same; ``ridge`` times the squared weights is added to the mean loss.
    """
    classes = [(1.0, memorized.double().numpy()), (-1.0, ordinary.double().numpy())]

    def loss(parameters: np.ndarray) -> float:
        w, b = parameters[:-1], parameters[-1]
        return float(sum(np.logaddexp(0, -sign * (z @ w + b)).mean() for sign, z in classes) + ridge * w @ w)

    w = minimize(loss, np.zeros(ordinary.shape[1] + 1)).x[:-1]
    return (w / max(np.abs(w).sum(), 1e-12)).tolist()


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
    score, rows = torch.zeros(count), torch.arange(count)
    read: list[str] = []
    floor: Tensor | None = None
    for stage in cascade.stages:
        here = observation.select(rows)
        for name in stage.signals:
            values[name][rows] = BY_NAME[name].read(here).float().cpu()
        read += stage.signals
        fused = fuse({name: cascade.scales[name].z(values[name][rows]) for name in read}, stage.weights)
        score[rows] = above(floor, fused)
        if stage.bound is None or not (going := fused >= stage.bound).any():
            break
        floor, rows = above(floor, torch.tensor(stage.bound)), rows[going]
    return score, values


def judge_later(norms: Tensor, step: int, cascade: Cascade) -> Tensor:
    """Score of each row at a later call by its guidance norm there, ``[B]``; a run's score is the highest of all its calls'.

    Minus infinity where the call is not watched. Cost: none.
    """
    watched = 1 <= step <= len(cascade.later)
    return cascade.later[step - 1].z(norms) if watched else torch.full_like(norms, -math.inf)
