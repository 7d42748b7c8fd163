"""Geometry and signals by denoisers that compute in half precision, against densities whose answer is known.

What is allowed follows from the dtype. A network here rounds its input, a subtraction and a multiplication: three errors of at most
``u = eps / 2`` of what is rounded, ``u / 3**.5`` in root mean square. A difference over a relative step h has those of two evaluations,
``2**.5 u / h`` of a product, and half of that where it is central, since its points lie twice as far apart. They are independent of a
probe's signs, so that a trace errs by so much of the root of its summed squares; of that, four deviations are allowed. What is a norm
grows by the square of the errors in it. Sums of d numbers in fp32 are held to `SUMS` of what is summed.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdguard.denoiser.probe import probe_run
from sdguard.geometry.dimension import flipd
from sdguard.geometry.displacement import displaced, step_in
from sdguard.geometry.hessian import HessianProduct, Score, difference_product, exact_product, trace
from sdguard.geometry.rollout import grid, probe
from sdguard.geometry.rowwise import norm
from sdguard.geometry.volume import RESOLUTION
from sdguard.observation import CLEAN, NoiseLevel, Observation
from sdguard.signals.condition_jacobian import condition_jacobian
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.signals.lid import TIMESTEP, lid_conditional, lid_noisy, lid_unconditional
from sdguard.signals.output_density import STEP, output_density, output_density_ahead
from sdguard.signals.sharpness import sharpness
from sdguard.steering.descent import lid_gradient
from sdguard.steering.noise import LOOK
from sdguard.steering.noise import sharpness as looked

#: a noise level whose 1 / s, 1.625, is a number of every dtype, so that the density off a subspace is the same in each.
LEVEL = NoiseLevel(math.sqrt(1 - (8 / 13) ** 2), 8 / 13)

SUMS = 1e-5

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
sizes = pytest.mark.parametrize("d", [64, 16384])

sides = pytest.mark.parametrize("central", [True, False], ids=["central", "one-sided"])

Network = Callable[[Tensor], Tensor]


def gaussian(variances: Tensor, means: Tensor) -> Network:
    """The noise prediction for a Gaussian of independent components, computed in the dtype of its input."""
    coefficients = LEVEL.s / (LEVEL.a**2 * variances + LEVEL.s**2)
    return lambda x: coefficients.to(x.dtype) * (x - (LEVEL.a * means).to(x.dtype))


def mixture(means: Tensor, variance: float) -> Network:
    """The noise prediction for an equal mixture of two isotropic Gaussians at plus and minus ``means``; sums in fp32, as in kernels."""
    noised = LEVEL.a**2 * variance + LEVEL.s**2

    def network(x: Tensor) -> Tensor:
        centre = (LEVEL.a * means).to(x.dtype)
        tilt = torch.tanh((x.float() * centre.float()).sum(1, keepdim=True) / noised).to(x.dtype)
        return LEVEL.s / noised * (x - tilt * centre)

    return network


def score_in(network: Network, dtype: torch.dtype) -> Score:
    """The score of a network that computes in ``dtype``."""
    return lambda x: -network(x.to(dtype)).to(x.dtype) / LEVEL.s


def share_of_error(dtype: torch.dtype, step: float = 4e-3, central: bool = False) -> float:
    """Root mean square error of a product's components, as a share of theirs."""
    return math.sqrt(2) * torch.finfo(dtype).eps / 2 / step_in(dtype, step) / (2 if central else 1)


