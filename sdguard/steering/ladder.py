"""The ladder: steering methods in order of how far they move the prompt, each verified by a signal it did not optimise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.calibration import Profile
from sdguard.lookahead import independent_noise, look_ahead
from sdguard.observation import Observation
from sdguard.signals.agreement import correlation
from sdguard.steering.embedding import Correction, embedding_descent

#: trust-region radii of the embedding rungs, as shares of each token's distance from the empty prompt's.
RADII = (0.5, 0.8, 1.0)


@dataclass
class Outcome:
    """What the ladder did for one row; ``condition`` is None if no rung passed verification."""

    agreement: float = float("nan")
    condition: Tensor | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For the report: the rung that passed, if any, and every attempt."""
        return {"passed": self.condition is not None, "attempts": self.attempts}


def climb(observation: Observation, profile: Profile) -> list[Outcome]:
    """Try the rungs on every row until one passes verification.

    With A the row's own noise and B an independent one, a corrected condition passes when its look-aheads from A and B
    agree no more than those of 95% of ordinary prompts do (it leads to no memorized picture, old or new), and when its look-ahead
    from A agrees no more than that with the uncorrected one from B (it left the picture that every noise led to).
    Cost per image: 10 for the uncorrected look-ahead; per rung the descent, 1, and 18 for verification.
    """
    limit, target = profile.agreement_limit(), profile.guidance_norm[profile.prompts // 2]
    noise = independent_noise(observation.x)
    uncorrected = look_ahead(observation, noise)
    outcomes = [Outcome() for _ in observation.rows]
    left = torch.arange(len(outcomes))
    for radius in RADII:
        here = observation.select(left)
        correction = embedding_descent(here, target, radius)
        candidate = here.with_condition(correction.condition)
        own, other = look_ahead(candidate), look_ahead(candidate, noise[left])
        across, stayed = correlation(own, other), correlation(own, uncorrected[left])
        passed = (across <= limit) & (stayed <= limit)
        for i, row in enumerate(left.tolist()):
            outcomes[row].attempts.append(attempt(radius, correction, i, across[i].item(), stayed[i].item()))
            outcomes[row].agreement = across[i].item()
            if passed[i]:
                outcomes[row].condition = correction.condition[i]
        left = left[~passed.cpu()]
        if not len(left):
            break
    return outcomes


def attempt(radius: float, correction: Correction, i: int, across: float, stayed: float) -> dict[str, Any]:
    """One rung on one row, for the report."""
    return {
        "method": "embedding_descent",
        "radius": radius,
        "tokens": correction.tokens[i],
        "moved": correction.moved[i].item(),
        "agreement": across,
        "agreement_with_uncorrected": stayed,
    }
