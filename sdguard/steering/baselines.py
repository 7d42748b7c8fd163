"""The literature's baselines, for comparison only: random tokens, random numbers, embedding noise (Somepalli et al. 2023, 2305.20086)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sdguard.correction import Correction
from sdguard.noise import independent_noise
from sdguard.steering.method import Method, SteeringInput

#: words or numbers put in, and the noise's standard deviation as a share of the embedding's.
INSERTED, NOISE = 4, 0.1


def inserted(flagged: SteeringInput, draw: Callable[[np.random.Generator], str]) -> list[Correction | None]:
    """The prompt with `INSERTED` drawn words at random places, a fixed function of prompt and noise."""
    corrections: list[Correction | None] = []
    for prompt, x in zip(flagged.prompts, flagged.observation.x, strict=True):
        if prompt is None:
            corrections.append(None)
            continue
        rng = np.random.default_rng(abs(int(x.double().sum().item() * 1e6)))
        words = prompt.split()
        for _ in range(INSERTED):
            words.insert(int(rng.integers(len(words) + 1)), draw(rng))
        corrections.append(Correction({"wording": " ".join(words)}, condition=flagged.encoder([" ".join(words)])[0]))
    return corrections


def random_tokens(flagged: SteeringInput) -> list[Correction | None]:
    """Random words of ordinary prompts put in. Cost: the text encoder's alone."""
    vocabulary = sorted(flagged.profile.words)
    return inserted(flagged, lambda rng: str(rng.choice(vocabulary)))


def random_numbers(flagged: SteeringInput) -> list[Correction | None]:
    """Random numbers put in. Cost: the text encoder's alone."""
    return inserted(flagged, lambda rng: str(rng.integers(1000)))


def embedding_noise(flagged: SteeringInput) -> list[Correction | None]:
    """Gaussian noise on the prompt embedding. Cost: none."""
    condition = flagged.observation.condition
    noise = independent_noise(flagged.observation.x, 20, condition.shape[1:]) * condition.float().std(dim=(1, 2), keepdim=True)
    return [Correction({}, condition=row) for row in condition + (NOISE * noise).to(condition)]


RANDOM_TOKENS = Method("random tokens", random_tokens, cost=0)
RANDOM_NUMBERS = Method("random numbers", random_numbers, cost=0)
EMBEDDING_NOISE = Method("embedding noise", embedding_noise, cost=0)
