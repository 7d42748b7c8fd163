"""Prompt-embedding perturbation: move the tokens that pull, and no further than needed."""

from __future__ import annotations

import torch
from torch import Tensor

from sdguard.attribution import norm_gradient, token_shares
from sdguard.observation import Observation
from sdguard.steering.correction import Correction


def responsible(gradient: Tensor, share: float) -> Tensor:
    """The fewest tokens that hold ``share`` of the gradient's energy, begin token never among them: bool ``[B, T]``."""
    order = token_shares(gradient).sort(dim=1, descending=True)
    before = order.values.cumsum(1) - order.values
    return torch.zeros_like(before, dtype=torch.bool).scatter(1, order.indices, before < share - 1e-6)


def embedding_descent(
    observation: Observation, target: float, radius: float, iterations: int = 8, share: float = 0.9, step: float = 0.25
) -> Correction:
    """Normalised descent on the guidance norm over the responsible tokens, inside a trust region around the prompt.

    After Wen et al. 2024 (2407.21720, sec. 4.2), with three differences: each image has its own loss and stops by itself once its
    norm is below ``target``; only the tokens that hold ``share`` of the first gradient's energy move, the begin token never;
    each token stays within ``radius`` times its distance from the empty prompt's. ``step`` is a share of that radius. The report
    gets the positions of the moved ``tokens`` and the distance ``moved`` relative to the norm of the whole embedding.
    Cost: at most ``2 iterations`` evaluations per image.
    """
    origin = observation.condition.float()
    reach = radius * (origin - observation.null_condition.float()).norm(dim=-1, keepdim=True)
    condition, moving = origin, torch.zeros(0)
    for iteration in range(iterations):
        norm, gradient = norm_gradient(observation, condition)
        if iteration == 0:
            moving = responsible(gradient, share).unsqueeze(-1)
        active = (norm > target).view(-1, 1, 1)
        if not active.any():
            break
        direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        delta = condition - origin - step * reach * direction * moving * active
        delta = delta * (reach / delta.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
        condition = origin + delta
    tokens = [row.nonzero().flatten().tolist() for row in moving.squeeze(-1)]
    moved = ((condition - origin).flatten(1).norm(dim=1) / origin.flatten(1).norm(dim=1)).tolist()
    how = [{"method": "embedding descent", "radius": radius, "tokens": t, "moved": m} for t, m in zip(tokens, moved, strict=True)]
    return Correction(condition.to(observation.condition.dtype), how)
