"""Scanning at scale: ``python -m benchmarks scan`` scans generated captions by `sdguard scan` on one engine after the other, and looks on.

Captions are drawn, by a seed, from the world of the embedded model, which scans them: ``--few`` of them, or ``--captions`` by processes
that share a GPU, where there is one. Of each the captions a second, the resident memory of all its processes and what lies on disk are
read at each tenth, then the seconds and the memory of ranking. One case loses a worker on the way. The ranking alone is measured on
made-up rows as well. A run that is stopped goes on where it was, since a scan does, and what it took so far is kept; cases and sizes that
are not measured again stay in ``results/scan.json``. Writes that and the docs' table; ends with exit code 1 where a table has not each row
once.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import duckdb
import numpy as np
import pandas as pd
import torch
import typer

from benchmarks.documents import ROOT, markdown, put
from benchmarks.running import profile_digest, resident, versions
from benchmarks.zoo.recipes import EMBEDDED, SCENES
from benchmarks.zoo.world import Describer, pool, some_words
from sdguard.files.atomic import write_text
from sdguard.files.prompt_files import PIECE_ROWS, write_tables
from sdguard.files.resumable import Parts, parts_folder, unsealed
from sdguard.scan.ranking import ranked

NAME, RESULTS = "scan", Path(__file__).parent / "results"
SEED = 0
#: seconds between two looks at a scan, and between two notes of them.
LOOK, NOTE = 0.2, 10.0
#: rows that the ranking alone is measured on.
RANKED = (1_000_000, 10_000_000)
#: captions that the paper's extrapolation is for.
CORPUS = 1_000_000_000
#: starts Ray with so many CPUs, each of which has a worker, before the command runs.
WITH_CPUS = (
    "import sys; from sdguard.scan.ray_engine import connect; connect(int(sys.argv.pop(1))); from sdguard.cli.main import app; app()"
)


@dataclass(frozen=True)
class Case:
    """An engine with so many workers, one of which may be lost on the way; they may share a GPU."""

    engine: str
    workers: int = 1
    lost: bool = False
    gpu: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.engine}, {self.workers}{', one lost' if self.lost else ''}{' on one GPU' if self.gpu else ''}"

    def command(self, captions: Path, out: Path) -> list[str]:
        """What scans."""
        scan = ["scan", str(captions), "--out", str(out), *(["--device", "cuda", "--batch-size", f"{GPU_BATCH}"] if self.gpu else [])]
        if self.engine == "ray":
            return [sys.executable, "-c", WITH_CPUS, str(self.workers), *scan, "--engine", "ray"]
        if self.engine == "torchrun":
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.workers)]
            return [sys.executable, *launch, "-m", "sdguard.cli", *scan]
        if self.engine == "accelerate":
            # without a GPU, this flag means no more than several processes
            several = ["--multi_gpu"] if self.workers > 1 else []
            launch = ["-m", "accelerate.commands.launch", *several, "--num_processes", str(self.workers), "--num_machines", "1"]
            return [sys.executable, *launch, "-m", "sdguard.cli", *scan]
        return [sys.executable, "-m", "sdguard.cli", *scan]


#: prompts in a batch on a GPU, which smaller ones leave idle.
GPU_BATCH = 256
#: of few captions, and of many.
CASES = (Case("local"), *(Case(engine, count) for engine in ("accelerate", "ray") for count in (1, 2)), Case("ray", 2, lost=True))
LONG = Case("torchrun", 6, gpu=True)


def caption_tables(count: int) -> Iterator[pd.DataFrame]:
    """So many captions of the embedded model's world, in pieces."""
    rng, scenes = np.random.default_rng(SEED), list(SCENES)
    describe = Describer(EMBEDDED, pool(EMBEDDED, scenes), SEED)
    for start in range(0, count, PIECE_ROWS):
        size = min(PIECE_ROWS, count - start)
        yield pd.DataFrame({"caption": [describe(some_words(EMBEDDED, scenes, rng)) for _ in range(size)]})


def processes_under(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory(pid: int) -> list[float]:
    """The resident memory of a process and all below it, in MB."""
    found = []
    for process in processes_under(pid):
        with suppress(OSError):
            found.append(resident(process))
    return found


def lose_worker(pid: int) -> bool:
    """Kill one of Ray's workers below a process; whether there was one."""
    for process in processes_under(pid):
        with suppress(OSError):
            if b"Scanner" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)
                return True
    return False


def rows_done(folder: Path, count: int, known: dict[Path, int]) -> int:
    """How many rows the parts of a scan hold; ``known`` remembers batches that have been looked into."""
    pieces = {path.stem: min(PIECE_ROWS, count - int(path.stem.partition("-")[0])) for path in folder.glob("pieces-*/*.parquet")}
    batches = 0
    for path in folder.glob("batches-*/*.json"):
        if path.parent.name.removeprefix("batches-").rpartition("-")[0] not in pieces:
            with suppress(OSError):  # its piece may be whole by now
                if path not in known:
                    known[path] = len(json.loads(unsealed(path.read_bytes()) or b"[]"))
                batches += known[path]
    return sum(pieces.values()) + batches


