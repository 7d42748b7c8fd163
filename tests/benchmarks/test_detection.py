"""``python -m benchmarks detection`` on a pipeline from a directory and prompts from a file: its rows, killed and gone on with, shared."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import build, profile_for
from sklearn.metrics import roc_auc_score
from transformers import T5Config, T5EncoderModel
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.detection import BATCH, CAPTION, GUARD
from benchmarks.published import over_run, released
from sdguard import Profile
from sdguard.decision.identity import identity
from sdguard.files.prompt_files import write_table
from sdguard.signals import SIGNALS

STEPS, SEEDS = 3, 2
#: no two prompts share a word, so that each is its own cluster; together two batches of samples.
PROMPTS = {
    "verbatim": ["cat", "dog", "fox", "boat", "zebra"],
    "template": ["poster", "canvas", "print", "sky", "field"],
    "ordinary": ["snow", "house", "car", "ship", "hill"],
}
EACH = len(PROMPTS["verbatim"])


def saved(pipe: Any, folder: Path) -> list[str]:
    """A tiny pipeline with its profile and a file of prompts in a folder, and the arguments of a command that measures them."""
    pipe.save_pretrained(folder / "model")
    replace(profile_for(3.0), model=identity(pipe)).save(folder / "model" / "sdguard" / "profile.json")
    rows = [{"caption": prompt, "kind": kind} for kind, prompts in PROMPTS.items() for prompt in prompts]
    write_table(pd.DataFrame(rows).assign(source="made up"), folder / "prompts.csv")
    given = {"model": folder / "model", "prompts": folder / "prompts.csv", "seeds": SEEDS, "steps": STEPS, "guidance": 4.0}
    return ["detection", *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def to(folder: Path) -> list[str]:
    return ["--out", str(folder), "--work", str(folder / "work")]


def measured(command: list[str], folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What the command writes: samples, and the result file."""
    result = CliRunner().invoke(app, [*command, *to(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return written(folder)


def written(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    return pd.read_parquet(folder / "detection-model.parquet"), json.loads((folder / "detection-model.json").read_text())


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Equal up to the order of reduction, but for what was timed."""
    numbers = [table.drop(columns=[name for name in table if name.endswith("_seconds")]) for table in (one, other)]
    pd.testing.assert_frame_equal(*numbers, rtol=1e-2, atol=1e-3)


@pytest.fixture(scope="module")
def command(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return saved(build("StableDiffusionPipeline", embedded.tokenizer), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The uninterrupted measurement of one process."""
    return measured(command, tmp_path_factory.mktemp("whole"))


def test_every_row_has_its_configuration_and_its_libraries(command: list[str], whole: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    samples, found = whole
    assert {kind: sorted(set(here.prompt)) for kind, here in samples.groupby("kind")} == {k: sorted(v) for k, v in PROMPTS.items()}
    assert (samples.groupby("prompt").seed.apply(list).map(sorted).map(tuple) == tuple(range(SEEDS))).all()
    profile = Profile.load(Path(command[2]) / "sdguard" / "profile.json")
    expected = {"model": command[2], "device": "cpu", "num_inference_steps": STEPS, "guidance_scale": 4.0}
    expected |= {"profile": found["about"]["profile"], "weights": profile.model["weights"]["unet"]["float32"]}
    expected |= {name: importlib.metadata.version(name) for name in ("sdguard", "torch", "diffusers", "transformers", "accelerate")}
    for row in (*samples.to_dict("records"), *found["rows"]):
        assert {name: row[name] for name in expected} == expected
    assert found["about"] == expected


def test_every_detector_is_in_the_table_with_the_figures_of_its_samples(whole: tuple[pd.DataFrame, dict[str, Any]]) -> None:
    samples, found = whole
    rows = pd.DataFrame(found["rows"])
    later = {detector.name for detector in over_run(STEPS, torch.zeros(0))}
    first = {signal.name for signal in (*SIGNALS, *released("epsilon"))} | {GUARD, CAPTION}
    assert set(rows[rows.steps == "first"].detector) == first
    assert later < set(rows[rows.steps == "all"].detector)
    assert not later & set(rows[rows.steps != "all"].detector)
    assert set(zip(rows.kind, rows.negatives, strict=True)) == {("verbatim", "made up"), ("template", "made up")}
    for name, column in {"sharpness_released": "sharpness_released", "flipd_running_released": "flipd_running_released_run"}.items():
        row = rows[(rows.detector == name) & (rows.level == "sample") & (rows.kind == "template")].iloc[0]
        taken = samples[samples.kind.isin(["template", "ordinary"])]
        assert row.auc == pytest.approx(roc_auc_score(taken.positive, taken[column]))
        assert (row.positives, row.of) == (SEEDS * EACH,) * 2
    per_prompt = samples.groupby("prompt").agg(value=("agreement", "mean"), kind=("kind", "first"))
    taken = per_prompt[per_prompt.kind != "template"]
    row = rows[(rows.detector == "agreement") & (rows.level == "prompt") & (rows.kind == "verbatim") & (rows.seeds == 1)].iloc[0]
    assert row.auc == pytest.approx(
        roc_auc_score(taken.kind == "verbatim", samples[samples.seed == 0].set_index("prompt").agreement[taken.index])
    )


def test_a_killed_measurement_goes_on_and_has_lost_a_batch_at_most(
    command: list[str], whole: tuple[pd.DataFrame, dict[str, Any]], tmp_path: Path
) -> None:
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside this process's threads
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *command, *to(tmp_path)], stdout=subprocess.DEVNULL, env=alone)

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/[0-9]*.parquet")}

    until = time.monotonic() + 120
    while not kept() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = kept()
    assert 1 <= len(before) < 3 * len(whole[0]) / BATCH  # three passes
    assert not (tmp_path / "detection-model.json").exists()
    samples, _ = measured(command, tmp_path)
    assert {path: kept()[path] for path in before} == before
    same(samples, whole[0])


def test_two_processes_measure_what_one_does(
    command: list[str], whole: tuple[pd.DataFrame, dict[str, Any]], tmp_path: Path, launch: Callable[..., str]
) -> None:
    launch(*command, *to(tmp_path), program=("-m", "benchmarks"))
    samples, found = written(tmp_path)
    same(samples, whole[0])
    assert [(row["detector"], row["steps"], row["level"]) for row in found["rows"]] == [
        (row["detector"], row["steps"], row["level"]) for row in whole[1]["rows"]
    ]


def test_what_a_transformer_has_no_part_for_is_missing(embedded: Any, tmp_path: Path) -> None:
    pipe = build("StableDiffusion3Pipeline", embedded.tokenizer)
    t5 = T5Config(vocab_size=len(embedded.tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    pipe.register_modules(text_encoder_3=T5EncoderModel(t5).eval(), tokenizer_3=embedded.tokenizer)
    samples, found = measured([*saved(pipe, tmp_path), "--seeds", "1"], tmp_path / "out")
    missing = {"attention_entropy", "bottleneck_spread", "attention_entropy_released", "attention_entropy_run_released"}
    assert not missing & {row["detector"] for row in found["rows"]}
    assert {"guidance_norm", "sharpness_released", "flipd_finished_released"} <= {row["detector"] for row in found["rows"]}
    assert np.isfinite(samples.flipd_running_released_run).all()
