"""Rules of decision over tables of readings: how one is fitted and scored, and how one is chosen on several models.

A `Rule` has the form of `sdguard.decision.cascade`: a gate of free signals lets a share of ordinary prompts go on to the evidence that
costs; the score is the gate's below its bound, and above it the bound plus ``log(1 + exp(f))`` of the evidence f. Here the readings have
been taken for every row, so that a rule is scored in a moment, and thousands are compared.

`choose` takes the models it may look at and no other: what is left out cannot be seen by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.models import SAME_PICTURE
from sdguard.choices import BATCH_SIZE
from sdguard.decision.calibration import LOOKED_AT, split
from sdguard.decision.cascade import CLIP, Cascade
from sdguard.decision.profile import SAME_PICTURE as PICTURES_ALIKE
from sdguard.decision.profile import Profile, ProfileError

#: promised false-positive rate, and that at which true positives are counted.
RATE = 0.01
#: evaluations of a sample that is not clearly clean, at most; `GEOMETRY` of them are sharpness and dimension, read for every such sample.
MOST, GEOMETRY = 8, 4
FREE = ("guidance_norm", "guidance_peak", "guidance_detail", "bottleneck_shift")
GEOMETRIC = ("sharpness", "lid_noisy")
#: the log-SNR that one conditional DDIM step goes to: timesteps of about 750, 650, 476 and 350 of Stable Diffusion's 1,000.
LOG_SNRS = (-2.8, -2.0, -0.8, 0.0)
#: of those, where the pictures from several noises are compared.
COMPARED_AT = (-0.8, 0.0)
NOISES = (2, 3, 4)
#: free fusions that may be the gate, and the shares of ordinary prompts that may pass it: nine in ten are to pay nothing.
GATES: tuple[tuple[str, ...], ...] = (
    ("guidance_detail",),
    ("guidance_norm",),
    ("guidance_norm", "guidance_detail"),
    ("guidance_detail", "bottleneck_shift"),
    ("guidance_norm", "guidance_peak", "guidance_detail"),
    FREE,
)
SHARES = (0.05, 0.10)
SCALES = ("median", "mean")
#: sums of evidence that every gate is tried with: the best behind an open one.
SHORT_LIST = 40
#: two rules are as good as each other within this mean of AUC + TPR.
AS_GOOD = 1e-3


def persistence_name(log_snr: float, measure: str) -> str:
    """The name of a variant of persistence; ``measure`` is ``relative`` or ``over detail``."""
    return f"persistence at {log_snr:g}, {measure}"


def agreement_name(log_snr: float | None, noises: int, pairs: str, measure: str) -> str:
    """The name of a variant of agreement: at the first noise level (None) or one step on; of the ``closest`` or the ``mean`` of pairs."""
    where = "at start" if log_snr is None else f"at {log_snr:g}"
    return f"agreement {where}, {noises} noises, {pairs}, {measure}"


#: which evaluations each bought reading needs, by name: (noise, log-SNR it is evaluated at). The run's own first call is free.
PERSISTENCE: dict[str, frozenset[tuple[int, float | None]]] = {
    persistence_name(t, measure): frozenset({(0, t)}) for t in LOG_SNRS for measure in ("relative", "over detail")
}
AT_START: dict[str, frozenset[tuple[int, float | None]]] = {
    agreement_name(None, n, pairs, measure): frozenset((k, None) for k in range(1, n))
    for n in NOISES
    for pairs in (("closest", "mean") if n > 2 else ("mean",))
    for measure in ("correlation", "distance")
}
AHEAD: dict[str, frozenset[tuple[int, float | None]]] = {
    agreement_name(t, n, pairs, measure): frozenset({(0, t), *((k, at) for k in range(1, n) for at in (None, t))})
    for t in COMPARED_AT
    for n in (NOISES if t == COMPARED_AT[0] else NOISES[:1])
    for pairs in (("closest", "mean") if n > 2 else ("mean",))
    for measure in ("correlation", "distance")
}
BOUGHT = PERSISTENCE | AT_START | AHEAD
READINGS = (*FREE, *BOUGHT, *GEOMETRIC)
#: the names that signals of the guard have among the readings.
SHIPPED_NAMES = {
    "persistence": persistence_name(0.0, "over detail"),
    "estimate_agreement": agreement_name(None, 3, "closest", "correlation"),
    "estimate_agreement_ahead": agreement_name(0.0, 2, "mean", "correlation"),
}


@dataclass(frozen=True)
class Rule:
    """A rule of decision.

    Attributes:
        gate: free readings whose mean z-score opens it; empty for an open one.
        share: of ordinary prompts that pass.
        evidence: readings whose mean z-score decides behind it.
        scale: how z-scores are taken: by ``median`` and 16-84% span or by ``mean`` and standard deviation of ordinary prompts.
    """

    gate: tuple[str, ...]
    share: float
    evidence: tuple[str, ...]
    scale: str = "median"

    @property
    def cost(self) -> int:
        """Evaluations of a sample that passes the gate, those for reporting its geometry included where it is a decision of two stages."""
        needed = len(frozenset().union(*(BOUGHT.get(name, frozenset()) for name in self.evidence)))
        return needed + (GEOMETRY if self.gate else 2 * len(set(self.evidence) & set(GEOMETRIC)))


class Readings(NamedTuple):
    """What was read on one model: a row a sample of its cases, of its own ordinary captions, and of the shipped prompts.

    All have the columns `READINGS`; cases also ``caption``, ``role``, ``copy``, ``resembles`` and ``twin``; the other two ``same``: the
    correlation of what two noises give.
    """

    cases: pd.DataFrame
    own: pd.DataFrame
    shipped: pd.DataFrame


@dataclass(frozen=True)
class Scales:
    """How readings spread over ordinary prompts, a column each: whether logs are taken, centre and deviation, ``[k]``."""

    names: tuple[str, ...]
    log: np.ndarray
    centre: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fit(cls, ordinary: pd.DataFrame, names: Sequence[str], scale: str) -> Scales:
        """The scales of ``names`` on ``ordinary`` prompts; a reading's log is taken where all its values there are positive."""
        values = ordinary[list(names)].to_numpy(float)
        log = (values > 0).all(axis=0)
        taken = np.where(log, np.log(np.where(log, values, 1)), values)
        low, centre, high = np.quantile(taken, [0.16, 0.5, 0.84], axis=0)
        deviation = (high - low) / 2
        if scale == "mean":
            centre, deviation = taken.mean(axis=0), taken.std(axis=0, ddof=1)
        return cls(tuple(names), log, centre, np.maximum(deviation, 1e-12))

    def z(self, table: pd.DataFrame) -> np.ndarray:
        """Readings as z-scores within the cascade's bounds, ``[n, k]``."""
        values = table[list(self.names)].to_numpy(float)
        taken = np.where(self.log, np.log(np.clip(np.where(self.log, values, 1), 1e-30, None)), values)
        return np.clip((taken - self.centre) / self.deviation, *CLIP)


