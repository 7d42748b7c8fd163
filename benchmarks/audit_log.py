"""An audit log under load: ``python -m benchmarks audit-log`` makes many guarded runs under several processes into one rotated log.

Every line of it has to be valid against the schema, and every image that a run has told of has to be there exactly once. Each run is a
single step of one prompt, ordinary or memorized, with what is flagged withheld. Writes ``results/audit-log.json`` and the sentence of
``docs/howto-operate.md``, and ends with exit code 1 if a line is missing, twice or not valid, or a file is larger than it may be.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pandas as pd
import torch
import typer

from benchmarks.documents import put
from benchmarks.kills import PROMPTS
from benchmarks.running import print_no_verdicts, versions
from sdguard import GuardConfig, guard, testbed
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.atomic import write_text
from sdguard.guarded.audit_log import audit_files, schema

NAME = "audit-log"
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "howto-operate.md"
#: one prompt of so many is a memorized one.
MEMORIZED_EACH = 10


def prompts_of(model: str) -> list[str]:
    """Prompts for a model's runs, by turns: ordinary ones, and for the embedded model some that it has memorized."""
    if model != "embedded":
        return PROMPTS
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    memorized = table[(table.split == "development") & (table.copy_rate == 1)].text.head(4)
    ordinary = [PROMPTS[i % len(PROMPTS)] for i in range(len(memorized) * (MEMORIZED_EACH - 1))]
    starts = range(0, len(ordinary), MEMORIZED_EACH - 1)
    return [text for start, known in zip(starts, memorized, strict=True) for text in (known, *ordinary[start : start + MEMORIZED_EACH - 1])]


def run_many(model: str, log: Path, largest: int, seeds: range) -> list[str]:
    """Guarded runs, one a seed, in this process; the ids of their images as the reports have them."""
    torch.set_num_threads(1)
    plain, prompts = load_pipeline(model), prompts_of(model)
    plain.set_progress_bar_config(disable=True)
    pipe = guard(plain, GuardConfig("block", on_unknown="first_call_only", audit_log=log, audit_log_bytes=largest))
    found = []
    for seed in seeds:
        output = pipe(prompts[seed % len(prompts)], num_inference_steps=1, generator=torch.Generator().manual_seed(seed))
        found += [report.id for report in output.guard]
    return found


def is_valid(line: str, validator: Any) -> bool:
    """Whether a line is a record."""
    try:
        return bool(validator.is_valid(json.loads(line)))
    except ValueError:
        return False


def judged(log: Path, told: list[str], largest: int) -> dict[str, Any]:
    """What a log holds beside what its runs have ``told`` of, image by image."""
    files = audit_files(log)
    lines = [line for file in files for line in file.read_text().splitlines()]
    validator = jsonschema.Draft202012Validator(schema())
    records = [json.loads(line) for line in lines if is_valid(line, validator)]
    times = Counter(record["id"] for record in records)
    return {
        "images": len(told),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "lines": len(lines),
        "verdicts": dict(sorted(Counter(record["verdict"] for record in records).items())),
        "wrong": {
            "not valid": len(lines) - len(records),
            "missing": len({*told} - {*times}),
            "twice": sum(count > 1 for count in times.values()),
            "of no run": len({*times} - {*told}),
            "too large": sum(file.stat().st_size > largest for file in files),
        },
    }


def sentence(found: Mapping[str, Any]) -> str:
    """What the page says of the results."""
    about, wrong = found["about"], sum(found["wrong"].values())
    return (
        f"{about['runs']:,} runs of {about['processes']} processes at once into one log of at most {about['largest']:,} bytes a file: "
        f"{found['lines']:,} lines in {found['files']} files, "
        + ("all of them valid against the schema, none missing and none twice." if not wrong else f"{wrong} of them wrong.")
    )


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs of all processes together.")] = 1000,
    processes: Annotated[int, typer.Option(min=1, help="Processes that write at once.")] = 2,
    largest: Annotated[int, typer.Option(min=1, help="Bytes from which on the log is put aside.")] = 20_000,
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    out: Annotated[Path, typer.Option(help="Where audit-log.json goes.")] = RESULTS,
) -> None:
    """Make many guarded runs under several processes into one audit log, and check it line by line."""
    about = {"runs": runs, "processes": processes, "largest": largest, "model": model, "versions": versions()}
    shares = [range(rank, runs, processes) for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, get_context("spawn"), print_no_verdicts) as pool:
        log, began = Path(folder) / "audit.jsonl", time.monotonic()
        told = [name for names in pool.map(partial(run_many, model, log, largest), shares) for name in names]
        seconds = round(time.monotonic() - began)
        found = {"about": about, **judged(log, told, largest), "seconds": seconds}
    write_text(out / f"{NAME}.json", json.dumps(found, indent=1) + "\n")
    if out == RESULTS:
        put(NAME, sentence(found))
    typer.echo(f"{sentence(found)} {seconds} seconds.")
    if any(found["wrong"].values()):
        raise typer.Exit(1)
