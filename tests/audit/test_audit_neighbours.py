"""The nearest-neighbour tests: what they see, and what they miss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdguard.audit.neighbours import pixels, sample_ratio, second_ratio


def test_a_copy_has_ratio_zero_and_a_stranger_about_one() -> None:
    rng = np.random.default_rng(0)
    training = rng.normal(size=(200, 64))
    assert second_ratio(training[:5] + 1e-6, training).max() < 1e-4
    assert second_ratio(rng.normal(size=(5, 64)), training).min() > 0.8


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-5, 5))
@settings(deadline=None, max_examples=30)
def test_ratios_do_not_hang_on_scale_origin_or_rotation(seed: int, scale: float, origin: float) -> None:
    rng = np.random.default_rng(seed)
    generated, training, held_out = rng.normal(size=(3, 12, 4)).astype(np.float64)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]

    def moved(x: np.ndarray) -> np.ndarray:
        return scale * x @ turn + origin

    ratio = second_ratio(generated, training)
    assert ((ratio >= 0) & (ratio <= 1)).all()
    np.testing.assert_allclose(second_ratio(moved(generated), moved(training)), ratio, rtol=1e-2)
    found = sample_ratio(training, held_out, generated)
    np.testing.assert_allclose(sample_ratio(moved(training), moved(held_out), moved(generated)), found, rtol=1e-2)


def test_a_shift_by_two_pixels_fools_the_test() -> None:
    """The paper's first objection: the copy is plain to see, and no nearer than a stranger."""
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, size=(60, 16, 16, 3)).astype(np.uint8)
    assert second_ratio(training[:5], training).max() < 0.01
    assert second_ratio(np.roll(training[:5], 2, axis=2), training).min() > 0.9


def test_points_that_the_model_draws_near_have_a_sample_ratio_above_one() -> None:
    rng = np.random.default_rng(0)
    training, held_out, generated = rng.normal(size=(3, 100, 8))
    generated[:10] = training[:10] + 0.05 * rng.normal(size=(10, 8))
    found = sample_ratio(training, held_out, generated)
    assert found[:10].min() > 3
    assert np.median(found[10:]) == pytest.approx(1.0, abs=0.15)


def test_pictures_are_read_in_zero_to_one() -> None:
    found = pixels(np.full((2, 4, 4, 3), 255, np.uint8))
    assert found.shape == (2, 48)
    assert (found == 1).all()
