"""The ladder: steering methods in order of how far they leave the prompt, each verified by a signal it did not optimise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.attribution import Encode
from sdguard.lookahead import independent_noise, look_ahead
from sdguard.observation import Observation
from sdguard.profile import Profile, quantile
from sdguard.signals.agreement import correlation
from sdguard.steering.correction import Correction
from sdguard.steering.embedding import embedding_descent
from sdguard.steering.rewording import Wording, reword, rewordings

#: a corrected prompt may pull as hard as this share of ordinary prompts do; asking for less drops words that need not go.
TARGET = 0.9
#: wordings that are tried, before the embedding rungs.
WORDINGS = 2
#: trust-region radii of the embedding rungs, as shares of each token's distance from the empty prompt's.
RADII = (0.5, 0.8, 1.0)


@dataclass
class Outcome:
    """What the ladder did for one row; ``condition`` is None if no rung passed verification."""

    agreement: float = float("nan")
    condition: Tensor | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For the report: the attempt that passed, if any, and every attempt."""
        return {"passed": self.attempts[-1] if self.condition is not None else None, "attempts": self.attempts}


def climb(observation: Observation, profile: Profile, prompts: list[str | None], encode: Encode) -> list[Outcome]:
    """Try the rungs on every row until one passes verification; ``prompts`` are the rows' own, None where only embeddings are known.

    With A the row's own noise and B an independent one, a corrected condition passes when its look-aheads from A and B
    agree no more than those of ordinary prompts do (it leads to no memorized picture, old or new), and when its look-ahead
    from A agrees no more than that with the uncorrected one from B (it left the picture that every noise led to).
    Cost per image: 10 for the uncorrected look-ahead; what the rungs cost; 1 and 18 for the verification of each.
    """
    limit, noise = profile.agreement_limit(), independent_noise(observation.x)
    uncorrected = look_ahead(observation, noise)
    outcomes = [Outcome() for _ in observation.rows]
    left = set(range(len(outcomes)))
    for rows, correction in rungs(observation, profile, prompts, encode, left):
        picked = torch.tensor(rows)
        candidate = observation.select(picked).with_condition(correction.condition)
        own, other = look_ahead(candidate), look_ahead(candidate, noise[picked])
        across, stayed = correlation(own, other).tolist(), correlation(own, uncorrected[picked]).tolist()
        for i, row in enumerate(rows):
            outcome = outcomes[row]
            outcome.attempts.append({**correction.how[i], "agreement": across[i], "agreement_with_uncorrected": stayed[i]})
            outcome.agreement = across[i]
            if across[i] <= limit and stayed[i] <= limit:
                outcome.condition = correction.condition[i]
                left.discard(row)
        if not left:
            break
    return outcomes


def rungs(
    observation: Observation, profile: Profile, prompts: list[str | None], encode: Encode, left: set[int]
) -> Iterator[tuple[list[int], Correction]]:
    """Each rung's correction for the rows it applies to, of those still ``left`` when its turn comes."""
    target = quantile(profile.values["guidance_norm"], TARGET)
    wordings: list[list[Wording]] = [
        rewordings(observation.select(torch.tensor([row])), prompt, encode, profile.words, target) if prompt else []
        for row, prompt in enumerate(prompts)
    ]
    for turn in range(WORDINGS):
        if rows := [row for row in sorted(left) if turn < len(wordings[row])]:
            yield rows, reword([wordings[row][turn] for row in rows], encode)
    for radius in RADII:
        rows = sorted(left)
        yield rows, embedding_descent(observation.select(torch.tensor(rows)), target, radius)
