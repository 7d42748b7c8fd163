"""What a steering method is given: flagged images, what is known of their prompts, and what ordinary prompts look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sdguard.correction import Correction
from sdguard.decision.profile import Profile, quantile
from sdguard.denoiser.text_encoding import Encoder
from sdguard.observation import Observation
from sdguard.steering.paraphrase import Paraphrase, Rewriter, candidates, first_ordinary

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
        paraphrases: the prompt as ordinary prompts would put it; None where none was found.
    """

    observation: Observation
    prompts: list[str | None]
    encoder: Encoder
    profile: Profile
    paraphrases: list[Paraphrase | None]
    own_noise: bool = True

    @classmethod
    def of(
        cls, observation: Observation, prompts: list[str | None], encoder: Encoder, profile: Profile, rewriter: Rewriter | None = None
    ) -> SteeringInput:
        """Flagged images at their run's first call, their paraphrases looked for. Cost: that of `candidates` and `first_ordinary`."""
        here, observation = observation, observation.at_reference.differentiable()
        own_noise = here.x.shape == observation.x.shape and torch.equal(here.x, observation.x) and here.timestep == observation.timestep
        target = quantile(profile.values["guidance_norm"], TARGET)
        frequency = profile.frequency
        rows = [observation.select(torch.tensor([row])) for row in range(len(prompts))]
        offered = [
            candidates(row, prompt, encoder, frequency, rewriter) if prompt else [] for row, prompt in zip(rows, prompts, strict=True)
        ]
        return cls(observation, prompts, encoder, profile, first_ordinary(observation, offered, encoder, target), own_noise)

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
            paraphrases=[self.paraphrases[row] for row in rows],
        )


@dataclass(frozen=True)
class Method:
    """A steering method; one file each in this folder.

    Attributes:
        name: the one it has in configurations, reports and tables.
        correct: gives each image its correction, or None where the method does not apply.
        cost: evaluations an image it takes at most to find the correction.
        step_cost: evaluations an image it takes at every denoising step thereafter.
    """

    name: str
    correct: Callable[[SteeringInput], list[Correction | None]]
    cost: int
    step_cost: int = 0
