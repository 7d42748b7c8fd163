"""What a steering method is given: flagged images, what is known of their prompts, and what ordinary prompts look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sdguard.correction import Correction
from sdguard.decision.profile import Profile, quantile
from sdguard.denoiser.text_encoding import Encoder
from sdguard.observation import Observation
from sdguard.steering.wording import Rewriter, Wording, depiction, wordings

#: a corrected prompt may pull as hard as this share of ordinary prompts do.
TARGET = 0.95


@dataclass(frozen=True)
class SteeringInput:
    """Flagged images at their first denoiser call.

    Attributes:
        observation: of these rows alone, at the guard's own reference call, where ordinary prompts were read too.
        own_noise: whether that call is the run's own first one, so that another noise found there is one for the run.
        prompts: their prompts; None where only embeddings are known.
        encoder: the pipeline's own text encoder.
        profile: what ordinary prompts look like.
        wordings: the prompt put differently, what keeps most of it first; none where it is not known.
    """

    observation: Observation
    prompts: list[str | None]
    encoder: Encoder
    profile: Profile
    wordings: list[list[Wording]]
    own_noise: bool = True

    @classmethod
    def of(
        cls, observation: Observation, prompts: list[str | None], encoder: Encoder, profile: Profile, rewriter: Rewriter | None = None
    ) -> SteeringInput:
        """Flagged images at their run's first call."""
        here, observation = observation, observation.at_reference.differentiable()
        own_noise = here.x.shape == observation.x.shape and torch.equal(here.x, observation.x) and here.timestep == observation.timestep
        kind = depiction(profile.words)
        offered = [wordings(prompt or "", kind, rewriter) for prompt in prompts]
        return cls(observation, prompts, encoder, profile, offered, own_noise)

    @property
    def target(self) -> float:
        """The guidance norm that steering aims to come under."""
        return quantile(self.profile.values["guidance_norm"], TARGET)

    def select(self, rows: Sequence[int]) -> SteeringInput:
        """Some of the images."""
        return replace(
            self,
            observation=self.observation.select(torch.tensor(rows)),
            prompts=[self.prompts[row] for row in rows],
            wordings=[self.wordings[row] for row in rows],
        )


#: gives each image its correction, or None where the method does not apply.
Correct = Callable[[SteeringInput], list[Correction | None]]


@dataclass(frozen=True)
class Method:
    """A steering method; one file each in this folder.

    Attributes:
        name: the one it has in configurations, reports and tables.
        correct: gives each image its correction, or None where the method does not apply.
        cost: evaluations an image it takes at most to find the correction.
        step_cost: evaluations an image it takes at every denoising step thereafter.
        stronger: what it does where that does not pass verification, one after the other.
    """

    name: str
    correct: Correct
    cost: int
    step_cost: int = 0
    stronger: tuple[Correct, ...] = ()
