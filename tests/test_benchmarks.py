"""The benchmarks' statistics against libraries and brute force; their runs can be stopped and shared; their tables are the results'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from benchmarks import audit, detection, report
from benchmarks.published import released
from benchmarks.readme import put
from benchmarks.running import measured
from benchmarks.statistics import auc, bootstrap_weights, estimates, roc_band, true_positive_rate
from sdguard.observation import Observation, from_noise
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.signals.sharpness import sharpness

SAMPLES = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=30).filter(
    lambda rows: 0 < sum(truth for truth, _, _ in rows) < len(rows)
)


@given(SAMPLES)
@settings(deadline=None, max_examples=60)
def test_auc_and_true_positive_rate_are_those_of_the_library_and_of_brute_force(rows: list[tuple[bool, int, int]]) -> None:
    truth, score = np.array([t for t, _, _ in rows]), np.array([float(s) for _, s, _ in rows])
    ones = np.ones((1, len(rows)))
    assert auc(truth, score, ones)[0] == pytest.approx(roc_auc_score(truth, score))
    for rate in (0.0, 0.2, 0.5, 1.0):
        bounds = [b for b in [-np.inf, *score] if (score[~truth] > b).mean() <= rate]
        assert true_positive_rate(truth, score, ones, rate)[0] == pytest.approx((score[truth] > min(bounds)).mean())


@given(SAMPLES)
@settings(deadline=None, max_examples=60)
def test_a_weight_is_a_sample_drawn_so_often(rows: list[tuple[bool, int, int]]) -> None:
    truth, score = np.array([t for t, _, _ in rows]), np.array([float(s) for _, s, _ in rows])
    weights = np.array([w for _, _, w in rows])
    again = np.repeat(np.arange(len(rows)), weights)
    if not 0 < truth[again].sum() < len(again):
        return
    ones = np.ones((1, len(again)))
    assert auc(truth, score, weights[None].astype(float))[0] == pytest.approx(auc(truth[again], score[again], ones)[0])
    for rate in (0.0, 0.3):
        weighted = true_positive_rate(truth, score, weights[None].astype(float), rate)[0]
        assert weighted == pytest.approx(true_positive_rate(truth[again], score[again], ones, rate)[0])


def test_the_bootstrap_draws_whole_clusters_and_its_interval_holds_the_truth() -> None:
    clusters = np.repeat(np.arange(40), 3)
    weights = bootstrap_weights(clusters)
    assert (weights.reshape(-1, 40, 3) == weights.reshape(-1, 40, 3)[..., :1]).all()
    assert (weights.sum(1) == len(clusters)).all()
    rng = np.random.default_rng(0)
    truth = clusters % 2 == 0
    score = rng.normal(size=len(clusters)) + truth
    area, rate = estimates(truth, score, clusters, 0.1)
    assert area.low < area.value < area.high
    assert area.low < 0.76 < area.high  # P(N(1, 1) > N(0, 1)) = .76
    assert rate.low <= rate.value <= rate.high
    curve, low, high = roc_band(truth, score, clusters, np.array([0.0, 0.1, 1.0]))
    assert curve[1] == rate.value
    assert curve[2] == 1
    assert (low <= high).all()


def test_a_measurement_that_was_stopped_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    samples = pd.DataFrame({"prompt": [f"a cat {i}" for i in range(10)]})
    seen: list[str] = []

    def measure(part: pd.DataFrame) -> pd.DataFrame:
        if len(seen) == 6 and not tmp_path.joinpath("go").exists():
            raise KeyboardInterrupt
        seen.extend(part.prompt)
        return part.assign(length=part.prompt.str.len(), series=[[1.0, 2.0]] * len(part))

    with pytest.raises(KeyboardInterrupt):
        measured("x", samples, measure, tmp_path, {"model": "m"}, 3)
    assert len(seen) == 6
    (tmp_path / "go").touch()
    found = measured("x", samples, measure, tmp_path, {"model": "m"}, 3)
    assert found.prompt.tolist() == samples.prompt.tolist() == seen
    assert (found.model == "m").all()
    assert found.series.iloc[0].tolist() == [1.0, 2.0]
    measured("x", samples, measure, tmp_path, {"model": "another"}, 3)
    assert len(seen) == 20


SCRIPT = """
import os, sys
from pathlib import Path
import pandas as pd
from benchmarks.running import measured

