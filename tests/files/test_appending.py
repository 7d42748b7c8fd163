"""Lines that many append to one file: whole or absent, in files of a bounded size, whoever is killed and however full the disk is."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdguard.files.appending import BLOCK, append_lines, put_aside
from sdguard.files.atomic import CannotWrite

OURS = b'{"id": "'


def written(path: Path) -> list[bytes]:
    """What each file of a log holds, the oldest first."""
    return [file.read_bytes() for file in (*put_aside(path).values(), path)]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=40)


@settings(max_examples=40, deadline=None)
@given(calls=st.lists(st.lists(texts, min_size=1, max_size=4), min_size=1, max_size=12), largest=st.integers(1, 200))
def test_all_lines_are_there_in_their_order_and_no_file_is_larger_than_it_may_be_but_by_one_call(
    calls: list[list[str]], largest: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "in" / "log.jsonl"
        for lines in calls:
            append_lines(path, lines, largest=largest)
        pieces = ["".join(f"{line}\n" for line in lines).encode() for lines in calls]
        files = written(path)
        assert b"".join(files) == b"".join(pieces)
        assert all(len(file) <= largest or file in pieces for file in files)
        assert list(put_aside(path)) == list(range(1, len(files)))


def test_a_file_is_put_aside_under_the_number_after_the_highest_there_is(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for name in ("log.7", "log.gz", "log.7.gz", "log.٣", "other.9"):
        (tmp_path / name).write_text("kept")
    for line in ("one", "two", "three"):
        append_lines(path, [line], largest=4)
    assert [file.name for file in put_aside(path).values()] == ["log.7", "log.8", "log.9"]
    assert written(path) == [b"kept", b"one\n", b"two\n", b"three\n"]


def test_one_that_was_removed_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for line in ("one", "two", "three"):
        append_lines(path, [line], largest=1)
    (tmp_path / "log.1").unlink()
    append_lines(path, ["four"], largest=1)
    assert written(path) == [b"two\n", b"three\n", b"four\n"]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Within the block no file of this process grows beyond ``size`` bytes: as on a full disk, a write ends in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_cuts_off_is_taken_back_and_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_lines(path, ["a whole line"])
    with disk_of(20), pytest.raises(CannotWrite, match=rf"^{path} cannot be written: [A-Z][^\n]+\. Make room"):
        append_lines(path, ["a line that is longer than what is left"])
    assert path.read_bytes() == b"a whole line\n"
    append_lines(path, ["another"])
    assert path.read_bytes() == b"a whole line\nanother\n"


@pytest.mark.parametrize("cut", [1, 3, len(OURS), 30])
def test_a_line_that_somebody_was_killed_in_is_removed(cut: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "log", b'{"id": "1", "verdict": "clean", "p": 1}\n'
    path.write_bytes(whole * 3 + whole[:cut])
    append_lines(path, ["{}"], beginning=OURS)
    assert path.read_bytes() == whole * 3 + b"{}\n"


@pytest.mark.parametrize("foreign", [b"not ours", b'{"idea": "', b"\xff", b"x" * (2 * BLOCK + 5)])
def test_a_last_line_that_is_not_ours_is_kept_and_ended(foreign: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\n" + foreign)
    append_lines(path, ["{}"], beginning=OURS)
    assert path.read_bytes() == b"first\n" + foreign + b"\n{}\n"


def test_a_file_without_any_line_break_is_nobody_s_to_remove(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_bytes(b"what I have to remember")
    append_lines(path, ["{}"], beginning=OURS)
    assert path.read_bytes() == b"what I have to remember\n{}\n"


def test_no_lines_change_nothing_and_show_whether_some_could_be_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_lines(path, ["one"], largest=1)
    append_lines(path, [], largest=1)
    assert written(path) == [b"one\n"]
    with pytest.raises(CannotWrite, match="Is a directory"):
        append_lines(tmp_path, [])
    with pytest.raises(CannotWrite, match=r"cannot be written: (Not a directory|File exists)"):
        append_lines(path / "log", [])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".log.lock", "log"]


#: appends numbered lines of its own, a few at a time.
WRITER = """
import sys
from pathlib import Path
from sdguard.files.appending import append_lines
for i in range(100):
    append_lines(Path(sys.argv[1]), [f"{sys.argv[2]} {i} {j}" for j in range(i % 3 + 1)], largest=500)
"""


def test_processes_lose_nothing_while_the_file_is_put_aside_under_them(tmp_path: Path) -> None:
    path = tmp_path / "log"
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    lines = b"".join(written(path)).decode().splitlines()
    for name in "abc":
        assert [line for line in lines if line[0] == name] == [f"{name} {i} {j}" for i in range(100) for j in range(i % 3 + 1)]
    assert len(lines) == 3 * sum(i % 3 + 1 for i in range(100))
    assert all(len(file) <= 500 for file in written(path))


#: appends numbered lines until it is killed, each as soon as the one before is on disk, and says which are.
ENDLESS = """
import itertools, sys
from pathlib import Path
from sdguard.files.appending import append_lines
for i in itertools.count():
    line = f'{{"id": "{sys.argv[2]}", "number": {i}, "text": "{"long " * 900}"}}'
    append_lines(Path(sys.argv[1]), [line], beginning=b'{"id": "', largest=20_000)
    print(i, flush=True)
"""


def test_killed_processes_leave_whole_lines_and_all_that_they_said_were_there(tmp_path: Path) -> None:
    path, said = tmp_path / "log", {}
    for name, delay in (("a", 0.02), ("b", 0.05), ("c", 0.11), ("d", 0.23)):
        with subprocess.Popen([sys.executable, "-c", ENDLESS, str(path), name], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()  # it is under way
            time.sleep(delay)
            process.kill()
            said[name] = len((first + process.stdout.read()).splitlines())
    append_lines(path, ['{"id": "last", "number": 0}'], beginning=OURS)
    lines = [json.loads(line) for line in b"".join(written(path)).splitlines()]
    numbers = {name: [line["number"] for line in lines if line["id"] == name] for name in said}
    assert min(said.values()) > 0
    for name, count in said.items():
        assert numbers[name] == list(range(len(numbers[name])))
        assert len(numbers[name]) - count in (0, 1)  # one may be there that it had not yet said


def test_threads_lose_nothing_either(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: append_lines(path, [str(i)], largest=50), range(80)))
    assert sorted(map(int, b"".join(written(path)).split())) == list(range(80))