def on_disk(folder: Path) -> tuple[int, float]:
    """How many files there are in a folder, and their MB."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes) / 1e6


def scan_watched(case: Case, count: int, work: Path) -> dict[str, Any]:
    """What is measured of a scan by a case, which goes on where an earlier run of it was stopped."""
    folder = work / f"{case.name.replace(', ', '-').replace(' ', '-')}-{count}"
    notes = Parts(folder, "notes", [case.name, count, profile_digest(), versions()])
    if "found" in notes:
        return dict(notes["found"])
    captions, out = work / f"captions-{count}.parquet", folder / "ranked.parquet"
    if not captions.exists():
        write_tables(caption_tables(count), captions)
    out.parent.mkdir(parents=True, exist_ok=True)
    before: dict[str, Any] = notes.get("now", {"seconds": 0.0, "lost": False, "sessions": 0})
    lost, known, largest, rank_began, noted = before["lost"], dict[Path, int](), 0.0, 0.0, 0.0
    began = time.monotonic()
    with (folder / "log").open("a") as log, subprocess.Popen(case.command(captions, out), stdout=log, stderr=log) as process:
        try:
            while process.poll() is None:
                time.sleep(LOOK)
                done, held, seconds = rows_done(parts_folder(out), count, known), memory(process.pid), time.monotonic() - began
                if case.lost and not lost and done >= count / 2:
                    lost = lose_worker(process.pid)
                if done >= count:
                    rank_began, largest = rank_began or time.monotonic(), max(largest, *held, 0.0)
                now = {"seconds": before["seconds"] + seconds, "done": done, "MB": sum(held), "lost": lost}
                now["sessions"] = before["sessions"] + 1
                now["files"], now["disk MB"] = on_disk(parts_folder(out))
                if (tenth := f"tenth-{10 * done // count}") not in notes:
                    notes.keep(tenth, now)
                if seconds - noted > NOTE:
                    notes.keep("now", now)
                    noted = seconds
        except BaseException:
            process.terminate()
            raise
    ended = time.monotonic()
    if process.returncode:
        raise SystemExit(f"{case.name}: ended with {process.returncode}; {folder / 'log'} says why.")
    notes.keep("found", {**measured(case, count, notes), "rank seconds": ended - (rank_began or ended), "rank MB": largest, **check(out)})
    return dict(notes["found"])


def check(out: Path) -> dict[str, int]:
    """How many rows a ranked table has, and how many different ones."""
    query = 'SELECT count(*) AS rows, count(DISTINCT row) AS "different rows" FROM read_parquet(?)'
    return {name: int(value) for name, value in duckdb.execute(query, [str(out)]).df().iloc[0].items()}


def measured(case: Case, count: int, notes: Parts) -> dict[str, Any]:
    """The figures of the notes of a scan: those that were taken first of each tenth."""
    tenths = [notes[f"tenth-{k}"] for k in range(11) if f"tenth-{k}" in notes]
    first = next(note for note in tenths if note["done"])
    rates = [
        (later["done"] - note["done"]) / (later["seconds"] - note["seconds"]) for note, later in itertools.pairwise(tenths) if note["done"]
    ]
    last = tenths[-1]
    return {
        "case": case.name,
        "device": torch.cuda.get_device_name() if case.gpu else "CPU",
        "captions": count,
        "sessions": last["sessions"],
        "worker lost": last["lost"],
        "captions a second": (last["done"] - first["done"]) / (last["seconds"] - first["seconds"]),
        "captions a second, by tenth": rates,
        "resident MB of all processes, by tenth": [round(note["MB"]) for note in tenths],
        "files of parts, by tenth": [note["files"] for note in tenths],
        "bytes of parts a caption": 1e6 * last["disk MB"] / count,
    }


def made_up_tables(count: int, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """So many rows as a scan makes them, of numbers drawn at random: p-values as coarse as a profile of 958 scores makes them."""
    rng, drawn = np.random.default_rng(SEED), caption_tables(min(count, PIECE_ROWS))
    prompts = next(drawn).caption
    for start in range(0, count, PIECE_ROWS):
        size = min(PIECE_ROWS, count - start)
        table = pd.DataFrame({"row": range(start, start + size), "prompt": prompts[:size], "score": rng.normal(size=size)})
        table = table.assign(p_value=rng.integers(1, 960, size) / 959, evaluations=2, error="", truncated=False)
        yield table.assign(seed_0=rng.integers(0, 1 << 32, size), **{name: rng.normal(size=size) for name in columns})


def rank_made_up(count: int, columns: Sequence[str], folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of ranking so many rows into a parquet file; to be called in a process of its own."""
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    began = time.monotonic()
    for _ in made_up_tables(count, columns):
        pass
    making = time.monotonic() - began
    began = time.monotonic()
    with TemporaryDirectory(dir=folder) as own, ranked(made_up_tables(count, columns), 0.05, Path(own)) as ranking:
        filled, disk = time.monotonic() - began - making, on_disk(Path(own))[1]
        ranking.summary(20)
        write_tables(ranking.tables(), Path(own) / "ranked.parquet")
        seconds, written = time.monotonic() - began - making, (Path(own) / "ranked.parquet").stat().st_size
    return {
        "rows": count,
        "seconds": seconds,
        "seconds to fill the database": filled,
        "MB before": first,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "bytes of the database a row": 1e6 * disk / count,
        "bytes of the table a row": written / count,
    }