def measure(part):
    print("measured", *part.row, flush=True)
    return part.assign(square=part.row ** 2)

found = measured("squares", pd.DataFrame({"row": range(11)}), measure, Path(sys.argv[1]), {}, 2)
assert found.square.tolist() == [i ** 2 for i in range(11)]
"""


def test_two_processes_share_the_batches_and_both_have_all_rows(tmp_path: Path, launch: Callable[..., str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = launch(str(tmp_path / "work"), program=(str(tmp_path / "script.py"),))
    measured_rows = [int(row) for line in printed.splitlines() if "measured" in line for row in line.split("measured")[1].split()]
    assert sorted(measured_rows) == list(range(11))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_released_detectors_are_their_corrected_forms_up_to_what_they_say(kind: str, observe: Callable[..., Observation]) -> None:
    """For a Gaussian whose variance the text halves, where everything is known in closed form."""

    def eps(x: torch.Tensor, level: Any, text: torch.Tensor) -> torch.Tensor:
        variance = torch.where(text[:, 0, 0] > 0, 0.5, 2.0).view(-1, 1, 1, 1) * level.a**2 + level.s**2
        return level.s * x / variance

    x = torch.randn(3, 4, 4, 4)
    observation = observe(eps, x, torch.ones(3, 2, 2))
    wen, sharp, anisotropy = (detector.read(observation) for detector in released(kind))
    factor = observation.level.a if kind == "v_prediction" else 1.0
    torch.testing.assert_close(wen * factor, guidance_norm(observation))
    torch.testing.assert_close(sharp.square(), sharpness(observation), rtol=1e-2, atol=1e-6)
    text, null = (from_noise(e, x, observation.level_at(41.0), kind) for e in observation.replay(x, 41.0))
    cosine = 1.0 if torch.equal((text - null).sign(), null.sign()) else -1.0  # everything points along x
    torch.testing.assert_close(anisotropy, wen + (2.0 if kind == "epsilon" else 0.1) * cosine, rtol=1e-4, atol=1e-5)


def test_a_table_takes_its_place_in_the_readme_and_nothing_else_moves(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- one: python -m x -->\nold\n<!-- /one -->\nafter\n")
    put("one", "| new |", path)
    put("one", "| newer |", path)
    assert path.read_text() == "before\n<!-- one: python -m x -->\n| newer |\n<!-- /one -->\nafter\n"
    with pytest.raises(ValueError, match="no place for the table 'two'"):
        put("two", "", path)


def test_the_readme_says_what_the_committed_results_say() -> None:
    readme = report.README.read_text()
    for name, draw in (("detection", report.readme_detection), ("steering-test", report.readme_steering)):
        found = report.load(report.RESULTS, name)
        assert found is not None
        assert draw(pd.DataFrame(found["rows"])) in readme
    found = report.load(report.RESULTS, "development")
    assert found is not None
    assert report.readme_development(found["figures"]) in readme
    overhead = {p.stem.removeprefix("overhead-"): json.loads(p.read_text()) for p in sorted(report.RESULTS.glob("overhead-*.json"))}
    assert report.readme_overhead(overhead) in readme
    for name, table_of in audit.TABLES.items():
        found = report.load(report.RESULTS / "audit", name)
        assert found is not None
        assert table_of(found) in readme


def test_samples_of_the_embedded_model_are_labelled_by_seed_and_never_pool_their_negatives() -> None:
    samples = detection.embedded_samples("test")
    copied = samples[samples.copy_rate > 0]
    assert (copied.groupby("prompt").positive.mean() == copied.groupby("prompt").copy_rate.first()).all()
    assert set(samples.source[samples.kind == "ordinary"]) == {report.UNSEEN, report.ORDINARY}
    assert not samples.positive[samples.kind == "ordinary"].any()
    rng = np.random.default_rng(0)
    samples["guidance_norm"] = samples.positive + rng.normal(scale=0.1, size=len(samples))
    rows = pd.DataFrame(detection.compare(samples, {"guidance_norm": 0.0}))
    assert set(rows.negatives) == {report.UNSEEN, report.ORDINARY}
    assert (rows.auc > 0.99).all()
    assert set(rows.seeds) == {1, 4, 16}
