"""Files that are there whole or not at all, however their writers end."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]


class CannotWrite(OSError):
    """A file cannot be written; its text is one sentence that names the file and the reason."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}. Make room or give another place, and run it again."


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, in a folder that is there; it takes the place of ``path`` at the end of the block.

    If the block raises, nothing is left of it, and what was at ``path`` stays. What is left by a writer that was killed becomes the next
    one's to write over. Of several writers, threads or processes, the last to end has its file there: each writes to a path of its own.

    Raises:
        CannotWrite: in place of any `OSError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as partial:
            yield partial
            partial.replace(path)
    except OSError as error:
        raise CannotWrite(error.errno, (error.strerror or str(error)).splitlines()[0].rstrip("."), str(path)) from None


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside ``path`` that nobody else writes to within the block; if that raises, nothing is left there."""
    partial, descriptor = claimed(path)
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claimed(path: Path) -> tuple[Path, int | None]:
    """The first of the paths beside ``path`` that no living writer holds, and the descriptor that holds it.

    A killed writer holds nothing. Where files cannot be locked, it is a path that nobody else hits upon, and has no descriptor.
    """
    for number in itertools.count():
        partial = path.with_name(f".{path.name}.{number}.partial")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(partial)):
                return partial, descriptor
        except (BlockingIOError, FileNotFoundError):  # somebody else's, or has become somebody's file just now
            pass
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                partial.unlink()
            return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial"), None
        os.close(descriptor)
    raise AssertionError  # there is always another number


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises as `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises as `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
