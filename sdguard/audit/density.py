"""Output density: how much of latent space a generator squeezes into a neighbourhood of what it makes.

Feiszli 2017 (1705.09303): a generator ``x = g(z)`` with Jacobian J carries the prior p(z) to the density
``p(z) / sqrt(det J^T J)`` on its image. Where it has memorized, this tends to delta functions: the volume element collapses over whole
regions of latent space, each sent to one output, and explodes on the thin boundaries between them. ``J^T J`` is also the metric that
lengths in latent space are to be measured in. Latents are ``[B, ...]``, each row on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdguard.audit.likelihood import gaussian
from sdguard.geometry.hessian import Estimate, HessianProduct, averaged, spectrum
from sdguard.geometry.rowwise import norm

#: latents ``[B, ...]`` -> outputs ``[B, ...]``, each row on its own.
Generate = Callable[[Tensor], Tensor]


def push(g: Generate, z: Tensor, v: Tensor) -> Tensor:
    """``J v`` by forward-mode differentiation, shaped as the output. Cost: 1 evaluation, about twice as long as a plain one."""
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(g, (z,), (v,))[1]


def metric_product(g: Generate, z: Tensor) -> HessianProduct:
    """``v -> J^T J v``, the metric at ``z``. Cost: 1 forward-mode and 1 reverse-mode evaluation a product."""

    def product(v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return vjp(g, z)[1](push(g, z, v))[0]

    return product


def jacobian(g: Generate, z: Tensor) -> Tensor:
    """J of each row, ``[B, outputs, latents]``. Cost: one forward-mode evaluation a latent."""
    basis = torch.eye(z[0].numel(), dtype=z.dtype).view(-1, *z[0].shape)
    return torch.stack([push(g, z, v.expand_as(z).contiguous()).flatten(1) for v in basis], dim=2)


def log_volume_element(g: Generate, z: Tensor, resolution: float = 0.0) -> Tensor:
    """``log det(J^T J + resolution**2 I) / 2`` from J's singular values, ``[B]``, for latents no more than outputs.

    ``resolution`` bounds it from below where J is singular: outputs nearer than that count as one. Cost: `jacobian`'s.
    """
    sizes = torch.linalg.svdvals(jacobian(g, z))
    return (sizes.square() + resolution**2).log().sum(1) / 2


def log_volume_element_lanczos(g: Generate, z: Tensor, probes: Sequence[Tensor], iterations: int, resolution: float = 0.0) -> Estimate:
    """`log_volume_element` by stochastic Lanczos quadrature (Ubaru et al. 2017), ``[B]``; ``probes`` of independent signs.

    Cost: ``iterations`` metric products a probe, whatever the number of latents.
    """
    product, d = metric_product(g, z), z[0].numel()
    tiny = torch.finfo(z.dtype).tiny

    def quadrature(v: Tensor) -> Tensor:
        nodes, weights = spectrum(product, v, iterations)
        return d * (weights * (nodes.clamp_min(0) + resolution**2).clamp_min(tiny).log()).sum(1) / 2

    return averaged([quadrature(v) for v in probes])


def log_density(g: Generate, z: Tensor, resolution: float = 0.0) -> Tensor:
    """The log density of the generator's output at ``g(z)`` under a standard Gaussian prior, ``[B]``, in nats. Cost: `jacobian`'s."""
    return gaussian(z) - log_volume_element(g, z, resolution)


def speed(g: Generate, start: Tensor, end: Tensor, points: int) -> Tensor:
    """How fast the output moves along the straight path from ``start`` to ``end``, ``sqrt(v^T J^T J v)`` with ``v = end - start``.

    At ``points`` evenly spaced times, ``[B, points]``; its integral over [0, 1] is the path's length in the metric, and where the
    generator has memorized it is nothing but a few spikes. Cost: 1 forward-mode evaluation a point.
    """
    v = end - start
    return torch.stack([norm(push(g, start + float(t) * v, v)) for t in torch.linspace(0, 1, points)], dim=1)


def concentration(g: Generate, start: Tensor, end: Tensor, points: int) -> Tensor:
    """Share of the path's length that lies in the tenth of it where the output moves fastest, ``[B]``: .1 on an even path, 1 at jumps."""
    fast = speed(g, start, end, points).sort(dim=1, descending=True).values
    return fast[:, : max(1, points // 10)].sum(1) / fast.sum(1)
