"""The benchmarks' statistics against libraries and brute force; their runs can be stopped and shared; their tables are the results'."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from sklearn.metrics import roc_auc_score

from benchmarks import audit, detection, overhead, report
from benchmarks.documents import ROOT, documents, put
from benchmarks.published import over_run, released, similarity, ssim
from benchmarks.statistics import auc, bootstrap_weights, estimates, roc_band, true_positive_rate
from sdguard.decision.profile import Profile
from sdguard.denoiser.probe import probe_run
from sdguard.files.resumable import measured
from sdguard.observation import Observation, from_noise
from sdguard.signals.attention_entropy import ATTENTION_ENTROPY
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
from sdguard.files.resumable import measured
from sdguard.files.processes import processes

def measure(part):
    print("".join(f"measured {row} {processes().process_index}\\n" for row in part.row), end="", flush=True)
    return part.assign(square=part.row ** 2)

found = measured("squares", pd.DataFrame({"row": range(11)}), measure, Path(sys.argv[1]), {}, 2)
assert found.square.tolist() == [i ** 2 for i in range(11)]
"""


def test_two_processes_share_the_batches_and_both_have_all_rows(tmp_path: Path, launch: Callable[..., str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = launch(str(tmp_path / "work"), program=(str(tmp_path / "script.py"),))
    by_process: dict[str, list[int]] = {"0": [], "1": []}
    for row, process in re.findall(r"measured (\d+) (\d+)", printed):
        by_process[process].append(int(row))
    assert sorted(by_process["0"]) == [0, 1, 4, 5, 8, 9]
    assert sorted(by_process["1"]) == [2, 3, 6, 7, 10]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_released_detectors_are_their_corrected_forms_up_to_what_they_say(kind: str, observe: Callable[..., Observation]) -> None:
    """For a Gaussian whose variance the text halves, where everything is known in closed form."""

    def eps(x: torch.Tensor, level: Any, text: torch.Tensor) -> torch.Tensor:
        variance = torch.where(text[:, 0, 0] > 0, 0.5, 2.0).view(-1, 1, 1, 1) * level.a**2 + level.s**2
        return level.s * x / variance

    x = torch.randn(3, 4, 4, 4)
    observation = observe(eps, x, torch.ones(3, 2, 2))
    by_name = {detector.name: detector for detector in released(kind)}
    wen, sharp, anisotropy = (by_name[f"{name}_released"].read(observation) for name in ("wen", "sharpness", "anisotropy"))
    factor = observation.level.a if kind == "v_prediction" else 1.0
    torch.testing.assert_close(wen * factor, guidance_norm(observation))
    torch.testing.assert_close(sharp.square(), sharpness(observation), rtol=1e-2, atol=1e-6)
    text, null = (from_noise(e, x, observation.level_at(41.0), kind) for e in observation.both_branches(x, 41.0))
    cosine = 1.0 if torch.equal((text - null).sign(), null.sign()) else -1.0  # everything points along x
    torch.testing.assert_close(anisotropy, wen + (2.0 if kind == "epsilon" else 0.1) * cosine, rtol=1e-4, atol=1e-5)


def windowed_similarity(one: np.ndarray, other: np.ndarray, width: float, luminance: bool) -> float:
    """Mean over all windows of 11 by 11 places of Wang's similarity of two channels, with or without its luminance part."""
    taps = np.exp(-(((np.arange(11) - 5) / 1.5) ** 2) / 2)
    weights = np.outer(taps, taps) / taps.sum() ** 2
    found = []
    for i, j in itertools.product(range(one.shape[0] - 10), range(one.shape[1] - 10)):
        p, q = one[i : i + 11, j : j + 11], other[i : i + 11, j : j + 11]
        m, n = (weights * p).sum(), (weights * q).sum()
        varied = (weights * (p - m) ** 2).sum() + (weights * (q - n) ** 2).sum()
        value = (2 * (weights * (p - m) * (q - n)).sum() + (0.03 * width) ** 2) / (varied + (0.03 * width) ** 2)
        found.append(value * (2 * m * n + (0.01 * width) ** 2) / (m**2 + n**2 + (0.01 * width) ** 2) if luminance else value)
    return float(np.mean(found))


def test_similarity_is_that_of_every_window_at_three_scales() -> None:
    pictures = (torch.rand(2, 1, 2, 48, 44) + torch.rand(2, 3, 2, 48, 44)) / 2
    pictures[1, 2] = pictures[1, 0]
    pictures[0, 2] = 1 - pictures[0, 0]
    found = similarity(pictures)
    expected = np.ones((2, 2))
    for scale in range(3):
        here = torch.nn.functional.avg_pool2d(pictures.flatten(0, 1), 2**scale).unflatten(0, (2, 3)).double().numpy()
        for row, k in itertools.product(range(2), range(2)):
            channels = [windowed_similarity(here[row, 0, c], here[row, k + 1, c], np.ptp(here[row]), scale == 2) for c in range(2)]
            expected[row, k] *= max(0.0, float(np.mean(channels))) ** 0.33
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert 0.2 < found[0, 0] < 0.9
    assert found[1, 1] == pytest.approx(1)
    assert found[0, 1] == 0


@pytest.mark.parametrize("side", [8, 64])
def test_the_released_ssim_is_one_for_the_only_picture_and_small_for_white_data(side: int, observe: Callable[..., Observation]) -> None:
    """What is compared is the prediction at timestep 961 less the noise, and nothing else of the model."""
    picture = torch.randn(4, side, side)

    def eps(x: torch.Tensor, level: Any, text: torch.Tensor) -> torch.Tensor:
        known = level == second
        return torch.where(text[:, :1, :1, None] > 0, x + picture * known + x**3 * (not known), 0.9 * x)

    second = observe(lambda x, level, text: x, torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2)).level_at(961.0)
    observation = observe(eps, torch.randn(2, 4, side, side), torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 2, 2))
    memorized, free = ssim(observation).tolist()
    assert memorized == pytest.approx(1, abs=1e-4)
    assert free < 0.428
    assert observation.evaluations.tolist() == [10, 10]


