"""Kill -9 at random moments: ``python -m benchmarks kills`` tries every long command, small, many times.

A command is run undisturbed first. Then, ``--trials`` times: it is killed at up to ``--kills`` random moments, begun again each time, and
run to its end. The files that it makes have to be those of the undisturbed run, to the byte where no time is recorded in them; nothing half
written may be left; and no piece of work that was kept may be done again: of each kill, one that was under way is lost at most. What is
written is seen by the renames that put a file in its place, whoever writes it. `DECISIONS` says of every command of ``sdguard`` and of
``python -m benchmarks`` whether it is long. Writes ``results/kills.json`` and the docs' sentence, and ends with exit code 1 if a trial
failed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from rich.progress import track
from torch import Tensor

from benchmarks.documents import put
from benchmarks.running import commands_of, versions
from sdguard import calibrate
from sdguard.audit import digits
from sdguard.audit.subjects import Diffusion, Generator, Samples, Trainable
from sdguard.cli.main import app as sdguard_app
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.atomic import write_text
from sdguard.observation import NoiseLevel

NAME = "kills"
RESULTS = Path(__file__).parent / "results"
PROMPTS = [f"a {thing} in {place}" for thing in ("cat", "dog", "fox", "boat", "zebra", "owl") for place in ("snow", "fog", "forest", "sky")]


@dataclass(frozen=True)
class Long:
    """A long command, and how it is tried.

    Attributes:
        arguments: after its name; ``{out}`` is where its results go, ``{work}`` where it keeps its work, the others are `Inputs`.
        goes_on: whether it keeps what it has done; else it begins anew, since all of it takes no longer than a picture or one table.
    """

    arguments: tuple[str, ...]
    goes_on: bool = True


KEEPS = "keeps its batches by sdguard.files.resumable.measured, as 'benchmarks detection' does, and has no small size"
TRAINS = "keeps checkpoints by benchmarks.zoo.training.train, whose resumption has a test of its own"
TIMES = "measures time or a server, which a kill ends: it begins anew"
QUICK = "is done in seconds"
ANEW = "runs other programs, their tests, or cases that are known by a number: it begins anew, where it is asked to"

#: every command: how it is tried, or why it is not.
DECISIONS: dict[str, Long | str] = {
    "sdguard calibrate": Long(
        ("--model", "{model}", "--prompts", "{prompts}", "--memorized", "{memorized}", "--fpr", "0.3", "--out", "{out}/profile.json")
    ),
    "sdguard scan": Long(
        ("{prompts}", "--model", "{model}", "--profile", "{profile}", "--fpr", "0.3", "--batch-size", "2", "--out", "{out}/scan.parquet")
    ),
    "sdguard generate": Long(
        ("a cat", "a dog", "--model", "{model}", "--profile", "{profile}", "--fpr", "0.3", "--steps", "2", "--out", "{out}"), goes_on=False
    ),
    "sdguard explain": Long(("a cat in fog", "--model", "{model}", "--steps", "2", "--out", "{out}"), goes_on=False),
    "sdguard audit score": Long(("benchmarks.kills:trainable", "--folds", "3", "--repeats", "2", "--out", "{out}")),
    "sdguard audit density": Long(("benchmarks.kills:generator", "--times", "5", "--out", "{out}")),
    "sdguard audit lid": Long(("benchmarks.kills:diffusion", "--neighbours", "8", "--out", "{out}"), goes_on=False),
    "sdguard audit neighbours": Long(("benchmarks.kills:samples", "--out", "{out}"), goes_on=False),
    "benchmarks detection": Long(
        ("--model", "{model}", "--prompts", "{sets}", "--seeds", "2", "--steps", "2", "--out", "{out}", "--work", "{work}")
    ),
    "sdguard demo": "is a server, and keeps nothing",
    **dict.fromkeys([f"sdguard profiles {name}" for name in ("list", "show", "rm", "export", "import")], QUICK),
    **dict.fromkeys(
        [f"benchmarks {name}" for name in ("steering", "cures", "development", "leave-one-out", "settings", "reproduce", "zoo label")],
        KEEPS,
    ),
    **dict.fromkeys([f"benchmarks audit {name}" for name in ("score", "gap", "density", "agreement", "neighbours")], KEEPS),
    **dict.fromkeys(["benchmarks zoo autoencoder", "benchmarks zoo train"], TRAINS),
    **dict.fromkeys(["benchmarks load", "benchmarks overhead"], TIMES),
    **dict.fromkeys([f"benchmarks {name}" for name in ("fuzz", "kills", "matrix", "old-releases")], ANEW),
    **dict.fromkeys([f"benchmarks {name}" for name in ("report", "figures", "examples", "prompt-sets", "zoo data", "audit lid")], QUICK),
    "benchmarks audit-log": "makes runs of a single step for a minute or two, which begin anew",
    "benchmarks upstream": "writes its results after each class of pipelines, and goes on from them",
    "benchmarks packages": "writes its results after each use of a package, and goes on from them",
    "benchmarks scan": "scans by 'sdguard scan', whose work goes on, and keeps what each case took",
    "benchmarks first-use": "counts one calibration after the other, and begins anew",
}


# small subjects of the audits


def trainable() -> Trainable:
    """Digits and a VAE that is trained briefly."""
    return digits.vae(epochs=3)


def generator() -> Generator:
    """A fixed smooth map of eight dimensions into twenty, at enough latents for several batches."""
    draws = torch.Generator().manual_seed(0)
    weights, latents = torch.randn(8, 20, generator=draws), torch.randn(400, 8, generator=draws)
    return Generator(lambda z: torch.tanh(z @ weights), latents)


def diffusion() -> Diffusion:
    """The exact noise prediction of a standard Gaussian in four dimensions."""
    draws = torch.Generator().manual_seed(0)

    def noise(x: Tensor, level: NoiseLevel) -> Tensor:
        return x * level.s

    return Diffusion(noise, NoiseLevel(0.99, 0.141), torch.randn(40, 4, generator=draws), torch.randn(200, 4, generator=draws), 2.0)


def samples() -> Samples:
    """Three clouds of points."""
    rng = np.random.default_rng(0)
    return Samples(*(rng.normal(size=(300, 5)).astype(np.float32) for _ in range(3)))


# running


class Inputs(NamedTuple):
    """What commands are given: a model's folder, ordinary and memorized prompts, a set of both with their kinds, the model's profile."""

    model: Path
    prompts: Path
    memorized: Path
    sets: Path
    profile: Path


def prepared(model: Path, folder: Path) -> Inputs:
    """The inputs on a model, in a folder. Cost: that of a calibration on `PROMPTS`."""
    inputs = Inputs(model, *(folder / name for name in ("prompts.txt", "memorized.txt", "sets.csv", "profile.json")))
    write_text(inputs.prompts, "\n".join(PROMPTS) + "\n")
    write_text(inputs.memorized, "\n".join(f"a rose number {i}" for i in range(3)) + "\n")
    apart = ["cat", "dog", "fox", "boat", "zebra", "owl", "snow", "fog", "forest", "sky"]  # no two are near duplicates
    pd.DataFrame({"prompt": apart, "kind": ["memorized", "ordinary"] * 5}).to_csv(inputs.sets, index=False)
    pipe = load_pipeline(str(model))
    pipe.set_progress_bar_config(disable=True)
    calibrate(pipe, PROMPTS).save(inputs.profile)
    return inputs


def words_of(name: str, inputs: Inputs, folder: Path) -> list[str]:
    """A command's words where all that it makes is in ``folder``."""
    long = DECISIONS[name]
    assert isinstance(long, Long)
    places = {**inputs._asdict(), "out": folder / "out", "work": folder / "work"}
    return [*name.split()[1:], *(word.format(**places) for word in long.arguments)]


