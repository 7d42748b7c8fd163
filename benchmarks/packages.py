"""Packages of other people's that change pipelines: what worked without the guard works with it.

``python -m benchmarks packages`` applies each package of `benchmarks.package_situations` that is installed to a tiny pipeline, as its
README does, and runs it in a process of its own (`benchmarks.package_runs`): unguarded, guarded where nothing is flagged, guarded where
one image of three is flagged and steered, and unguarded once more after each; prompts are read, as a calibration reads them; and it is
applied to a pipeline that is guarded already. What is not flagged has to be what it is unguarded, bit by bit.

None of the packages is needed by sdguard or by its other benchmarks, and many want other versions of the libraries than are installed:
they go into a folder of their own, ``pip install --no-deps --target FOLDER NAME ...``, which ``PYTHONPATH`` names.

Writes ``results/packages.json`` after each situation, and in the end the docs' table. What is there already, of the same versions, is not
run again unless ``--only`` names its package. Ends with exit code 1 if a situation differs, or fails guarded alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from benchmarks.documents import ROOT, markdown, put
from benchmarks.package_runs import DIFFERS, FAILS, LONGEST_REASON
from benchmarks.package_situations import SITUATIONS, Situation
from benchmarks.running import versions
from sdguard.cli.errors import one_sentence
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput

NAME = "packages"
NOT_INSTALLED = "not installed"
#: seconds after which a situation, most of which take ten, is ended.
LONGEST = 600


def version_of(distribution: str) -> str | None:
    """The version of a package that is installed, None of one that is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_process(situation: Situation) -> dict[str, Any]:
    """What `benchmarks.package_runs` tells of a situation; a process that ends without a word fails, as it may have been made to."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "SDGUARD_CACHE": folder}
        command = [sys.executable, "-m", "benchmarks.package_runs", situation.name, str(found)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return {"outcome": FAILS, "reason": f"it was not done after {LONGEST} seconds"}
        if not found.exists():
            said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            return {"outcome": FAILS, "reason": said[-1][:LONGEST_REASON]}
        told: dict[str, Any] = json.loads(found.read_text())
    return told


def measure(situation: Situation) -> dict[str, Any]:
    """What becomes of a situation here, with the version of its package."""
    version = version_of(situation.distribution)
    about = {"package": situation.distribution, "version": version, "does": situation.does, "pipeline": situation.pipeline}
    return {**about, **({"outcome": NOT_INSTALLED, "reason": ""} if version is None else in_process(situation))}


def seen(row: Mapping[str, Any], column: str) -> str:
    """A yes or no of a row, or that it was not come to."""
    return "-" if column not in row else "yes" if row[column] else "no"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The documentation's table and, below it, what did not end as identical, each with its reason."""
    cells = [
        [
            f"{row['package']} {row['version'] or ''}".strip(),
            row["does"],
            f"`{row['pipeline']}`",
            seen(row, "acts"),
            row["outcome"],
            row.get("flagged") or "-",
        ]
        for row in rows.values()
    ]
    shown = markdown(["package", "what it does", "pipeline", "changes pictures", "guarded", "flagged image"], cells)
    reasons = {(row["package"], row["does"], row["outcome"], row["reason"]): None for row in rows.values() if row["reason"]}
    told = [f"* {package}, {does}, {outcome}: {reason}" for package, does, outcome, reason in reasons]
    told += [
        f"* {row['package']}, {row['does']}, the flagged image: {row['flagged_reason']}"
        for row in rows.values()
        if row.get("flagged_reason")
    ]
    return shown + ("\n\nReasons:\n\n" + "\n".join(told) if told else "")


def is_known(situation: Situation, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a situation is among ``rows`` already, of the version of its package that is installed."""
    return situation.name in rows and rows[situation.name]["version"] == version_of(situation.distribution)


def main(
    only: Annotated[list[str] | None, typer.Option(help="A package that is tried, again if it has been; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose table is written.")] = ROOT,
) -> None:
    """Apply other people's packages to tiny pipelines, and compare what they make guarded and unguarded."""
    with one_sentence():
        names = list(dict.fromkeys(situation.distribution for situation in SITUATIONS))
        if unknown := [name for name in only or () if name not in names]:
            raise BadInput(f"Nothing is tried of {unknown[0]}; packages are {', '.join(names)}.")
        path = out / f"{NAME}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        rows = before["situations"] if before.get("versions") == versions() else {}
        wanted = [of for of in SITUATIONS if (of.distribution in only if only else not is_known(of, rows))]
        with Progress() as progress:
            for situation in progress.track(wanted, description="situations"):
                rows[situation.name] = measure(situation)
                rows = {of.name: rows[of.name] for of in SITUATIONS if of.name in rows}
                write_text(path, json.dumps({"versions": versions(), "situations": rows}, indent=1) + "\n")
                told = " ".join(filter(None, [rows[situation.name]["outcome"], rows[situation.name]["reason"]]))
                progress.console.print(f"{situation.name}: {told}", highlight=False, markup=False)
        put(NAME, table(rows), root)
    if any(row["outcome"] in (DIFFERS, FAILS) for row in rows.values()):
        raise typer.Exit(1)
