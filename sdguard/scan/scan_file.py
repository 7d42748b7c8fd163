"""A file of prompts scanned into a file: read, scanned on one engine or the other, ranked, written.

The file may have any length: it is read in pieces, and the rows of each piece are kept in a part of their own until all are ranked, so
that nothing but the disk has to hold more the longer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from accelerate.utils import broadcast_object_list

from sdguard.choices import Engine
from sdguard.decision.cache import main_process_alone
from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.loading import load_for_runs
from sdguard.files.inputs import BadInput
from sdguard.files.outputs import check_file, ensure_writable
from sdguard.files.processes import processes
from sdguard.files.prompt_files import PromptFile, check_suffix, column_of, import_pandas, write_tables
from sdguard.files.resumable import Parts, parts_folder
from sdguard.guarded.config import GuardConfig
from sdguard.scan.ranking import Summary, import_duckdb, ranked
from sdguard.scan.scan import Row, batches_of, cache_key, keep_batch, piece_name, scan_pieces


@dataclass(frozen=True)
class FileScan:
    """What a scan of a file found; the table is in a file.

    Attributes:
        summary: of that table.
        profile: what the prompts were judged by.
        window: tokens that the text encoder reads.
    """

    summary: Summary
    profile: Profile
    window: int


def known_pieces(parts: Parts, sizes: Iterable[str], work: Path, key: Mapping[str, Any]) -> set[str]:
    """Of the pieces of these names those whose part is sound. What failed in one is to be tried again: its other rows become a batch."""
    known = set()
    for name in sizes:
        table = parts.get(name)
        if table is None:
            continue
        if (table.error == "").all():
            known.add(name)
        elif rows := table[table.error == ""].to_dict("records"):
            keep_batch(batches_of(work, name, key), rows)
    return known


def part(parts: Parts, name: str, file: Path) -> Any:
    """The part of a piece; raises `BadInput` where there is none."""
    if (table := parts.get(name)) is None:
        raise BadInput(f"{file} has changed while it was scanned, or {parts.path(name)} has: run it again.")
    return table


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
    shown: int,
    skip_empty: bool = False,
    device: str | None = None,
    dtype: str | None = None,
) -> FileScan | None:
    """Scan the prompts of ``file`` and write the ranked table to ``out``; goes on where an earlier scan of the same was stopped.

    Where several processes share the work, ``progress`` (prompts done, prompts in all) counts for all of them, and all but the main one
    get None. ``skip_empty`` leaves out rows without text, and has the log say how many. So many rows of the table are ``shown`` in the
    summary. ``device`` and ``dtype`` are those of `load_for_runs`; each worker of a cluster has a device of its own unless one is named.
    Cost: as `scan`; the file is read twice, first to see that all of it can be used.

    Raises:
        ModuleNotFoundError: pandas, pyarrow or duckdb is missing; the message says which extra has them.
        ValueError: a file, model, rate, engine or profile that cannot be used; one sentence.
        CannotWrite: the disk is full, or cannot be written to; what was done before is kept, and gone on from.
    """
    if not 0 < fdr < 1:
        raise BadInput(f"--fdr is {fdr:g}; it must lie between 0 and 1.")
    if engine not in get_args(Engine):
        raise BadInput(f"engine is {engine!r}; it must be 'local' or 'ray'.")
    GuardConfig(false_positive_rate=false_positive_rate)  # refuses a rate that cannot be
    import_pandas()
    import_duckdb()  # which the table needs: better said now than at the end
    check_suffix(out)
    check_file(out, file)
    prompts = PromptFile(file, column_of(file, column), skip_empty)
    sizes = {piece_name(piece): len(piece) for piece in prompts.pieces(tell=True)}
    state = processes()
    if engine == "ray" and state.num_processes > 1:
        raise BadInput("--engine ray shares the work itself: run it without 'accelerate launch'.")
    pipe = load_for_runs(model, device, dtype)
    ensure_writable(out.parent)
    found = broadcast_object_list([profile_for(pipe, given=profile) if state.is_main_process else None])[0]
    profile_for(pipe, given=found).allowed(false_positive_rate)
    with main_process_alone(out, state):
        # what was done in another precision is not gone on from
        work, key = parts_folder(out.with_name(f"{out.name}.{dtype}") if dtype else out), cache_key(found, seeds, false_positive_rate)
        parts = Parts(work, "pieces", key, ".parquet")
        known = broadcast_object_list([known_pieces(parts, sizes, work, key) if state.is_main_process else None])[0]
        left = {name: size for name, size in sizes.items() if name not in known}
        total, done = sum(sizes.values()), sum(map(sizes.__getitem__, known))
        progress(done, total)

        def advance(count: int) -> None:
            nonlocal done
            done = min(total, done + count)
            progress(done, total)

        options: dict[str, Any] = {"seeds": seeds, "false_positive_rate": false_positive_rate, "batch_size": batch_size, "work": work}
        if engine == "ray":
            from sdguard.scan.ray_engine import scan_pieces_with_ray

            scanned = scan_pieces_with_ray(partial(load_for_runs, model, device, dtype), found, prompts.pieces, left, advance, **options)
        else:
            scanned = scan_pieces(pipe, found, prompts.pieces(), left, advance, state=state, **options)
        for name, rows in scanned:
            if state.is_main_process:
                parts.keep(name, as_part(rows))
            state.wait_for_everyone()
            batches_of(work, name, key).remove()
        summary = None
        if state.is_main_process:
            with ranked((part(parts, name, file) for name in sizes), fdr, work) as ranking:
                summary = ranking.summary(shown)
                write_tables(ranking.tables(), out)
            parts.remove(sizes)  # what is kept of another scan's stays
        state.wait_for_everyone()
    return FileScan(summary, found, pipe.tokenizer.model_max_length) if summary else None


def as_part(rows: list[Row]) -> Any:
    """The rows of a piece as a table, by row."""
    return import_pandas().DataFrame(rows).sort_values("row", ignore_index=True)
