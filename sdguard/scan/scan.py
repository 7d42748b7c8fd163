"""Scanning: the prompts of a list ranked by memorization p-value, without making their pictures.

Every prompt is read at the guard's own reference call, in observing mode, and no run is made. Its seeds are hashes of its text. So its
results depend neither on the order of the list nor on how it is cut into batches, and different prompts do not share their noise.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from sdguard.choices import BATCH_SIZE
from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.loading import are_truncated
from sdguard.denoiser.probe import fitting, read_prompts
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.resumable import Parts
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun

Row = dict[str, Any]
Batch = Sequence[tuple[int, str]]


def seed_of(prompt: str, k: int) -> int:
    """The k-th seed of a prompt, 32 bits of a hash of both."""
    return int.from_bytes(hashlib.sha256(f"{k} {prompt}".encode()).digest()[:4], "big")


def combine_p_values(p_values: Sequence[float]) -> float:
    """One p-value of several, whatever their dependence: twice their mean, at most 1 (Vovk & Wang 2020, Biometrika 107, 791-808).

    A mean stays small where every noise leads to the memorized picture, as it does for most memorized prompts, and then costs
    a factor 2 for any number of seeds; the smallest p-value, corrected after Bonferroni, would cost their number.
    """
    return p_values[0] if len(p_values) == 1 else min(1.0, 2 * statistics.fmean(p_values))


def smallest_p_value(profile: Profile, seeds: int) -> float:
    """The smallest p-value that a prompt can get."""
    return combine_p_values([1 / (1 + profile.prompts)] * seeds)


def reports_of(pipe: Any, profile: Profile, prompts: Sequence[str], seeds: Sequence[int], false_positive_rate: float) -> list[GuardReport]:
    """The guard's report of each prompt from its seed, in observing mode and without a run, its evaluations among the extra ones.

    Cost: 2 denoiser evaluations a prompt, and what the cascade buys.
    """
    run = GuardedRun(GuardConfig("observe", false_positive_rate, "pass"), profile, list(prompts), Encoder(pipe))
    run.observe(read_prompts(pipe, prompts, seeds))
    return run.reports


def scan_batch(pipe: Any, profile: Profile, batch: Batch, *, seeds: int, false_positive_rate: float) -> list[Row]:
    """One row for each ``(row number, prompt)`` of a batch, in halves where it does not fit into memory. Cost: as `scan`.

    A row has ``row``, ``prompt``, ``score`` (mean over seeds), ``p_value`` (`combine_p_values`), ``evaluations``, ``error`` (empty unless
    a signal failed, and then score and p-value are nan), ``truncated`` (whether the prompt is longer than the text encoder reads), and
    for each seed k ``seed_k``, ``score_k``, ``p_value_k`` and the value of each signal of the cascade, ``NAME_k``, nan where it was not
    read.
    """

    def rows(some: Batch) -> list[Row]:
        return rows_of(pipe, profile, some, seeds, false_positive_rate)

    return [row for part in fitting(rows, batch) for row in part]


def rows_of(pipe: Any, profile: Profile, batch: Batch, seeds: int, false_positive_rate: float) -> list[Row]:
    """`scan_batch` in ``seeds`` denoiser batches."""
    prompts = [prompt for _, prompt in batch]
    unread = {"score": math.nan, "p_value": math.nan, "evaluations": 0, "error": ""}
    found: list[Row] = [
        {"row": int(row), "prompt": prompt, **unread, "truncated": truncated}
        for (row, prompt), truncated in zip(batch, are_truncated(prompts, pipe.tokenizer), strict=True)
    ]
    for k in range(seeds):
        noises = [seed_of(prompt, k) for prompt in prompts]
        for row, report, seed in zip(found, reports_of(pipe, profile, prompts, noises, false_positive_rate), noises, strict=True):
            row[f"seed_{k}"], row[f"score_{k}"], row[f"p_value_{k}"] = seed, as_number(report.score), as_number(report.p_value)
            row.update({f"{name}_{k}": as_number(report.signals.get(name, {}).get("value")) for name in profile.cascade.signals})
            row["evaluations"] += report.extra_evaluations
            row["error"] = row["error"] or report.error or ""
    for row in found:
        if not row["error"]:
            row["score"] = statistics.fmean(row[f"score_{k}"] for k in range(seeds))
            row["p_value"] = combine_p_values([row[f"p_value_{k}"] for k in range(seeds)])
    return found


def as_number(value: float | None) -> float:
    """A number that may be missing, nan where it is."""
    return math.nan if value is None else float(value)


def scan(
    pipe: Any,
    profile: Profile,
    prompts: Mapping[int, str],
    *,
    seeds: int = 1,
    false_positive_rate: float = 0.01,
    batch_size: int = BATCH_SIZE,
    work: Path | None = None,
    state: PartialState | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of `scan_batch` batch by batch as they are done, first of all those that ``work`` knows already.

    Cost: for each prompt and seed 2 denoiser evaluations and what the cascade buys. No picture is made.

    Args:
        prompts: row number -> prompt.
        seeds: noises for each prompt.
        false_positive_rate: the guard's: what it flags is flagged in a guarded run too.
        batch_size: prompts in one denoiser batch.
        work: a folder that keeps results as they come, so that a scan killed at any time goes on and loses at most a batch.
        state: accelerate's, where several processes share the work, each on its own pipeline; each yields its own rows, and all
            have to take all of theirs.

    Raises:
        ProfileError: the profile is another model's, or is too small for the rate.
    """
    profile_for(pipe, given=profile).allowed(false_positive_rate)
    scan_one = partial(scan_batch, pipe, profile, seeds=seeds, false_positive_rate=false_positive_rate)
    yield from run_resumable(
        partial(map, scan_one),
        prompts,
        cache_key(profile, seeds, false_positive_rate),
        batch_size=batch_size,
        work=work,
        state=state,
    )