class Attention(torch.nn.Module):
    """A cross-attention layer of two heads, as far as what it pays to tokens goes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.to_q, self.to_k = 2, torch.nn.Identity(), torch.nn.Identity()


@pytest.fixture
def attending(observe: Callable[..., Observation]) -> Callable[..., Observation]:
    """An observation of five layers of which the fourth, if any, has its first head pay token 1 alone and its second token 2; 8 tokens."""

    def make(sharp: bool, step: int) -> Observation:
        net = torch.nn.ModuleDict({f"{i}": torch.nn.ModuleDict({"attn2": Attention()}) for i in range(5)})
        keys = torch.zeros(3, 8, 4)
        keys[:, 1, :2] = keys[:, 2, 2:] = 100.0

        def denoise(x: torch.Tensor, t: float, text: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(net.values()):
                block["attn2"].to_q(torch.ones(3, 5, 4))  # type: ignore[index]
                block["attn2"].to_k(keys if sharp and i == 3 else torch.zeros(3, 8, 4))  # type: ignore[index]
            return x

        x, text = torch.zeros(3, 1, 2, 2), torch.zeros(3, 8, 2)
        return observe(lambda x, level, text: x, x, text, denoiser=net, denoise=denoise, step=step)

    return make


def test_released_attention_entropy_is_of_the_heads_average(attending: Callable[..., Observation]) -> None:
    detector = next(detector for detector in released("epsilon") if detector.name == "attention_entropy_released")
    observation = attending(True, 0)
    assert detector.read(observation).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-4)
    assert ATTENTION_ENTROPY.read(observation).tolist() == pytest.approx([0.8 * math.log(8)] * 3, abs=1e-4)
    assert detector.read(attending(False, 0)).tolist() == pytest.approx([math.log(8)] * 3)
    assert observation.evaluations.tolist() == [2] * 3


def test_released_attention_entropy_of_a_run_counts_what_the_padding_gains(attending: Callable[..., Observation]) -> None:
    detector = over_run(10, torch.tensor([3, 4, 8]))[2]
    assert detector.calls == (0, 8, 9)
    found = sum(detector.read(attending(step > 0, step)) for step in detector.calls)
    shares = np.full(8, 0.1)
    shares[1:3] = 0.2  # four layers of five pay all eight tokens alike
    parts = -shares * np.log(shares)
    padding_gain = [parts[start:].sum() - (8 - start) * math.log(8) / 8 for start in (2, 3, 7)]
    torch.testing.assert_close(found, torch.tensor(parts.sum() + padding_gain, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def test_released_flipds_are_those_of_a_linear_network(observe: Callable[..., Observation]) -> None:
    """Predictions ``k s x``: the Jacobian is ``k s`` in every direction, and what the one probe sees of it its own squared length."""

    def eps(x: torch.Tensor, level: Any, text: torch.Tensor) -> torch.Tensor:
        return text[:, :1, :1, None] * level.s * x

    x, (c, u, w) = torch.randn(3, 4, 4, 4), (0.7, 0.4, 3.0)
    text, null = torch.full((3, 2, 2), c), torch.full((3, 2, 2), u)
    observation = observe(eps, x, text, null_condition=null, guidance_scale=w, timestep=181.0)
    finished, running, _ = over_run(50, torch.zeros(3))
    assert (finished.calls, running.calls) == ((49,), (40,))
    probe = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(42)).square().sum()
    (a, s), guided = observation.level, u + w * (c - u)
    size = x.square().flatten(1).sum(1)
    torch.testing.assert_close(running.read(observation), s * w * (c - u) * s * probe - (guided * s) ** 2 * size, rtol=1e-4, atol=1e-4)
    a_linear, s_linear = math.exp(-0.0090575 / 2), (1 - math.exp(-0.0090575)) ** 0.5
    slope = c * observation.level_at(10.0).s
    end = (a_linear * (1 - s * guided * s) / a) ** 2 * size
    torch.testing.assert_close(finished.read(observation), -(64 - s_linear * slope * probe + slope**2 * end), rtol=1e-4, atol=1e-4)
    assert observation.evaluations.tolist() == [finished.cost + running.cost] * 3


def test_a_released_detector_is_a_function_of_its_row_and_costs_what_it_declares(tiny: Any) -> None:
    prompts, lengths = ["a cat", "a zebra on a hill", "a boat"], torch.tensor([4, 7, 4])
    found: dict[str, list[float]] = {}

    def look(observation: Observation, lengths: torch.Tensor) -> None:
        for detector in (*released("epsilon"), *over_run(3, lengths)):
            if observation.step in getattr(detector, "calls", (0,)):
                before = observation.evaluations.clone()
                found.setdefault(detector.name, []).extend(detector.read(observation).tolist())
                found.setdefault(f"{detector.name} cost", []).extend((observation.evaluations - before).tolist())

    setting: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
    probe_run(tiny, prompts, range(3), lambda observation: look(observation, lengths), None, **setting)
    together, found = found, {}
    for i in (2, 0):
        probe_run(tiny, prompts[i : i + 1], [i], lambda observation, i=i: look(observation, lengths[i : i + 1]), None, **setting)  # type: ignore[misc]
    for detector in (*released("epsilon"), *over_run(3, lengths)):
        calls = len(getattr(detector, "calls", (0,)))
        assert together[f"{detector.name} cost"] == [detector.cost / calls] * 3 * calls
        expected = [together[detector.name][3 * call + i] for i in (2, 0) for call in range(calls)]
        assert found[detector.name] == pytest.approx(expected, rel=1e-3, abs=1e-3), detector.name


@pytest.mark.parametrize("place", ["README.md", "docs/page.md"])
def test_a_table_takes_its_place_in_the_document_that_has_it_and_nothing_else_moves(place: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    other, path = tmp_path / "docs" / "other.md", tmp_path / place
    other.write_text("<!-- ones: python -m x -->\nanother\n<!-- /ones -->\n")
    path.write_text("before\n<!-- one: python -m x -->\nold\n<!-- /one -->\nafter\n")
    put("one", "| new |", tmp_path)
    put("one", "| newer |", tmp_path)
    assert path.read_text() == "before\n<!-- one: python -m x -->\n| newer |\n<!-- /one -->\nafter\n"
    assert other.read_text() == "<!-- ones: python -m x -->\nanother\n<!-- /ones -->\n"
    with pytest.raises(ValueError, match="a place for the table 'two'"):
        put("two", "", tmp_path)


def test_a_table_with_two_places_or_half_a_place_is_put_nowhere(tmp_path: Path) -> None:
    path, other = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    other.parent.mkdir()
    path.write_text("<!-- one: python -m x -->\nold\n")
    with pytest.raises(ValueError, match="a place for the table 'one'"):
        put("one", "new", tmp_path)
    other.write_text("<!-- one: python -m x -->\nold\n<!-- /one -->\n")
    with pytest.raises(ValueError, match=r"'one' has a place in each of README\.md, docs/page\.md"):
        put("one", "new", tmp_path)
    assert "new" not in path.read_text() + other.read_text()


def test_the_documentation_says_what_the_committed_results_say() -> None:
    text = "".join(path.read_text() for path in documents())
    for name, draw in (("detection", report.brief_detection), ("steering-test", report.brief_steering)):
        found = report.load(report.RESULTS, name)
        assert found is not None
        assert draw(pd.DataFrame(found["rows"])) in text
    found = report.load(report.RESULTS, "development")
    assert found is not None
    assert report.brief_development(found["figures"]) in text
    cures, left_out = (report.load(report.RESULTS, name) for name in ("cures", "leave-one-out"))
    assert cures is not None
    assert left_out is not None
    assert report.brief_cures(cures) in text
    assert report.brief_guard(cures) in text
    assert report.brief_results(left_out["rows"], cures) in text
    assert report.brief_cost(left_out["rows"], cures) in text
    overhead = {p.stem.removeprefix("overhead-"): json.loads(p.read_text()) for p in sorted(report.RESULTS.glob("overhead-*.json"))}
    assert report.brief_overhead(overhead) in text
    for name, table_of in audit.TABLES.items():
        found = report.load(report.RESULTS / "audit", name)
        assert found is not None
        assert table_of(found) in text


def headers(page: str) -> set[str]:
    """What the columns of a page's tables are called, up to a comma or a colon."""
    return {html.unescape(re.split("[,:]", header)[0]) for header in re.findall("<th>(.+?)</th>", page)}


