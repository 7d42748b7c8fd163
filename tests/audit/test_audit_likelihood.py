"""Likelihoods against densities known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from sdguard.audit.digits import LATENTS, new_vae
from sdguard.audit.likelihood import (
    divergence,
    elbo,
    gaussian,
    heun,
    importance_sampled,
    level_of,
    levels_between,
    probability_flow,
    probability_flow_draws,
    signs,
)
from sdguard.audit.manifolds import Mixture
from sdguard.observation import NoiseLevel

D, K, NOISE = 6, 2, 0.4


def linear_vae() -> tuple[Tensor, MultivariateNormal]:
    """Probabilistic PCA with orthogonal loadings ``[D, K]``, whose posterior is independent in each latent, and its exact density."""
    loadings = torch.linalg.qr(torch.randn(D, D, dtype=torch.double)).Q[:, :K] * torch.tensor([2.0, 0.7], dtype=torch.double)
    covariance = loadings @ loadings.T + NOISE**2 * torch.eye(D, dtype=torch.double)
    return loadings, MultivariateNormal(torch.zeros(D, dtype=torch.double), covariance)


def test_with_the_exact_posterior_one_importance_sample_gives_the_exact_likelihood() -> None:
    loadings, density = linear_vae()
    precision = 1 + loadings.square().sum(0) / NOISE**2
    x = density.sample((20,))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ loadings / NOISE**2 / precision, -precision.log().expand(len(x), K) / 2

    found = importance_sampled(encode, lambda x, z: gaussian(x, z @ loadings.T, math.log(NOISE)), x, samples=1)
    torch.testing.assert_close(found, density.log_prob(x), atol=1e-10, rtol=0)


def test_with_a_wrong_posterior_the_likelihood_rises_to_the_exact_one_with_samples() -> None:
    loadings, density = linear_vae()
    precision = 1 + loadings.square().sum(0) / NOISE**2
    x = density.sample((200,))

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ loadings / NOISE**2 / precision + 0.05, -precision.log().expand(len(x), K) / 2 + math.log(1.5)

    means = [
        importance_sampled(encode, lambda x, z: gaussian(x, z @ loadings.T, math.log(NOISE)), x, samples).mean().item()
        for samples in (1, 8, 256)
    ]
    exact = density.log_prob(x).mean().item()
    assert means[0] < means[1] < exact + 0.02
    assert means[2] == pytest.approx(exact, abs=0.02)


def test_the_vaes_binomial_likelihood_sums_to_one_over_a_pixels_levels() -> None:
    vae = new_vae(0)
    z = torch.randn(1, LATENTS).expand(17, -1)
    x = torch.full((17, 64), 8.0)
    base = vae.conditional(x, z)[0]
    x[:, 5] = torch.arange(17.0)
    p = (vae.decoder(z[:1]).sigmoid())[0, 5]
    at_eight = torch.distributions.Binomial(16, probs=p).log_prob(torch.tensor(8.0))
    assert (vae.conditional(x, z) - base + at_eight).exp().sum().item() == pytest.approx(1.0, abs=1e-3)


def mixture() -> Mixture:
    """Two Gaussians in three dimensions."""
    spread = torch.diag(torch.tensor([0.5, 0.2, 0.05], dtype=torch.double))
    return Mixture(torch.tensor([[1.0, 0, 0], [-1.0, 0.5, 0]], dtype=torch.double), torch.stack([spread, 0.3 * spread]))


def exact(found: Mixture, x: Tensor, sigma: float) -> Tensor:
    """log density of a mixture with noise of ``sigma`` added."""
    covariances = found.covariances + sigma**2 * torch.eye(3, dtype=torch.double)
    logs = [MultivariateNormal(mean, covariance).log_prob(x) for mean, covariance in zip(found.means, covariances, strict=True)]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def test_the_probability_flow_gives_a_mixtures_exact_density() -> None:
    found, x = mixture(), mixture().sample(40)
    error = probability_flow(found.noise, x, levels_between(0.02, 50.0, 150)) - exact(found, x, 0.02)
    assert error.abs().max() < 0.05


def test_draws_of_the_probability_flow_have_the_mixtures_weights_means_and_variances() -> None:
    found = mixture()
    eps = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    x = probability_flow_draws(found.noise, eps, levels_between(0.01, 50.0, 60))
    share = torch.special.ndtr(found.means[:, 0] / found.covariances[:, 0, 0].sqrt()).mean()
    assert (x[:, 0] > 0).double().mean().item() == pytest.approx(share.item(), abs=0.025)
    covariance = (found.covariances.mean(0) + torch.cov(found.means.T, correction=0)).diagonal()
    torch.testing.assert_close(x.mean(0), found.means.mean(0), atol=0.06, rtol=0)
    torch.testing.assert_close(x.var(0), covariance, atol=0.02, rtol=0.06)


def test_the_probability_flow_is_undone_by_its_draws() -> None:
    """Forth by Heun's steps and back by the same: the point itself, up to its denoising at the least noise."""
    found, x = mixture(), mixture().sample(20)
    levels = levels_between(0.004, 50.0, 250)
    u, _ = heun(lambda u, level: (level.s / level.a * found.noise(level.a * u, level), torch.zeros(len(u)).double()), x, levels)
    torch.testing.assert_close(probability_flow_draws(found.noise, levels[-1].a * u, levels), x, atol=2e-3, rtol=0)


