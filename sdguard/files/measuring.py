"""Long measurements: cut into batches that are kept as they come, shared by processes, and gone on with when they were stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.progress import track

from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table


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
