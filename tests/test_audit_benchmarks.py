"""The papers' claims at a size that a test can afford, and the pieces of the agreement study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

pytest.importorskip("skdim")

from benchmarks import agreement, leaving_out
from benchmarks.audit import rank_correlation
from sdguard.audit import digits
from sdguard.audit.likelihood import elbo, levels_between, probability_flow, signs
from sdguard.audit.memorization import memorization
from sdguard.audit.neighbours import nearest
from sdguard.audit.subjects import LogLikelihood, Trainable
from sdguard.testbed.world import pool


def test_atypical_digits_are_memorized_most_and_a_lower_rate_memorizes_less(tmp_path: Path) -> None:
    data = digits.digits()[:400]

    def trainable(rate: float) -> Trainable:
        def fit(points: Tensor, seed: int) -> LogLikelihood:
            return digits.trained(digits.new_vae(seed), points, seed, 100, rate).log_likelihood

        return Trainable(data, fit)

    fast = memorization(trainable(3e-3), 4, 1, 0, tmp_path, {"rate": "fast"})
    slow = memorization(trainable(3e-4), 4, 1, 0, tmp_path, {"rate": "slow"})
    alone, _ = nearest(data.numpy(), data.numpy(), 2)
    assert spearmanr(fast.score, alone[:, 1]).statistic > 0.3
    assert fast.score.median() > 1.5 * slow.score.median()


def test_both_likelihoods_of_a_diffusion_model_rank_digits_alike() -> None:
    data, draws = digits.scaled(digits.digits()), torch.Generator().manual_seed(0)
    model = digits.trained(digits.new_denoiser(0), data[:600], 0, 60, 1e-3)
    points = data[600:700]
    bound = elbo(model, points, levels_between(digits.LEAST_NOISE, digits.MOST_NOISE, 48), 4, draws)
    flow = probability_flow(model, points, levels_between(digits.LEAST_NOISE, digits.MOST_NOISE, 16), signs(points, 8, draws))
    assert spearmanr(bound, flow).statistic > 0.7


def test_a_captions_visits_follow_its_repetitions_and_what_is_left_out_is_never_shown() -> None:
    captions, rng = pool(), np.random.default_rng(0)
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
