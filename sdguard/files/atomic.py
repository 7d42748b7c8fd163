"""Files that are there whole or not at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class CannotWrite(OSError):
    """A file cannot be written; its text is one sentence that names the file and the reason."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}. Make room or give another place, and run it again."


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, in a folder that is there; it takes the place of ``path`` at the end of the block.

    If the block raises, nothing is left of it, and what was at ``path`` stays. Of several writers, threads or processes, the last to end
    has its file there: each writes to a path of its own.

    Raises:
        CannotWrite: in place of any `OSError`.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise CannotWrite(error.errno, (error.strerror or str(error)).splitlines()[0].rstrip("."), str(path)) from None
    finally:
        with suppress(OSError):  # the folder may be what cannot be written to
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises as `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises as `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
