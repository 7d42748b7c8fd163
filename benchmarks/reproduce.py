"""The guard on a model with real weights, beside what papers report: ``python -m benchmarks reproduce MODEL``.

For whoever has the weights. MODEL is one of `FIGURES`' (stable-diffusion-v1-4), a hub id, a pipeline directory or ``embedded``; the files
of memorized and ordinary prompts are published sets (`benchmarks.prompt_sets`) or lists, a line each. Half of the ordinary prompts, by
whole clusters of near-duplicates, calibrate; the other half are the negatives, so that nothing is chosen on what it is measured on. Then,
each kept in parts so that a stopped run goes on:

* detection: the guard's score and the signals that papers report, at the first call and over the first five, so many seeds a prompt;
* steering: memorized prompts, one a cluster, unguarded and guarded with two seeds each. No training picture is at hand; what two seeds of a
  prompt both draw unguarded stands for it (`steered`).

How many denoiser evaluations it takes, and about how long, is said before it starts. Writes ``reproduce-MODEL.json``, and a contact sheet
under the working folder, which is not to be published.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from benchmarks import prompt_sets
from benchmarks.detection import BATCH, CAPTION, GUARD, RATE, RESULTS, Task, at_first_call, caption_only, compare, configuration, over_runs
from benchmarks.documents import markdown
from benchmarks.running import as_png, from_png
from benchmarks.statistics import Estimate, share_estimate
from benchmarks.zoo.sheets import sheet
from sdguard import GuardConfig, Profile, guard
from sdguard.cli.errors import one_sentence
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import identity
from sdguard.denoiser.loading import default_setting, load_pipeline
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput
from sdguard.files.processes import processes
from sdguard.files.resumable import measured, parts_folder
from sdguard.signals import SIGNALS
from sdguard.testbed.copies import SSCD

#: what papers report, with their sources.
FIGURES: dict[str, Any] = json.loads(Path(__file__).with_name("published_figures.json").read_text())
#: the signals that have a figure there.
REPORTED = tuple(s for s in SIGNALS if s.name in {f["detector"] for m in FIGURES["models"].values() for f in m["detection"]})
CALLS, PICTURE_SEEDS, PICTURE_BATCH = 5, 2, 4
#: SSCD similarity from which two pictures are called one (Somepalli et al. 2023, 2212.03860).
SAME = 0.5
#: evaluations a prompt of a calibration, and those of the guard for a flagged picture; both as measured on the small models.
CALIBRATION_COST, STEERING_COST = 7, 30


@dataclass(frozen=True)
class Prompts:
    """What takes part, a row a prompt in the schema of `benchmarks.prompt_sets`, and the ordinary prompts that calibrate."""

    memorized: pd.DataFrame
    ordinary: pd.DataFrame
    calibration: list[str]


def read_prompts(memorized: Path, ordinary: Path, most: int | None) -> Prompts:
    """Both sets, at most ``most`` of each, the ordinary one parted by whole clusters of near-duplicates.

    A file that `benchmarks.prompt_sets` knows nothing about is a list of prompts of the kind it is given as. A prompt that is in both
    files, or twice in one, counts where it comes first.
    """
    lists = {"memorized": prompt_sets.PromptSet("memorized"), "ordinary": prompt_sets.PromptSet("ordinary", source="given")}
    sets = []
    for kind, path in (("memorized", memorized), ("ordinary", ordinary)):
        found = prompt_sets.read_set(path, prompt_sets.SETS.get(path.name, lists[kind]))
        if wrong := set(found.kind.eq("ordinary")) - {kind == "ordinary"}:
            raise BadInput(f"{path} was given as {kind}, and holds {'ordinary' if wrong == {True} else 'memorized'} prompts.")
        sets.append(found.iloc[evenly(range(len(found)), most or len(found))])
    both = pd.concat(sets, ignore_index=True).drop_duplicates("prompt", ignore_index=True)
    both["cluster"] = prompt_sets.near_duplicates(both.prompt.tolist())
    both = both.assign(positive=both.kind != "ordinary", copy_rate=(both.kind != "ordinary").astype(float)).drop(columns="target")
    plain = both[~both.positive]
    calibrates = plain.cluster.rank(method="dense").astype(int) % 2 == 1
    if min(calibrates.sum(), (~calibrates).sum()) < 4:
        raise BadInput(f"{ordinary} holds too few different prompts: half of them calibrate and half are measured, at least 4 each.")
    return Prompts(both[both.positive], plain[~calibrates], plain.prompt[calibrates].tolist())


def profile_by(pipe: Any, prompts: list[str], work: Path) -> Profile:
    """The profile that ``prompts`` give of this very model, made once and kept under ``work``."""
    key = hashlib.sha256(json.dumps([identity(pipe), prompts], sort_keys=True).encode()).hexdigest()[:12]
    path, state = work / f"reproduce-profile-{key}.json", processes()
    if not path.exists():
        made = calibrate(pipe, prompts, work=parts_folder(path), state=state)
        if state.is_main_process:
            made.save(path)
        state.wait_for_everyone()
    return Profile.load(path)


def plan(prompts: Prompts, seeds: int, pictures: int, steps: int) -> dict[str, int]:
    """Denoiser evaluations of each stage, about."""
    samples = seeds * (len(prompts.memorized) + len(prompts.ordinary))
    drawn = 2 * PICTURE_SEEDS * pictures
    return {
        "calibration": CALIBRATION_COST * len(prompts.calibration),
        "detection": samples * (2 * CALLS + 2 + int(sum(signal.cost for signal in REPORTED)) + CALIBRATION_COST),
        "pictures": 2 * drawn * 2 * steps + drawn // 2 * STEERING_COST,
    }


def seconds_an_evaluation(pipe: Any, prompt: str, setting: dict[str, Any]) -> float:
    """Of a batch of `BATCH` pictures' first two steps, the second time they are made."""
    for _ in range(2):
        started = time.perf_counter()
        pipe([prompt] * BATCH, output_type="latent", **{**setting, "num_inference_steps": 2})
    return (time.perf_counter() - started) / (2 * 2 * BATCH)


