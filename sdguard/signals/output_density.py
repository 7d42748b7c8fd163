"""Output density: how much of noise space is squeezed into this picture."""

import torch
from torch import Tensor

from sdguard.geometry import difference_product, log_determinant, log_volume
from sdguard.lookahead import LOOK_AHEAD_STEPS, probe, trajectory
from sdguard.observation import Branch, Observation
from sdguard.signals.signal import Signal

ITERATIONS = 3


def output_density(observation: Observation) -> Tensor:
    """By how much the text shrinks the volume element of the one-step generator at ``x_T``, ``[B]``, in nats.

    ``log |det J_u| - log |det J_c|`` for the denoised estimate's Jacobian J: the log density of Feiszli 2017 (1705.09303) of one branch
    over that of the other, ``p(z)`` being the same. `ITERATIONS` Lanczos steps in each branch, one-sided differences.
    Cost: 6 evaluations. Blind to what happens after the first step.
    """

    def volume(branch: Branch, eps: Tensor) -> Tensor:
        product = difference_product(observation.score(branch), observation.x, -eps / observation.level.s)
        return log_volume(product, [probe(observation.x)], observation.level, ITERATIONS).value

    return volume("unconditional", observation.eps_u) - volume("conditional", observation.eps_c)


def output_density_ahead(observation: Observation) -> Tensor:
    """Minus the log volume element of the look-ahead as a generator ``x_T -> x_0``, ``[B]``, in nats.

    ``log |det|`` of the map is the sum over its DDIM steps, each of Jacobian ``(a'/a) I + s (a' s/a - s') H``. With the constant log
    density of ``x_T`` added, this is the log output density of Feiszli 2017 (1705.09303). Cost: 8 evaluations for the look-ahead,
    and `ITERATIONS` guided pairs a step.
    """
    total = torch.zeros(len(observation.x))
    for step in trajectory(observation):
        product = difference_product(observation.score("guided", step.timestep), step.x, -step.eps / step.level.s)
        scale = step.level.s * (step.following.a * step.level.s / step.level.a - step.following.s)
        shift = step.following.a / step.level.a
        total = total.to(step.x) + log_determinant(product, [probe(observation.x)], ITERATIONS, scale, shift).value
    return -total


OUTPUT_DENSITY = Signal("output_density", output_density, cost=2 * ITERATIONS)
OUTPUT_DENSITY_AHEAD = Signal(
    "output_density_ahead", output_density_ahead, cost=2 * (LOOK_AHEAD_STEPS - 1) + 2 * ITERATIONS * LOOK_AHEAD_STEPS
)
