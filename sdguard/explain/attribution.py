"""Attribution: which words make a prompt memorized, and which region of the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdguard.geometry.hessian import HessianProduct, branch_product
from sdguard.geometry.rollout import probe
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.words import without

#: text embeddings ``[n, T, E]`` of n texts, by the pipeline's own text encoder.
Encode = Callable[[list[str]], Tensor]


def norm_gradient(observation: Observation, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Guidance norm under ``condition`` and its gradient with respect to it: ``[B]``, ``[B, T, E]``. Cost: 2 evaluations."""
    with torch.enable_grad():
        condition = condition.detach().float().requires_grad_()
        norm = (observation.conditional(observation.x, observation.timestep, condition) - observation.eps_u).flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(norm.sum(), condition)
    observation.count_nfe(2)
    return norm.detach(), gradient


def token_shares(gradient: Tensor) -> Tensor:
    """Each token's share of the gradient's energy, ``[B, T]``, summing to 1; the begin token, which every prompt has, gets none.

    The attribution of Wen et al. 2024 (2407.21720), by the gradient of the guidance norm on the token embeddings.
    """
    energy = gradient.square().sum(-1)
    energy[:, 0] = 0
    return energy / energy.sum(1, keepdim=True).clamp_min(1e-30)


def norms_under(observation: Observation, texts: list[str], encode: Encode) -> list[float]:
    """Guidance norm of a single image under each of ``texts`` in place of its prompt. Cost: 1 evaluation a text."""
    repeated = observation.select(torch.zeros(len(texts), dtype=torch.long))
    return guidance_norm(repeated.with_condition(encode(texts))).tolist()


def norms_without(observation: Observation, words: list[str], positions: list[int], encode: Encode) -> list[float]:
    """Guidance norm of a single image when one word of its prompt is left out, for each of ``positions``. Cost: 1 evaluation each."""
    return norms_under(observation, [without(words, [left_out]) for left_out in positions], encode)


def pull_map(observation: Observation) -> Tensor:
    """Root energy of ``eps_c - eps_u`` at every place of the latent grid, ``[B, H, W]``, in noise-prediction units. Cost: none."""
    return observation.difference.square().sum(dim=1).sqrt()


def diagonal(product: HessianProduct, probes: list[Tensor]) -> Tensor:
    """The diagonal of H, shaped as the point, by the mean of ``v * H v`` over sign probes (Bekas et al. 2007). Cost: a product a probe."""
    return torch.stack([v * product(v) for v in probes]).mean(dim=0)


def curvature_map(observation: Observation, probes: int = 4) -> Tensor:
    """``diag(-H_c) - diag(-H_u)`` summed over channels, ``[B, H, W]``: where the text sharpens the density (2605.26756).

    Cost: 2 evaluations a probe.
    """
    signs = [probe(observation.x, draw) for draw in range(probes)]

    diagonal_u = diagonal(branch_product(observation, "unconditional"), signs)
    diagonal_c = diagonal(branch_product(observation, "conditional"), signs)
    return (diagonal_u - diagonal_c).sum(dim=1)
