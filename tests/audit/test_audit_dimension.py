"""Dimensions against manifolds that are known, and the verdicts they lead to."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("skdim")

from sdguard.audit import manifolds
from sdguard.audit.dimension import (
    DATA,
    NEITHER,
    OVERFITTING,
    Dimension,
    aligned,
    below,
    classify,
    data_dimension,
    deficit,
    model_dimension,
)
from sdguard.audit.likelihood import level_of, signs


def test_flipd_is_exact_on_gaussians() -> None:
    """At the mean, ``d - s**2 tr (a**2 C + s**2 I)**-1``, off it the squared score beside; many probes find the trace."""
    covariance = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.01, 0.0], dtype=torch.double))
    found = manifolds.Mixture(torch.zeros(1, 5, dtype=torch.double), covariance[None])
    level = level_of(0.1)
    x = torch.randn(7, 5, dtype=torch.double) @ covariance.sqrt()
    precision = torch.linalg.inv(level.a**2 * covariance + level.s**2 * torch.eye(5, dtype=torch.double))
    expected = 5 - level.s**2 * precision.trace() + level.s**2 * (level.a * x @ precision).square().sum(1)
    estimate = model_dimension(found.noise, x, level, signs(x, 8))
    np.testing.assert_allclose(estimate.value, expected.numpy(), atol=1e-8)  # signs see a diagonal Hessian without error


@given(st.integers(0, 12), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_flipd_is_the_dimension_of_a_random_subspace(dimension: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    covariance = manifolds.subspaces([dimension], draws)
    found = manifolds.Mixture(torch.zeros(1, manifolds.AMBIENT, dtype=torch.double), covariance)
    x = torch.randn(6, manifolds.AMBIENT, generator=draws, dtype=torch.double) @ covariance[0]
    np.testing.assert_allclose(model_dimension(found.noise, x, level_of(1e-3)).value, dimension, atol=0.01)


def test_probes_err_by_as_much_as_they_say() -> None:
    covariance = manifolds.subspaces([8], torch.Generator().manual_seed(0))
    found = manifolds.Mixture(torch.zeros(1, manifolds.AMBIENT, dtype=torch.double), covariance)
    x = torch.randn(300, manifolds.AMBIENT, dtype=torch.double) @ covariance[0]
    estimate = model_dimension(found.noise, x, level_of(1e-3), [signs(x[:1], 1)[0].expand_as(x).contiguous() for _ in range(64)])
    shared = estimate.value - 8  # one error for all points, as all have the same probes
    assert np.ptp(shared) < 1e-3
    assert abs(shared[0]) < 4 * estimate.standard_error[0]


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_the_datas_dimension_is_found_within_a_fifth(dimension: int) -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(3000, dimension)) @ rng.normal(size=(dimension, 15))
    found = data_dimension(data[:100], data)
    assert found.value.mean() == pytest.approx(dimension, rel=0.2)
    assert np.std(found.value) == pytest.approx(found.standard_error.mean(), rel=0.5)


def test_a_point_is_not_its_own_neighbour() -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(400, 3))
    without = data_dimension(data[:1], data[1:], neighbours=20)
    assert data_dimension(data[:1], data, neighbours=20).value == pytest.approx(without.value)


def test_every_kind_of_point_on_known_manifolds_is_told() -> None:
    drawn = manifolds.draw_sample(points=20, each=2000, seed=0)
    own = data_dimension(drawn.points.numpy(), drawn.data.numpy())
    found = model_dimension(drawn.model.noise, drawn.points, level_of(1e-3))
    verdicts = classify(found, own, below(own, 3.0))
    truth = np.array([component.truth for component in drawn.of])
    assert set(truth) == {OVERFITTING, DATA, NEITHER}
    assert (verdicts == truth).mean() >= 0.97
    assert (
        np.abs(found.value - [component.model for component in drawn.of]) < 0.05
    ).mean() >= 0.9  # where points of a line overlap, it is a line


def test_a_network_that_was_driven_to_a_point_has_lost_the_dimensions_of_its_manifold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on draws of a subspace of three dimensions, and on one point of another such subspace."""
    monkeypatch.setattr(manifolds, "COMPONENTS", (manifolds.Component(3, 3, NEITHER), manifolds.Component(3, 0, OVERFITTING)))
    monkeypatch.setattr(manifolds, "AMBIENT", 6)
    drawn = manifolds.draw_sample(points=1, each=1500, seed=0)
    found = model_dimension(manifolds.learned(drawn, epochs=60), drawn.points.float(), level_of(0.2))
    assert found.value[0] == pytest.approx(3.0, abs=0.6)
    assert found.value[1] == pytest.approx(0.0, abs=0.4)


def test_draws_of_a_mixture_have_its_moments() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)).Q
    covariance = turn @ torch.diag(torch.tensor([2.0, 0.5, 0.1, 0.0], dtype=torch.double)) @ turn.T
    mean = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.double)
    x = manifolds.Mixture(mean[None], covariance[None]).sample(20_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.06, rtol=0)


def test_a_claim_of_overfitting_errs_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    model = Dimension(5 + rng.normal(size=n) * 0.3, np.full(n, 0.3))
    data = Dimension(5 + rng.normal(size=n) * 0.4, np.full(n, 0.4))
    assert (classify(model, data, np.zeros(n, bool)) == OVERFITTING).mean() == pytest.approx(0.05, abs=0.01)
    assert deficit(model, data).std() == pytest.approx(1.0, abs=0.05)


def test_what_the_data_let_expect_is_read_off_the_reference_points() -> None:
    """A model biased by a factor and an offset: a point on the line has no deficit, one under it has."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(2, 20, size=300)
    reference = Dimension(40 + 3 * truth + rng.normal(size=300), np.zeros(300))
    own = Dimension(np.array([10.0, 10.0]), np.ones(2))
    model = Dimension(np.array([70.0, 55.0]), np.zeros(2))
    expected = aligned(model, reference, Dimension(truth, np.zeros(300)), own)
    np.testing.assert_allclose(expected.value, 70.0, atol=0.3)
    np.testing.assert_allclose(expected.standard_error, 1.0, atol=0.15)
    assert classify(model, expected, np.zeros(2, bool)).tolist() == [NEITHER, OVERFITTING]


def test_too_few_data_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="50 nearest neighbours cannot be had of 20 data points"):
        data_dimension(np.zeros((2, 3)), np.zeros((20, 3)))


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skdim", None)
    with pytest.raises(ModuleNotFoundError, match=r"sdguard\[audit\]"):
        data_dimension(np.zeros((2, 3)), np.zeros((200, 3)))
