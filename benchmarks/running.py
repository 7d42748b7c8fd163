"""Long measurements: cut into batches that are kept as they come, shared by processes, and gone on with when they were stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.progress import track

from sdguard.processes import processes
from sdguard.prompt_files import write_table

PACKAGES = ("sdguard", "torch", "diffusers", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """The versions of the libraries that a result hangs on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def measured(
    what: str,
    samples: pd.DataFrame,
    measure: Callable[[pd.DataFrame], pd.DataFrame],
    folder: Path,
    about: Mapping[str, Any],
    batch: int,
) -> pd.DataFrame:
    """What ``measure`` makes of ``samples``, a batch at a time; every row carries ``about``.

    Each batch is a parquet file under ``folder``, written whole or not at all, in a subfolder named after a hash of ``what``, the samples
    and ``about``: a measurement that was killed goes on and has lost a batch at most. Under ``accelerate launch`` the processes take turns
    with the batches and all return all rows; processes on several machines have to share the folder.
    """
    state = processes()
    told = samples.to_json(orient="split")
    work = folder / f"{what}-{hashlib.sha256(json.dumps([what, batch, told, dict(about)], default=str).encode()).hexdigest()[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    parts = {start: work / f"{start:06d}.parquet" for start in range(0, len(samples), batch)}
    mine = list(parts.items())[state.process_index :: state.num_processes]
    left = [(start, path) for start, path in mine if not path.exists()]
    for start, path in track(left, what, disable=not state.is_main_process or not left):
        write_table(measure(samples[start : start + batch].reset_index(drop=True)).assign(**about), path)
    state.wait_for_everyone()
    return pd.concat([pd.read_parquet(path) for path in parts.values()], ignore_index=True)


def as_png(images: np.ndarray) -> list[bytes]:
    """Pictures, uint8, as PNG files."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file, "png")
    return [file.getvalue() for file in files]


def from_png(files: Sequence[bytes]) -> np.ndarray:
    """The inverse of `as_png`."""
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
