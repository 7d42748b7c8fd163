"""The benchmark of hostile input: that its cases come out as they should, are the same each time, and that it sees what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import fuzz
from benchmarks.fuzz import KINDS, run_case, summary
from benchmarks.outcomes import BAD, MISREAD, NO_SENTENCE, READ, REFUSED, WRONG, Misread, NoSentence, checked_sentence, expect
from sdguard.files import prompt_files, resumable

EACH = len(KINDS)


def kind_at(kind: str, count: int) -> list[dict[str, Any]]:
    """So many cases of one kind."""
    return [run_case(list(KINDS).index(kind) + EACH * i) for i in range(count)]


def test_every_kind_comes_out_well_and_the_same_each_time(tmp_path: Path) -> None:
    fuzz.main(count=2 * EACH, first=1000, out=tmp_path)
    written = json.loads((tmp_path / "fuzz.json").read_text())
    assert written["bad"] == []
    assert [row["kind"] for row in written["rows"]] == list(KINDS)
    assert {row["cases"] for row in written["rows"]} == {2}
    assert summary([run_case(1000 + i) for i in range(2 * EACH)]) == written["rows"]


def test_a_row_that_is_shifted_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompt_files, "checked_row", lambda line, row, header, separator: [*row, *header][: len(header)])
    misread = [case["case"] for case in kind_at("prompt file, misshapen", 30) if case["outcome"] == MISREAD]
    assert misread
    with pytest.raises(typer.Exit):
        fuzz.main(count=1, first=misread[0], out=tmp_path)


def test_a_damaged_part_that_is_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "unsealed", lambda content: content.partition(b"\n")[2])
    assert {case["outcome"] for case in kind_at("part of long work, damaged", 20)} & {*BAD}


def test_what_is_no_sentence_is_seen() -> None:
    assert checked_sentence(ValueError("a.csv has no column 'b'.")) == REFUSED
    for text in ("bad", "a\nb.", "a" * 2000 + ".", ""):
        with pytest.raises(NoSentence):
            checked_sentence(ValueError(text))
    assert WRONG[NoSentence] == NO_SENTENCE
    assert expect(1, 1) == READ
    with pytest.raises(Misread):
        expect(1, 2)
