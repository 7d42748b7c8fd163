"""Learning the ladder: which methods cure on this model, at what cost, from prompts that are known to be memorized."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sdguard.decision.profile import Profile, Rung
from sdguard.denoiser.families import Encoder
from sdguard.denoiser.probe import read
from sdguard.geometry.rollout import estimate
from sdguard.observation import Observation
from sdguard.steering import METHODS
from sdguard.steering.flagged import Flagged
from sdguard.steering.ladder import attempt

BATCH = 8


def ordered(rungs: Sequence[Rung]) -> list[Rung]:
    """Least expected cost of a cure first, of equal cost the one that moves the prediction least; what cures nothing is left out.

    For independent tries that stop at the first success, the order by cost over probability has the least expected cost.
    """
    curing = [rung for rung in rungs if rung.cured]
    return sorted(curing, key=lambda rung: (round(rung.cost / rung.cured), rung.moved))


def learn_ladder(
    pipe: Any,
    profile: Profile,
    memorized: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """The profile with its ladder learnt: every method is tried on every memorized prompt, one seed each, and verified.

    Cost: that of all methods and verifications, some 600 evaluations a prompt.
    """
    setting: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    found: dict[str, list[tuple[bool, int, float]]] = {name: [] for name in METHODS}

    def look(observation: Observation, prompts: list[str]) -> None:
        estimate(observation, independent=True)  # the decision has made it by the time a sample is steered
        flagged = Flagged.of(observation, list(prompts), Encoder(pipe), profile)
        for name, method in METHODS.items():
            before = observation.evaluations.clone()
            tried = attempt(flagged, method)
            costs = (observation.evaluations - before).tolist()
            verified = [(entry[1], cost) for entry, cost in zip(tried, costs, strict=True) if entry]
            found[name] += [(verification.passed, cost, verification.moved["prediction"]) for verification, cost in verified]

    for start in range(0, len(memorized), BATCH):
        some = list(memorized[start : start + BATCH])
        read(pipe, some, [seed + i for i in range(start, start + len(some))], lambda o, some=some: look(o, some), **setting)  # type: ignore[misc]
        if progress:
            progress(start + len(some), len(memorized))
    rungs = [Rung(name, *(statistics.fmean(column) for column in zip(*tried, strict=True))) for name, tried in found.items() if tried]
    return replace(profile, ladder=ordered(rungs))
