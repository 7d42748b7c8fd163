"""The guidance norm: how hard the text pulls at one denoising step."""

from torch import Tensor

from sdguard.observation import Prediction
from sdguard.signals.signal import Signal


def guidance_norm(prediction: Prediction) -> Tensor:
    """``||eps_c - eps_u||_2`` of each image, ``[B]``, in noise-prediction units.

    Wen et al., *Detecting, Explaining, and Mitigating Memorization in Diffusion Models*, ICLR 2024 (2407.21720), eq. 4, per image
    and not over the batch, and in noise-prediction space whatever the network predicts. Cost: none, the run pays for both
    branches anyway. Blind to templates whose free background dilutes the norm, and without a prompt.
    """
    return prediction.guidance_norm


GUIDANCE_NORM = Signal("guidance_norm", guidance_norm, cost=0)