def cache_key(profile: Profile, seeds: int, false_positive_rate: float) -> dict[str, Any]:
    """What moves the results of a scan beside its prompts; the same for every engine, so that the one goes on with the other's work."""
    return {"profile": asdict(profile), "seeds": seeds, "rate": false_positive_rate}


def piece_name(prompts: Mapping[int, str]) -> str:
    """A name for these prompts by row, which no others have; names sort as first rows do."""
    digest = hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()[:16]
    return f"{min(prompts, default=0):012d}-{digest}"


def batches_of(work: Path | None, name: str, key: Mapping[str, Any]) -> Parts:
    """The batches that are done of the piece of this name, under ``key`` (`cache_key`)."""
    return Parts(work, f"batches-{name}", key)


def keep_batch(batches: Parts, rows: list[Row]) -> None:
    """Keep the rows of a batch under a name that another batch does not have: what failed is tried again beside other rows."""
    numbers = [row["row"] for row in rows]
    batches.keep(f"{numbers[0]:012d}-{hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:8]}", rows)


def rows_in(batches: Parts, names: Iterable[str]) -> list[Row]:
    """The rows of the batches of these names; those that failed are not known."""
    return [row for name in names for row in batches.get(name, []) if not row["error"]]


def cut(prompts: Iterable[tuple[int, str]], batch_size: int) -> Iterator[Batch]:
    """Prompts in batches."""
    left = iter(prompts)
    while batch := list(islice(left, batch_size)):
        yield batch


def run_resumable(
    scan_batches: Callable[[Iterable[Batch]], Iterable[list[Row]]],
    prompts: Mapping[int, str],
    key: Mapping[str, Any],
    *,
    batch_size: int,
    work: Path | None,
    state: PartialState | None = None,
) -> Iterator[list[Row]]:
    """Yield what ``work`` knows of this very piece, then what ``scan_batches`` makes of this process's share of the others, kept first.

    ``key`` has whatever moves the results beside the prompts (`cache_key`).
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    batches = batches_of(work, piece_name(prompts), key)
    known = rows_in(batches, batches.dealt(state))
    if known:
        yield known
    done = [row["row"] for row in known]
    everyone = set(gather_object(done) if processes > 1 else done)
    left = ((row, prompt) for row, prompt in prompts.items() if row not in everyone)
    for rows in scan_batches(islice(cut(left, batch_size), rank, None, processes)):
        keep_batch(batches, rows)
        yield rows


def scan_pieces(
    pipe: Any,
    profile: Profile,
    pieces: Iterable[Mapping[int, str]],
    left: Container[str],
    advance: Callable[[int], None],
    *,
    seeds: int,
    false_positive_rate: float,
    batch_size: int,
    work: Path,
    state: PartialState,
) -> Iterator[tuple[str, list[Row]]]:
    """Yield each of those pieces whose `piece_name` is ``left``: that name, and the rows of all its prompts, in any order.

    All processes take all pieces, share the batches of each, and get the same. ``advance`` is called with prompts done on the way. What
    is kept in ``work`` of a piece under way is for the caller to remove once the piece is safe. Cost and arguments: as `scan`, whose
    check of the profile is the caller's.
    """
    scan_one = partial(scan_batch, pipe, profile, seeds=seeds, false_positive_rate=false_positive_rate)
    key = cache_key(profile, seeds, false_positive_rate)
    for prompts in pieces:
        if (name := piece_name(prompts)) in left:
            own: list[Row] = []
            for rows in run_resumable(partial(map, scan_one), prompts, key, batch_size=batch_size, work=work, state=state):
                own += rows
                advance(len(rows) * state.num_processes)
            yield name, gather_object(own) if state.num_processes > 1 else own


def power_note(profile: Profile, seeds: int, count: int, fdr: float) -> str | None:
    """What a profile of this size can discover among ``count`` prompts, in one sentence; None where a single prompt can be discovered."""
    smallest = smallest_p_value(profile, seeds)
    needed = math.ceil(count * smallest / fdr - 1e-9)
    if needed <= 1:
        return None
    enough = math.ceil(count * smallest * (1 + profile.prompts) / fdr - 1e-9) - 1
    few = f"The profile's {profile.prompts} scores give no p-value under {smallest:.2g}"
    grow = f"a single one needs a profile of {enough:,} scores"
    if needed > count:
        return f"{few}, so that nothing can be discovered at a false discovery rate of {fdr:g}: {grow}."
    return f"{few}, so that nothing is discovered unless {needed} of these {count} prompts reach it; {grow}."
