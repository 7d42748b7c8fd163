"""The Hessian of log p_t at a point: its products with vectors, exact or by differences, its trace, spectrum and extreme directions.

Everything is a function of a *score* ``s(x) = grad log p_t(x)``, ``[B, ...] -> [B, ...]``, each row on its own, and of a point ``x``.
``H`` is the Hessian of log p_t, ``d`` the number of dimensions of a row. A learned score is no exact gradient, so that its
Jacobian is only nearly symmetric; what is stated below for ``H`` holds for it as far as it is.

Sharpness (Jeon et al. 2024, 2412.04140) is read off it here, dimension in `sdguard.geometry.dimension`, volume in
`sdguard.geometry.volume`. ``J = (I + s**2 H) / a``, the Jacobian of the denoised estimate, ties all three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdguard.geometry.displacement import displaced, step_in
from sdguard.geometry.rowwise import dot, expand_like, norm
from sdguard.observation import Observation

#: ``x -> grad log p_t(x)``, ``[B, ...] -> [B, ...]``.
Score = Callable[[Tensor], Tensor]
#: ``v -> H v`` at a fixed point, per row.
HessianProduct = Callable[[Tensor], Tensor]


def exact_product(score: Score, x: Tensor) -> HessianProduct:
    """``v -> H v`` by forward-mode differentiation. Cost: 1 score evaluation a product, about twice as long as a plain one.

    Needs fp32 and math attention, which it asks for itself.
    """

    def product(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            derivative = forward_ad.unpack_dual(score(forward_ad.make_dual(x, v))).tangent
        return torch.zeros_like(x) if derivative is None else derivative

    return product


def difference_product(
    score: Score, x: Tensor, known: Tensor | None = None, step: float = 4e-3, dtype: torch.dtype = torch.float32
) -> HessianProduct:
    """``v -> H v`` by a difference along ``v``; works with every attention kernel, in half precision, compiled.

    The point moves by ``step`` times its own norm, whatever the length of ``v``, or further where the network takes its input in a
    ``dtype`` that is too coarse for that; what is divided by is how far it has moved in that. The difference is central, at 2 score
    evaluations a product, or one-sided, at 1, where the score at ``x`` is ``known``.
    """
    step = step_in(dtype, step)

    def product(v: Tensor) -> Tensor:
        length = norm(v).clamp_min(1e-30)
        h = expand_like(step * norm(x).clamp_min(1e-30) / length, x)
        ahead, share = displaced(x, h * v, dtype)
        if known is not None:
            return (score(ahead) - known) / (share * h)
        behind, share_back = displaced(x, -h * v, dtype)
        return (score(ahead) - score(behind)) / ((share + share_back) * h)

    return product


def branch_product(observation: Observation, branch: Literal["conditional", "unconditional"]) -> HessianProduct:
    """``v -> H v`` of one branch at the observation's own point, by one-sided differences. Cost: 1 evaluation a product."""
    eps = observation.eps_c if branch == "conditional" else observation.eps_u
    return difference_product(observation.score(branch), observation.x, known=-eps / observation.level.s, dtype=observation.dtype)


class Estimate(NamedTuple):
    """A stochastic estimate and its standard error, ``[B]`` each."""

    value: Tensor
    standard_error: Tensor


def averaged(draws: list[Tensor]) -> Estimate:
    """Mean and standard error of independent draws; the error of a single one is infinite."""
    stacked = torch.stack(draws)
    error = stacked.std(dim=0) / len(draws) ** 0.5 if len(draws) > 1 else torch.full_like(stacked[0], torch.inf)
    return Estimate(stacked.mean(dim=0), error)


def trace(product: HessianProduct, probes: Sequence[Tensor]) -> Estimate:
    """``tr H`` by Hutchinson's estimator (Hutchinson 1989); ``probes`` of independent signs. Cost: one product a probe."""
    return averaged([dot(v, product(v)) for v in probes])


