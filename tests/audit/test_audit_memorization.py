"""The memorization score against closed forms, its invariants, and trainings that are stopped and shared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdguard.audit.memorization import fold_of, log_likelihoods, memorization, scores
from sdguard.audit.subjects import LogLikelihood, Trainable


def gaussian_mean(data: Tensor, seed: int) -> LogLikelihood:
    """Maximum likelihood of a unit Gaussian's mean."""
    mean = data.mean()
    return lambda x: -(x - mean).square() / 2 - math.log(2 * math.pi) / 2


def kernel_density(data: Tensor, seed: int, width: float = 0.3) -> LogLikelihood:
    """A Gaussian kernel density."""

    def log_likelihood(x: Tensor) -> Tensor:
        kernels = -((x[:, None] - data[None]) / width).square() / 2 - math.log(width * math.sqrt(2 * math.pi))
        return kernels.logsumexp(1) - math.log(len(data))

    return log_likelihood


def test_leaving_each_point_out_gives_the_closed_form_for_a_gaussians_mean(tmp_path: Path) -> None:
    """Of models that leave out j, the one with j = i has mean ``m - d_i / (n - 1)``; the others' squared errors average in closed form."""
    x = torch.randn(15, dtype=torch.double)
    n, d = len(x), x - x.mean()
    unseen = (n / (n - 1) * d).square()
    others = d.square().sum() - d.square()
    seen = d.square() - 2 * d.square() / (n - 1) ** 2 + others / (n - 1) ** 3
    found = memorization(Trainable(x, gaussian_mean), folds=n, repeats=1, seed=0, work=tmp_path, about={})
    np.testing.assert_allclose(found.score, ((unseen - seen) / 2).numpy(), atol=1e-12)


def test_a_kernel_density_memorizes_its_lonely_point_by_as_much_as_its_neighbours_are_far(tmp_path: Path) -> None:
    """Seen, its density is its own kernel's; unseen, that of n - 1 points at distance r."""
    r, width, n = 4.0, 0.3, 12
    x = torch.cat([torch.zeros(n - 1), torch.tensor([r])]).double()
    found = memorization(Trainable(x, kernel_density), folds=n, repeats=1, seed=0, work=tmp_path, about={})
    assert found.score.idxmax() == n - 1
    assert found.score.iloc[-1] == pytest.approx((r / width) ** 2 / 2 - math.log(n - 1), abs=1e-9)
    assert found.score.iloc[:-1].max() == pytest.approx(0.0, abs=0.05)


@given(st.lists(st.integers(0, 8), min_size=6, max_size=40), st.integers(2, 4), st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_folds_hold_each_group_out_whole_and_are_even(groups: list[int], folds: int, repeat: int, seed: int) -> None:
    fold = fold_of(np.array(groups), folds, repeat, seed)
    by_group = {group: {f for g, f in zip(groups, fold, strict=True) if g == group} for group in groups}
    assert all(len(found) == 1 for found in by_group.values())
    sizes = np.bincount([next(iter(found)) for found in by_group.values()], minlength=folds)
    assert sizes.max() - sizes.min() <= 1


@given(st.integers(1, 4), st.integers(2, 5), st.integers(3, 8), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_scores_are_those_of_brute_force_and_ignore_how_likely_a_point_is_in_itself(repeats: int, folds: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, fold = rng.normal(size=(repeats, folds, n)), rng.integers(folds, size=(repeats, n))
    each = [
        [np.mean([values[r, k, i] for k in range(folds) if k != fold[r, i]]) - values[r, fold[r, i], i] for i in range(n)]
        for r in range(repeats)
    ]
    found = scores(values, fold)
    np.testing.assert_allclose(found.score, np.mean(each, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.score, found.seen - found.unseen, atol=1e-12)
    np.testing.assert_allclose(scores(values + 10 * rng.normal(size=n), fold).score, found.score, atol=1e-11)
    if repeats > 1:
        np.testing.assert_allclose(found.standard_error, np.std(each, axis=0, ddof=1) / repeats**0.5, atol=1e-12)
    else:
        assert np.isinf(found.standard_error).all()


def test_the_standard_error_is_that_of_more_repeats(tmp_path: Path) -> None:
    """A likelihood that is mere noise has score zero, and falls within two errors of it as often as it should."""

    def noise(data: Tensor, seed: int) -> LogLikelihood:
        return lambda x: torch.randn(len(x), generator=torch.Generator().manual_seed(seed))

    found = memorization(Trainable(torch.zeros(300), noise), folds=3, repeats=12, seed=0, work=tmp_path, about={})
    assert (found.score.abs() < 2.2 * found.standard_error).mean() == pytest.approx(0.95, abs=0.03)  # Student, 11 degrees of freedom


def test_stopped_trainings_go_on_and_more_repeats_add_to_what_there_is(tmp_path: Path) -> None:
    trained: list[int] = []

    def fit(data: Tensor, seed: int) -> LogLikelihood:
        if len(trained) == 4 and not (tmp_path / "go").exists():
            raise KeyboardInterrupt
        trained.append(seed)
        return gaussian_mean(data, seed)

    subject, about = Trainable(torch.arange(9).double(), fit), {"subject": "x"}
    with pytest.raises(KeyboardInterrupt):
        memorization(subject, 3, 2, 0, tmp_path, about)
    (tmp_path / "go").touch()
    memorization(subject, 3, 2, 0, tmp_path, about)
    assert len(trained) == len(set(trained)) == 6
    memorization(subject, 3, 3, 0, tmp_path, about)
    assert len(trained) == len(set(trained)) == 9
    memorization(subject, 3, 3, 0, tmp_path, {"subject": "another"})
    assert len(trained) == 18


def test_points_of_one_group_are_left_out_together(tmp_path: Path) -> None:
    """A duplicate left in would hide what a point's absence does."""
    x = torch.tensor([0.0, 0.1, 0.2, 0.3, 5.0, 5.0]).double()
    alone = memorization(Trainable(x, kernel_density), 3, 8, 0, tmp_path, {})
    together = memorization(Trainable(x, kernel_density, np.array([0, 1, 2, 3, 4, 4])), 3, 8, 0, tmp_path, {})
    assert (together.score[4:] > 50).all()
    assert (alone.score[4:] < together.score[4:]).all()


@pytest.mark.parametrize("folds", [1, 10])
def test_folds_that_cannot_be_are_refused_in_a_sentence(folds: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{folds} folds cannot be had of 9 points"):
        log_likelihoods(Trainable(torch.arange(9), gaussian_mean), folds, 1, 0, tmp_path, {})


SCRIPT = """
import sys
from pathlib import Path
import torch
from sdguard.audit.memorization import memorization
from sdguard.audit.subjects import Trainable

def fit(data, seed):
    print(f"trained {seed}\\n", end="", flush=True)
    return lambda x: -(x - data.mean()) ** 2

found = memorization(Trainable(torch.arange(8.0), fit), 4, 2, 0, Path(sys.argv[1]), {})
assert found.score.notna().all() and len(found) == 8
"""


def test_processes_share_the_trainings(tmp_path: Path, launch: Callable[..., str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = launch(str(tmp_path / "work"), program=(str(tmp_path / "script.py"),))
    seeds = re.findall(r"trained (\d+)", printed)
    assert len(seeds) == len(set(seeds)) == 8
