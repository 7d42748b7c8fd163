"""Verification: is the corrected sample memorized after all, and does it still show what was asked for?

Nothing here reads the signal that methods descend on, and nothing the caller has set. It is asked of a candidate before the run
(`verify`), and of the run itself by `recurrence`: pictures that come back from noise are ones that the denoiser knows by heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdguard.correction import Correction, corrected, movement
from sdguard.decision.profile import quantile
from sdguard.geometry.alignment import alignment
from sdguard.geometry.reference import NOISED_LOG_SNR, recurrence, reference_end, timestep_at
from sdguard.geometry.rollout import rollout_end
from sdguard.geometry.rowwise import correlation
from sdguard.observation import Observation
from sdguard.signals.guidance_detail import guidance_detail
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.method import SteeringInput
from sdguard.steering.wording import depiction, subject

#: share of ordinary prompts that pull harder than the weakest of them, and the part of that under which a prompt counts as emptied.
PULLING, EMPTIED = 0.99, 0.5


@dataclass(frozen=True)
class Verification:
    """What was found of one corrected image; what was not asked any more is nan.

    Attributes:
        detail: the guidance detail under the corrected condition.
        moved: how far text embeddings, noise and prediction were moved (see `movement`).
        memorized: whether detail, recurrence or agreement are over what ordinary prompts have.
        recurrence: how like itself the picture ahead comes back from noise.
        agreement_with_uncorrected: of the picture ahead with what the uncorrected text draws from independent noise.
        alignment: how much of the picture ahead the prompt's subject explains; nan where no text is known.
        aligned: whether the alignment is that of 99% of ordinary prompts, or, where it is unknown, whether the prompt still pulls.
    """

    detail: float
    moved: dict[str, float]
    memorized: bool
    recurrence: float = math.nan
    agreement_with_uncorrected: float = math.nan
    alignment: float = math.nan
    aligned: bool = False

    @property
    def passed(self) -> bool:
        """Not memorized and still on the prompt."""
        return self.aligned and not self.memorized

    @property
    def failed(self) -> str | None:
        """The question that it did not pass, if any."""
        if self.memorized:
            return "detail" if math.isnan(self.recurrence) and math.isnan(self.agreement_with_uncorrected) else "recurrence or agreement"
        return None if self.aligned else "alignment"

    def entry(self) -> dict[str, Any]:
        """For the report; what is not known is None."""
        known = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()}
        return {**known, "aligned": None if self.memorized else self.aligned, "failed": self.failed}


def verify(flagged: SteeringInput, corrections: Sequence[Correction]) -> list[Verification]:
    """Verify one correction for each flagged image, at the guard's own reference call; what fails one question is asked no other.

    Pictures are drawn by the conditional branch alone, whatever the caller's guidance; where a correction takes guidance's place they are
    drawn by it, under the caller's. Cost: that of applying the correction; for K short rollout steps ``K - 1`` for the corrected rollout,
    twice as many under a rule and what it takes, ``K - 1`` once an image for the uncorrected one, 1 for the recurrence, 2 for the
    alignment.
    """
    candidate = corrected(flagged.observation, corrections)
    limit = flagged.profile.detail_limit()
    described = zip(guidance_detail(candidate).tolist(), movement(flagged.observation, candidate), strict=True)
    found = [Verification(detail, moved, memorized=not detail <= limit) for detail, moved in described]
    return asked(flagged, candidate, asked(flagged, candidate, found, drawn_ahead), kept)


#: asks a question of candidates: (flagged images, their candidates, what has been found of them) -> the same with the answer.
Question = Callable[[SteeringInput, Observation, list[Verification]], list[Verification]]


def asked(flagged: SteeringInput, candidate: Observation, found: list[Verification], question: Question) -> list[Verification]:
    """What has been found, with the answer to ``question`` for those that do not count as memorized yet."""
    rows = [row for row, verification in enumerate(found) if not verification.memorized]
    if not rows:
        return found
    answers = iter(question(flagged.select(rows), candidate.select(torch.tensor(rows)), [found[row] for row in rows]))
    return [verification if verification.memorized else next(answers) for verification in found]


def drawn_ahead(flagged: SteeringInput, candidate: Observation, found: list[Verification]) -> list[Verification]:
    """Is the picture ahead a memorized one, the avoided one or any other?"""
    observation, profile = flagged.observation, flagged.profile
    ahead = picture_ahead(candidate)
    asked_there = replace(observation, condition=candidate.condition)
    returned = recurrence(asked_there, ahead, timestep_at(observation, NOISED_LOG_SNR)).tolist()
    stayed = correlation(ahead, reference_end(observation, 0)).tolist()

    def answered(verification: Verification, recurrence: float, agreement: float) -> Verification:
        memorized = not (recurrence <= profile.recurrence_limit() and agreement <= profile.agreement_limit())
        return replace(verification, recurrence=recurrence, agreement_with_uncorrected=agreement, memorized=memorized)

    return list(map(answered, found, returned, stayed))


def kept(flagged: SteeringInput, candidate: Observation, found: list[Verification]) -> list[Verification]:
    """Does the picture ahead still show what the prompt says? Where no text is known: does the condition still pull?"""
    weakest = -EMPTIED * quantile([-value for value in reversed(flagged.profile.values["guidance_norm"])], PULLING)
    pulls = guidance_norm(candidate).tolist()
    limit = flagged.profile.alignment_limit()
    aligned = alignments(flagged, picture_ahead(candidate))
    return [
        replace(verification, alignment=t, aligned=t >= limit if has_text(prompt) else pull >= weakest)
        for verification, t, pull, prompt in zip(found, aligned, pulls, flagged.prompts, strict=True)
    ]


def has_text(prompt: str | None) -> bool:
    """Whether there are words to ask a picture for."""
    return bool(prompt and prompt.split())


def picture_ahead(candidate: Observation) -> Tensor:
    """What corrected rows lead to from their own noise, ``[B, C, H, W]``; once it is known it costs nothing."""
    return rollout_end(candidate) if any(candidate.rules) else reference_end(candidate)


def alignments(flagged: SteeringInput, pictures: Tensor) -> list[float]:
    """The alignment of each picture with the subject of its prompt, nan where no prompt is known. Cost: 2 evaluations where one is.

    The subject is asked for as any picture of it would be, never in the words of a cure.
    """
    rows = [row for row, prompt in enumerate(flagged.prompts) if has_text(prompt)]
    values = [math.nan] * len(flagged.prompts)
    if rows:
        kind = depiction(flagged.profile.words)
        condition = flagged.encoder([subject(str(flagged.prompts[row]), kind) for row in rows])
        here: Observation = flagged.observation.select(torch.tensor(rows))
        for row, value in zip(rows, alignment(here, pictures[rows], condition).tolist(), strict=True):
            values[row] = value
    return values