def run_command(application: str, words: list[str], folder: str, profile: str) -> None:
    """Run a command in this process, which is its own; every file that takes its place is noted in ``folder/renamed`` first."""
    os.chdir(folder)
    os.environ["SDGUARD_CACHE"] = str(Path(folder) / "cache")
    profiles = Path(folder) / "cache" / "profiles"
    if not profiles.exists():
        profiles.mkdir(parents=True)
        shutil.copy(profile, profiles)
    said = os.open(Path(folder) / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    noted = os.open(Path(folder) / "renamed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            os.write(noted, f"{os.fspath(arguments[1])}\n".encode())

    sys.addaudithook(note)
    torch.set_num_threads(1)
    if application == "sdguard":
        sdguard_app(words)
    else:
        from benchmarks.__main__ import app

        app(words)


def server() -> Any:
    """What starts processes: a server that has imported everything and computed nothing forks them, so that no time is lost on imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.kills", "benchmarks.__main__"])
    return context


@contextmanager
def started(name: str, inputs: Inputs, folder: Path) -> Iterator[Any]:
    """A process that runs a command; killed at the end of the block, if it still runs."""
    arguments = (name.split()[0], words_of(name, inputs, folder), str(folder), str(inputs.profile))
    process = server().Process(target=run_command, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def timeless(path: Path) -> bytes:
    """What a file of results holds, but for the times that are recorded in it."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        if timed := [name for name in table if "seconds" in name]:
            return bytes(table.drop(columns=timed).to_parquet())
    if path.suffix == ".json":
        return json.dumps(json.loads(path.read_text(), object_hook=without_times)).encode()
    return path.read_bytes()


def without_times(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an object but for its times, and for the name that each image is given of its own."""
    return {name: value for name, value in fields.items() if "seconds" not in name and name not in ("time", "id")}


def made(folder: Path) -> dict[str, str]:
    """The results of a command: a hash of every file by its name; of its work that is kept beside them, nothing."""
    out = folder / "out"
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".partial"]
    files = [path for path in files if not any(part == "work" or part.endswith(".parts") for part in path.relative_to(out).parts)]
    return {str(path.relative_to(out)): hashlib.sha256(timeless(path)).hexdigest() for path in files}


def put_in_place(folder: Path) -> list[str]:
    """The pieces of work that were put in their place, all runs in ``folder`` together, in their order."""
    noted = folder / "renamed"
    return [line for line in noted.read_text().splitlines() if ".parts/" in line or "/work/" in line] if noted.exists() else []


class Whole(NamedTuple):
    """An undisturbed run: its results, how many pieces of work it kept, how long it took."""

    results: dict[str, str]
    pieces: int
    seconds: float


def undisturbed(name: str, inputs: Inputs, folder: Path) -> Whole:
    """A command run to its end in an empty folder; raises `RuntimeError` where it fails."""
    folder.mkdir(parents=True)
    first = server().Process(target=time.time)
    first.start()
    first.join()  # the server has imported everything by now
    began = time.monotonic()
    with started(name, inputs, folder) as process:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{name} ends with {process.exitcode}: {(folder / 'said').read_text()[-2000:]}")
    seconds = time.monotonic() - began
    return Whole(made(folder), len(put_in_place(folder)), seconds)


def trial(name: str, inputs: Inputs, whole: Whole, folder: Path, kills: int, rng: Random) -> dict[str, Any]:
    """A command killed at up to so many random moments and then run to its end, in an empty folder: what came of it."""
    folder.mkdir(parents=True)
    kept, killed, again, placed = set[str](), 0, 0, 0
    while made(folder) != whole.results:  # once complete, it would begin anew
        with started(name, inputs, folder) as process:
            process.join(rng.uniform(0, whole.seconds) if killed < kills else None)
            code = process.exitcode
        killed += code is None
        now = put_in_place(folder)
        again += sum(piece in kept for piece in now[placed:])
        kept, placed = kept | {piece for piece in now if Path(piece).exists()}, len(now)
        if code is not None:
            break
    else:  # killed while it tidied up
        with started(name, inputs, folder) as process:
            process.join()
            code = process.exitcode
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in (".partial", ".parts")]
    wrong = {
        "exit code": code,
        "other results": sorted({file for file, _ in whole.results.items() ^ made(folder).items()}),
        "left behind": left,
        "done again": again,
    }
    return {"killed": killed, "again": again, "wrong": {what: found for what, found in wrong.items() if found}}


def tried(name: str, inputs: Inputs, trials: int, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """What came of a command's trials, as a row."""
    whole = undisturbed(name, inputs, folder / "whole")
    rows = []
    for number in range(trials):
        moments, killed = Random(f"{seed} {name} {number}"), False
        while not killed:  # a run that ended before its moment, being faster than the undisturbed one, tells nothing
            row = trial(name, inputs, whole, folder / f"{number}", kills, moments)
            shutil.rmtree(folder / f"{number}")
            killed = row["killed"] > 0 or bool(row["wrong"])
        rows.append(row)
    return {
        "command": name,
        "files": len(whole.results),
        "pieces kept": whole.pieces,
        "trials": trials,
        "killed": sum(row["killed"] for row in rows),
        "pieces done again": sum(row["again"] for row in rows),
        "wrong": [{"trial": number, **row["wrong"]} for number, row in enumerate(rows) if row["wrong"]],
    }


def tried_commands() -> list[str]:
    """The commands that are tried."""
    return [name for name, decision in DECISIONS.items() if isinstance(decision, Long)]


def every_command() -> list[str]:
    """All commands of ``sdguard`` and of ``python -m benchmarks``, as their applications have them."""
    from benchmarks.__main__ import app

    return [f"{of} {name}" for of, one in (("sdguard", sdguard_app), ("benchmarks", app)) for name in commands_of(one)]


def sentence(found: Mapping[str, Any]) -> str:
    """What the documentation says of the results."""
    rows = found["rows"]
    killed, again, wrong = (
        sum(row["killed"] for row in rows),
        sum(row["pieces done again"] for row in rows),
        sum(len(r["wrong"]) for r in rows),
    )
    return (
        f"Kill -9 at {killed:,} random moments of {len(rows)} commands, in {sum(row['trials'] for row in rows):,} trials: begun again, "
        f"{wrong or 'none'} made other files than a run that nothing disturbs, or left anything half written; of the pieces of work that "
        f"were kept when it was killed, {again or 'none'} had to be done again."
    )


def main(
    trials: Annotated[int, typer.Option(min=1, help="Trials of each command.")] = 20,
    kills: Annotated[int, typer.Option(min=1, help="Kills in each trial, at most.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    model: Annotated[Path | None, typer.Option(help="A model directory. [default: the embedded one]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="These commands alone, such as 'sdguard scan'; the others' rows stay.")] = None,
    out: Annotated[Path, typer.Option(help="Where kills.json goes.")] = RESULTS,
) -> None:
    """Kill long commands at random moments, begin them again, and compare."""
    from sdguard import testbed

    path, about = out / f"{NAME}.json", {"kills": kills, "seed": seed, "versions": versions()}
    before = json.loads(path.read_text()) if path.exists() else {}
    known = {row["command"]: row for row in before.get("rows", [])} if before.get("about") == about else {}
    with tempfile.TemporaryDirectory() as name:
        inputs = prepared(model or testbed.path(), Path(name))
        for command in track(only or tried_commands(), NAME):
            known[command] = tried(command, inputs, trials, kills, seed, Path(name) / command.replace(" ", "-"))
            rows = [known[command] for command in tried_commands() if command in known]
            write_text(path, json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if out == RESULTS:
        put(NAME, sentence({"rows": rows}))
    for row in rows:
        typer.echo(json.dumps(row))
    if any(row["wrong"] for row in rows):
        raise typer.Exit(1)
