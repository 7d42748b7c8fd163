"""The ladder: steering methods in order of how far they move the prompt, each verified by a signal it did not optimise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.calibration import Profile
from sdguard.lookahead import look_ahead
from sdguard.observation import Observation
from sdguard.signals.agreement import agreement, correlation
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

    A corrected condition passes when its look-aheads from the row's own noise and from independent noise agree no more than
    those of 95% of ordinary prompts do (it leads to no memorized picture, old or new), and when its look-ahead agrees with the
    uncorrected one no more than that either (it left the picture it was sent away from).
    Cost per image: 8 for the uncorrected look-ahead; per rung the descent, 1, and 18 for verification.
    """
    limit, target = profile.agreement_limit(), profile.guidance_norm[profile.prompts // 2]
    uncorrected = look_ahead(observation)
    outcomes = [Outcome() for _ in observation.rows]
    left = torch.arange(len(outcomes))
    for radius in RADII:
        here = observation.select(left)
        correction = embedding_descent(here, target, radius)
        candidate = here.with_condition(correction.condition)
        estimate = look_ahead(candidate)
        across = agreement(candidate, own=estimate)
        stayed = correlation(estimate, uncorrected[left])
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
        "agreement_with_unsteered": stayed,
    }
