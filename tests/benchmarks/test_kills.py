"""Kill -9: of every command it is decided whether it is long, and each that is long is killed at random moments and goes on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from families import build

from benchmarks.__main__ import app
from benchmarks.kills import DECISIONS, KEEPS, Inputs, Long, every_command, prepared, trial, tried, tried_commands, undisturbed
from benchmarks.running import commands_of


def test_of_every_command_it_is_decided_whether_it_is_long() -> None:
    assert sorted(every_command()) == sorted(DECISIONS)


def sources(module: str, depth: int = 3) -> Iterator[str]:
    """The source of a module, and of those of ours that it takes functions from."""
    yield inspect.getsource(sys.modules[module])
    if depth:
        values = vars(sys.modules[module]).values()
        taken = {value.__module__ for value in values if inspect.isfunction(value)} | {v.__name__ for v in values if inspect.ismodule(v)}
        for name in taken - {module}:
            if name.partition(".")[0] in ("benchmarks", "sdguard") and name != "benchmarks.__main__":
                yield from sources(name, depth - 1)


@pytest.mark.parametrize("name", [name for name, decision in DECISIONS.items() if decision == KEEPS])
def test_what_is_said_to_keep_its_batches_does(name: str) -> None:
    callback = commands_of(app)[name.removeprefix("benchmarks ")].callback
    assert callback is not None
    assert any(" measured(" in source for source in sources(callback.__module__))


@pytest.fixture(scope="module")
def inputs(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    build("StableDiffusionPipeline", embedded.tokenizer).save_pretrained(folder / "model")
    return prepared(folder / "model", folder)


@pytest.mark.parametrize("name", tried_commands())
def test_a_killed_command_makes_what_it_makes_undisturbed_and_does_nothing_twice(name: str, inputs: Inputs, tmp_path: Path) -> None:
    found = tried(name, inputs, trials=1, kills=2, seed=0, folder=tmp_path)
    assert found["wrong"] == []
    assert found["files"] > 0
    assert found["killed"] > 0
    decision = DECISIONS[name]
    assert isinstance(decision, Long)
    assert (found["pieces kept"] > 1) == decision.goes_on


def test_a_trial_sees_other_results_and_what_is_left_behind(inputs: Inputs, tmp_path: Path) -> None:
    name = "sdguard audit neighbours"
    whole = undisturbed(name, inputs, tmp_path / "whole")
    assert trial(name, inputs, whole, tmp_path / "same", 0, Random(0))["wrong"] == {}
    other = whole._replace(results={**whole.results, "neighbours.png": "another hash"})
    assert trial(name, inputs, other, tmp_path / "other", 0, Random(0))["wrong"] == {"other results": ["neighbours.png"]}
