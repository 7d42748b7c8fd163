"""The latent update norm: how far the next step would go."""

from torch import Tensor

from sdguard.geometry.rollout import trajectory
from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def update_norm(observation: Observation) -> Tensor:
    """``||x_next - x_t||_2`` of the short rollout's first step, ``[B]``, in latent units.

    After 2605.22050, which takes the run's own step; the DDIM step of the short rollout is known before any step is taken and is the
    same whatever the scheduler. Cost: none. Blind where the picture is near the mean of all pictures.
    """
    return norm(next(trajectory(observation)).taken() - observation.x)


UPDATE_NORM = Signal("update_norm", update_norm, cost=0)
