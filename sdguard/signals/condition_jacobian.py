"""The condition Jacobian: how fast the prediction moves as the prompt leaves its place for the empty one."""

from torch import Tensor

from sdguard.geometry.displacement import displaced
from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal

STEP = 0.1


def condition_jacobian(observation: Observation) -> Tensor:
    """``||[eps(e_p) - eps(e_p - h (e_p - e_0))] / h||_2`` for h = `STEP`, ``[B]``, in noise-prediction units.

    ``e_p``, ``e_0``: text embeddings of the prompt and of the empty one. Where the guidance norm takes the whole way between the two,
    this takes the slope at the prompt. Cost: 1 evaluation. Blind to a memorization that holds over a whole
    neighbourhood of the prompt, where the slope is small.
    """
    text, null = observation.condition.float(), observation.null_condition.float()
    nearer, share = displaced(text, -STEP * (text - null), observation.dtype)
    observation.count_nfe(1)
    return norm(observation.eps_c - observation.conditional(observation.x, observation.timestep, nearer)) / (STEP * share.flatten())


CONDITION_JACOBIAN = Signal("condition_jacobian", condition_jacobian, cost=1)
