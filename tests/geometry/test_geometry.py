"""Geometry against densities whose answer is known in closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdguard.denoiser.probe import probe_run
from sdguard.geometry.dimension import flipd
from sdguard.geometry.hessian import Score, difference_product, exact_product, extreme_directions, extreme_eigenvalues, spectrum, trace
from sdguard.geometry.rollout import probe
from sdguard.geometry.rowwise import norm
from sdguard.geometry.volume import log_volume
from sdguard.observation import NoiseLevel, Observation, to_noise

VP = NoiseLevel(0.8, 0.6)


def gaussian(variances: Tensor, level: NoiseLevel, mean: float = 0.0) -> tuple[Score, Tensor]:
    """The score of a noised Gaussian with a diagonal covariance, and the eigenvalues of its Hessian."""
    noised = level.a**2 * variances + level.s**2
    return (lambda x: -(x - level.a * mean) / noised), -1 / noised


def mixture(level: NoiseLevel, means: Tensor, variance: float) -> Score:
    """The score of an equal mixture of isotropic Gaussians at ``means`` ``[k, d]``, noised."""
    noised = level.a**2 * variance + level.s**2

    def score(x: Tensor) -> Tensor:
        offset = level.a * means - x.unsqueeze(1)
        share = torch.softmax(-offset.square().sum(-1) / (2 * noised), dim=1)
        return (share.unsqueeze(-1) * offset).sum(1) / noised

    return score


def signs(x: Tensor, count: int = 1, seed: int = 0) -> list[Tensor]:
    """Independent Rademacher probes like ``x``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for _ in range(count)]


@pytest.mark.parametrize("d", [2, 16, 1024, 4096])
def test_products_of_a_gaussian(d: int) -> None:
    score, eigenvalues = gaussian(torch.linspace(0.01, 3, d), VP, mean=0.5)
    x, v = torch.randn(2, d), torch.randn(2, d)
    torch.testing.assert_close(exact_product(score, x)(v), eigenvalues * v)
    torch.testing.assert_close(difference_product(score, x)(v), eigenvalues * v, rtol=1e-3, atol=1e-3)


def test_exact_and_difference_products_of_a_mixture_agree() -> None:
    score = mixture(VP, torch.randn(3, 8) * 2, 0.2)
    x, v = torch.randn(5, 8), torch.randn(5, 8) * 7
    torch.testing.assert_close(difference_product(score, x)(v), exact_product(score, x)(v), rtol=1e-2, atol=1e-2)


def test_exact_product_works_within_no_grad() -> None:
    score, eigenvalues = gaussian(torch.tensor([0.5, 2.0]), VP)
    with torch.no_grad():
        assert torch.allclose(exact_product(score, torch.randn(1, 2))(torch.ones(1, 2)), eigenvalues)


@pytest.mark.parametrize("d", [2, 64, 4096])
def test_trace_of_a_diagonal_hessian_is_exact_with_one_probe(d: int) -> None:
    score, eigenvalues = gaussian(torch.linspace(0.1, 3, d), VP)
    x = torch.randn(3, d)
    estimate = trace(exact_product(score, x), signs(x))
    torch.testing.assert_close(estimate.value, eigenvalues.sum().expand(3), rtol=1e-4, atol=1e-4)
    assert estimate.standard_error.isinf().all()


def rotated(d: int) -> tuple[Score, Tensor]:
    """A Gaussian whose axes are turned, and its Hessian."""
    turn = torch.linalg.qr(torch.randn(d, d)).Q
    hessian = -turn @ torch.diag(1 / torch.linspace(0.2, 2, d)) @ turn.T
    return (lambda x: x @ hessian), hessian


def test_trace_lies_within_its_standard_error() -> None:
    score, hessian = rotated(32)
    x = torch.randn(1, 32)
    estimates = [trace(exact_product(score, x), signs(x, 16, seed)) for seed in range(40)]
    z = torch.stack([(e.value - hessian.trace()) / e.standard_error for e in estimates])
    assert 0.7 < z.std() < 1.4
    assert z.mean().abs() < 0.5


