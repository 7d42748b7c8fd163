"""Where results go: a folder that can be written to, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from sdguard.files.atomic import atomic_write, write_text
from sdguard.files.inputs import BadInput

#: about so many pixels the longer side of a picture on a sheet has at least.
LEAST_SIDE = 512


def ensure_writable(folder: Path) -> None:
    """Create ``folder``; raises `BadInput` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"The output directory {folder} cannot be written to: {error.strerror}.") from None


def check_file(path: Path, *read: Path | None) -> None:
    """Raise `BadInput` where ``path`` cannot be the file of a result: no file's name, a directory, or one of those that are ``read``."""
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # as where the name is too long
        raise BadInput(f"{path} cannot be written: {error.strerror}.") from None
    if os.path.isdir(path):
        raise BadInput(f"{path} is a directory: the result is a file.")
    if any(file is not None and os.path.realpath(path) == os.path.realpath(file) for file in read):
        raise BadInput(f"{path} is read, and would be written over: give the result another name.")


def save_pictures(out: Path, pictures: dict[str, Any], report: Any, report_name: str = "report.json") -> None:
    """Write PIL images by file name, as PNG, and a report as JSON into ``out``, each whole or not at all."""
    for name, picture in pictures.items():
        with atomic_write(out / name) as partial:
            picture.save(partial, format="PNG")
    write_text(out / report_name, json.dumps(report, indent=1))


def enlarged(picture: Image.Image, side: int = LEAST_SIDE) -> Image.Image:
    """A picture for a sheet: a small one is drawn a whole number of times larger, so that its longer side has about ``side`` pixels."""
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.BICUBIC)
