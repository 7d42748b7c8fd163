"""A short deterministic look-ahead: where would this sample end, before a single step of the run is taken?"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sdguard.observation import Observation, denoised

LOOK_AHEAD_STEPS = 5


def look_ahead(observation: Observation, noise: Tensor | None = None, steps: int = LOOK_AHEAD_STEPS) -> Tensor:
    """The denoised estimate after ``steps`` guided DDIM steps (Song et al. 2021, eq. 12 with sigma = 0), ``[B, C, H, W]``.

    Starts at the observation's own ``x_t`` and predictions, or at ``noise`` in their place. Cost: ``2 (steps - 1)`` evaluations
    per image from its own point, ``2 steps`` from other noise.
    """
    timesteps = torch.linspace(observation.timestep, 0, steps + 1)[:-1].round().tolist()
    x = observation.x if noise is None else noise
    eps_c, eps_u = (observation.eps_c, observation.eps_u) if noise is None else observation.replay(x, observation.timestep)
    level = observation.level
    x0 = x
    for following in [*timesteps[1:], None]:
        eps = eps_u + observation.guidance_scale * (eps_c - eps_u)
        x0 = denoised(x, eps, level)
        if following is not None:
            level = observation.level_at(following)
            x = level.a * x0 + level.s * eps
            eps_c, eps_u = observation.replay(x, following)
    return x0


def independent_noise(x: Tensor) -> Tensor:
    """Gaussian noise like ``x``, independent of it yet a fixed function of each row alone, whatever its neighbours are."""
    rows = []
    for row in x.cpu():
        digest = hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=7).digest()
        rows.append(torch.randn(row.shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big"))))
    return torch.stack(rows).to(x)
