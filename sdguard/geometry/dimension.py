"""The local intrinsic dimension of the learned density at a point."""

from torch import Tensor

from sdguard.geometry.hessian import Score
from sdguard.geometry.rowwise import norm
from sdguard.observation import NoiseLevel


def flipd(score: Score, trace_of_hessian: Tensor, y: Tensor, level: NoiseLevel) -> Tensor:
    """Local intrinsic dimension ``d + s**2 (tr H + ||score||**2)`` at ``y = a x_0``, ``[B]`` (FLIPD, Kamkari et al. 2024, 2406.03537).

    The estimate of the dimension at the clean point ``x_0``, for a noise level small against the manifold's own scales; no noise is
    added to ``y``. In noise predictions it reads ``d - s tr(d eps / dx) + ||eps||**2``. Cost: 1 evaluation beside the trace's.
    """
    return y[0].numel() + level.s**2 * (trace_of_hessian + norm(score(y)).square())