def as_given(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Points that are numbers of ``dtype``, as those of a run are."""
    return x.to(dtype).to(x.dtype)


def difference(network: Network, dtype: torch.dtype, x: Tensor, central: bool) -> HessianProduct:
    score = score_in(network, dtype)
    return difference_product(score, x, known=None if central else score(x), dtype=dtype)


def truth(network: Network, x: Tensor) -> HessianProduct:
    return exact_product(score_in(network, torch.float32), x)


@sizes
@dtypes
@sides
def test_products_of_a_gaussian(dtype: torch.dtype, d: int, central: bool) -> None:
    network = gaussian(torch.linspace(0.01, 3, d), torch.full((d,), 0.5))
    x, v = as_given(torch.randn(2, d), dtype), torch.randn(2, d)
    found, expected = difference(network, dtype, x, central)(v), truth(network, x)(v)
    assert (norm(found - expected) / norm(expected)).max() < 1.4 * share_of_error(dtype, central=central)


@sizes
@dtypes
@sides
def test_products_of_a_mixture(dtype: torch.dtype, d: int, central: bool) -> None:
    """Halfway between its parts the difference errs by its step too, up to a hundredth of what it is."""
    network = mixture(torch.randn(d) / d**0.5, 0.2)
    x, v = as_given(torch.randn(2, d), dtype), torch.randn(2, d)
    found, expected = difference(network, dtype, x, central)(v), truth(network, x)(v)
    assert (norm(found - expected) / norm(expected)).max() < 0.01 + 1.4 * share_of_error(dtype, central=central)


@sizes
@dtypes
@sides
def test_the_trace_at_a_noisy_point(dtype: torch.dtype, d: int, central: bool) -> None:
    variances = torch.linspace(0.01, 3, d)
    network = gaussian(variances, torch.full((d,), 0.5))
    x = as_given(LEVEL.a * (0.5 + variances.sqrt() * torch.randn(2, d)) + LEVEL.s * torch.randn(2, d), dtype)
    found = trace(difference(network, dtype, x, central), [probe(x)]).value
    eigenvalues = truth(network, x)(torch.ones(2, d))
    allowed = 4 * share_of_error(dtype, central=central) * norm(eigenvalues) + SUMS * eigenvalues.abs().sum(1)
    assert ((found - eigenvalues.sum(1)).abs() < allowed).all()


@sizes
@dtypes
@pytest.mark.parametrize("share", [0.0, 78 / 16384, 0.5])
def test_dimension_of_an_affine_subspace(dtype: torch.dtype, d: int, share: float) -> None:
    k = round(share * d)
    variances, mean = (torch.arange(d) < k).float(), torch.randn(d)
    network = gaussian(variances, mean)
    y = LEVEL.a * (mean + variances * torch.randn(2, d))
    found = flipd(score_in(network, dtype), trace(difference(network, dtype, y, central=True), [probe(y)]).value, y, LEVEL)
    eigenvalues = truth(network, y)(torch.ones(2, d))
    expected = flipd(score_in(network, torch.float32), eigenvalues.sum(1), y, LEVEL)
    allowed = 4 * share_of_error(dtype, central=True) * LEVEL.s**2 * norm(eigenvalues) + SUMS * d
    assert ((found - expected).abs() < allowed).all()


def test_a_point_that_is_not_moved_at_all_has_a_product_of_none() -> None:
    x = torch.ones(2, 8)
    for dtype in (torch.float32, torch.bfloat16):
        assert difference_product(lambda y: -y, x, -x, dtype=dtype)(torch.zeros(2, 8)).abs().max() == 0


def test_in_single_precision_nothing_is_rounded() -> None:
    x, way = torch.randn(2, 8), torch.randn(2, 8) * 1e-3
    moved, share = displaced(x, way, torch.float32)
    assert torch.equal(moved, x + way)
    assert share.tolist() == [[1.0]] * 2
    assert step_in(torch.float32, 4e-3) == 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_a_step_is_several_spacings_long(dtype: torch.dtype) -> None:
    assert 4 * torch.finfo(dtype).eps < step_in(dtype, 4e-3) < 0.1


def test_what_was_moved_by_is_what_rounding_has_left() -> None:
    """Next to 1 numbers of bf16 are 1/128 apart."""
    moved, share = displaced(torch.ones(2, 4), torch.tensor([[0.006], [0.012]]).expand(2, 4), torch.bfloat16)
    assert moved[:, 0].tolist() == [1 + 1 / 128, 1 + 2 / 128]
    assert share.flatten().tolist() == pytest.approx([1 / 128 / 0.006, 2 / 128 / 0.012])


def remembered(picture: Tensor, dtype: torch.dtype) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """Text 1 has but one picture, text 0 has white data; computed in ``dtype``."""

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        x, share = x.to(dtype), text[:, 0, 0].view(-1, 1, 1, 1).to(dtype)
        return (share * ((x - (level.a * picture).to(dtype)) / level.s) + (1 - share) * (level.s * x)).float()

    return eps


@pytest.fixture
def recall(observe: Callable[..., Observation]) -> Callable[..., Observation]:
    """Makes an observation of `remembered` for d dimensions."""

    def make(dtype: torch.dtype, d: int, text: float = 1.0, **fields: Any) -> Observation:
        side = math.isqrt(d // 4)
        picture, x = torch.linspace(-2, 2, d).view(4, side, side), as_given(torch.randn(2, 4, side, side), dtype)
        return observe(remembered(picture, dtype), x, torch.full((2, 3, 2), text), dtype=dtype, **fields)

    return make


def near(found: Tensor, expected: Tensor | float, allowed: float) -> bool:
    return bool(((found - expected).abs() <= allowed).all())


@sizes
@dtypes
def test_dimensions_of_the_only_picture_and_of_white_data(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    observation = recall(dtype, d)
    level, squares = observation.level_at(TIMESTEP), torch.linspace(-2, 2, d).square().sum().item()
    allowed = 4 * share_of_error(dtype, central=True) * d**0.5 + SUMS * d
    assert near(lid_conditional(observation), 0.0, allowed)
    assert near(lid_unconditional(observation), -(d + level.s**2 * (level.a**2 * squares - d)), allowed)


@sizes
@dtypes
def test_dimension_at_the_noisy_point(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    """Of two traces."""
    observation = recall(dtype, d, timestep=301.0)
    allowed = 4 * 2**0.5 * share_of_error(dtype) * d**0.5 + SUMS * d
    assert near(lid_noisy(observation), observation.level.a**2 * d, allowed)


@sizes
@dtypes
def test_sharpness_of_the_only_picture_against_white_data(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    observation = recall(dtype, d, timestep=301.0)
    s, error = observation.level.s, 1.4 * share_of_error(dtype, 1 / 128)
    expected = (1 / s**2 - 1) * guidance_norm(observation) / s
    assert near(sharpness(observation).sqrt() / expected, 1.0, error**2 + 4 * error / d**0.5 + SUMS)


@sizes
@dtypes
def test_output_density_of_the_only_picture_against_white_data(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    """The Jacobian of the only picture, which is none, is seen as the errors in it, divided by a."""
    observation = recall(dtype, d, timestep=301.0)
    error = 1.4 * share_of_error(dtype) / observation.level.a
    expected = math.log(observation.level.a**2 + RESOLUTION**2) / 2 - math.log(RESOLUTION)
    assert near(output_density(observation) / d, expected, math.log1p(error**2) / 2 + 4 * error**2 / d**0.5 + SUMS)


@sizes
@dtypes
def test_output_density_along_the_short_rollout(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    """Every one of the two times four evaluations adds its errors; what is measured has shrunk to ``exp(-expected)`` at the end."""
    observation = recall(dtype, d, text=0.0)
    levels = [*map(observation.level_at, grid(observation)), CLEAN]
    expected = -sum(math.log(after.a * before.a + after.s * before.s) for before, after in itertools.pairwise(levels))
    error = 4**0.5 * share_of_error(dtype, STEP) * math.exp(expected)
    assert near(output_density_ahead(observation), expected, math.log1p(error**2) / 2 + 4 * error / d**0.5 + SUMS)


@sizes
@dtypes
def test_condition_jacobian_of_a_linear_text(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    """Two predictions of unit variance are rounded, the step apart, and the norm has their errors in it."""
    observation = recall(dtype, d)
    expected, error = guidance_norm(observation), 2**0.5 * torch.finfo(dtype).eps / 2 / 0.1 * d**0.5
    error = error / expected.min().item()
    assert near(condition_jacobian(observation) / expected, 1.0, error**2 / 2 + 4 * error / d**0.5 + SUMS)


@sizes
@dtypes
def test_steering_takes_its_differences_in_the_same_way(dtype: torch.dtype, d: int, recall: Callable[..., Observation]) -> None:
    """The density under text c of `remembered` has a Jacobian of ``c / s + (1 - c) s``, of which the trace is lost as c grows."""
    observation = recall(dtype, d, timestep=301.0)
    s = observation.level.s
    _, gradient = lid_gradient(observation, observation.condition)
    # of the predictions, and of the two parts of the gradient, each a number of the dtype
    assert near(gradient[:, 0, 0] / (s * d * (1 / s - s)), 1.0, 4 * 2 * share_of_error(dtype) / d**0.5 + SUMS)
    step = step_in(dtype, LOOK)
    error = 1.4 * share_of_error(dtype, LOOK)
    expected = (1 / s - s) * step * norm(observation.x)
    assert near(looked(observation, observation.x).sqrt() / expected, 1.0, error**2 + 4 * error / d**0.5 + SUMS)


@dtypes
def test_an_observation_of_a_run_says_what_its_denoiser_takes(dtype: torch.dtype, tiny: Any) -> None:
    found: list[Observation] = []
    probe_run(tiny.to(dtype), ["a cat"], [0], found.append, num_inference_steps=2)
    (seen,) = found
    assert [seen.dtype, seen.at_reference.dtype] == [dtype] * 2
    assert torch.equal(seen.at(seen.x / 3, 1.0).x, as_given(seen.x / 3, dtype))