def signal_columns(ranked_table: Path) -> list[str]:
    """The columns of numbers that a scan's table has beyond those of every scan."""
    columns = duckdb.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(ranked_table)]).df()
    return [str(name) for name in columns.column_name if str(name).endswith("_0") and name != "seed_0"]


def brief_text(found: dict[str, Any]) -> str:
    """The documentation's table, and what it comes to for a corpus."""
    rows = [
        [
            case["case"],
            f"{case['captions']:,}",
            f"{case['captions a second']:.1f}",
            f"{min(case['captions a second, by tenth']):.1f} to {max(case['captions a second, by tenth']):.1f}",
            f"{case['resident MB of all processes, by tenth'][1]:,} to {case['resident MB of all processes, by tenth'][-1]:,}",
            f"{case['rank seconds']:.0f} s, {case['rank MB']:,.0f} MB" if case["rank MB"] else "too short to be seen",
        ]
        for case in found["cases"]
    ]
    header = ["engine, workers", "captions", "a second", "slowest and fastest tenth", "MB of all processes, first to last tenth", "ranking"]
    return f"{markdown(header, rows)}\n\n{on_paper(found)}"


def on_paper(found: dict[str, Any]) -> str:
    """What the measured rates come to for `CORPUS` captions, with what is assumed."""
    most, ranking = max(found["cases"], key=lambda case: case["captions"]), found["ranking"][-1]
    rate = most["captions a second"]
    growth = math.log(CORPUS) / math.log(ranking["rows"])
    hours = CORPUS * ranking["seconds"] / ranking["rows"] * growth / 3600
    parts, database, table = (
        most["bytes of parts a caption"], ranking["bytes of the database a row"], ranking["bytes of the table a row"]
    )  # fmt: skip
    return (
        f"On paper, {CORPUS:,} captions are {CORPUS / rate / 86400:,.1f} days of one such machine ({most['device']}), divided by how many "
        f"there are; "
        f"{CORPUS * (parts + database + table) / 1e9:,.0f} GB of disk for parts, database and table ({parts:.0f}, {database:.0f} and "
        f"{table:.0f} bytes a row), and about as much as the database again to sort it; {math.ceil(CORPUS / PIECE_ROWS):,} parts; and "
        f"{hours:.1f} hours to rank, from {ranking['rows']:,} rows in {ranking['seconds']:.0f} s and {ranking['peak MB']:,.0f} MB. "
        f"Assumed: every caption costs what these cost, machines do not slow each other down, and a sort of n rows takes n log n."
    )


def main(
    captions: Annotated[int, typer.Option(min=10, help="Captions of the case on a GPU.")] = 1_000_000,
    few: Annotated[int, typer.Option(min=10, help="Captions of the cases on the CPU.")] = 2_000,
    only: Annotated[list[str] | None, typer.Option(help="These cases on the CPU alone, such as 'accelerate, 2', and no ranking.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure the case on a GPU, and nothing else.")] = False,
    rows: Annotated[list[int] | None, typer.Option("--rank", help="Rows that the ranking alone is measured on.")] = None,
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks/scan"),
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose tables are written.")] = ROOT,
) -> None:
    """Scan many captions on every engine."""
    if gpu and not torch.cuda.is_available():
        raise typer.BadParameter("--gpu needs a GPU that torch can use.")
    if unknown := set(only or ()) - {case.name for case in CASES}:
        raise typer.BadParameter(f"There is no case {sorted(unknown)[0]!r}; there are {', '.join(repr(case.name) for case in CASES)}.")
    work.mkdir(parents=True, exist_ok=True)
    path, about = out / f"{NAME}.json", {"seed": SEED, "profile": profile_digest(), **versions()}
    known = json.loads(path.read_text()) if path.exists() else {"cases": [], "ranking": []}
    cases = {(case["case"], case["captions"]): case for case in known["cases"]}
    for case in [LONG] if gpu else [case for case in CASES if not only or case.name in only]:
        count = captions if case == LONG else few
        cases[case.name, count] = scan_watched(case, count, work) | about
        typer.echo(json.dumps(cases[case.name, count]))
    ranking = {measured["rows"]: measured for measured in known["ranking"]}
    columns = signal_columns(next(work.glob("*/ranked.parquet")))
    for count in rows or ([] if gpu or only else RANKED):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            ranking[count] = alone.submit(rank_made_up, count, columns, work).result() | about
        typer.echo(json.dumps(ranking[count]))
    found = {"cases": list(cases.values()), "ranking": [ranking[count] for count in sorted(ranking)]}
    write_text(path, json.dumps(found, indent=1))
    if ranking:
        put(NAME, brief_text(found), root)
    if any(not case["rows"] == case["different rows"] == case["captions"] for case in cases.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
