"""``python -m benchmarks reproduce`` on the embedded model: what it says first, what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import build, profile_for
from typer.testing import CliRunner

from benchmarks import reproduce
from benchmarks.__main__ import app
from benchmarks.detection import GUARD
from benchmarks.reproduce import FIGURES, REPORTED, beside, profile_by, read_prompts, steering_figures
from sdguard import testbed
from sdguard.decision.identity import identity
from sdguard.signals import SIGNALS

MEMORIZED, ORDINARY = 4, 16


class Pixels:
    """In place of SSCD, which is optional: pictures are alike as far as their pixels are."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1) / 255 - 0.5
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, table = tmp_path_factory.mktemp("prompts"), pd.read_parquet(testbed.path() / "prompts.parquet")
    copied = table[table.copy_rate == 1].drop_duplicates("object").text[:MEMORIZED]
    ordinary = table[table.kind == "ordinary"].drop_duplicates("object").text[:ORDINARY]
    paths = folder / "memorized.txt", folder / "ordinary.txt"
    for path, texts in zip(paths, (copied, ordinary), strict=True):
        path.write_text("\n".join(texts) + "\n")
    return paths


def command(files: tuple[Path, Path], folder: Path, *more: str) -> list[str]:
    options = {"memorized": files[0], "ordinary": files[1], "out": folder, "work": folder / "work"}
    return ["reproduce", "embedded", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *more]


def test_the_embedded_model_is_calibrated_detected_and_steered(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "SSCD", Pixels)
    monkeypatch.setattr(reproduce, "RATE", 0.2)  # a handful of prompts allows no smaller one
    small = ("--seeds", "1", "--pictures", "2", "--steps", "4")
    result = CliRunner().invoke(app, command(files, tmp_path, *small), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.index("denoiser evaluations") < result.output.index("| detector |")
    found = json.loads((tmp_path / "reproduce-embedded.json").read_text())
    assert {row["detector"] for row in found["rows"]} >= {GUARD, "caption_only", *(signal.name for signal in REPORTED)}
    assert {row["steps"] for row in found["rows"] if row["detector"] == "guidance_norm"} == {"first", "first five"}
    assert set(found["flagged"]) == {"memorized", "given"}
    assert found["steering"]["pictures of memorized prompts"] == 4
    again = CliRunner().invoke(app, command(files, tmp_path, *small), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert json.loads((tmp_path / "reproduce-embedded.json").read_text()) == found, again.output


def test_of_two_models_in_one_work_folder_each_has_its_own_profile(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "calibrate", lambda pipe, prompts, **options: replace(profile_for(1.0), model=identity(pipe)))
    pipes = [build("StableDiffusionPipeline", embedded.tokenizer) for _ in range(2)]
    with torch.no_grad():
        next(pipes[1].unet.parameters()).mul_(2)
    for pipe in (*pipes, *pipes):
        profile_by(pipe, ["a lion"], tmp_path).check(identity(pipe))


def test_no_cluster_of_ordinary_prompts_is_on_both_sides(tmp_path: Path) -> None:
    memorized, ordinary = tmp_path / "m.txt", tmp_path / "o.txt"
    memorized.write_text("a red fox poster\n")
    words = [f"w{i}a w{i}b w{i}c" for i in range(12)]
    ordinary.write_text("".join(f"{text}\n{text} too\n" for text in words))
    prompts = read_prompts(memorized, ordinary, None)
    assert len(prompts.calibration) == len(prompts.ordinary) == 12
    stems = {text.removesuffix(" too") for text in prompts.calibration}
    assert not stems & {text.removesuffix(" too") for text in prompts.ordinary.prompt}


@pytest.mark.parametrize(
    ("memorized", "sentence"),
    [("group_nomem500.txt", "was given as memorized, and holds ordinary prompts."), ("mine.txt", "too few different prompts")],
)
def test_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(
    memorized: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "load_pipeline", None)
    files = tmp_path / memorized, tmp_path / "o.txt"
    for path in files:
        path.write_text(f"of {path.stem}\n")
    result = CliRunner().invoke(app, command(files, tmp_path), env={"COLUMNS": "1000"})
    assert result.exit_code == 1
    assert sentence in result.output


def test_every_published_figure_is_of_a_known_signal_and_has_its_paper() -> None:
    for about in FIGURES["models"].values():
        for figure in about["detection"]:
            assert figure["detector"] in {signal.name for signal in SIGNALS}
            assert figure["source"] in FIGURES["papers"]
            assert 0.5 <= figure["auc"] <= 1
            assert 0 <= figure["tpr"] <= 1


def test_a_published_figure_stands_beside_what_it_is_of() -> None:
    row = {"detector": "sharpness", "seeds": 4, "steps": "first", "kind": "memorized", "negatives": "COCO"}
    rows = [
        {**row, **{f"{name}{end}": 0.5 for name in ("auc", "tpr") for end in ("", "_low", "_high")}, "seeds": seeds} for seeds in (1, 4)
    ]
    one, four = beside(rows, FIGURES["models"]["stable-diffusion-v1-4"]["detection"]).splitlines()[2:]
    assert "0.987 / 0.908 (Jeon 2025)" in one
    assert "0.998 / 0.982 (Jeon 2025)" in four
    assert "0.967 / 0.740 (Jeon 2025, hard)" in four


def test_only_pictures_that_recur_count_as_memorized_ones() -> None:
    rows: list[dict[str, Any]] = [
        {"positive": True, "recurs": True, "verdict": "steered", "left": False, "evaluations": 20.0, "identical": False},
        {"positive": True, "recurs": True, "verdict": "clean", "left": True, "evaluations": 0.0, "identical": True},
        {"positive": True, "recurs": False, "verdict": "clean", "left": True, "evaluations": 0.0, "identical": True},
        {"positive": False, "recurs": False, "verdict": "clean", "left": True, "evaluations": 0.0, "identical": True},
    ]
    figures = steering_figures(pd.DataFrame(rows))
    assert figures["of these, the same from two seeds"] == 2
    assert figures["shown and still that picture"] == 0.5
    assert figures["bit-identical of those that were not"] == 1.0
