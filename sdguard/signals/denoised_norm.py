"""The norm of the denoised estimate: a memorized prompt knows its picture too early."""

from torch import Tensor

from sdguard.geometry.rowwise import norm
from sdguard.observation import Prediction, denoised
from sdguard.signals.signal import Signal


def denoised_norm(prediction: Prediction) -> Tensor:
    """``||x0hat||_2`` of the guided prediction of each image, ``[B]``, in latent units.

    After 2509.25705: memorized prompts overestimate ``x_0`` early. Cost: none. Blind to a memorized picture of little contrast; at
    low noise every sample has the norm of its own picture.
    """
    eps = prediction.guided(prediction.eps_c, prediction.eps_u)
    return norm(denoised(prediction.x, eps, prediction.level))


DENOISED_NORM = Signal("denoised_norm", denoised_norm, cost=0)
