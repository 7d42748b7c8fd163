"""Bottleneck spread: how widely the features in the middle of the U-Net vary."""

import math

from torch import Tensor

from sdguard.denoiser.capture import bottleneck, captured
from sdguard.geometry.rollout import ROLLOUT_STEPS, trajectory
from sdguard.observation import Observation
from sdguard.signals.signal import Signal, UnsupportedModel


def bottleneck_spread(observation: Observation) -> Tensor:
    """Standard deviation of the mid-block's output in the second half of the short rollout, ``[B]``, in feature units.

    After a reading note on an ICLR 2026 paper (no released code was seen): read at a middle noise level, without using the prompt's
    contrast. Cost: 7 evaluations. Blind where a memorized picture is as rich as any other; its sign is to be checked per model.

    Raises:
        UnsupportedModel: the denoiser has no mid-block (transformers have none).
    """
    middle = bottleneck(observation.denoiser)
    if middle is None:
        raise UnsupportedModel("The denoiser has no mid-block.")
    step = next(step for step in trajectory(observation) if step.timestep <= observation.timestep / 2 + 1)
    observation.count_nfe(1)
    with captured([middle]) as found:
        observation.conditional(step.x, step.timestep)
    return found[middle].float().flatten(1).std(dim=1)


#: steps of the short rollout, the first free, up to half of the noise range.
STEPS = math.ceil(ROLLOUT_STEPS / 2)
BOTTLENECK_SPREAD = Signal("bottleneck_spread", bottleneck_spread, cost=2 * STEPS + 1)