def test_the_page_explains_every_column_and_leaves_documents_that_hold(tmp_path: Path) -> None:
    for path in documents():
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    report.main(report.RESULTS, tmp_path / "page", tmp_path)
    for path in documents():
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), path
    page = (tmp_path / "page" / "report.html").read_text()
    terms = {term for terms in re.findall("<dt>(.+?)</dt>", page) for term in terms.split(", ")}
    plain = {"detector", "method", "kind", "repetitions", "samples", "measured", "shape", "peak gigabytes", "reads", "corrected form"}
    assert headers(page) - plain - terms == {"what the released code does otherwise"}
    assert set(re.findall('href="#(.+?)"', page)) <= set(re.findall('id="(.+?)"', page))
    for name in ("guard", "sharpness_released", detection.CAPTION):
        assert report.plain(name).strip("*") in html.unescape(page)
    assert not [cell for cell in re.findall("<td>(.*?)</td>", page) if "nan" in cell.lower()]
    for picture in (tmp_path / "page").glob("*.png"):
        assert base64.b64encode(picture.read_bytes()).decode() in page
    report.main(tmp_path, tmp_path / "empty", tmp_path)
    assert "Nothing has been measured yet" in (tmp_path / "empty" / "report.html").read_text()


def test_a_detector_that_reads_later_calls_stands_under_the_whole_run() -> None:
    found = report.load(report.RESULTS, "detection")
    assert found is not None
    rows = pd.DataFrame(found["rows"])
    rows = rows[~rows.detector.isin([detector.name for detector in over_run(10, torch.zeros(0))])]
    like = rows[(rows.detector == "guidance_norm") & (rows.steps == "all")]
    flipd = like.assign(detector="flipd_running_released", auc=0.123, milliseconds=np.nan)
    name = report.plain("flipd_running_released")
    without = report.tables_of_detection(rows)
    assert not any(name in table["html"] for table in without)
    tables = report.tables_of_detection(pd.concat([rows, flipd]))
    assert [table["title"] for table in tables] == [table["title"] for table in without]
    assert [name in table["html"] and "0.123" in table["html"] for table in tables] == ["whole run" in table["title"] for table in tables]
    about = report.table_of_detectors(["flipd_running_released"])["html"]
    assert "layer6ai-labs/diffusion_memorization 084b8b4" in about
    assert "the unconditional Jacobian is missing" in about
    assert report.plain("lid_guided") in about


