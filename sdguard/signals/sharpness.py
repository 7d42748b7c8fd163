"""Sharpness: the curvature that the text adds to log p_t."""

from torch import Tensor

from sdguard.geometry import difference_product, extreme_eigenvalues, norm
from sdguard.lookahead import probe
from sdguard.observation import Branch, Observation
from sdguard.signals.signal import Signal

ITERATIONS = 4


def sharpness(observation: Observation) -> Tensor:
    """``||(H_c - H_u)(s_c - s_u)||_2**2``, ``[B]``: one Hessian product of the contrast along its own score.

    Jeon et al. 2024 (2412.04140), by a one-sided difference. Cost: 2 evaluations. Blind where the text changes the
    mean of what is drawn and not its spread.
    """
    known = -observation.difference / observation.level.s
    product = difference_product(observation.score("contrast"), observation.x, known, step=1 / 128)
    return norm(product(known)).square()


def curvature(observation: Observation) -> Tensor:
    """How much the sharpest curvature of the conditional exceeds that of the unconditional density, ``[B]``.

    ``lambda_min(H_u) - lambda_min(H_c)``, by `ITERATIONS` Lanczos steps in each branch, one-sided differences. The form in which Jeon
    et al. 2024 (2412.04140) define sharpness, against its baseline. Cost: 8 evaluations.
    """

    def lowest(branch: Branch, eps: Tensor) -> Tensor:
        product = difference_product(observation.score(branch), observation.x, -eps / observation.level.s)
        return extreme_eigenvalues(product, probe(observation.x), ITERATIONS)[0]

    return lowest("unconditional", observation.eps_u) - lowest("conditional", observation.eps_c)


SHARPNESS = Signal("sharpness", sharpness, cost=2)
CURVATURE = Signal("curvature", curvature, cost=2 * ITERATIONS)