@dataclass(frozen=True)
class Fitted:
    """A rule fitted on ordinary prompts: the scales of its readings and the bound of its gate (None: open)."""

    rule: Rule
    scales: Scales
    bound: float | None

    @classmethod
    def fit(cls, rule: Rule, ordinary: pd.DataFrame) -> Fitted:
        """Fit a rule as `Cascade.fit` does."""
        scales = Scales.fit(ordinary, tuple(dict.fromkeys([*rule.gate, *rule.evidence])), rule.scale)
        if not rule.gate:
            return cls(rule, scales, None)
        opened = scales.z(ordinary)[:, : len(rule.gate)].mean(axis=1)
        going = int(rule.share * len(ordinary))
        return cls(rule, scales, float(np.sort(opened)[::-1][going - 1]) if going else np.inf)

    def stages(self, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """The scores of gate and evidence, ``[n]`` each."""
        z = self.scales.z(table)
        return (
            z[:, : len(self.rule.gate)].mean(axis=1) if self.rule.gate else np.full(len(z), np.inf),
            z[:, [self.scales.names.index(name) for name in self.rule.evidence]].mean(axis=1),
        )

    def passes(self, table: pd.DataFrame) -> np.ndarray:
        """Which rows go on behind the gate, ``[n]``."""
        return np.full(len(table), True) if self.bound is None else self.stages(table)[0] >= self.bound

    def score(self, table: pd.DataFrame) -> np.ndarray:
        """The score of each row, ``[n]``, as `sdguard.decision.cascade.judge` gives it."""
        opened, evidence = self.stages(table)
        if self.bound is None:
            return evidence
        return np.where(opened >= self.bound, self.bound + np.logaddexp(0, evidence), opened)


def collapsed(same: np.ndarray, suspicion: np.ndarray) -> np.ndarray:
    """Which prompts the collapse check of `sdguard.decision.calibration` sets aside, ``[n]``.

    The most suspicious are looked at first, a batch at a time, until a batch has none whose pictures from two noises are the same. Here
    that has been read of every prompt, whichever a rule suspects.
    """
    aside = np.full(len(same), False)
    order = np.argsort(-suspicion, kind="stable")
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        aside[batch] = same[batch] > PICTURES_ALIKE
        if not aside[batch].any() and start + BATCH_SIZE >= LOOKED_AT * len(order):
            break
    return aside


def calibrated(rule: Rule, ordinary: pd.DataFrame, check: bool) -> tuple[Fitted, Profile, int]:
    """A rule fitted on every third of some ordinary prompts, a profile of its scores on the others, and how many were set aside.

    As `sdguard.decision.calibration` does it; ``check`` says whether prompts that collapse are set aside.
    """
    fitting, scoring = (ordinary.iloc[rows] for rows in split(len(ordinary)))
    fitted, aside = Fitted.fit(rule, fitting), 0
    if check:
        gone = collapsed(fitting.same.to_numpy(), fitted.stages(fitting)[1])
        fitted, aside = Fitted.fit(rule, fitting[~gone]), int(gone.sum())
    scores = fitted.score(scoring)
    if check:
        gone = collapsed(scoring.same.to_numpy(), scores)
        scores, aside = scores[~gone], aside + int(gone.sum())
    return fitted, Profile({}, Cascade((), {}), np.sort(scores).tolist(), {}), aside


def threshold(profile: Profile, rate: float = RATE) -> float:
    """The score above which a sample is flagged; not a number where there are too few prompts for the rate."""
    try:
        return profile.threshold(rate)
    except ProfileError:
        return np.nan


def negatives(cases: pd.DataFrame) -> dict[str, np.ndarray]:
    """Which samples copies are told from, by what they are called, ``[n]`` each; none of them is a copy.

    ``never seen, cleaned``: without those that resemble a memorized picture, of whatever caption: they are no true negatives.
    """
    unseen, clean = (cases.role == "never seen") & ~cases["copy"], cases.resembles <= SAME_PICTURE
    found = {
        "never seen": unseen,
        "never seen, cleaned": unseen & clean,
        "ordinary": (cases.role == "ordinary") & ~cases["copy"],
        "too rarely seen": (cases.role == "too rarely seen") & ~cases["copy"],
    }
    return {name: chosen.to_numpy() for name, chosen in found.items()}


#: what a choice is made by.
CHOSEN_BY = ("never seen, cleaned", "ordinary")


def merit(copies: np.ndarray, others: np.ndarray) -> np.ndarray:
    """AUC + TPR at `RATE` of each of C scores, ``[C]``, of ``copies`` ``[C, P]`` against ``others`` ``[C, N]``; ties count against."""
    count, against = copies.shape[1], others.shape[1]
    if not count or not against:
        return np.full(len(copies), np.nan)
    order = np.argsort(np.concatenate([copies, others], axis=1), axis=1, kind="stable")
    ranks = np.empty(order.shape)
    np.put_along_axis(ranks, order, np.arange(1.0, order.shape[1] + 1)[None].repeat(len(order), axis=0), axis=1)
    area = (ranks[:, :count].sum(axis=1) - count * (count + 1) / 2) / (count * against)
    limit = np.sort(others, axis=1)[:, against - 1 - int(RATE * against)]
    return area + (copies > limit[:, None]).mean(axis=1)


def merits(scores: np.ndarray, cases: pd.DataFrame) -> np.ndarray:
    """The mean `merit` of C scores ``[C, n]`` of a model's cases against each of `CHOSEN_BY` that it has, ``[C]``."""
    copies, others = cases["copy"].to_numpy(), negatives(cases)
    return np.nanmean([merit(scores[:, copies], scores[:, others[name]]) for name in CHOSEN_BY if others[name].any()], axis=0)


def sums_of_evidence() -> list[tuple[str, ...]]:
    """Every sum that may be chosen: one persistence, one agreement or one of each place, optionally geometry, within `MOST` evaluations."""
    agreements = [(name,) for name in (*AT_START, *AHEAD)] + list(itertools.product(AT_START, AHEAD))
    geometries = [(), *((name,) for name in GEOMETRIC), GEOMETRIC]
    found = [(p, *a, *g) for p, a, g in itertools.product(PERSISTENCE, agreements, geometries)]
    return [evidence for evidence in found if Rule(FREE, 0.0, evidence).cost <= MOST]


def best(rules: Sequence[Rule], value: np.ndarray, count: int) -> list[int]:
    """The first ``count`` rules by ``value`` ``[C]``, of those as good the one first that costs an ordinary prompt least, positions."""
    return sorted(range(len(rules)), key=lambda i: (-np.floor(value[i] / AS_GOOD + 1e-9), rules[i].share * rules[i].cost, -value[i]))[
        :count
    ]


def read_on_all(models: Iterable[Readings]) -> set[str]:
    """The readings that every one of ``models`` has: a transformer has no bottleneck."""
    tables = [table for readings in models for table in readings]
    return {name for name in READINGS if all(np.isfinite(table[name]).all() for table in tables)}


def choose(models: Mapping[str, Readings], usable: Collection[str]) -> Rule:
    """The rule that is best on ``models``, each calibrated on its own captions, by the mean of their `merits`; ties by cost.

    Of the ``usable`` readings alone.

    In two rounds: sums of evidence behind an open gate, then the best `SHORT_LIST` of them behind every gate, with and without the gate's
    own signals in the sum. Pull, persistence and agreement each take part in every candidate.
    """
    fitting = {name: readings.own.iloc[split(len(readings.own))[0]] for name, readings in models.items()}
    sums = [evidence for evidence in sums_of_evidence() if set(evidence) <= set(usable)]
    open_rules = [Rule((), 1.0, evidence, scale) for scale in SCALES for evidence in sums]
    value = np.mean([value_of(open_rules, fitting[name], readings.cases) for name, readings in models.items()], axis=0)
    short = [open_rules[i] for i in best(open_rules, value, SHORT_LIST)]
    gates = [gate for gate in GATES if set(gate) <= set(usable)]
    gated = [
        Rule(gate, share, (*rule.evidence, *(gate if pulled else ())), rule.scale)
        for rule, gate, share, pulled in itertools.product(short, gates, SHARES, (False, True))
    ]
    means = np.mean([value_of(gated, fitting[name], readings.cases) for name, readings in models.items()], axis=0)
    return gated[best(gated, means, 1)[0]]


def picks(sums: Sequence[Sequence[str]]) -> np.ndarray:
    """Weights of all `READINGS` in each of C means, ``[C, k]``."""
    chosen = np.array([[name in names for name in READINGS] for names in sums], float)
    return chosen / chosen.sum(axis=1, keepdims=True)


def value_of(rules: Sequence[Rule], fitting: pd.DataFrame, cases: pd.DataFrame) -> np.ndarray:
    """The `merits` of each of C rules, fitted on some ordinary prompts, on a model's cases, ``[C]``; the same as `Fitted`, all at once."""
    value = np.full(len(rules), np.nan)
    for scale in SCALES:
        here = [i for i, rule in enumerate(rules) if rule.scale == scale]
        if not here:
            continue
        scales = Scales.fit(fitting, READINGS, scale)
        z, ordinary = np.nan_to_num(scales.z(cases)), np.nan_to_num(scales.z(fitting))
        score = picks([rules[i].evidence for i in here]) @ z.T
        for row, i in enumerate(here):
            if gate := rules[i].gate:
                weights = GATE_PICKS[gate]
                opened = weights @ z.T
                going = int(rules[i].share * len(ordinary))
                bound = np.sort(weights @ ordinary.T)[::-1][going - 1] if going else np.inf
                score[row] = np.where(opened >= bound, bound + np.logaddexp(0, score[row]), opened)
        value[here] = merits(score, cases)
    return value


#: `picks` of each gate.
GATE_PICKS = {gate: picks([gate])[0] for gate in GATES}