def detected(task: Task, prompts: Prompts, work: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """The samples with the guard's score, p-value and cost, the reported signals and the captions alone; and what each costs."""
    keys = ["prompt", "seed"]
    free = [signal for signal in REPORTED if not signal.cost]
    first = measured("reproduce-first", task.samples[keys], partial(at_first_call, task, REPORTED), work, task.about, BATCH)
    early = measured("reproduce-early", task.samples[keys], partial(over_runs, task, free, calls=CALLS), work, task.about, BATCH)
    samples = task.samples
    for found in (first, early):
        samples = samples.merge(found.drop(columns=list(task.about)), on=keys)
    asked = pd.concat([prompts.memorized, prompts.ordinary], ignore_index=True)
    samples[CAPTION] = samples.prompt.map(dict(zip(asked.prompt, caption_only(asked), strict=True)))
    return samples, {GUARD: float(samples.decision.mean()), **{s.name: float(s.cost) for s in REPORTED}, CAPTION: 0.0}


def flagged(samples: pd.DataFrame) -> dict[str, Estimate]:
    """The share of samples that the guard flags at `RATE`, by kind, and of ordinary ones by source."""
    group = samples.kind.where(samples.positive, samples.source)
    return {name: share_estimate((here.p_value <= RATE).to_numpy(float), here.cluster.to_numpy()) for name, here in samples.groupby(group)}


def drawn(pipe: Any, setting: dict[str, Any], part: pd.DataFrame) -> pd.DataFrame:
    """Pictures of a batch of samples, as PNG, with the verdicts where ``pipe`` is guarded."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in part.seed]
    output = pipe(part.prompt.tolist(), generator=generators, output_type="np", **setting)
    reports = getattr(output, "guard", None)
    return part.assign(
        picture=as_png((output.images * 255).round().astype(np.uint8)),
        verdict=[report.verdict for report in reports] if reports else "clean",
        evaluations=[float(report.extra_evaluations) for report in reports] if reports else 0.0,
    )


def steered(task: Task, prompts: Prompts, pictures: int, work: Path) -> pd.DataFrame:
    """A row a picture of the first ``pictures`` clusters of either kind, `PICTURE_SEEDS` seeds each, unguarded and guarded.

    ``recurs``: its prompt's unguarded pictures of two seeds are one, by SSCD; ``left``: the guarded picture, where it is shown, is one with
    the unguarded one; ``identical``: bit by bit.
    """
    some = pd.concat([of.drop_duplicates("cluster").head(pictures) for of in (prompts.memorized, prompts.ordinary)])[["prompt", "positive"]]
    rows = pd.concat([some.assign(seed=seed) for seed in range(PICTURE_SEEDS)], ignore_index=True)
    pipes = {"unguarded": task.pipe, "guarded": guard(task.pipe, GuardConfig(profile=task.profile, false_positive_rate=RATE))}
    made = {
        name: measured(f"reproduce-{name}", rows, partial(drawn, pipe, task.setting), work, task.about, PICTURE_BATCH)
        for name, pipe in pipes.items()
    }
    sscd = SSCD()
    plain, other = (sscd(from_png(table.picture)) for table in made.values())
    first, second = plain[: len(some)], plain[len(some) :]
    recurs = np.tile((first * second).sum(axis=1) >= SAME, PICTURE_SEEDS)
    guarded = made["guarded"]
    return rows.assign(
        unguarded=made["unguarded"].picture,
        guarded=guarded.picture,
        verdict=guarded.verdict,
        evaluations=guarded.evaluations,
        recurs=recurs,
        left=((plain * other).sum(axis=1) >= SAME) & (guarded.verdict != "withheld"),
        identical=made["unguarded"].picture == guarded.picture,
    )


def steering_figures(found: pd.DataFrame) -> dict[str, Any]:
    """What became of the memorized prompts' pictures that recur, and of the ordinary ones."""
    recurring, ordinary = found[found.positive & found.recurs], found[~found.positive]
    return {
        "pictures of memorized prompts": int(found.positive.sum()),
        "of these, the same from two seeds": len(recurring),
        "of these, flagged": share(recurring.verdict != "clean"),
        "shown and still that picture": share(recurring.left),
        "withheld": share(recurring.verdict == "withheld"),
        "evaluations beyond the run's, where flagged": share(recurring.evaluations[recurring.verdict != "clean"]),
        "pictures of ordinary prompts": len(ordinary),
        "flagged": share(ordinary.verdict != "clean"),
        "bit-identical of those that were not": share(ordinary.identical[ordinary.verdict == "clean"]),
    }


def share(values: pd.Series) -> float:
    """The mean; not a number of none."""
    return float(values.mean()) if len(values) else math.nan


def beside(rows: list[dict[str, Any]], reported: list[dict[str, Any]]) -> str:
    """The detection table: here, and in print; a published figure stands in the rows of its detector, seeds and calls."""

    def printed(row: dict[str, Any]) -> str:
        found = [f for f in reported if all(f[key] == row[key] for key in ("detector", "seeds", "steps"))]
        return "; ".join(f"{f['auc']:.3f} / {f['tpr']:.3f} ({', '.join(filter(None, (f['source'], f['note'])))})" for f in found) or "-"

    def interval(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"

    header = ["detector", "seeds", "calls", "memorized", "against", "AUC", "TPR at 1% FPR", "published AUC / TPR"]
    keys = ("detector", "seeds", "steps", "kind", "negatives")
    return markdown(header, [[*(str(row[key]) for key in keys), interval(row, "auc"), interval(row, "tpr"), printed(row)] for row in rows])


def main(
    model: Annotated[str, typer.Argument(help=f"{', '.join(FIGURES['models'])}, a hub id, a pipeline directory, or 'embedded'.")],
    memorized: Annotated[Path, typer.Option(help="Memorized prompts: a published set, or a list.")],
    ordinary: Annotated[Path, typer.Option(help="Ordinary prompts, half of which calibrate: a published set, or a list.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds a prompt.")] = 4,
    pictures: Annotated[int, typer.Option(min=2, help="Memorized prompts whose pictures are drawn, and ordinary ones.")] = 50,
    most: Annotated[int | None, typer.Option(min=8, help="Prompts of each file at most.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.", show_default="10 embedded, 50 else")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="2.5 embedded, 7.5 else")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
) -> None:
    """Calibrate, detect and steer on a model with published prompts, and put the figures beside those of the papers."""
    known, state = FIGURES["models"].get(model, {}), processes()
    with one_sentence():
        prompts = read_prompts(memorized, ordinary, most)
        dtype = torch.float16 if state.device.type == "cuda" else torch.float32
        pipe = load_pipeline(known.get("hub", model)).to(state.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        setting = default_setting(model, steps, guidance)
        evaluations = plan(prompts, seeds, pictures, setting["num_inference_steps"])
        each, total = seconds_an_evaluation(pipe, prompts.calibration[0], setting), sum(evaluations.values())
        of = ", ".join(f"{name} {count:,}" for name, count in evaluations.items())
        typer.echo(f"About {total:,} denoiser evaluations ({of}) of {each:.3f} s: {each * total / 3600 / state.num_processes:.1f} hours.")
        profile = profile_by(pipe, prompts.calibration, work)
        samples = pd.concat([prompts.memorized, prompts.ordinary], ignore_index=True)
        samples = pd.concat([samples.assign(seed=seed) for seed in range(seeds)], ignore_index=True)
        about = {**configuration(model, pipe, profile, setting, state.device), "dtype": str(dtype)}
        task = Task(pipe, setting, profile, samples, about)
        found, costs = detected(task, prompts, work)
        shown = steered(task, prompts, pictures, work)
    if not state.is_main_process:
        return
    rows = [row for row in compare(found, costs) if row["level"] == "prompt" and row["steps"] != "all"]
    shares, steering = flagged(found), steering_figures(shown)
    name = Path(model).name
    some = shown[shown.positive & shown.recurs].head(16)
    if len(some):
        sheet([list(from_png(some[column])) for column in ("unguarded", "guarded")], work / f"reproduce-{name}.png")
    results = {
        "about": about,
        "prompts": {"memorized": memorized.name, "ordinary": ordinary.name, "calibration": len(prompts.calibration)},
        "rows": rows,
        "flagged": {of: share._asdict() for of, share in shares.items()},
        "steering": steering,
        "published": known.get("detection", []),
    }
    write_text(out / f"reproduce-{name}.json", json.dumps(results, indent=1))
    typer.echo(beside(rows, known.get("detection", [])))
    for of, each_share in shares.items():
        typer.echo(f"flagged at a promised {RATE:.0%}, {of}: {each_share.value:.1%} ({each_share.low:.1%} to {each_share.high:.1%})")
    for of, value in steering.items():
        typer.echo(f"{of}: {value if isinstance(value, int) else f'{value:.3f}'}")
    if known:
        typer.echo(f"Published: {FIGURES['about']}")
        for short, full in FIGURES["papers"].items():
            typer.echo(f"{short}: {full}")


if __name__ == "__main__":
    typer.run(main)
