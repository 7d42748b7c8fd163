"""Agreement of the denoised estimates: does the text promise the same picture from another noise?"""

import itertools

import torch
from torch import Tensor

from sdguard.geometry.reference import LOG_SNR, estimate_ahead, estimate_at_start
from sdguard.geometry.rowwise import correlation
from sdguard.observation import Observation
from sdguard.signals.signal import Signal

#: noises whose estimates are compared, the image's own among them.
NOISES = 3


def estimate_agreement(observation: Observation) -> Tensor:
    """Highest correlation among the conditional denoised estimates from `NOISES` noises, ``[B]``, in [-1, 1].

    A memorized text maps all of noise space to one picture (the collapsed volume element of Feiszli 2017, 1705.09303), and says so before
    the first step; one that holds two pictures sends two of three noises to the same. Channels are centred, so that a plain ground, which
    ordinary pictures share, does not count. Cost: 2 evaluations. Blind to a text that holds more pictures than there are noises.
    """
    estimates = [estimate_at_start(observation, draw) for draw in (None, *range(NOISES - 1))]
    return torch.stack([correlation(*pair) for pair in itertools.combinations(estimates, 2)]).amax(dim=0)


def estimate_agreement_ahead(observation: Observation, log_snr: float = LOG_SNR) -> Tensor:
    """Correlation of two estimates after one DDIM step of the conditional branch to ``log_snr``, ``[B]``: of pictures drawn, not promised.

    Cost: 3 evaluations; 1 where `estimate_agreement` and `persistence` have been read. Blind to a text that holds several pictures and
    sends the two noises to different ones.
    """
    return correlation(estimate_ahead(observation, log_snr), estimate_ahead(observation, log_snr, draw=0))


ESTIMATE_AGREEMENT = Signal("estimate_agreement", estimate_agreement, cost=NOISES - 1)
ESTIMATE_AGREEMENT_AHEAD = Signal("estimate_agreement_ahead", estimate_agreement_ahead, cost=3)
