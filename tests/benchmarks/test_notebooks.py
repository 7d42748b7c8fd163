"""Notebooks: their cells run, and give what is kept in them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from typer.testing import CliRunner

from benchmarks import notebooks
from benchmarks.__main__ import app
from benchmarks.examples import elsewhere

#: levels of 255 by which a picture may differ on another processor, in the mean.
PICTURE_TOLERANCE = 2
#: bytes of a notebook with its pictures.
MOST = 600_000

DRAWN = """
import sys
from PIL import Image
print("out", 1 + 1)
print("not kept", file=sys.stderr)
print("out again")
Image.new("RGB", (2, 3), (9, 9, 9))
"""


def notebook_of(*sources: str) -> NotebookNode:
    """A notebook of these cells of code, behind one of text, that never ran."""
    cells = [nbformat.v4.new_markdown_cell("# Title\n\nSome `code`."), *map(nbformat.v4.new_code_cell, sources)]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(params=notebooks.files(), ids=lambda path: str(path.name))
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_the_cells_of_a_notebook_run_and_give_what_is_kept_in_it(path: Path) -> None:
    before = notebooks.read(path)
    with elsewhere():
        now = notebooks.run(before)
    assert notebooks.texts(now) == notebooks.texts(before), "make notebook writes it anew"
    for old, new in zip(notebooks.pictures(before), notebooks.pictures(now), strict=True):
        assert np.abs(old.astype(int) - new).mean() < PICTURE_TOLERANCE, "make notebook writes it anew"


def test_a_notebook_is_small_and_as_the_command_writes_it(path: Path) -> None:
    assert path.stat().st_size < MOST
    assert path.read_text() == notebooks.written(notebooks.read(path))


def test_the_command_keeps_text_and_pictures_and_nothing_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "some.ipynb"
    file.write_text(notebooks.written(notebook_of("x = 20", DRAWN, "print(x)")))
    assert CliRunner().invoke(app, ["examples", str(file)]).exit_code == 0
    found = notebooks.read(file)
    assert notebooks.texts(found) == [[], ["out 2\nout again\n", "<PIL.Image.Image image mode=RGB size=2x3>"], ["20\n"]]
    assert [picture.tolist() for picture in notebooks.pictures(found)] == [[[[9, 9, 9]] * 2] * 3]
    given = str([cell.outputs for cell in notebooks.code_cells(found)])
    assert "not kept" not in given
    assert "image/jpeg" not in given
    assert [cell.execution_count for cell in notebooks.code_cells(found)] == [1, 2, 3]
    text = file.read_text()
    assert CliRunner().invoke(app, ["examples", str(file)]).exit_code == 0
    assert file.read_text() == text


def test_a_cell_that_raises_is_told_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "some.ipynb"
    file.write_text(before := notebooks.written(notebook_of("print(1)", "1 / 0")))
    result = CliRunner().invoke(app, ["examples", str(file)])
    assert isinstance(result.exception, CellExecutionError)
    assert "ZeroDivisionError" in str(result.exception)
    assert file.read_text() == before


def test_prose_is_what_stands_between_the_cells() -> None:
    assert notebooks.prose(notebook_of("print(1)")) == "# Title\n\nSome `code`."
