"""Bottleneck shift: how far the text moves the features in the middle of the U-Net."""

from torch import Tensor

from sdguard.denoiser.capture import bottleneck, captured
from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal, UnsupportedModel


def bottleneck_shift(observation: Observation) -> Tensor:
    """Distance of the mid-block's outputs under the prompt and without it, ``[B]``, in feature units.

    Where the guidance norm sees what the text does to the output, this sees what it does to the network's summary of the picture. Cost: 2
    evaluations, since both branches are evaluated again with the features captured: a hook inside the run's own call would cost none, but
    breaks compiled denoisers. Blind where the text works through the outer blocks alone.

    Raises:
        UnsupportedModel: the denoiser has no mid-block (transformers have none).
    """
    block = bottleneck(observation.denoiser)
    if block is None:
        raise UnsupportedModel("The denoiser has no mid-block.")
    with captured([block]) as found:
        observation.both_branches(observation.x, observation.timestep)
    null, text = found[block].float().chunk(2)
    return norm(text - null)


BOTTLENECK_SHIFT = Signal("bottleneck_shift", bottleneck_shift, cost=2)
