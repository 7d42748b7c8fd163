"""Files that are there whole or not at all, on disks that are full and under writers that meet."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from PIL import Image

from sdguard.files import atomic
from sdguard.files.atomic import CannotWrite, atomic_write, write_text
from sdguard.files.outputs import save_pictures
from sdguard.files.prompt_files import write_table


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within the block no file can have more than so many bytes: a real error in the midst of writing, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.parquet", "a.png"])
def test_on_a_full_disk_what_was_there_stays_and_one_sentence_names_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("before")
    text = [f"{i} {hash(str(i))}" for i in range(5000)]
    writers: dict[str, Callable[[], None]] = {
        "a.txt": lambda: write_text(path, "".join(text)),
        "a.png": lambda: save_pictures(tmp_path, {name: Image.effect_noise((300, 300), 99)}, {}),
    }
    with full_disk(1000), pytest.raises(CannotWrite) as refused:
        writers.get(name, lambda: write_table(pd.DataFrame({"prompt": text}), path))()
    assert str(refused.value).startswith(f"{path} cannot be written: ")
    assert "Make room or give another place" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match=r"file/deep/a\.txt cannot be written: Not a directory\."):
        write_text(tmp_path / "file" / "deep" / "a.txt", "")


def test_of_two_writers_in_one_process_the_last_to_end_wins_and_nothing_is_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
        assert not path.exists()
    assert path.read_text() == "first"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_text(path, f"{i} " * 50_000), range(64)))
    assert len(set(path.read_text().split())) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_leaves_is_written_over_by_the_next_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    pid = os.fork()
    if not pid:
        with atomic_write(path) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 1
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def half_written(path: Path) -> None:
    """A write that fails on the way."""
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reason", ["no locks on this system", "no locks on this disk"])
def test_where_nothing_can_be_locked_files_are_whole_too(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no locks on this system":
        monkeypatch.setattr(atomic, "fcntl", None)
    else:
        monkeypatch.setattr(atomic.fcntl, "flock", lambda *_: os.close(-1))
    path = tmp_path / "a.txt"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_text(path, f"{i} " * 50_000), range(32)))
    assert len(set(path.read_text().split())) == 1
    with pytest.raises(CannotWrite):
        half_written(path)
    assert list(tmp_path.iterdir()) == [path]


def test_many_processes_write_one_file_and_are_killed_and_it_is_always_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    rng = Random(0)
    for _ in range(5):
        writers = []
        for number in range(4):
            if not (pid := os.fork()):
                while True:
                    write_text(path, f"{number} " * 20_000)
            writers.append(pid)
        for pid in writers:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert len(set(path.read_text().split())) == 1
    assert len(list(tmp_path.glob(".*"))) <= 4
