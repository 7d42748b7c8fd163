"""What the command line says of itself: quick help with its defaults, a version, and exit codes from one table."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import sdguard
from sdguard.cli import main as cli
from sdguard.cli import options
from sdguard.cli.errors import MEANING, Exit
from sdguard.denoiser import loading
from sdguard.files.inputs import BadInput

#: prints the modules that there are after a command line.
SCRIPT = """
import sys
from sdguard.cli.main import app
try:
    app(sys.argv[1:])
finally:
    print("modules:", *sys.modules)
"""

COMMANDS = ["generate", "explain", "scan", "calibrate"]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["scan", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_that_takes_long(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.rpartition("modules:")[2].split()
    assert "sdguard.cli.main" in modules
    assert {"torch", "numpy", "diffusers", "transformers", "pandas"} & {*modules} == set()


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"sdguard {sdguard.__version__}\n")


def test_the_package_gives_what_it_names_and_nothing_else() -> None:
    assert set(sdguard.__all__) == set(sdguard._MODULES) <= set(dir(sdguard))
    assert all(getattr(sdguard, name).__name__ == name for name in sdguard.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdguard.nothing


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_has_a_default_shows_it(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    text = " ".join(run(name, "--help").stdout.replace("│", " ").split())
    for option in command.params:
        if option.param_type_name != "option" or getattr(option, "is_flag", False):
            continue
        if option.default is not None:
            assert f"[default: {option.default}]" in text, option.name
        elif isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in text, option.name
    assert "[default: (" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_device_and_precision_can_be_chosen_wherever_a_model_is_run_and_size_wherever_a_picture_is(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    found = {opt for parameter in command.params for opt in parameter.opts}
    assert {"--device", "--dtype"} <= found
    assert ({"--height", "--width", "--negative-prompt"} <= found) == (name in ("generate", "explain"))


def test_no_option_that_several_commands_have_is_declared_twice() -> None:
    shared = {name for name, value in vars(options).items() if hasattr(value, "__metadata__")}
    source = inspect.getsource(cli)
    assert shared
    for help_text in (vars(options)[name].__metadata__[0].help for name in shared):
        assert help_text not in source


# exit codes


def exits(code: Exit, tmp_path: Path, memorized: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Result:
    """A command that ends with an exit code."""
    out, prompts = ["--out", str(tmp_path / "out")], tmp_path / "prompts.txt"
    prompts.write_text(f"{memorized['text']}\na cat\n")
    seed = str(memorized["copied_seeds"][0])
    words = {
        Exit.DONE: ["generate", "a cat", "--steps", "1", *out],
        Exit.BAD_INPUT: ["generate", "a cat", "--model", "/no/such/model", *out],
        Exit.USAGE: ["generate", "a cat", "--mode", "watch", *out],
        Exit.WITHHELD: ["generate", memorized["text"], "--seed", seed, "--mode", "block", "--steps", "1", *out],
        Exit.DISCOVERED: ["scan", str(prompts), "--exit-code", "--out", str(tmp_path / "scan.csv")],
    }
    return run(*words[code])


@pytest.mark.parametrize("code", list(Exit), ids=lambda code: code.name)
def test_each_exit_code_of_the_table_is_that_of_a_command(
    code: Exit, tmp_path: Path, memorized: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exits(code, tmp_path, memorized, monkeypatch).exit_code == code


def test_the_table_has_every_code_and_help_shows_it() -> None:
    assert list(MEANING) == list(Exit)
    text = " ".join(run("--help").stdout.split())
    assert all(f"{code.value} {meaning}" in text for code, meaning in MEANING.items())


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["generate", "a cat", "--mode", "foo"], ["steer", "observe", "block"]),
        (["generate", "a cat", "--on-failure", "foo"], ["withhold", "pass", "raise"]),
        (["scan", "a.txt", "--engine", "foo"], ["local", "ray"]),
        (["calibrate", "--dtype", "foo"], ["float32", "float16", "bfloat16"]),
        (["generate", "a cat", "--dtype", "foo"], ["float32", "float16", "bfloat16"]),
    ],
)
def test_a_choice_that_there_is_not_is_wrong_usage_and_the_others_are_named(words: list[str], choices: list[str], tmp_path: Path) -> None:
    result = run(*words, *["--out", str(tmp_path / "out")])
    assert result.exit_code == Exit.USAGE
    assert "foo" in result.stderr
    assert all(choice in result.stderr for choice in choices)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "asked", "code"), [("a cat", True, 0), ("{memorized}", False, 0), ("{memorized}", True, 4)])
def test_a_scan_says_by_its_exit_code_what_it_discovered_where_it_is_asked_to(
    text: str, asked: bool, code: int, tmp_path: Path, memorized: dict[str, Any]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(text.format(memorized=memorized["text"]) + "\n")
    result = run("scan", str(prompts), "--out", str(tmp_path / "scan.csv"), *(["--exit-code"] if asked else []))
    assert result.exit_code == code, result.output
    assert (tmp_path / "scan.csv").exists()


def test_a_scan_that_could_not_judge_a_prompt_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr("sdguard.guarded.run.judge", None)
    assert run("scan", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "scan.csv"), "--exit-code").exit_code == Exit.DISCOVERED


# what a run is set to


def test_a_picture_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    result = run("generate", "a cat", "--steps", "1", "--height", "72", "--width", "48", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "00.png").size == (48, 72)


def test_a_negative_prompt_moves_the_picture_and_not_the_judgement(tmp_path: Path) -> None:
    rows = {}
    for negative in ("", "a dog in snow"):
        given = ["--steps", "2", "--negative-prompt", negative, "--out", str(tmp_path / negative)]
        assert run("generate", "a cat", "a fox", *given).exit_code == 0
        rows[negative] = json.loads((tmp_path / negative / "report.json").read_text())
    assert (tmp_path / "00.png").read_bytes() != (tmp_path / "a dog in snow" / "00.png").read_bytes()
    scores = [[row["score"] for row in found] for found in rows.values()]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--negative-prompt", "owl " * 40], "The negative prompt is 42 tokens long"),
        (["--device", "abacus"], "The model cannot be put on the device 'abacus'"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(words: list[str], says: str, tmp_path: Path) -> None:
    for command in ("generate", "explain"):
        result = run(command, "a cat", *words, "--out", str(tmp_path / "out"))
        assert result.exit_code == Exit.BAD_INPUT, result.output
        assert says in " ".join(result.stderr.split())
        assert not list(tmp_path.glob("out/*"))


def test_a_report_knows_its_occasion(tmp_path: Path) -> None:
    assert run("generate", "a cat", "--seed", "3", "--n", "2", "--steps", "1", "--fpr", "0.02", "--out", str(tmp_path)).exit_code == 0
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["seed"] for row in rows] == [3, 4]
    assert len({row["id"] for row in rows}) == 2
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"])
        assert (row["version"], row["false_positive_rate"]) == (sdguard.__version__, 0.02)
        assert row["profile"].startswith("UNet2DConditionModel-")
        assert re.fullmatch(r"UNet2DConditionModel-[0-9a-f]{8}", row["model"])


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_run_may_be_in_half_precision(command: str, tmp_path: Path) -> None:
    result = run(command, "a zebra at beach", "--steps", "1", "--dtype", "bfloat16", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output


def test_explain_draws_what_can_be_seen(tmp_path: Path) -> None:
    assert run("explain", "a zebra", "--steps", "1", "--out", str(tmp_path)).exit_code == 0
    assert Image.open(tmp_path / "explain.png").size == (1024, 512)


# where a model is loaded


def test_a_pipeline_for_runs_is_on_the_device_of_its_process_and_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Pipe:
        def to(self, *place: Any) -> Pipe:
            asked.append(place)
            return self

    import torch

    monkeypatch.setattr(loading, "load_pipeline", lambda model: Pipe())
    monkeypatch.setattr("sdguard.files.processes.processes", lambda: type("State", (), {"device": torch.device("cuda", 1)})())
    loading.load_for_runs("embedded")
    loading.load_for_runs("embedded", "cpu", "bfloat16")
    assert asked == [(torch.device("cuda", 1),), ("cpu", torch.bfloat16)]
    with pytest.raises(BadInput, match=r"^dtype is 'int8'; it must be one of float32, float16, bfloat16\.$"):
        loading.load_for_runs("embedded", dtype="int8")


def test_every_command_that_runs_a_model_loads_it_in_one_place() -> None:
    rooms = Path(sdguard.__file__).parent
    found = {path.relative_to(rooms).as_posix() for path in rooms.rglob("*.py") if "load_pipeline(" in path.read_text()}
    # the demonstration draws with the embedded model unguarded beside guarded
    assert found == {"denoiser/loading.py", "testbed/demo.py"}


def test_half_precision_is_scanned_as_such_and_does_not_go_on_from_another(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a lion in fog\n")
    scores = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.jsonl"
        assert run("scan", str(tmp_path / "prompts.txt"), "--dtype", dtype, "--out", str(out)).exit_code == 0
        scores.append(json.loads(out.read_text())["score"])
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.5)
