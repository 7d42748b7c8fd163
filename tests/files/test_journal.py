"""Journals: what a killed run keeps."""

from pathlib import Path

from sdguard.files.journal import Journal

WORK = {"of": "this"}


def test_a_journal_remembers_and_goes_when_the_work_is_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    Journal(path, WORK).add("one", [1.5, None])
    again = Journal(path, WORK)
    assert again.results == {"one": [1.5, None]}
    again.close()
    assert not path.exists()


def test_a_journal_of_other_work_is_started_over(tmp_path: Path) -> None:
    Journal(tmp_path / "j", {"of": "that"}).add("one", 1)
    assert Journal(tmp_path / "j", WORK).results == {}


def test_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, WORK).add("one", 1)
    with path.open("a") as file:
        file.write('{"key": "two", "resu')
    again = Journal(path, WORK)
    assert again.results == {"one": 1}
    again.add("three", 3)
    assert Journal(path, WORK).results == {"one": 1, "three": 3}


def test_without_a_path_nothing_is_kept() -> None:
    journal = Journal(None, WORK)
    journal.add("one", 1)
    journal.close()
    assert journal.results == {"one": 1}
