"""Output density against generators whose volume is known, and what memorization does to it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdguard.audit import digits
from sdguard.audit.density import concentration, jacobian, log_density, log_volume_element, log_volume_element_lanczos, speed
from sdguard.audit.likelihood import gaussian, signs


def path_length(g: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int) -> Tensor:
    """Length of the straight path from ``start`` to ``end`` in the metric, ``[B]``, by the trapezoid rule; see `speed`."""
    return torch.trapezoid(speed(g, start, end, points), dx=1 / (points - 1), dim=1)


def sphere(z: Tensor) -> Tensor:
    """Latents as polar angle and azimuth on the unit sphere."""
    polar, azimuth = z.unbind(1)
    return torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], dim=1)


def test_a_linear_generators_volume_is_that_of_its_matrix() -> None:
    matrix = torch.randn(9, 4, dtype=torch.double)
    z = torch.randn(6, 4, dtype=torch.double)
    torch.testing.assert_close(jacobian(lambda z: z @ matrix.T, z), matrix.expand(6, 9, 4))
    expected = torch.linalg.slogdet(matrix.T @ matrix).logabsdet / 2
    torch.testing.assert_close(log_volume_element(lambda z: z @ matrix.T, z), expected.expand(6))


def test_the_spheres_volume_element_is_the_sine_of_the_polar_angle() -> None:
    z = torch.rand(50, 2, dtype=torch.double) * torch.tensor([math.pi, 2 * math.pi], dtype=torch.double)
    torch.testing.assert_close(log_volume_element(sphere, z), z[:, 0].sin().log(), atol=1e-9, rtol=0)


def test_the_exponential_of_a_gaussian_has_the_log_normal_density() -> None:
    z = torch.randn(30, 3, dtype=torch.double)
    expected = torch.distributions.LogNormal(0.0, 1.0).log_prob(z.exp()).sum(1)
    torch.testing.assert_close(log_density(torch.exp, z), expected)


def test_the_output_density_integrates_to_one_over_a_curve_whatever_its_parameter() -> None:
    """Along the image of one latent, by arc length: a spiral, run through unevenly."""

    def spiral(z: Tensor) -> Tensor:
        t = z + 0.4 * z.sin()
        return torch.cat([t * t.cos(), t * t.sin(), t], dim=1)

    z = torch.linspace(-7, 7, 4001, dtype=torch.double)[:, None]
    along = (spiral(z[1:]) - spiral(z[:-1])).norm(dim=1)
    density = log_density(spiral, (z[1:] + z[:-1]) / 2).exp()
    assert (density * along).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_lanczos_finds_the_exact_volume_of_many_latents() -> None:
    matrix = torch.randn(80, 40, dtype=torch.double) / 40**0.5
    other = torch.randn(40, 40, dtype=torch.double) / 40**0.5

    def g(z: Tensor) -> Tensor:
        return (z + 0.5 * (z @ other).tanh()) @ matrix.T

    z = torch.randn(8, 40, dtype=torch.double)
    known = log_volume_element(g, z)
    estimate = log_volume_element_lanczos(g, z, signs(z, 30), iterations=30)
    assert ((estimate.value - known) / estimate.standard_error).abs().max() < 4
    torch.testing.assert_close(estimate.value, known, atol=4.0, rtol=0)


def test_a_resolution_bounds_the_volume_of_a_singular_generator() -> None:
    z = torch.randn(5, 3, dtype=torch.double)

    def flat(z: Tensor) -> Tensor:
        return torch.cat([z[:, :1], z[:, :1], 0 * z[:, 1:]], dim=1)

    expected = (math.log(2 + 0.01**2) + 2 * math.log(0.01**2)) / 2
    torch.testing.assert_close(log_volume_element(flat, z, 0.01), torch.full((5,), expected, dtype=torch.double))
    lanczos = log_volume_element_lanczos(flat, z, signs(z, 200), 3, 0.01)
    torch.testing.assert_close(lanczos.value, torch.full((5,), expected, dtype=torch.double), atol=1.0, rtol=0)


@given(st.integers(0, 10_000), st.floats(0.1, 3.0))
@settings(deadline=None, max_examples=30)
def test_a_path_is_no_shorter_than_its_chord_and_a_rotation_of_the_output_leaves_it(seed: int, scale: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(5, 3, generator=draws, dtype=torch.double)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draws, dtype=torch.double)).Q
    start, end = torch.randn(2, 4, 3, generator=draws, dtype=torch.double)

    def g(z: Tensor) -> Tensor:
        return (z @ matrix.T).tanh()

    length = path_length(g, start, end, 200)
    assert (length > (g(end) - g(start)).norm(dim=1) - 1e-3).all()
    torch.testing.assert_close(path_length(lambda z: g(z) @ turn, start, end, 200), length)


def test_an_arcs_length_is_its_angle() -> None:
    start, end = torch.tensor([[math.pi / 2, 0.0]]).double(), torch.tensor([[math.pi / 2, 2.5]]).double()
    torch.testing.assert_close(path_length(sphere, start, end, 50), torch.tensor([2.5]).double())
    torch.testing.assert_close(speed(sphere, start, end, 3), torch.full((1, 3), 2.5).double())


def test_a_generator_of_jumps_has_its_length_in_few_places() -> None:
    start, end = torch.full((1, 2), -2.0), torch.full((1, 2), 2.0)
    even = concentration(lambda z: 3 * z, start, end, 200)
    jumps = concentration(lambda z: (200 * z).tanh(), start, end, 2001)
    assert even.item() == pytest.approx(0.1, abs=0.01)
    assert jumps.item() > 0.99


def test_memorizing_ten_digits_collapses_regions_of_latent_space() -> None:
    """Feiszli's claim at a small size: the same network and steps, on ten digits and on all."""
    z = torch.randn(512, 2, generator=torch.Generator().manual_seed(1))
    volumes = [log_volume_element(digits.of_points(points, steps=1200).decode, z, 1e-6) for points in (10, 1797)]
    few, many = (volume.quantile(torch.tensor([0.05, 0.95])) for volume in volumes)
    assert few[0] < many[0] - 1.5
    assert few[1] - few[0] > 1.5 * (many[1] - many[0])


def test_longer_training_on_ten_digits_collapses_the_volume_and_lets_it_explode_on_the_boundaries() -> None:
    """With one latent, where the volume element is the speed of the output."""
    z = torch.linspace(-3, 3, 4000)[:, None]
    volumes = [log_volume_element(digits.of_points(10, latents=1, steps=steps).decode, z, 1e-6) for steps in (300, 3000)]
    short, long = (volume.quantile(torch.tensor([0.25, 1.0])) for volume in volumes)
    assert long[0] < short[0] - 0.3
    assert long[1] > short[1] + 0.5


def test_the_density_is_the_priors_over_the_volume() -> None:
    z = torch.randn(4, 2).double()
    torch.testing.assert_close(log_density(sphere, z), gaussian(z) - log_volume_element(sphere, z))
