"""Output density: how much of noise space is squeezed into this picture."""

from torch import Tensor

from sdguard.geometry.displacement import displaced, step_in
from sdguard.geometry.hessian import branch_product
from sdguard.geometry.rollout import ROLLOUT_STEPS, probe, short_rollout
from sdguard.geometry.rowwise import norm
from sdguard.geometry.volume import log_volume
from sdguard.observation import Observation
from sdguard.signals.signal import Signal

ITERATIONS, STEP = 3, 0.02


def output_density(observation: Observation) -> Tensor:
    """By how much the text shrinks the volume element of the one-step generator at ``x_T``, ``[B]``, in nats.

    `log_volume` of the unconditional minus that of the conditional denoised estimate: the log density of Feiszli 2017 (1705.09303) of one
    branch over that of the other, ``p(z)`` being the same. `ITERATIONS` Lanczos steps in each branch, one-sided differences.
    Cost: 6 evaluations. Blind to what happens after the first step.
    """

    signs = [probe(observation.x)]
    volume_u = log_volume(branch_product(observation, "unconditional"), signs, observation.level, ITERATIONS).value
    volume_c = log_volume(branch_product(observation, "conditional"), signs, observation.level, ITERATIONS).value
    return volume_u - volume_c


def output_density_ahead(observation: Observation) -> Tensor:
    """A lower bound of the log output density of the short rollout as a generator ``g: x_T -> x_0``, per dimension, ``[B]``, in nats.

    Minus the log volume element of Feiszli 2017 (1705.09303), ``-log det(J^T J) / 2d``, is at least ``-log(tr(J^T J) / d) / 2``
    (arithmetic and geometric mean of the squared singular values), and one sign probe v estimates the trace by
    ``||g(x + hv) - g(x)||**2 / h**2``. The constant log density of ``x_T`` is left out. Cost: 18 evaluations, two short rollouts.
    Blind to a collapse in a few directions only.
    """
    v, h = probe(observation.x), step_in(observation.dtype, STEP)
    start, share = displaced(observation.x, h * v, observation.dtype)
    moved = norm(short_rollout(observation, start) - short_rollout(observation)) / (h * share.flatten())
    return -(moved.square() / v[0].numel()).clamp_min(1e-30).log() / 2


OUTPUT_DENSITY = Signal("output_density", output_density, cost=2 * ITERATIONS)
OUTPUT_DENSITY_AHEAD = Signal("output_density_ahead", output_density_ahead, cost=4 * ROLLOUT_STEPS - 2)
