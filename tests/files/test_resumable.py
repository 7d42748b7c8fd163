"""Resumable work: what a killed run keeps, and what it is kept for."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sdguard.files import resumable
from sdguard.files.atomic import CannotWrite
from sdguard.files.resumable import Parts, parts_folder, run_pieces

ABOUT = {"of": "this"}


def test_results_are_remembered_and_go_when_the_work_is_done(tmp_path: Path) -> None:
    folder = parts_folder(tmp_path / "deep.csv")
    Parts(folder, "work", ABOUT).keep("one", [1.5, None])
    again = Parts(folder, "work", ABOUT)
    assert dict(again) == {"one": [1.5, None]}
    again.remove()
    assert not list(tmp_path.iterdir())


def test_of_other_work_nothing_is_known_and_it_is_left_alone(tmp_path: Path) -> None:
    that, this = Parts(tmp_path / "work", "work", {"of": "that"}), Parts(tmp_path / "work", "work", ABOUT)
    that.keep("one", 1)
    assert dict(this) == {}
    this.keep("one", 2)
    this.remove()
    assert dict(that) == {"one": 1}


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_half_written_result_is_not_known(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Any:
        raise KeyboardInterrupt

    parts, table = Parts(tmp_path, "work", ABOUT, suffix), pd.DataFrame({"a": [1]})
    parts.keep("one", table if suffix == ".parquet" else [1])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.keep("two", table if suffix == ".parquet" else [2])
    assert list(Parts(tmp_path, "work", ABOUT, suffix)) == ["one"]


def test_without_a_folder_nothing_is_kept_for_later() -> None:
    parts = Parts(None, "work", ABOUT)
    parts.keep("one", 1)
    assert dict(parts) == {"one": 1}
    assert dict(Parts(None, "work", ABOUT)) == {}
    parts.remove()
    assert not parts


@pytest.mark.parametrize("kept", [True, False])
def test_a_piece_that_is_known_is_not_done_again(kept: bool, tmp_path: Path) -> None:
    done: list[int] = []

    def square(number: int) -> int:
        if number == 3 and not done[3:]:
            done.append(number)
            raise KeyboardInterrupt
        done.append(number)
        return number**2

    pieces, folder = {f"{i}": i for i in range(5)}, tmp_path if kept else None
    with pytest.raises(KeyboardInterrupt):
        run_pieces(Parts(folder, "squares", ABOUT), pieces, square)
    assert run_pieces(Parts(folder, "squares", ABOUT), pieces, square) == [0, 1, 4, 9, 16]
    assert done == [0, 1, 2, 3, *([3, 4] if kept else range(5))]


def test_each_known_result_falls_to_one_process_that_can_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the processes share a folder, or have one each with some results in both."""
    for folders in ([tmp_path / "all"] * 3, [tmp_path / f"{i}" for i in range(3)]):
        parts = [Parts(folder, "work", ABOUT) for folder in folders]
        for number in range(9):
            parts[number % 3].keep(f"{number}", number)
            parts[(number + number // 3) % 3].keep(f"{number}", number)
        monkeypatch.setattr(resumable, "gather_object", lambda _, parts=parts: [list(part) for part in parts])
        dealt = [part.dealt(SimpleNamespace(num_processes=3, process_index=rank)) for rank, part in enumerate(parts)]  # type: ignore[arg-type]
        assert sorted(name for names in dealt for name in names) == [f"{number}" for number in range(9)]
        assert all(name in part for part, names in zip(parts, dealt, strict=True) for name in names)


GARBAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "cut off to what is JSON still": lambda content: content[:66],
    "garbage": lambda content: bytes(range(256)),
    "one bit": lambda content: content[:80] + bytes([content[80] ^ 1]) + content[81:],
    "what an older version wrote": lambda content: content.partition(b"\n")[2],
    "nested too deep": lambda content: b"[" * 100_000,
    "huge numbers": lambda content: b"9" * 100_000,
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize("damage", GARBAGE)
def test_a_damaged_result_is_absent_said_and_made_again(damage: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []

    def work(number: int) -> Any:
        done.append(number)
        return pd.DataFrame({"a": [number] * 9}) if suffix == ".parquet" else [number] * 40

    pieces = {f"{i}": i + 100 for i in range(3)}
    before = run_pieces(parts := Parts(tmp_path, "work", ABOUT, suffix), pieces, work)
    path = parts.path("1")
    assert path is not None
    path.write_bytes(GARBAGE[damage](path.read_bytes()))
    after = run_pieces(Parts(tmp_path, "work", ABOUT, suffix), pieces, work)
    assert done == [100, 101, 102, 101]
    assert all(map(pd.DataFrame.equals, before, after)) if suffix == ".parquet" else before == after
    assert f"{path} is damaged, or of another version" in caplog.text
    assert Parts(tmp_path, "work", ABOUT, suffix).get("1") is not None


def test_a_folder_in_place_of_a_result_is_refused_in_one_sentence(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "work", ABOUT)
    (path := parts.path("one")).mkdir(parents=True)  # type: ignore[union-attr]
    with pytest.raises(CannotWrite, match=f"^{path} cannot be written: Is a directory"):
        run_pieces(parts, {"one": 1}, lambda number: number)


def test_an_interruption_moves_no_result(tmp_path: Path) -> None:
    """JSON makes lists of tuples: so it is from the start."""
    for _ in range(2):
        assert run_pieces(Parts(tmp_path, "work", ABOUT), {"one": 1}, lambda number: (number, 2.5)) == [[1, 2.5]]


def test_two_processes_that_keep_the_same_pieces_have_the_same_results_and_leave_nothing_half_written(tmp_path: Path) -> None:
    """Neither knows of the other, as where a command is given twice."""
    pieces = {f"{i}": i for i in range(60)}

    def work(number: int) -> list[int]:
        return [number] * 20_000

    def run() -> bool:
        return run_pieces(Parts(tmp_path / "work", "work", ABOUT), pieces, work) == [[i] * 20_000 for i in range(60)]

    others = []
    for _ in range(2):
        if not (pid := os.fork()):
            os._exit(0 if run() else 1)
        others.append(pid)
    assert run()
    assert [os.waitpid(pid, 0)[1] for pid in others] == [0, 0]
    assert len([path for path in (tmp_path / "work").rglob("*") if path.is_file()]) == 60
    assert run()
