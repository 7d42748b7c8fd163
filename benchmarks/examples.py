"""The code in the README and the documentation: every Python block and notebook runs, and what it prints stands below it.

The blocks of a page run in their order, in one namespace, in an empty folder, on the embedded model. A block that cannot is marked in its
fence with the reason, ```` ```python not run: needs a GPU ````. What a block prints is the block after it, ```` ```text printed ````, which
``python -m benchmarks examples`` writes anew, and a test compares. It does the same for notebooks (`benchmarks.notebooks`).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import notebooks
from benchmarks.documents import documents
from sdguard.files.atomic import write_text

NOT_RUN, PRINTED = "not run: ", "printed"
FENCE = re.compile(r"^(`{3,})([\w-]*)[ \t]*([^\n]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        language: the first word of its fence, empty where it says none.
        note: what else stands there.
        code: what stands in it.
        line: the number of its first line.
        start, end: where the code begins and ends in the page.
    """

    language: str
    note: str
    code: str
    line: int
    start: int
    end: int

    @property
    def why_not_run(self) -> str:
        """The reason for which it does not run; empty where it does."""
        return self.note.removeprefix(NOT_RUN) if self.note.startswith(NOT_RUN) else ""


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(found[2], found[3].strip(), found[4], text.count("\n", 0, found.start(4)) + 1, found.start(4), found.end(4))
        for found in FENCE.finditer(text)
    ]


def run(text: str, name: str) -> dict[Block, str]:
    """Run the Python blocks of a page in the working directory; what those print that a printed block follows, by that block."""
    names: dict[str, Any] = {"__name__": "__page__"}
    printed, found = "", {}
    for block in blocks(text):
        if block.note == PRINTED:
            found[block], printed = printed, ""
        elif block.language == "python" and not block.why_not_run:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # so that a traceback has the page's own lines
                exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), names)
            printed = out.getvalue()
    return found


def filled(text: str, printed: Mapping[Block, str]) -> str:
    """A page with what its blocks print."""
    for block in sorted(printed, key=lambda block: -block.start):
        text = text[: block.start] + printed[block] + text[block.end :]
    return text


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """An empty working directory, and an empty cache of profiles."""
    here, before = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["SDGUARD_CACHE"] = str(Path(folder) / "cache")
        try:
            yield
        finally:
            os.chdir(here)
            os.environ.clear()
            os.environ.update(before)


def anew(path: Path) -> tuple[str, int]:
    """The text of a page or notebook with what its code gives now, and how many blocks or cells give something. Cost: all that they run."""
    with elsewhere():
        if path.suffix == notebooks.SUFFIX:
            notebook = notebooks.run(notebooks.read(path))
            return notebooks.written(notebook), sum(map(bool, notebooks.texts(notebook)))
        printed = run(path.read_text(), str(path))
        return filled(path.read_text(), printed), len(printed)


def main(
    pages: Annotated[list[Path] | None, typer.Argument(help="Pages. [default: the README and all of the documentation]")] = None,
) -> None:
    """Run the code in the README and the documentation, and write what it prints below it, or into its notebook."""
    for path in [page.resolve() for page in pages or [*documents(), *notebooks.files()]]:
        text, outputs = anew(path)
        if outputs:
            write_text(path, text)
            typer.echo(f"{path.name}: {outputs} outputs")
