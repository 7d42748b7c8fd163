"""Sheets of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def sheet(rows: list[list[np.ndarray]], path: Path, scale: int = 2) -> None:
    """Rows of pictures as one PNG."""
    grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    image = Image.fromarray(grid)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC).save(path, optimize=True)
