"""What several benchmarks need: the versions their results hang on, the memory of a process, and pictures in tables."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from PIL import Image

from sdguard import testbed
from sdguard.decision.model_folder import PROFILE_FILE

PACKAGES = ("sdguard", "torch", "diffusers", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """The versions of the libraries that a result hangs on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def resident(pid: int) -> float:
    """A process's resident memory, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def print_no_verdicts() -> None:
    """Keep the verdicts of this process out of its log: by the thousand they are what benchmarks are made of."""
    logging.getLogger("sdguard").addFilter(lambda record: not hasattr(record, "sdguard"))


def profile_digest() -> str:
    """A hash of the embedded model's profile, on which a guarded result hangs."""
    return hashlib.sha256((testbed.path() / PROFILE_FILE).read_bytes()).hexdigest()[:12]


def as_png(images: np.ndarray) -> list[bytes]:
    """Pictures, uint8, as PNG files."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "png")
    return [file.getvalue() for file in files]


def from_png(files: Sequence[bytes]) -> np.ndarray:
    """The inverse of `as_png`."""
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def commands_of(app: typer.Typer) -> dict[str, Any]:
    """Every command of an application by its words."""

    def under(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield " ".join(words), command
            return
        for name, inner in command.commands.items():
            yield from under(inner, (*words, name))

    return dict(under(typer.main.get_command(app), ()))
