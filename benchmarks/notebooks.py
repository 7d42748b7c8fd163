"""The documentation's notebooks: their cells run, and what they give is kept in them.

A notebook is run from its first cell to its last, in a kernel of its own, and only what its cells give is replaced. Of that stays what a
reader sees on any machine: text, tables, and pictures as PNG. What goes to the standard error is of the libraries, and of the machine.
"""

from __future__ import annotations

import base64
import copy
import io
import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from benchmarks.documents import ROOT

SUFFIX = ".ipynb"
#: seconds that a cell may take.
LONGEST = 600
TEXTS, PICTURE = ("text/plain", "text/html"), "image/png"


def files(root: Path = ROOT) -> list[Path]:
    """The notebooks under ``docs/``."""
    return sorted((root / "docs").glob(f"*{SUFFIX}"))


def read(path: Path) -> NotebookNode:
    """A notebook; raises what nbformat does where the file is none."""
    return nbformat.read(path, as_version=4)


def written(notebook: NotebookNode) -> str:
    """The text of its file."""
    return str(nbformat.writes(notebook)) + "\n"


def prose(notebook: NotebookNode) -> str:
    """What it says between its code, in Markdown."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run(notebook: NotebookNode) -> NotebookNode:
    """A notebook after a run: a copy with what its cells give now. They run in the working directory, in a new kernel of this Python.

    The kernel has one thread: the order of a reduction, and so its bits, hang on the number.

    Raises:
        CellExecutionError: a cell raises; the message has the cell and its traceback.
    """
    ran = copy.deepcopy(notebook)
    client = NotebookClient(
        ran,
        kernel_name="python3",
        timeout=LONGEST,
        resources={"metadata": {"path": str(Path.cwd())}},
        coalesce_streams=True,
        record_timing=False,
        # other users of the machine can listen to a kernel's ports
        config=Config(KernelManager={"transport_encryption": "auto"}),
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = copy.deepcopy(notebook)
    for number, (cell, after) in enumerate(zip(code_cells(found), code_cells(ran), strict=True), start=1):
        cell.execution_count, cell.outputs = number, list(kept(after.outputs))
    return found


def kept(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """What stays of the outputs of a cell."""
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stdout":
                yield output
        else:
            data = {kind: value for kind, value in output.data.items() if kind in (*TEXTS, PICTURE)}
            yield nbformat.from_dict({**output, "data": data})


def texts(notebook: NotebookNode) -> list[list[str]]:
    """For each cell of code, all that it has given as text."""
    return [
        [text for output in cell.outputs for text in ([output.text] if "text" in output else map(output.data.get, TEXTS)) if text]
        for cell in code_cells(notebook)
    ]


def pictures(notebook: NotebookNode) -> list[np.ndarray]:
    """The pictures that its cells have given, uint8 ``[H, W, 3]`` each."""
    shown = [output.data[PICTURE] for cell in code_cells(notebook) for output in cell.outputs if PICTURE in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")) for picture in shown]