def test_extreme_eigenvalues_of_a_turned_gaussian() -> None:
    score, hessian = rotated(32)
    x = torch.randn(2, 32)
    lowest, highest = extreme_eigenvalues(exact_product(score, x), torch.randn_like(x), 32)
    truth = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(lowest, truth[:1].expand(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(highest, truth[-1:].expand(2), rtol=1e-3, atol=1e-3)


def test_a_near_delta_component_is_found_by_few_iterations() -> None:
    """One direction in 4,096 of variance 1e-4: sharpness goes as 1 / s**2."""
    level = NoiseLevel(math.sqrt(1 - 1e-3), math.sqrt(1e-3))
    variances = torch.ones(4096)
    variances[7] = 1e-4
    score, eigenvalues = gaussian(variances, level)
    x = torch.randn(1, 4096)
    lowest, _ = extreme_eigenvalues(exact_product(score, x), torch.randn_like(x), 8)
    torch.testing.assert_close(lowest, eigenvalues.min().view(1), rtol=1e-2, atol=0)


def test_the_spectrum_of_a_multiple_of_one_is_one_point() -> None:
    found = spectrum(lambda v: -3 * v, torch.randn(2, 10), 5)
    assert torch.allclose(found.nodes, torch.tensor(-3.0))
    assert torch.allclose(found.weights.sum(1), torch.tensor(1.0))


def test_a_rows_spectrum_does_not_depend_on_its_neighbours() -> None:
    score = mixture(VP, torch.randn(3, 8), 0.2)
    x, start = torch.randn(4, 8), torch.randn(4, 8)
    together = spectrum(exact_product(score, x), start, 4)
    alone = spectrum(exact_product(score, x[2:3]), start[2:3], 4)
    torch.testing.assert_close(together.nodes[2:3], alone.nodes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [2, 64, 4096])
def test_log_volume_of_a_gaussian(d: int) -> None:
    variances = torch.linspace(0.2, 3, d)
    score, _ = gaussian(variances, VP)
    x = torch.randn(2, d)
    truth = (VP.a * variances / (VP.a**2 * variances + VP.s**2)).log().sum()
    estimate = log_volume(exact_product(score, x), signs(x), VP, 12, resolution=0)
    torch.testing.assert_close(estimate.value, truth.expand(2), rtol=2e-2, atol=2e-2)


def test_log_volume_of_a_point_is_its_resolution() -> None:
    score, _ = gaussian(torch.zeros(16), VP)
    x = torch.randn(1, 16)
    found = log_volume(exact_product(score, x), signs(x), VP, 4, resolution=0.1)
    assert found.value.item() == pytest.approx(16 * math.log(0.1), rel=1e-3)


def lid(variances: Tensor, level: NoiseLevel) -> float:
    score, _ = gaussian(variances, level)
    y = torch.zeros(1, len(variances))
    return flipd(score, trace(exact_product(score, y), signs(y)).value, y, level).item()


@pytest.mark.parametrize(("d", "k"), [(2, 1), (64, 0), (64, 5), (64, 64), (1024, 100)])
def test_lid_of_an_affine_subspace_is_its_dimension(d: int, k: int) -> None:
    variances = torch.zeros(d)
    variances[:k] = 1.0
    assert lid(variances, NoiseLevel(math.sqrt(1 - 1e-4), 1e-2)) == pytest.approx(k, abs=0.05 + 2e-4 * d)


def test_a_near_delta_has_dimension_zero_below_its_scale_and_sharpness_without_bound() -> None:
    sharp = [1 / gaussian(torch.zeros(4), NoiseLevel(math.sqrt(1 - s * s), s))[1].abs().max() for s in (0.3, 0.1, 0.01)]
    assert sharp[0] > sharp[1] > sharp[2]
    assert lid(torch.full((64,), 1e-8), NoiseLevel(math.sqrt(1 - 1e-2), 0.1)) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_every_parametrisation_of_one_density_has_one_geometry(kind: str) -> None:
    """A network that predicts noise, v, flow or the sample of the same Gaussian: Hessian, dimension and volume agree."""
    level = NoiseLevel(0.4, 0.6) if kind == "flow_prediction" else VP
    variances = torch.tensor([0.1, 1.0, 4.0])
    noised = level.a**2 * variances + level.s**2

    def network(x: Tensor) -> Tensor:
        x0 = level.a * variances / noised * x
        eps = level.s / noised * x
        return {"epsilon": eps, "v_prediction": level.a * eps - level.s * x0, "flow_prediction": eps - x0, "sample": x0}[kind]

    def score(x: Tensor) -> Tensor:
        return -to_noise(network(x), x, level, kind) / level.s

    x = torch.randn(2, 3)
    product = exact_product(score, x)
    torch.testing.assert_close(product(torch.ones(2, 3)), (-1 / noised).expand(2, 3))
    truth = (level.a * variances / noised).log().sum()
    torch.testing.assert_close(log_volume(product, signs(x), level, 3, resolution=0).value, truth.expand(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(flipd(score, (-1 / noised).sum(), x, level), 3 + level.s**2 * ((-1 / noised).sum() + norm(x / noised) ** 2))


BRANCHES = ("conditional", "unconditional", "guided", "contrast")
#: a branch, at another level than the point's own, by another step than the usual one. Where the branches nearly cancel, what is left bends
#: more along the usual step; noise that is asked at another level may lie on a ridge of the learned density, which no long step stays on.
PRODUCTS: list[tuple[str, float | None, dict[str, float]]] = [(branch, None, {}) for branch in BRANCHES[:3]]
PRODUCTS += [("contrast", None, {"step": 1e-3}), *((branch, 601.0, {"step": 1e-4}) for branch in BRANCHES)]


@pytest.mark.parametrize(("branch", "timestep", "step"), PRODUCTS)
def test_exact_and_difference_products_agree_on_the_network(branch: Any, timestep: float | None, step: Any, embedded: Any) -> None:
    found: list[float] = []

    def look(observation: Observation) -> None:
        score, v = observation.score(branch, timestep), probe(observation.x)
        exact, near = exact_product(score, observation.x)(v), difference_product(score, observation.x, **step)(v)
        found.extend((norm(exact - near) / norm(exact)).tolist())

    seeds = range(1 if timestep else 5)
    probe_run(embedded, ["a lion in snow"] * len(seeds), list(seeds), look, num_inference_steps=2, guidance_scale=2.5)
    assert max(found) < 0.02


def test_extreme_directions_of_a_gaussian_are_its_axes() -> None:
    score, eigenvalues = gaussian(torch.tensor([0.01, 0.8, 0.9, 1.0, 1.1, 20.0]), VP)
    x = torch.randn(3, 6)
    sharpest, flattest = extreme_directions(exact_product(score, x), torch.randn(3, 6), 6)
    assert sharpest.abs()[:, 0] == pytest.approx(torch.ones(3), abs=1e-3)
    assert flattest.abs()[:, 5] == pytest.approx(torch.ones(3), abs=1e-3)
    assert (sharpest * flattest).sum(1) == pytest.approx(torch.zeros(3), abs=1e-4)
    product = exact_product(score, x)
    assert (sharpest * product(sharpest)).sum(1) == pytest.approx(eigenvalues[0].expand(3), rel=1e-3)


def test_extreme_directions_survive_an_exhausted_space() -> None:
    score, _ = gaussian(torch.tensor([0.2, 0.2, 0.2, 5.0]), VP)
    x = torch.randn(2, 4)
    sharpest, flattest = extreme_directions(exact_product(score, x), torch.randn(2, 4), 4)
    assert flattest.abs()[:, 3] == pytest.approx(torch.ones(2), abs=1e-3)
    assert sharpest[:, 3] == pytest.approx(torch.zeros(2), abs=1e-3)
    assert norm(sharpest) == pytest.approx(torch.ones(2), abs=1e-5)
