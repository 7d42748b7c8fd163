"""Learning the order of methods: which cure on this model, at what cost, from prompts that are known to be memorized."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sdguard.choices import BATCH_SIZE
from sdguard.decision.profile import MethodStatistics, Profile
from sdguard.denoiser.probe import read_prompts
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.resumable import Parts, run_pieces
from sdguard.geometry.reference import reference_end
from sdguard.steering import METHODS
from sdguard.steering.fallback import attempt_each
from sdguard.steering.method import SteeringInput

#: share of the prompts that a method has to cure to be tried at all: what mostly fails costs more than it keeps.
LEAST_CURED = 0.5

#: of one method on one prompt: whether it passed, the evaluations it cost, how far it moved the prediction, its alignment if it passed.
Tried = tuple[bool, int, float, float]


def ordered(methods: Sequence[MethodStatistics]) -> list[MethodStatistics]:
    """What keeps most of the prompt first, of equals what moves the prediction least; what cures less than `LEAST_CURED` is left out.

    What is tried first is what most pictures come out of: a cheaper cure that loses the prompt is no saving. Alignments that some dozens of
    pictures tell apart by less than a twentieth from the best of them are equals.
    """
    left = sorted((method for method in methods if method.cured >= LEAST_CURED), key=lambda method: -method.alignment)
    found: list[MethodStatistics] = []
    while left:
        equals = [method for method in left if left[0].alignment - method.alignment < 1 / 20]
        found += sorted(equals, key=lambda method: method.moved)
        left = left[len(equals) :]
    return found


def learn_methods(
    pipe: Any,
    profile: Profile,
    memorized: Sequence[str],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    work: Path | None = None,
) -> Profile:
    """The profile with the order of methods learnt: every one is tried on every memorized prompt, one seed each, and verified.

    ``work`` is a folder that keeps what was tried, so that it goes on after a kill; it is left there. Cost: that of all methods and
    verifications, some 600 evaluations a prompt.
    """
    parts = Parts(work, "methods", [asdict(profile), list(memorized), seed, BATCH_SIZE, list(METHODS)])

    def tried_from(start: int) -> dict[str, list[Tried]]:
        return try_methods(pipe, profile, list(memorized[start : start + BATCH_SIZE]), seed + start)

    def advance(start: int) -> None:
        if progress:
            progress(min(start + BATCH_SIZE, len(memorized)), len(memorized))

    starts = {f"{start:06d}": start for start in range(0, len(memorized), BATCH_SIZE)}
    batches = run_pieces(parts, starts, tried_from, done=advance)
    found = {name: [tried for batch in batches for tried in batch[name]] for name in METHODS}
    return replace(profile, methods=ordered([statistics_of(name, tried) for name, tried in found.items() if tried]))


@torch.no_grad()
def try_methods(pipe: Any, profile: Profile, prompts: Sequence[str], seed: int) -> dict[str, list[Tried]]:
    """What came of every method on each of the prompts that it could be tried on, the first of them from the noise of ``seed``."""
    observation = read_prompts(pipe, list(prompts), [seed + i for i in range(len(prompts))])
    reference_end(observation, 0)  # it serves all methods
    flagged = SteeringInput.of(observation, list(prompts), Encoder(pipe), profile)
    found: dict[str, list[Tried]] = {}
    for name, method in METHODS.items():
        before = observation.evaluations.clone()
        attempts = attempt_each(flagged, method)
        costs = (observation.evaluations - before).tolist()
        verified = [(entry[1], cost) for entry, cost in zip(attempts, costs, strict=True) if isinstance(entry, tuple)]
        found[name] = [(v.passed, cost, v.moved["prediction"], v.alignment if v.passed else math.nan) for v, cost in verified]
    return found


def statistics_of(name: str, tried: Sequence[Tried]) -> MethodStatistics:
    """Means over what was tried of a method: passed, evaluations, movement, and the alignment of what passed."""
    passed, cost, moved, aligned = zip(*tried, strict=True)
    of_cures = [value for value in aligned if not math.isnan(value)] or [0.0]
    return MethodStatistics(name, statistics.fmean(passed), statistics.fmean(cost), statistics.fmean(moved), statistics.fmean(of_cures))
