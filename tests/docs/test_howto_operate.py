"""The page on operating sdguard: its Python runs in order, and its table of exit codes is the command line's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.examples import blocks
from sdguard.cli.errors import MEANING

PAGE = Path(__file__).parents[2] / "docs" / "howto-operate.md"
BLOCKS = [block.code for block in blocks(PAGE.read_text()) if block.language == "python"]


def test_the_blocks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    assert [record["verdict"] for record in names["records"]] == ["clean", "clean"]
    model = names["records"][0]["model"]
    assert f'sdguard_images_total{{model="{model}",verdict="clean"}} 2.0' in names["exposed"]
    assert f'sdguard_extra_evaluations_count{{model="{model}"}} 2.0' in names["exposed"]
    assert names["exposed"].endswith("# EOF\n")


def test_the_table_of_exit_codes_is_that_of_the_commands() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", PAGE.read_text(), flags=re.M)
    assert rows == [(str(code.value), meaning) for code, meaning in MEANING.items()]
