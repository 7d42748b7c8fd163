"""Low-noise alignment: does the text's pull point along the unconditional prediction when pure noise is taken for a clean picture?"""

import torch
from torch import Tensor

from sdguard.observation import Observation
from sdguard.signals.signal import Signal

TIMESTEP = 41.0


def low_noise_alignment(observation: Observation) -> Tensor:
    """``cos(eps_c - eps_u, eps_u)`` of the observation's ``x_T`` at timestep 41, ``[B]``, in [-1, 1].

    2601.20642. Cost: 2 evaluations. Its sign is not the same on every model: take it from calibration, not from the paper.
    """
    eps_c, eps_u = observation.both_branches(observation.x, TIMESTEP)
    return torch.cosine_similarity((eps_c - eps_u).flatten(1), eps_u.flatten(1), dim=1)


LOW_NOISE_ALIGNMENT = Signal("low_noise_alignment", low_noise_alignment, cost=2)
