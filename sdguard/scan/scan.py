"""Scanning: the prompts of a list ranked by memorization p-value, without making their pictures.

Every prompt is read at the guard's own reference call, in observing mode, and no run is made. Its seeds are hashes of its text. So its
results depend neither on the order of the list nor on how it is cut into batches, and different prompts do not share their noise.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import gather_object
from scipy.stats import false_discovery_control

from sdguard.decision.profile import Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.probe import BATCH_SIZE, read_prompts
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.resumable import Parts
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun

if TYPE_CHECKING:
    import pandas as pd

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
    """One row for each ``(row number, prompt)`` of a batch. Cost: as `scan`, in ``seeds`` denoiser batches.

    A row has ``row``, ``score`` (mean over seeds), ``p_value`` (`combine_p_values`), ``evaluations``, ``error`` (empty unless a signal
    failed, and then score and p-value are nan), and for each seed k ``seed_k``, ``score_k``, ``p_value_k`` and the value of each signal
    of the cascade, ``NAME_k``, nan where it was not read.
    """
    prompts = [prompt for _, prompt in batch]
    found: list[Row] = [{"row": int(row), "score": math.nan, "p_value": math.nan, "evaluations": 0, "error": ""} for row, _ in batch]
    for k in range(seeds):
        noises = [seed_of(prompt, k) for prompt in prompts]
        for row, report, seed in zip(found, reports_of(pipe, profile, prompts, noises, false_positive_rate), noises, strict=True):
            row[f"seed_{k}"], row[f"score_{k}"], row[f"p_value_{k}"] = seed, as_number(report.score), as_number(report.p_value)
            row.update({f"{name}_{k}": report.signals.get(name, {}).get("value", math.nan) for name in profile.cascade.signals})
            row["evaluations"] += report.extra_evaluations
            row["error"] = row["error"] or report.error or ""
    for row in found:
        if not row["error"]:
            row["score"] = statistics.fmean(row[f"score_{k}"] for k in range(seeds))
            row["p_value"] = combine_p_values([row[f"p_value_{k}"] for k in range(seeds)])
    return found


def as_number(value: float | None) -> float:
    """A number that may be missing, nan where it is."""
    return math.nan if value is None else value


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
        lambda batches: map(scan_one, batches),
        prompts,
        cache_key(profile, seeds, false_positive_rate),
        batch_size=batch_size,
        work=work,
        state=state,
    )


def cache_key(profile: Profile, seeds: int, false_positive_rate: float) -> dict[str, Any]:
    """What moves the results of a scan beside its prompts; the same for every engine, so that the one goes on with the other's work."""
    return {"profile": asdict(profile), "seeds": seeds, "rate": false_positive_rate}


def run_resumable(
    scan_batches: Callable[[Sequence[Batch]], Iterable[list[Row]]],
    prompts: Mapping[int, str],
    key: Mapping[str, Any],
    *,
    batch_size: int,
    work: Path | None,
    state: PartialState | None = None,
) -> Iterator[list[Row]]:
    """Yield what ``work`` knows of this very scan, then what ``scan_batches`` makes of this process's share of the others, kept first.

    ``key`` has whatever moves the results beside the prompts (`cache_key`).
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    parts = Parts(work, "scan", [list(prompts.items()), key])
    known = [row for name in parts.dealt(state) for row in parts.get(name, []) if not row["error"]]
    if known:
        yield known
    done = [row["row"] for row in known]
    everyone = set(gather_object(done) if processes > 1 else done)
    left = [(row, prompt) for row, prompt in prompts.items() if row not in everyone]
    for rows in scan_batches([left[start : start + batch_size] for start in range(0, len(left), batch_size)][rank::processes]):
        parts.keep(part_name([row["row"] for row in rows]), rows)
        yield rows


def part_name(numbers: Sequence[int]) -> str:
    """A name for the rows of these numbers, which another batch does not have: what failed is tried again beside other rows."""
    return f"{numbers[0]:09d}-{hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:8]}"


def rank_prompts(rows: Iterable[Row], prompts: Mapping[int, str], fdr: float) -> pd.DataFrame:
    """The rows of a scan as a table with ``prompt``, ``q_value``, ``discovered``: smallest p-value first, of equal ones the higher score.

    ``q_value`` is the Benjamini-Hochberg adjusted p-value over all prompts that could be judged, and ``discovered`` whether it is at most
    ``fdr``: of the discoveries, that share at most is expected to be ordinary. Conformal p-values that share their calibration scores
    depend on each other positively (PRDS), which the procedure allows for (Bates et al. 2023, Annals of Statistics 51, 149-178).
    This is proved for one seed and prompts that are independent of each other; means over seeds give p-values too, but no PRDS is
    proved of them.
    """
    import pandas as pd

    table = pd.DataFrame(list(rows))
    table.insert(1, "prompt", table.row.map(prompts))
    judged = table.p_value.notna()
    table.insert(4, "q_value", math.nan)
    if judged.any():
        table.loc[judged, "q_value"] = false_discovery_control(table.p_value[judged])
    table.insert(5, "discovered", table.q_value <= fdr)
    return table.sort_values(["p_value", "score", "row"], ascending=[True, False, True], ignore_index=True)


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
