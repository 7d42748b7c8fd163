"""What several benchmarks need: the versions their results hang on, pictures in tables, and the audit's way of writing results."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from PIL import Image

from sdguard import testbed
from sdguard.audit.figures import save
from sdguard.calibration import PROFILE_FILE

PACKAGES = ("sdguard", "torch", "diffusers", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """The versions of the libraries that a result hangs on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


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


def write(name: str, table: pd.DataFrame, figures: Mapping[str, Any], figure: Figure, out: Path) -> None:
    """The table, the figures in numbers with the versions they hang on, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out / f"{name}.parquet", index=False)
    (out / f"{name}.json").write_text(json.dumps({"about": versions(), **figures}, indent=1) + "\n")
    save(figure, out / f"{name}.png")
    typer.echo(json.dumps(figures, indent=1))