class Spectrum(NamedTuple):
    """Gauss quadrature of the spectral measure of H as one probe sees it: ``sum weights f(nodes)`` estimates ``tr f(H) / d``.

    Attributes:
        nodes: Ritz values, ascending, ``[B, k]``; the outermost approach the extreme eigenvalues.
        weights: ``[B, k]``, summing to 1.
    """

    nodes: Tensor
    weights: Tensor


class Krylov(NamedTuple):
    """What Lanczos has built: orthonormal vectors ``[B, ...]`` (zero once a row's space is exhausted), and H in them, ``[B, k, k]``."""

    basis: list[Tensor]
    tridiagonal: Tensor


def lanczos(product: HessianProduct, start: Tensor, iterations: int) -> Krylov:
    """Lanczos with full reorthogonalisation from ``start``. Cost: one product an iteration."""
    q = start / expand_like(norm(start), start)
    basis, alphas, betas = [q], [], []
    for _ in range(min(iterations, start[0].numel())):
        w = product(basis[-1])
        alphas.append(dot(basis[-1], w))
        for _ in range(2):
            for b in basis:
                w = w - expand_like(dot(b, w), w) * b
        beta = norm(w)
        beta = torch.where(beta > 1e-5 * torch.stack(alphas).abs().amax(dim=0), beta, torch.zeros_like(beta))
        betas.append(beta)
        basis.append(torch.where(expand_like(beta, w) > 0, w / expand_like(beta, w).clamp_min(1e-30), torch.zeros_like(w)))
    tridiagonal = torch.diag_embed(torch.stack(alphas, 1))
    if len(alphas) > 1:
        off = torch.stack(betas[:-1], 1)
        tridiagonal = tridiagonal + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return Krylov(basis[:-1], tridiagonal)


def spectrum(product: HessianProduct, start: Tensor, iterations: int) -> Spectrum:
    """`lanczos` read as a quadrature (Golub & Meurant 1994; Ubaru et al. 2017). Cost: one product an iteration.

    Once a row's Krylov space is exhausted its further nodes have weight zero and repeat the largest found.
    """
    nodes, vectors = torch.linalg.eigh(lanczos(product, start, iterations).tridiagonal.double())
    weights = vectors[:, 0, :].square()
    largest = torch.where(weights > 1e-12, nodes, -torch.inf).amax(dim=1, keepdim=True)
    nodes = torch.where(weights > 1e-12, nodes, largest)
    order = nodes.argsort(dim=1)
    return Spectrum(nodes.gather(1, order).to(start), weights.gather(1, order).to(start))


def extreme_directions(product: HessianProduct, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Unit vectors along which log p_t bends down most and least, ``[B, ...]`` each: the outermost Ritz vectors of `lanczos`.

    They are orthogonal; where H is a multiple of the identity along ``start``, the second is any direction that is orthogonal to the first.
    Cost: one product an iteration.
    """
    basis, tridiagonal = lanczos(product, start, iterations)
    nodes, vectors = torch.linalg.eigh(tridiagonal.double())
    nodes = torch.where(vectors[:, 0, :].square() > 1e-12, nodes, torch.nan)  # what lies beyond an exhausted space is no direction
    which = (nodes.nan_to_num(torch.inf).argmin(dim=1), nodes.nan_to_num(-torch.inf).argmax(dim=1))
    rows = torch.arange(len(start))
    along = torch.stack(basis, 1)
    found = (torch.einsum("bk,bk...->b...", vectors[rows, :, index].to(start), along) for index in which)
    sharpest, flattest = (v / expand_like(norm(v), v) for v in found)
    any_other = torch.arange(flattest[0].numel()).cos().to(flattest).view_as(flattest[:1]).expand_as(flattest)
    any_other = any_other - expand_like(dot(any_other, sharpest), flattest) * sharpest
    same = expand_like(dot(sharpest, flattest).abs() > 0.5, flattest)
    return sharpest, torch.where(same, any_other / expand_like(norm(any_other), flattest), flattest)


def extreme_eigenvalues(product: HessianProduct, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of H, ``[B]`` each, approached from inside. Cost: one product an iteration."""
    nodes = spectrum(product, start, iterations).nodes
    return nodes[:, 0], nodes[:, -1]
