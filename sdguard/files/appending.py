"""Lines appended to a file that many write to: each is there whole or not at all, and the file may be put aside by its size."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterable
from io import FileIO
from os import SEEK_END
from pathlib import Path

from filelock import FileLock

from sdguard.files.atomic import CannotWrite

#: seconds between two looks at a lock that somebody else holds.
POLL = 0.005
#: bytes in which the end of the last whole line is looked for, from the end of a file on.
BLOCK = 65536


def append_lines(path: Path, lines: Iterable[str], *, beginning: bytes | None = None, largest: int | None = None) -> None:
    """Append lines to a file, all of them or none, whoever else, thread or process, appends to it at once; they are on disk then.

    Without any lines it is only seen that some could be written. Whoever writes holds a lock on a file beside it, ``.NAME.lock``, which
    stays.

    Args:
        path: the file, made where there is none, its folder too.
        lines: each without its line break, and without any in it.
        beginning: what all lines of this kind begin with. A last line without a line break that begins so is one that somebody was killed
            in, and is removed; any other is ended, so that it spoils none, since it may be anybody's.
        largest: bytes that the file does not grow beyond: before, it is put aside under the next of the names in `put_aside`, and one
            is begun. Lines that are appended together stay together, and are put aside only by those that come after.

    Raises:
        CannotWrite: in place of any `OSError`; the file has none of the lines then.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), poll_interval=POLL):
            with FileIO(path, "a+") as file:
                size = mended(file, beginning)
                if largest is None or not (size and content) or size + len(content) <= largest:
                    append(file, content)
                    return
            path.rename(path.with_name(f"{path.name}.{1 + max(put_aside(path), default=0)}"))
            with FileIO(path, "a+") as file:
                append(file, content)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or str(error), str(path)) from None


def put_aside(path: Path) -> dict[int, Path]:
    """The files that the lines of ``path`` were put aside in, by their number, the oldest first; those that were removed are not there."""
    found = {file.name.removeprefix(f"{path.name}."): file for file in path.parent.glob(f"{glob.escape(path.name)}.*")}
    return dict(sorted((int(number), file) for number, file in found.items() if number.isascii() and number.isdecimal()))


def mended(file: FileIO, beginning: bytes | None) -> int:
    """The size of a file once a last line without a line break was removed, if it begins so as far as it goes, or ended."""
    size = file.seek(0, SEEK_END)
    whole = end_of_lines(file, size)
    if whole == size:
        return size
    file.seek(whole)
    if beginning is not None and beginning.startswith(file.read(min(len(beginning), size - whole))):
        file.truncate(whole)
        return whole
    append(file, b"\n")
    return size + 1


def end_of_lines(file: FileIO, size: int) -> int:
    """Bytes of a file of this size up to the end of its last line break."""
    for start in range((size - 1) // BLOCK * BLOCK, -1, -BLOCK):
        file.seek(start)
        if (place := file.read(BLOCK).rfind(b"\n")) >= 0:
            return start + place + 1
    return 0


def append(file: FileIO, content: bytes) -> None:
    """Write all of ``content`` to the end of a file and have it on disk; what cannot be written whole is taken back."""
    size, left = file.seek(0, SEEK_END), memoryview(content)
    try:
        while left:
            left = left[file.write(left) :]
        if content:
            os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        raise
