"""Bottleneck shift: how far the text moves the features in the middle of the U-Net."""

from torch import Tensor

from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal, UnsupportedModel


def bottleneck_shift(observation: Observation) -> Tensor:
    """Distance of the mid-block's outputs under the prompt and without it, ``[B]``, in feature units.

    Captured in the run's own first call. Where the guidance norm sees what the text does to the output, this sees what it does to the
    network's summary of the picture. Cost: none. Blind where the text works through the outer blocks alone.

    Raises:
        UnsupportedModel: nothing was captured: the denoiser has no mid-block (transformers have none), or it is not the first call.
    """
    if observation.middle is None:
        raise UnsupportedModel("No features of a mid-block were captured.")
    null, text = observation.middle.float().unbind(dim=1)
    return norm(text - null)


BOTTLENECK_SHIFT = Signal("bottleneck_shift", bottleneck_shift, cost=0)
