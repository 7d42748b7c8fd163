"""A file of prompts scanned into a file: read, scanned on one engine or the other, ranked, written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object

from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.loading import count_truncated, load_pipeline
from sdguard.files.inputs import BadInput
from sdguard.files.outputs import ensure_writable
from sdguard.files.processes import processes
from sdguard.files.prompt_files import check_suffix, import_pandas, prompts_by_row, write_table
from sdguard.files.resumable import parts_folder
from sdguard.guarded.config import GuardConfig
from sdguard.scan.scan import Row, rank_prompts, scan

if TYPE_CHECKING:
    import pandas as pd

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class FileScan:
    """What a scan of a file found.

    Attributes:
        table: as `rank_prompts` makes it.
        profile: what the prompts were judged by.
        window: tokens that the text encoder reads.
        truncated: how many prompts are longer than that.
    """

    table: pd.DataFrame
    profile: Profile
    window: int
    truncated: int


def scan_file(
    file: Path,
    out: Path,
    model: str,
    *,
    column: str | None,
    seeds: int,
    fdr: float,
    false_positive_rate: float,
    batch_size: int,
    engine: str,
    profile: Path | None,
    progress: Callable[[int, int], None],
    skip_empty: bool = False,
) -> FileScan | None:
    """Scan the prompts of ``file`` and write the ranked table to ``out``; goes on where an earlier scan of the same was stopped.

    Where several processes share the work, ``progress`` (prompts done, prompts in all) counts for all of them, and all but the main one
    get None. ``skip_empty`` leaves out rows without text, and has the log say how many. Cost: as `scan`.

    Raises:
        ModuleNotFoundError: pandas or pyarrow is missing; the message says which extra has them.
        ValueError: a file, model, rate, engine or profile that cannot be used; one sentence.
        CannotWrite: the disk is full, or cannot be written to; what was done before is kept, and gone on from.
    """
    if not 0 < fdr < 1:
        raise BadInput(f"--fdr is {fdr:g}; it must lie between 0 and 1.")
    if engine not in ENGINES:
        raise BadInput(f"--engine is {engine!r}; it must be 'local' or 'ray'.")
    GuardConfig(false_positive_rate=false_positive_rate)  # refuses a rate that cannot be
    import_pandas()  # the table needs it: better said now than at the end
    prompts = prompts_by_row(file, column, skip_empty)
    check_suffix(out)
    state = processes()
    if engine == "ray" and state.num_processes > 1:
        raise BadInput("--engine ray shares the work itself: run it without 'accelerate launch'.")
    pipe = load_pipeline(model).to(state.device)
    found = broadcast_object_list([profile_for(pipe, given=profile) if state.is_main_process else None])[0]
    ensure_writable(out.parent)
    options: dict[str, Any] = {"seeds": seeds, "false_positive_rate": false_positive_rate, "batch_size": batch_size}
    options["work"] = parts_folder(out)
    if engine == "ray":
        from sdguard.scan.ray_engine import scan_with_ray

        batches = scan_with_ray(partial(load_pipeline, model), found, prompts, **options)
    else:
        batches = scan(pipe, found, prompts, state=state, **options)
    rows: list[Row] = []
    progress(0, len(prompts))
    for batch in batches:
        rows += batch
        progress(min(len(prompts), len(rows) * state.num_processes), len(prompts))
    rows = gather_object(rows) if state.num_processes > 1 else rows
    if state.is_main_process:
        table = rank_prompts(rows, prompts, fdr)
        write_table(table, out)
    state.wait_for_everyone()
    shutil.rmtree(parts_folder(out), ignore_errors=True)
    if not state.is_main_process:
        return None
    return FileScan(table, found, pipe.tokenizer.model_max_length, count_truncated(list(prompts.values()), pipe.tokenizer))
