"""The geometry of the learned density at a point: Hessian products of log p_t, and what is read off them.

Everything is a function of a *score* ``s(x) = grad log p_t(x)``, ``[B, ...] -> [B, ...]``, each row on its own, and of a point ``x``.
``H`` is the Hessian of log p_t, ``d`` the number of dimensions of a row. A learned score is no exact gradient, so that its
Jacobian is only nearly symmetric; what is stated below for ``H`` holds for it as far as it is.

Sources: Ross et al. 2024 (2411.00113) with FLIPD of Kamkari et al. 2024 (2406.03537) for dimension, Jeon et al. 2024 (2412.04140)
for sharpness, Feiszli 2017 (1705.09303) for volume. ``J = (I + s**2 H) / a``, the Jacobian of the denoised estimate, ties all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdguard.observation import NoiseLevel

#: ``x -> grad log p_t(x)``, ``[B, ...] -> [B, ...]``.
Score = Callable[[Tensor], Tensor]
#: ``v -> H v`` at a fixed point, per row.
HessianProduct = Callable[[Tensor], Tensor]

#: eigenvalues of the denoised estimate's Jacobian count as at least this in size.
JACOBIAN_FLOOR = 1e-4


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each pair of rows, ``[B]``."""
    return (one * other).flatten(1).sum(1)


def norm(v: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[B]``."""
    return v.flatten(1).norm(dim=1)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """``[B]`` shaped to multiply rows of ``like``."""
    return value.view(-1, *[1] * (like.ndim - 1))


def exact_product(score: Score, x: Tensor) -> HessianProduct:
    """``v -> H v`` by forward-mode differentiation. Cost: 1 score evaluation a product, about twice as long as a plain one.

    Needs fp32 and math attention, which it asks for itself.
    """

    def product(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            derivative: Tensor = torch.func.jvp(score, (x,), (v,))[1]
        return derivative

    return product


def difference_product(score: Score, x: Tensor, step: float = 2e-3) -> HessianProduct:
    """``v -> H v`` by the central difference along ``v``; works with every attention kernel, in half precision, compiled.

    The point moves by ``step`` times its own norm, whatever the length of ``v``. Cost: 2 score evaluations a product.
    """

    def product(v: Tensor) -> Tensor:
        length = norm(v).clamp_min(1e-30)
        h = spread(step * norm(x).clamp_min(1e-30) / length, x)
        return (score(x + h * v) - score(x - h * v)) / (2 * h)

    return product


class Estimate(NamedTuple):
    """A stochastic estimate and its standard error, ``[B]`` each."""

    value: Tensor
    standard_error: Tensor


def rademacher(x: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs; one draw for all rows, so that a row's estimate does not depend on its neighbours."""
    signs = torch.randint(0, 2, x.shape[1:], generator=generator) * 2 - 1
    return signs.to(x).expand_as(x)


def trace(product: HessianProduct, x: Tensor, probes: int, generator: torch.Generator) -> Estimate:
    """``tr H`` by Hutchinson's estimator with Rademacher probes (Hutchinson 1989). Cost: one product a probe.

    The standard error is infinite for a single probe.
    """
    draws = torch.stack([dot(v, product(v)) for v in (rademacher(x, generator) for _ in range(probes))])
    error = draws.std(dim=0) / probes**0.5 if probes > 1 else torch.full_like(draws[0], torch.inf)
    return Estimate(draws.mean(dim=0), error)


class Spectrum(NamedTuple):
    """Gauss quadrature of the spectral measure of H as one probe sees it: ``sum weights f(nodes)`` estimates ``tr f(H) / d``.

    Attributes:
        nodes: Ritz values, ascending, ``[B, k]``; the outermost approach the extreme eigenvalues.
        weights: ``[B, k]``, summing to 1.
    """

    nodes: Tensor
    weights: Tensor


def spectrum(product: HessianProduct, start: Tensor, iterations: int) -> Spectrum:
    """Lanczos with full reorthogonalisation from ``start`` (Golub & Meurant 1994; Ubaru et al. 2017). Cost: one product an iteration.

    Once a row's Krylov space is exhausted its further nodes have weight zero and repeat the largest found.
    """
    q = start / spread(norm(start), start)
    basis, alphas, betas = [q], [], []
    for _ in range(min(iterations, start[0].numel())):
        w = product(basis[-1])
        alphas.append(dot(basis[-1], w))
        for _ in range(2):
            for b in basis:
                w = w - spread(dot(b, w), w) * b
        beta = norm(w)
        beta = torch.where(beta > 1e-5 * torch.stack(alphas).abs().amax(dim=0), beta, torch.zeros_like(beta))
        betas.append(beta)
        basis.append(torch.where(spread(beta, w) > 0, w / spread(beta, w).clamp_min(1e-30), torch.zeros_like(w)))
    tridiagonal = torch.diag_embed(torch.stack(alphas, 1))
    if len(alphas) > 1:
        off = torch.stack(betas[:-1], 1)
        tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal.double())
    weights = vectors[:, 0, :].square()
    largest = torch.where(weights > 1e-12, nodes, -torch.inf).amax(dim=1, keepdim=True)
    nodes = torch.where(weights > 1e-12, nodes, largest)
    order = nodes.argsort(dim=1)
    return Spectrum(nodes.gather(1, order).to(start), weights.gather(1, order).to(start))


def extreme_eigenvalues(product: HessianProduct, x: Tensor, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of H, ``[B]`` each, from inside. Cost: one product an iteration."""
    start = torch.randn(x.shape[1:], generator=generator).to(x).expand_as(x)
    nodes = spectrum(product, start, iterations).nodes
    return nodes[:, 0], nodes[:, -1]


def log_volume(product: HessianProduct, x: Tensor, level: NoiseLevel, iterations: int, probes: int, generator: torch.Generator) -> Estimate:
    """``log |det J|`` of the denoised estimate's Jacobian ``J = (I + s**2 H) / a`` by stochastic Lanczos quadrature.

    Minus this, added to log p(z), is the log output density of Feiszli 2017 (1705.09303) of the one-step generator. Eigenvalues of
    J count as at least `JACOBIAN_FLOOR` in size: a delta component has eigenvalue 0, and the volume would be minus infinity.
    Cost: ``iterations * probes`` products.
    """

    def log_jacobian(eigenvalues: Tensor) -> Tensor:
        return ((1 + level.s**2 * eigenvalues) / level.a).abs().clamp_min(JACOBIAN_FLOOR).log()

    d = x[0].numel()
    draws = []
    for _ in range(probes):
        nodes, weights = spectrum(product, rademacher(x, generator), iterations)
        draws.append(d * (weights * log_jacobian(nodes)).sum(1))
    stacked = torch.stack(draws)
    error = stacked.std(dim=0) / probes**0.5 if probes > 1 else torch.full_like(stacked[0], torch.inf)
    return Estimate(stacked.mean(dim=0), error)


def flipd(score: Score, trace_of_hessian: Tensor, y: Tensor, level: NoiseLevel) -> Tensor:
    """Local intrinsic dimension ``d + s**2 (tr H + ||score||**2)`` at ``y = a x_0``, ``[B]`` (Kamkari et al. 2024, eq. 9).

    The estimate of the dimension at the clean point ``x_0``, for a noise level small against the manifold's own scales; no noise is
    added to ``y``. In noise predictions it reads ``d - s tr(d eps / dx) + ||eps||**2``. Cost: 1 evaluation beside the trace's.
    """
    return y[0].numel() + level.s**2 * (trace_of_hessian + norm(score(y)).square())
