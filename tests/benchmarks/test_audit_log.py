"""The audit log under load: what the benchmark sees of a log that is whole, and of one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import build
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.audit_log import PAGE, RESULTS, judged, prompts_of, run_many, sentence
from sdguard.guarded.audit_log import audit_files

RESULT = RESULTS / "audit-log.json"


@pytest.fixture(scope="module")
def model(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("StableDiffusionPipeline", embedded.tokenizer).save_pretrained(folder)
    return folder


def test_processes_fill_one_log_and_the_command_says_so(model: Path, tmp_path: Path) -> None:
    options = ["--runs", "8", "--largest", "1500", "--model", str(model), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["audit-log", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "audit-log.json").read_text())
    assert found["lines"] == found["images"] == 8
    assert found["files"] > 2
    assert "none missing and none twice" in result.stdout


def test_what_is_wrong_with_a_log_is_seen(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    told = run_many(str(model), log, 1, range(4))
    assert not any(judged(log, told, 10_000)["wrong"].values())
    first, second, third, last = audit_files(log)
    largest = max(file.stat().st_size for file in audit_files(log))
    second.write_bytes(first.read_bytes() + third.read_bytes()[:100])
    last.unlink()
    found = judged(log, [*told, "another"], largest)
    assert found["wrong"] == {"not valid": 1, "missing": 3, "twice": 1, "of no run": 0, "too large": 1}
    assert "6 of them wrong" in sentence({"about": {"runs": 4, "processes": 1, "largest": 1}, **found})


def test_the_embedded_model_is_given_memorized_prompts_among_ordinary_ones() -> None:
    prompts = prompts_of("embedded")
    assert len(prompts) == 40
    assert len({*prompts[::10]} & {*prompts[1:10]}) == 0


@pytest.mark.skipif(not RESULT.exists(), reason="measured on what is committed, after it is")
def test_the_page_says_what_was_measured() -> None:
    assert sentence(json.loads(RESULT.read_text())) in PAGE.read_text()
