"""The command line: what it writes, what it refuses, and with which exit code."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sdguard import testbed
from sdguard.cli.main import app
from sdguard.decision.profile import Profile
from sdguard.files.prompt_files import prompts_by_row
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments])


def refused(result: Result, out: Path) -> str:
    """One sentence, exit code 1, no traceback, nothing written."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert not list(out.glob("*")) if out.is_dir() else True
    text = " ".join(result.stderr.split())
    assert text
    assert "Traceback" not in text
    return text


def test_an_ordinary_prompt_gives_picture_and_report(tmp_path: Path) -> None:
    result = generate("a cat in snow", "--out", str(tmp_path), "--compare", "--n", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "00.png", "01.png", "00-unguarded.png", "01-unguarded.png", "compare.png", "report.json",
    }  # fmt: skip
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["seed"] for row in rows] == [5, 6]
    assert {row["verdict"] for row in rows} == {"clean"}
    assert (tmp_path / "00.png").read_bytes() == (tmp_path / "00-unguarded.png").read_bytes()


def test_json_goes_to_standard_output(tmp_path: Path) -> None:
    result = generate("a cat", "--out", str(tmp_path), "--json")
    assert json.loads(result.stdout)[0]["prompt"] == "a cat"


def test_a_withheld_image_has_its_own_exit_code(tmp_path: Path, memorized: dict[str, Any]) -> None:
    result = generate(memorized["text"], "--out", str(tmp_path), "--mode", "block", "--seed", str(memorized["copied_seeds"][0]))
    assert result.exit_code == 3
    assert (
        GuardReport(**{k: v for k, v in json.loads((tmp_path / "report.json").read_text())[0].items() if k != "seed"}).verdict == "withheld"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a cat", "--model", "/no/such/model"], "There is no model at /no/such/model"),
        (["a cat", "--model", "{folder}"], "is no diffusers pipeline: it has no model_index.json"),
        (["", "--model", "embedded"], "There is no prompt"),
        (["cat " * 40], "this part would be cut: 'cat cat cat"),
        (["a cat", "--profile", "/no/profile.json"], "cannot be read: No such file"),
        (["a cat", "--profile", "{damaged}"], "is not a profile of sdguard, or it is damaged"),
        (["a cat", "--profile", "{shipped}", "--steps", "3"], "steps is 3, the profile's is 10"),
        (["a cat", "--fpr", "0.0001"], "needs at least 9999 scored ordinary prompts"),
        (["a cat", "--steering", "prayer"], "steering has 'prayer'; there are rewording,"),
        (["a cat", "--mode", "watch"], "it must be 'steer', 'observe' or 'block'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    folder, out, damaged = tmp_path / "empty", tmp_path / "out", tmp_path / "damaged.json"
    folder.mkdir()
    damaged.write_text("{")
    shipped = testbed.path() / "sdguard" / "profile.json"
    filled = [argument.format(folder=folder, damaged=damaged, shipped=shipped) for argument in arguments]
    assert says in refused(generate(*filled, "--out", str(out)), out)


def test_an_unwritable_output_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(generate("a cat", "--out", str(tmp_path / "file")), tmp_path / "file")


def test_every_config_field_is_documented() -> None:
    for name in GuardConfig.__dataclass_fields__:
        assert f"        {name}: " in str(GuardConfig.__doc__)


def test_usage_errors_are_typers_own() -> None:
    assert generate().exit_code == 2
    assert os.path.exists(testbed.path())


def test_explain_writes_a_sheet_and_names_the_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "a zebra at beach", "--steps", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert "zebra" in result.stdout
    assert json.loads((tmp_path / "explain.json").read_text())["words"] == ["a", "zebra", "at", "beach"]
    assert (tmp_path / "explain.png").exists()


def test_calibrate_says_how_many_prompts_a_rate_needs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--n", "30", "--out", str(tmp_path / "p.json")])
    assert result.exit_code == 1
    assert "needs 99 prompts to score; of 30 prompts 20 are scored" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_calibrate_keeps_a_profile_that_is_listed_and_used(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a lion number {i}" for i in range(9)))
    result = CliRunner().invoke(app, ["calibrate", "--prompts", str(prompts), "--steps", "2", "--fpr", "0.2"])
    assert result.exit_code == 0, result.stderr
    assert "6 scores of ordinary prompts" in " ".join(result.stdout.split())
    listed = CliRunner().invoke(app, ["profiles"], env={"COLUMNS": "200"})
    assert "StableDiffusionPipeline" in listed.stdout
    guarded = generate("a lion", "--steps", "2", "--fpr", "0.2", "--out", str(tmp_path / "out"))
    assert guarded.exit_code in (0, 3)


def test_prompts_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--prompts", str(tmp_path / "none.txt")])
    assert result.exit_code == 1
    assert "cannot be read" in " ".join(result.stderr.split())


def test_two_processes_calibrate_to_the_same_profile_as_one(tmp_path: Path, launch: Callable[..., None]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a lion number {i}" for i in range(24)))
    options = ["calibrate", "--prompts", str(prompts), "--steps", "2", "--fpr", "0.2", "--out"]
    assert CliRunner().invoke(app, [*options, str(tmp_path / "one.json")]).exit_code == 0
    launch(*options, str(tmp_path / "two.json"))
    one, two = (Profile.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two.fingerprint == one.fingerprint
    assert two.scores == pytest.approx(one.scores, abs=1e-3)
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "--fpr", "0"], "false_positive_rate is 0.0; it must lie between 0 and 1"),
    ],
)
def test_every_command_refuses_what_cannot_be_judged(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert says in " ".join(result.stderr.split())
    assert not list(tmp_path.rglob("*.json"))


def test_tables_need_the_extra_files_and_text_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, text = tmp_path / "prompts.csv", tmp_path / "prompts.txt"
    table.write_text("prompt\na cat\n")
    text.write_text("a cat\n\na dog\n")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert prompts_by_row(text) == {0: "a cat", 2: "a dog"}
    for arguments in (["scan", str(text)], ["calibrate", "--prompts", str(table)]):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out" / "o.csv")])
        assert result.exit_code == 1
        assert "pip install 'sdguard[files]'" in " ".join(result.stderr.split())