def test_methods_at_one_place_share_a_label() -> None:
    points = np.array([[0.0, 0.0], [100.0, 97.0], [0.5, 0.5], [99.0, 97.0], [0.0, 9.0]])
    assert report.neighbours(points, 1.6) == [[0, 2], [1, 3], [4]]


@pytest.mark.parametrize(("name", "draw"), [("steering-test", report.draw_steering), ("detection", report.draw_cost)])
def test_no_name_in_a_figure_covers_another(name: str, draw: Callable[[pd.DataFrame], Any]) -> None:
    found = report.load(report.RESULTS, name)
    assert found is not None
    rows = pd.DataFrame(found["rows"])
    figure = draw(rows)
    figure.tight_layout()
    figure.canvas.draw()
    names = figure.axes[0].texts
    written = {part for text in names for part in re.split("[;\n] ?", text.get_text())}
    assert written >= (set(rows.method) if name == "steering-test" else {"sharpness", "attention entropy"})
    boxes = [Text.get_window_extent(text) for text in names]  # without the line that ties it to its point
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    plt.close(figure)


@pytest.mark.parametrize("path", overhead.PATHS)
def test_a_profile_under_which_a_path_is_taken_is_read_as_it_was_written(path: str, tmp_path: Path) -> None:
    made = overhead.profile(path, {})
    made.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == made


def test_samples_of_the_embedded_model_are_labelled_by_seed_and_never_pool_their_negatives() -> None:
    samples = detection.embedded_samples("test")
    copied = samples[(samples.copy_rate > 0) & (samples.kind != "ordinary")]
    assert (copied.groupby("prompt").positive.mean() == copied.groupby("prompt").copy_rate.first()).all()
    assert set(samples.source[samples.kind == "ordinary"]) == {report.UNSEEN, report.ORDINARY}
    assert not samples.positive[samples.kind == "ordinary"].any()
    rng = np.random.default_rng(0)
    samples["guidance_norm"] = samples.positive + rng.normal(scale=0.1, size=len(samples))
    rows = pd.DataFrame(detection.compare(samples, {"guidance_norm": 0.0}))
    assert set(rows.negatives) == {report.UNSEEN, report.ORDINARY}
    # of a caption that is copied for some seeds only, the first few may not be copies
    assert (rows.auc > 0.8).all()
    assert (rows.auc[(rows.level == "sample") | (rows.seeds == rows.seeds.max())] > 0.99).all()
    assert set(rows.seeds) == {1, 4, 16}
