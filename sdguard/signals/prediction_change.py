"""The consecutive-step change: how much the conditional prediction turns from one step to the next."""

from torch import Tensor

from sdguard.geometry.rollout import grid, trajectory
from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def prediction_change(observation: Observation) -> Tensor:
    """``||eps_c(x_next) - eps_c(x_t)||_2**2`` over the short rollout's first step, ``[B]``, in squared noise-prediction units.

    Cost: 1 evaluation. Blind where both steps are equally sure of one picture.
    """
    x, following = next(trajectory(observation)).taken(), grid(observation)[1]
    observation.count_nfe(1)
    return (observation.conditional(x, following) - observation.eps_c).flatten(1).square().sum(dim=1)


PREDICTION_CHANGE = Signal("prediction_change", prediction_change, cost=1)
