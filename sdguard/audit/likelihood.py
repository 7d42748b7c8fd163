"""Log-likelihoods: of a VAE by importance sampling, of a diffusion model by its bound and by its probability flow. In nats, ``[B]``.

Sources: Burda et al. 2016 (1509.00519), Kingma et al. 2021 (2107.00630), Song et al. 2021 (2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdguard.audit.subjects import Noise
from sdguard.geometry.rowwise import dot
from sdguard.observation import NoiseLevel


def gaussian(x: Tensor, mean: Tensor | float = 0.0, log_std: Tensor | float = 0.0) -> Tensor:
    """Log density of each row under a Gaussian with independent coordinates, ``[B]``."""
    log_std = torch.as_tensor(log_std, dtype=x.dtype)
    terms = -((x - mean) * (-log_std).exp()).square() / 2 - log_std - math.log(2 * math.pi) / 2
    return terms.flatten(1).sum(1)


def importance_sampled(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    conditional: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x)`` with ``z_s`` of the encoder, ``[B]`` (Burda et al. 2016, eq. 8).

    A lower bound in expectation that rises to log p(x) with ``samples``; exact for any number where q is the posterior.
    Cost: 1 encoding and ``samples`` decodings a point.

    Args:
        encode: x -> mean and log standard deviation of q(z | x), ``[B, k]`` each.
        conditional: (x, z) -> log p(x | z), ``[B]``.
    """
    mean, log_std = encode(x)
    logs = []
    for _ in range(samples):
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        logs.append(conditional(x, z) + gaussian(z) - gaussian(z, mean, log_std))
    return torch.stack(logs).logsumexp(0) - math.log(samples)


def level_of(sigma: float) -> NoiseLevel:
    """The variance-preserving noise level whose noise is ``sigma`` times its signal."""
    return NoiseLevel(1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2))


def levels_between(lowest: float, highest: float, count: int) -> list[NoiseLevel]:
    """Noise levels with ``s / a`` from ``lowest`` to ``highest``, evenly spaced in its logarithm."""
    return [level_of(float(sigma)) for sigma in torch.logspace(math.log10(lowest), math.log10(highest), count, dtype=torch.double)]


def log_sigma(level: NoiseLevel) -> float:
    """``log s / a``, minus half the log signal-to-noise ratio."""
    return math.log(level.s / level.a)


@torch.no_grad()
def elbo(noise: Noise, x: Tensor, levels: Sequence[NoiseLevel], draws: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """The variational bound of log p(x), ``[B]`` (Kingma et al. 2021, sections 3 and 4).

    ``log p(x | z_0) - KL(q(z_1 | x) || N(0, I)) - 1/2 int E ||eps - eps(x_t)||**2 d(log SNR)``, the last by the trapezoid rule over
    ``levels`` (from the least noise to the most), with ``p(x | z_0) = N(z_0 / a, (s / a)**2)`` at the least noise. In log s / a the
    factor of 1/2 goes. Cost: ``draws`` evaluations a level.
    """
    d, least, most = x[0].numel(), levels[0], levels[-1]
    reconstruction = -d / 2 * (math.log(2 * math.pi) + 2 * log_sigma(least) + 1)
    prior = (most.a**2 * x.flatten(1).square().sum(1) + d * (most.s**2 - 1 - math.log(most.s**2))) / 2
    errors = []
    for level in levels:
        total = torch.zeros(len(x), dtype=x.dtype)
        for _ in range(draws):
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            total += (eps - noise(level.a * x + level.s * eps, level)).flatten(1).square().sum(1)
        errors.append(total / draws)
    at = torch.tensor([log_sigma(level) for level in levels], dtype=x.dtype)
    return reconstruction - prior - torch.trapezoid(torch.stack(errors), at, dim=0)


def signs(x: Tensor, count: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Probes of independent signs like ``x``, for Hutchinson's estimator."""
    return [torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1 for _ in range(count)]


def divergence(field: Callable[[Tensor], Tensor], x: Tensor, probes: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """A vector field at ``x`` and its divergence ``[B]``: by ``probes`` of signs (Hutchinson 1989), or exactly where they are None.

    Cost: one forward-mode product a probe, or a dimension.
    """
    directions = probes if probes is not None else [basis.expand_as(x) for basis in torch.eye(x[0].numel()).to(x).view(-1, *x[0].shape)]
    with sdpa_kernel(SDPBackend.MATH):
        products = [jvp(field, (x,), (v.contiguous(),)) for v in directions]
    total = sum((dot(v, found[1]) for v, found in zip(directions, products, strict=True)), torch.zeros(len(x), dtype=x.dtype))
    return products[0][0], total / (len(probes) if probes is not None else 1)


def heun(field: Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]], u: Tensor, levels: Sequence[NoiseLevel]) -> tuple[Tensor, Tensor]:
    """Follow ``du / d log sigma`` through ``levels``, and integrate a rate ``[B]`` along the way; ``field`` gives both.

    In ``u = x_t / a`` and ``sigma = s / a`` the probability flow is ``du / d sigma = eps`` (Karras et al. 2022, eq. 1).
    """
    gained = torch.zeros(len(u), dtype=u.dtype)
    for here, there in pairwise(levels):
        h = log_sigma(there) - log_sigma(here)
        first, rate = field(u, here)
        second, rate_there = field(u + h * first, there)
        u, gained = u + h / 2 * (first + second), gained + h / 2 * (rate + rate_there)
    return u, gained


@torch.no_grad()
def probability_flow(noise: Noise, x: Tensor, levels: Sequence[NoiseLevel], probes: Sequence[Tensor] | None = None) -> Tensor:
    """log p(x) through the probability-flow ODE, ``[B]`` (Song et al. 2021, eq. 39 and 40), of the data with the least noise added.

    The divergence of the flow (`heun`) is ``a tr(d eps / dx_t)``; from ``levels[0]`` to ``levels[-1]``, where ``a u`` is held for standard
    Gaussian. Cost: two evaluations and two divergences a step.
    """

    def flow(u: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        sigma = level.s / level.a
        value, spreading = divergence(lambda v: noise(level.a * v, level), u, probes)
        return sigma * value, sigma * spreading

    u, gained = heun(flow, x, levels)
    return gaussian(u, 0.0, -math.log(levels[-1].a)) + gained


@torch.no_grad()
def probability_flow_draws(noise: Noise, eps: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
    """What the probability flow makes of standard Gaussian ``eps``, shaped alike: from ``levels[-1]`` down to ``levels[0]`` and to none.

    The last step is Euler's, which is the denoised estimate. Cost: two evaluations a step and one for the last.
    """

    def flow(u: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return level.s / level.a * noise(level.a * u, level), torch.zeros(len(u), dtype=u.dtype)

    u, _ = heun(flow, eps / levels[-1].a, levels[::-1])
    return u - flow(u, levels[0])[0]
