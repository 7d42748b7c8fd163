"""Persistence: does the picture that the first call promises stay?"""

import torch.nn.functional as F
from torch import Tensor

from sdguard.geometry.reference import LOG_SNR, estimate_ahead, estimate_at_start
from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def detail(picture: Tensor) -> Tensor:
    """Norm of what the means over 2 x 2 pixels leave out of each picture, ``[B]``."""
    means = F.avg_pool2d(picture, 2, ceil_mode=True, count_include_pad=False)
    return norm(picture - means.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., : picture.shape[-2], : picture.shape[-1]])


def persistence(observation: Observation, log_snr: float = LOG_SNR) -> Tensor:
    """``-log(||x0hat(later) - x0hat(first)|| / detail)``, ``[B]``, in nats: of the conditional branch, by one DDIM step to ``log_snr``.

    How much of the picture had still to be filled in, for the `detail` it has in the end. A simple picture is settled early because there
    is little in it; a memorized one is settled in spite of its detail. In the spirit of 2509.25705, which reads the norm of the early
    estimate. Cost: 1 evaluation. Blind to a memorized picture that is itself a flat shape on a flat ground.
    """
    later = estimate_ahead(observation, log_snr)
    change = norm(later - estimate_at_start(observation))
    return -(change.clamp_min(1e-12) / detail(later).clamp_min(1e-12)).log()


PERSISTENCE = Signal("persistence", persistence, cost=1)
