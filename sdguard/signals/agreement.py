"""Agreement between noises: does the condition give the same picture wherever it starts?"""

from torch import Tensor

from sdguard.geometry.rollout import ROLLOUT_STEPS, rollout_end
from sdguard.geometry.rowwise import correlation
from sdguard.observation import Observation
from sdguard.signals.signal import Signal


def agreement(observation: Observation) -> Tensor:
    """Correlation of the image's short rollout with one from independent noise under the same condition, ``[B]``, in [-1, 1].

    A memorized condition maps all of noise space to one picture (the collapsed volume element of Feiszli 2017, 1705.09303; LID
    near 0 in Ross et al. 2024), so two starts agree. It asks "is this *any* memorized picture" and knows no training data.
    Cost: ``4 K - 2`` evaluations for K short rollout steps. Blind to a condition that copies for this noise and not for the other.
    """
    return correlation(rollout_end(observation), rollout_end(observation, independent=True))


AGREEMENT = Signal("agreement", agreement, cost=4 * ROLLOUT_STEPS - 2)