def test_the_probability_flow_with_probes_errs_by_the_probes_alone() -> None:
    found, x = mixture(), mixture().sample(40)
    levels = levels_between(0.02, 50.0, 30)
    known = probability_flow(found.noise, x, levels)
    errors = torch.stack([probability_flow(found.noise, x, levels, signs(x, 1)) - known for _ in range(8)])
    assert errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5
    assert 0 < errors.std() < 1.0


def test_the_bound_is_tight_where_the_noise_prediction_is_exact() -> None:
    """Up to the least noise, which blurs the reconstruction, and the trapezoid rule."""
    found, x = mixture(), mixture().sample(300)
    bound = elbo(found.noise, x, levels_between(0.01, 50.0, 80), draws=30, generator=torch.Generator().manual_seed(0)).mean()
    assert bound.item() == pytest.approx(exact(found, x, 0.0).mean().item(), abs=0.1)


def test_a_worse_noise_prediction_lowers_the_bound() -> None:
    found, x = mixture(), mixture().sample(300)
    levels = levels_between(0.05, 20.0, 30)

    def off(y: Tensor, level: NoiseLevel) -> Tensor:
        return found.noise(y, level) + 0.3

    bounds = [elbo(noise, x, levels, draws=4, generator=torch.Generator().manual_seed(0)).mean().item() for noise in (found.noise, off)]
    expected = 3 * 0.3**2 * math.log(20 / 0.05)  # the squared offset, integrated over log s / a
    assert bounds[0] - bounds[1] == pytest.approx(expected, rel=0.1)


def test_divergence_is_the_trace_and_probes_are_right_on_average() -> None:
    matrix = torch.randn(5, 5, dtype=torch.double)
    x = torch.randn(4, 5, dtype=torch.double)
    value, exactly = divergence(lambda y: y @ matrix.T, x, None)
    torch.testing.assert_close(value, x @ matrix.T)
    torch.testing.assert_close(exactly, matrix.trace().expand(4))
    _, probed = divergence(lambda y: y @ matrix.T, x, signs(x, 4000))
    torch.testing.assert_close(probed, exactly, atol=0.3, rtol=0)


def test_levels_are_variance_preserving_and_even_in_their_logarithm() -> None:
    levels = levels_between(0.1, 10.0, 5)
    assert all(a**2 + s**2 == pytest.approx(1) for a, s in levels)
    assert [s / a for a, s in levels] == pytest.approx([0.1, 10**-0.5, 1.0, 10**0.5, 10.0])
    assert level_of(1.0).a == pytest.approx(0.5**0.5)
