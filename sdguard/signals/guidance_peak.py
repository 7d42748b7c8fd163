"""The guidance norm where it is strongest: what is left of it when most of the picture is free."""

from torch import Tensor

from sdguard.observation import Observation
from sdguard.signals.signal import Signal

SHARE = 0.01


def guidance_peak(observation: Observation) -> Tensor:
    """Root energy of ``eps_c - eps_u`` in the top 1% of places of each image, ``[B]``, in noise-prediction units.

    For templates, whose memorized part the global norm dilutes over a free background (methods of Chen et al. 2025, 2504.18032, mask
    it by attention; this needs none). Cost: none. Blind, as the norm is, without a prompt.
    """
    energy = observation.difference.square().sum(dim=1).flatten(1)
    return energy.topk(max(1, round(SHARE * energy.shape[1])), dim=1).values.sum(dim=1).sqrt()


GUIDANCE_PEAK = Signal("guidance_peak", guidance_peak, cost=0)
