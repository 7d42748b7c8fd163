"""diffusers' own fast pipeline tests, each unguarded and with every call guarded, its outputs compared bit by bit.

``python -m benchmarks upstream --checkout PATH`` runs the tests that a checkout of diffusers has of the pipeline classes sdguard supports,
with the libraries that are installed here; nothing of theirs is kept. In the guarded run every call goes through ``sdguard.guard`` in a
mode in which nothing is steered (`benchmarks.upstream_tests`), and has to give what the same call of the unguarded run gave, or raise the
same. Tests that need a GPU skip. Those that need a hub, or hold a picture against numbers made with the hub's tokenizers, fail in both, and
their calls are compared all the same. Where a call differs the unguarded run is made once more; what does not repeat itself is left out.
The tests import ``parameterized`` and ``requests_mock``, which sdguard does not.

Writes ``results/upstream.json`` after each class, and in the end the docs' table. A class that is there already, of the same versions,
is not run again unless ``--only`` names it. Ends with exit code 1 if a test fails guarded alone, or a call differs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from benchmarks.documents import ROOT, markdown, put
from benchmarks.running import versions
from sdguard.cli.errors import one_sentence
from sdguard.denoiser.families import FAMILIES
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput

NAME = "upstream"
#: how a class of tests names the pipeline class that it tests.
TESTED = re.compile(r"^    pipeline_class = (\w+)$", re.MULTILINE)
#: characters of a reason that are kept.
LONGEST_REASON = 300

#: what became of the tests of one run: by test its "outcome", "reason" and "calls".
Outcomes = Mapping[str, Mapping[str, Any]]


def test_files(checkout: Path) -> dict[str, list[Path]]:
    """The files that test each supported pipeline class, by its name; raises `BadInput` where there are none."""
    found: dict[str, list[Path]] = {name: [] for name in FAMILIES}
    for path in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        for name in sorted(set(TESTED.findall(path.read_text()))):
            if name in found:
                found[name].append(path)
    if not any(found.values()):
        raise BadInput(f"{checkout} is no checkout of diffusers: under tests/pipelines nothing tests a pipeline that sdguard supports.")
    return {name: paths for name, paths in found.items() if paths}


def version_of(checkout: Path) -> str:
    """The version that a checkout says it is."""
    found = re.search(r'__version__ = "(.*)"', (checkout / "src" / "diffusers" / "__init__.py").read_text())
    return found[1] if found else "unknown"


def outcomes(checkout: Path, pipeline: str, files: Sequence[Path], guarded: bool) -> Outcomes:
    """Run the tests of one pipeline class in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "outcomes.json"
        options = [
            "-q",
            "--continue-on-collection-errors",
            "-p",
            "benchmarks.upstream_tests",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--rootdir={checkout}",
        ]
        chosen = ["--pipeline", pipeline, "--outcomes", str(written), *(["--guarded"] if guarded else [])]
        environment = {"HF_HUB_OFFLINE": "1", "SDGUARD_CACHE": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-m", "pytest"]
        done = subprocess.run([*command, *options, *chosen, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False)
        if not written.exists():
            raise BadInput(f"The tests of {pipeline} did not run to their end: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        found: Outcomes = json.loads(written.read_text())
    return {test.rpartition("/")[2]: outcome for test, outcome in found.items()}


def is_same_run(one: Outcomes, other: Outcomes) -> bool:
    """Whether all calls of two runs gave the same."""
    return {test: found["calls"] for test, found in one.items()} == {test: found["calls"] for test, found in other.items()}


def compared(plain: Outcomes, guarded: Outcomes, again: Outcomes) -> dict[str, Any]:
    """What is told of a pipeline class, from its unguarded run, its guarded one, and another unguarded one."""
    ran = [test for test, found in plain.items() if found["outcome"] != "skipped"]
    calls = {
        test: [
            (one, other)
            for one, other, once_more in zip_longest(plain[test]["calls"], guarded[test]["calls"], again[test]["calls"])
            if one == once_more
        ]
        for test in ran
    }
    passed = [test for test in ran if plain[test]["outcome"] == "passed"]
    made = sum(len(plain[test]["calls"]) for test in ran)
    return {
        "tests": len(ran),
        "skipped": len(plain) - len(ran),
        "passed_unguarded": len(passed),
        "passed_guarded": sum(guarded[test]["outcome"] == "passed" for test in ran),
        "calls": sum(map(len, calls.values())),
        "identical": sum(one == other for pairs in calls.values() for one, other in pairs),
        "not_repeatable": made - sum(one is not None for pairs in calls.values() for one, _ in pairs),
        "fail_guarded": {test: guarded[test]["reason"][:LONGEST_REASON] for test in passed if guarded[test]["outcome"] != "passed"},
        "differ": {
            test: [[str(one)[:LONGEST_REASON], str(other)[:LONGEST_REASON]] for one, other in pairs if one != other]
            for test, pairs in calls.items()
            if any(one != other for one, other in pairs)
        },
        "fail_unguarded": {test: plain[test]["reason"][:LONGEST_REASON] for test in ran if plain[test]["outcome"] != "passed"},
    }


def measure(checkout: Path, pipeline: str, files: Sequence[Path]) -> dict[str, Any]:
    """`compared` of one pipeline class."""
    plain, guarded = (outcomes(checkout, pipeline, files, way) for way in (False, True))
    again = plain if is_same_run(plain, guarded) else outcomes(checkout, pipeline, files, False)
    return compared(plain, guarded, again)


@contextmanager
def cancelled_on_error(pool: ThreadPoolExecutor) -> Iterator[None]:
    """What is raised within the block ends what has not begun."""
    try:
        yield
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def table(results: Mapping[str, Any]) -> str:
    """The documentation's table and, below it, the tests that fail guarded alone, each with its reason."""
    counted = ("tests", "passed_unguarded", "passed_guarded", "calls", "identical")
    rows = [[f"`{name}`", *(str(row[column]) for column in counted)] for name, row in results.items()]
    rows.append(["all", *(str(sum(row[column] for row in results.values())) for column in counted)])
    shown = markdown(["pipeline", "tests", "pass unguarded", "pass guarded", "calls compared", "identical"], rows)
    failed = [
        f"* `{test.partition('::')[2]}`: {' '.join(reason.split())}"
        for row in results.values()
        for test, reason in row["fail_guarded"].items()
    ]
    return shown + ("\n\nPass unguarded and fail guarded:\n\n" + "\n".join(failed) if failed else "")


def main(
    checkout: Annotated[Path, typer.Option(help="A checkout of diffusers, as of its repository.")],
    only: Annotated[list[str] | None, typer.Option(help="A pipeline class whose tests run, again if they have; may be repeated.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Classes whose tests run at the same time.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose table is written.")] = ROOT,
) -> None:
    """Run diffusers' own pipeline tests unguarded and guarded, and compare every call."""
    with one_sentence():
        checkout = checkout.resolve()
        files = test_files(checkout)
        if unknown := [name for name in only or () if name not in files]:
            raise BadInput(f"Nothing tests {unknown[0]} there; there are tests of {', '.join(files)}.")
        path, about = out / f"{NAME}.json", {"checkout": version_of(checkout), **versions()}
        before = json.loads(path.read_text()) if path.exists() else {}
        known = before["pipelines"] if before.get("versions") == about else {}
        wanted = only or [name for name in files if name not in known]
        with Progress() as progress, ThreadPoolExecutor(at_once) as pool, cancelled_on_error(pool):
            task = progress.add_task("pipeline classes", total=len(wanted))
            measured = {pool.submit(measure, checkout, name, files[name]): name for name in wanted}
            for done in as_completed(measured):
                name = measured[done]
                known[name] = done.result()
                known = {name: known[name] for name in files if name in known}
                write_text(path, json.dumps({"versions": about, "supported": len(files), "pipelines": known}, indent=1) + "\n")
                counts = {column: value for column, value in known[name].items() if isinstance(value, int)}
                progress.console.print(f"{name}: {counts}", highlight=False)
                progress.advance(task)
        put(NAME, table(known), root)
    if any(row["fail_guarded"] or row["differ"] for row in known.values()):
        raise typer.Exit(1)
