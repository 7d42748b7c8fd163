"""Agreement of the denoised estimates: does the text promise the same picture from another noise?"""

from torch import Tensor

from sdguard.geometry.reference import LOG_SNR, estimate_ahead, estimate_at_start
from sdguard.observation import Observation
from sdguard.signals.agreement import correlation
from sdguard.signals.signal import Signal


def estimate_agreement(observation: Observation) -> Tensor:
    """Correlation of the conditional denoised estimates from the image's own noise and an independent one, ``[B]``, in [-1, 1].

    A memorized text maps all of noise space to one picture (the collapsed volume element of Feiszli 2017, 1705.09303), and says so before
    the first step. Channels are centred, so that a plain ground, which ordinary pictures share, does not count. Cost: 1 evaluation.
    Blind to a text that holds several pictures and sends the two noises to different ones.
    """
    return correlation(estimate_at_start(observation), estimate_at_start(observation, draw=0))


def estimate_agreement_ahead(observation: Observation, log_snr: float = LOG_SNR) -> Tensor:
    """The same after one DDIM step of the conditional branch to ``log_snr``, ``[B]``: of pictures that are drawn rather than promised.

    Cost: 3 evaluations; 1 where `estimate_agreement` and `persistence` have been read. Blind as `estimate_agreement` is.
    """
    return correlation(estimate_ahead(observation, log_snr), estimate_ahead(observation, log_snr, draw=0))


ESTIMATE_AGREEMENT = Signal("estimate_agreement", estimate_agreement, cost=1)
ESTIMATE_AGREEMENT_AHEAD = Signal("estimate_agreement_ahead", estimate_agreement_ahead, cost=3)
