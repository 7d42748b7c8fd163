"""Verification: is the corrected sample memorized after all, and does it still show what was asked for?

Nothing here reads the signal that methods descend on. The short rollouts ask whether the corrected condition and noise lead to *any*
memorized picture, and the denoiser is asked whether the picture they lead to is the prompt's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sdguard.correction import Correction, corrected, movement
from sdguard.decision.profile import quantile
from sdguard.geometry.alignment import alignment
from sdguard.geometry.reference import reference_end
from sdguard.geometry.rollout import independent_start, short_rollout
from sdguard.observation import Observation
from sdguard.signals.agreement import correlation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.method import SteeringInput

#: share of ordinary prompts that pull harder than what counts as an emptied prompt.
PULLING = 0.99


@dataclass(frozen=True)
class Verification:
    """What was found of one corrected image.

    Attributes:
        agreement: of its short rollouts from its own noise and an independent one.
        agreement_with_uncorrected: of its short rollout with the uncorrected one from independent noise.
        alignment: how much of the picture ahead the prompt's paraphrase explains; nan where none is known.
        moved: how far text embeddings, noise and prediction were moved (see `movement`).
        memorized: whether the short rollouts agree more than 99% of ordinary prompts' do.
        aligned: whether the alignment is that of 99% of ordinary prompts, or, where it is unknown, whether the prompt still pulls.
    """

    agreement: float
    agreement_with_uncorrected: float
    alignment: float
    moved: dict[str, float]
    memorized: bool
    aligned: bool

    @property
    def passed(self) -> bool:
        """Not memorized and still on the prompt."""
        return self.aligned and not self.memorized

    def entry(self) -> dict[str, Any]:
        """For the report; what is not known is None."""
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()}


def verify(flagged: SteeringInput, corrections: Sequence[Correction]) -> list[Verification]:
    """Verify one correction for each flagged image, at the guard's own reference call.

    Pictures are drawn by the conditional branch alone, whatever the caller's guidance, and held against what those of ordinary prompts are
    (`sdguard.geometry.reference.reference_end`); where a correction takes guidance's place they are drawn by it, under the caller's.
    Cost for K short rollout steps: that of applying the correction; ``K - 1`` for the corrected rollout, K for the other, ``K - 1`` once an
    image for the uncorrected one; 2 for the alignment. Under a rule twice as many, and what it takes.
    """
    observation, profile = flagged.observation, flagged.profile
    candidate = corrected(observation, corrections)
    own, other = ends(candidate)
    across = correlation(own, other).tolist()
    stayed = correlation(own, reference_end(observation, 0)).tolist()
    aligned = alignments(flagged, own)
    pulls = guidance_norm(candidate).tolist()
    limit = profile.agreement_limit()
    weakest = -quantile([-value for value in reversed(profile.values["guidance_norm"])], PULLING)
    return [
        Verification(
            agreement=a,
            agreement_with_uncorrected=s,
            alignment=t,
            moved=moved,
            memorized=max(a, s) > limit,
            aligned=pull >= weakest if math.isnan(t) else t >= profile.alignment_limit(),
        )
        for a, s, t, pull, moved in zip(across, stayed, aligned, pulls, movement(observation, candidate), strict=True)
    ]


def ends(candidate: Observation) -> tuple[torch.Tensor, torch.Tensor]:
    """What corrected rows lead to from their own noise and from an independent one, ``[B, C, H, W]`` each."""
    if any(candidate.rules):
        return short_rollout(candidate), short_rollout(candidate, independent_start(candidate))
    return reference_end(candidate), reference_end(candidate, 0)


def alignments(flagged: SteeringInput, pictures: torch.Tensor) -> list[float]:
    """The alignment of each picture with its prompt's paraphrase, nan where there is none. Cost: 2 evaluations where there is."""
    rows = [row for row, paraphrase in enumerate(flagged.paraphrases) if paraphrase]
    found = [math.nan] * len(flagged.paraphrases)
    if rows:
        condition = flagged.encoder([paraphrase.text for paraphrase in flagged.paraphrases if paraphrase])
        here: Observation = flagged.observation.select(torch.tensor(rows))
        for row, value in zip(rows, alignment(here, pictures[rows], condition).tolist(), strict=True):
            found[row] = value
    return found
