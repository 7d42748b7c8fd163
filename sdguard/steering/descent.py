"""Prompt-embedding perturbation: descent inside a trust region around the prompt, no further than needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.explain.attribution import norm_gradient, token_shares
from sdguard.geometry.displacement import displaced, step_in
from sdguard.geometry.rollout import probe
from sdguard.geometry.rowwise import dot, norm
from sdguard.observation import Observation
from sdguard.steering.method import Method, SteeringInput

ITERATIONS = 8
#: as a share of each token's distance from the empty prompt's.
RADIUS = 1.0

#: (observation, condition) -> guidance norm ``[B]``, gradient ``[B, T, E]`` of what is to be made smaller.
Slope = Callable[[Observation, Tensor], tuple[Tensor, Tensor]]


def responsible(gradient: Tensor, share: float) -> Tensor:
    """The fewest tokens that hold ``share`` of the gradient's energy, begin token never among them: bool ``[B, T]``."""
    order = token_shares(gradient).sort(dim=1, descending=True)
    before = order.values.cumsum(1) - order.values
    return torch.zeros_like(before, dtype=torch.bool).scatter(1, order.indices, before < share - 1e-6)


def lid_gradient(observation: Observation, condition: Tensor, step: float = 4e-3) -> tuple[Tensor, Tensor]:
    """Guidance norm, and the gradient of minus the dimension under ``condition``, by the trace of FLIPD (see `lid_noisy`).

    One probe, a one-sided difference of relative length ``step``. Cost: 4 evaluations.
    """
    v = probe(observation.x)
    h = step_in(observation.dtype, step) * norm(observation.x).view(-1, 1, 1, 1) / norm(v).view(-1, 1, 1, 1)
    moved, share = displaced(observation.x, h * v, observation.dtype)
    with torch.enable_grad():
        condition = condition.detach().float().requires_grad_()
        eps = observation.conditional(observation.x, observation.timestep, condition)
        ahead = observation.conditional(moved, observation.timestep, condition)
        lost = observation.level.s * dot(v, (ahead - eps) / (share * h))
        (gradient,) = torch.autograd.grad(lost.sum(), condition)
    observation.count_nfe(4)
    return norm(eps.detach() - observation.eps_u), gradient


def descent(
    observation: Observation,
    target: float,
    slope: Slope = norm_gradient,
    share: float = 1.0,
    radius: float = RADIUS,
    iterations: int = ITERATIONS,
    step: float = 0.25,
) -> tuple[Tensor, list[list[int]]]:
    """The moved text condition, ``[B, T, E]``, and the positions of each row's tokens that were free to move.

    Normalised descent along ``slope``. Each image has its own loss and stops by itself once its guidance norm is at most ``target``; only
    the tokens that hold ``share`` of the first gradient's energy move, the begin token never; each token stays within ``radius``
    times its distance from the empty prompt's. ``step`` is a share of that radius. Cost: ``iterations`` times the slope's.
    """
    origin = observation.condition.float()
    reach = radius * (origin - observation.null_condition.float()).norm(dim=-1, keepdim=True)
    condition, moving = origin, torch.zeros(0)
    for iteration in range(iterations):
        norms, gradient = slope(observation, condition)
        if iteration == 0:
            moving = responsible(gradient, share).unsqueeze(-1)
        active = (norms > target).view(-1, 1, 1)
        if not active.any():
            break
        direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        delta = condition - origin - step * reach * direction * moving * active
        delta = delta * (reach / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
        condition = origin + delta
    return condition.to(observation.condition.dtype), [row.nonzero().flatten().tolist() for row in moving.squeeze(-1)]


def embedding_descent(flagged: SteeringInput, slope: Slope = norm_gradient, share: float = 1.0) -> list[Correction | None]:
    """Each prompt's embedding moved by `descent` until it pulls as ordinary prompts do."""
    condition, tokens = descent(flagged.observation, flagged.target, slope, share)
    return [Correction({"tokens": moved}, condition=row) for row, moved in zip(condition, tokens, strict=True)]


#: after Wen et al. 2024 (2407.21720, sec. 4.2), with a loss for each image and a trust region.
EMBEDDING_DESCENT = Method("embedding descent", embedding_descent, cost=2 * ITERATIONS)
#: the same on the tokens alone that hold nine tenths of the gradient's energy.
TOKEN_DESCENT = Method("token descent", partial(embedding_descent, share=0.9), cost=2 * ITERATIONS)
#: after Ross et al. 2024 (2411.00113, app. C): the prompt is moved to where its density has more dimensions.
LID_ASCENT = Method("LID ascent", partial(embedding_descent, slope=lid_gradient), cost=4 * ITERATIONS)
