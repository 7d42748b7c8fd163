"""Does a picture show what a prompt says? Asked of the denoiser itself."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sdguard.geometry.rowwise import norm
from sdguard.noise import independent_noise
from sdguard.observation import Observation

#: noise level at which the denoiser is asked.
TIMESTEP = 301.0


def alignment(observation: Observation, picture: Tensor, condition: Tensor) -> Tensor:
    """How much of the denoiser's error on each picture's noise its text explains, ``[B]``, at most 1, negative where it misleads.

    ``1 - ||n - eps_c||**2 / ||n - eps_u||**2`` for ``picture`` (denoised latents ``[B, C, H, W]``) under noise n, a function of the noise
    that the row starts from: what the text adds to the picture's log-likelihood, at one noise level (the diffusion classifier of Li et al.
    2023, 2303.16203).
    ``condition`` must not itself be memorized: a memorized text explains its own picture and nothing else. Cost: 2 evaluations.
    """
    level, noise = observation.level_at(TIMESTEP), independent_noise(observation.x, 2)
    eps_c, eps_u = replace(observation, condition=condition).both_branches(level.a * picture + level.s * noise, TIMESTEP)
    return 1 - (norm(noise - eps_c) / norm(noise - eps_u).clamp_min(1e-12)).square()
