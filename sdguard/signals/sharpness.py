"""Sharpness: the curvature that the text adds to log p_t."""

from torch import Tensor

from sdguard.geometry.hessian import branch_product, difference_product, extreme_eigenvalues
from sdguard.geometry.rollout import probe
from sdguard.geometry.rowwise import norm
from sdguard.observation import Observation
from sdguard.signals.signal import Signal

ITERATIONS = 4


def sharpness(observation: Observation) -> Tensor:
    """``||(H_c - H_u)(s_c - s_u)||_2**2``, ``[B]``: one Hessian product of the contrast along its own score.

    Jeon et al. 2024 (2412.04140), by a one-sided difference. Cost: 2 evaluations. Blind where the text changes the
    mean of what is drawn and not its spread.
    """
    known = -observation.difference / observation.level.s
    product = difference_product(observation.score("contrast"), observation.x, known, step=1 / 128, dtype=observation.dtype)
    return norm(product(known)).square()


def curvature(observation: Observation) -> Tensor:
    """How much the sharpest curvature of the conditional exceeds that of the unconditional density, ``[B]``.

    ``lambda_min(H_u) - lambda_min(H_c)``, by `ITERATIONS` Lanczos steps in each branch, one-sided differences. The form in which Jeon
    et al. 2024 (2412.04140) define sharpness, against its baseline. Cost: 8 evaluations.
    """

    start = probe(observation.x)
    lowest_u, _ = extreme_eigenvalues(branch_product(observation, "unconditional"), start, ITERATIONS)
    lowest_c, _ = extreme_eigenvalues(branch_product(observation, "conditional"), start, ITERATIONS)
    return lowest_u - lowest_c


SHARPNESS = Signal("sharpness", sharpness, cost=2)
CURVATURE = Signal("curvature", curvature, cost=2 * ITERATIONS)
