"""Detection: every signal, the guard's decision, published detectors as released and a caption-only baseline, and what each costs.

``python -m benchmarks detection`` measures the embedded model, ``--model NAME --prompts FILE ...`` any other. Three passes over the samples
are kept as they come (`sdguard.files.resumable`): *first*, everything that can be read at the first denoiser call, for the first
`PAID_SEEDS` seeds; *later*, for the same, published detectors that read later calls; *runs*, what is free, at every call of whole runs of
all seeds, with the guard's decision. What a denoiser has no parts for (attention, a middle) is missing. Writes
``results/detection.parquet`` (a row a sample), ``detection.json`` (the tables); every row of both names its whole configuration.

A *sample* is positive when it is a copy, where copies have been labelled; a *prompt* when at least half of its samples are, negative when
none is, and left out else. A model without labels takes the set's own word for its prompts. Negatives are never pooled over sources.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from torch import Tensor

from benchmarks import prompt_sets
from benchmarks.published import over_run, released
from benchmarks.running import versions
from benchmarks.statistics import estimates
from benchmarks.zoo.recipes import EMBEDDED, SCENES
from benchmarks.zoo.world import Describer, some_words
from sdguard import GuardConfig, Profile, testbed
from sdguard.decision.cascade import judge
from sdguard.denoiser.families import family_of
from sdguard.denoiser.loading import default_setting, load_for_runs
from sdguard.denoiser.probe import probe_run
from sdguard.files.atomic import write_text
from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured
from sdguard.guarded.run import profile_of
from sdguard.observation import Observation, prediction_type
from sdguard.signals import SIGNALS, Signal
from sdguard.signals.signal import UnsupportedModel

BATCH = 16
RATE = 0.01
HELD_OUT = 1000
SEEDS = (1, 4, 16)
#: seeds of a prompt for which what costs evaluations is measured.
PAID_SEEDS = 4
#: calls over which what is read at every call is averaged.
WINDOWS = {"first": 1, "first five": 5, "all": None}
GUARD, CAPTION = "guard", "caption_only"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """What is measured on: a pipeline, how it is called, the profile of that, and the samples.

    ``samples`` has a row a prompt and seed, in the schema of `benchmarks.prompt_sets` with ``seed`` and ``positive``.
    """

    pipe: Any
    setting: dict[str, Any]
    profile: Profile
    samples: pd.DataFrame
    about: dict[str, Any]


def embedded_samples(split: str) -> pd.DataFrame:
    """The embedded model's captions of a split, all labelled seeds of those that are copied or serve as negatives, one of the others.

    Samples of never-seen captions that are copies of another caption's picture are neither, and left out.
    """
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    table = pd.concat([prompt_sets.embedded_set(), table[["split", "copied_seeds", "copy_rate", "seeds"]]], axis=1)
    table = table[table.split == split]
    every = [(i, seed) for i, row in table.iterrows() for seed in range(row.seeds if row.copy_rate or row.kind == "ordinary" else 1)]
    samples = table.loc[[i for i, _ in every]].reset_index(drop=True).assign(seed=[seed for _, seed in every])
    samples["positive"] = [seed in copied for seed, copied in zip(samples.seed, samples.copied_seeds, strict=True)]
    neither = samples.positive & (samples.kind == "ordinary")
    return samples[~neither].drop(columns=["split", "copied_seeds", "seeds", "target"]).reset_index(drop=True)


def given_samples(files: Sequence[Path], seeds: int) -> pd.DataFrame:
    """The prompts of some sets, so many seeds each; a prompt that its set calls memorized counts as copied for every seed.

    A prompt that comes more than once counts as where it comes first.
    """
    table = pd.concat([prompt_sets.read_set(path) for path in files], ignore_index=True).drop_duplicates("prompt", ignore_index=True)
    table["cluster"] = prompt_sets.near_duplicates(table.prompt.tolist())
    positive = table.kind != "ordinary"
    table = table.assign(positive=positive, copy_rate=positive.astype(float)).drop(columns="target")
    return pd.concat([table.assign(seed=seed) for seed in range(seeds)], ignore_index=True)


def reading(signal: Signal, observation: Observation) -> Tensor:
    """What a signal reads, ``[B]``; not a number where the denoiser has no parts for it."""
    try:
        return signal.read(observation)
    except UnsupportedModel:
        return torch.full((len(observation.x),), torch.nan)


def at_first_call(task: Task, signals: Sequence[Signal], part: pd.DataFrame) -> pd.DataFrame:
    """Every signal and the cascade at the first call of a batch of samples, with seconds an image and the cascade's evaluations."""
    found: dict[str, Any] = {"prompt": part.prompt, "seed": part.seed}

    def look(observation: Observation) -> None:
        def timed(name: str, make: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = make()
            found[f"{name}_seconds"] = (time.perf_counter() - started) / len(observation.x)
            return result

        for signal in signals:
            found[signal.name] = timed(signal.name, partial(reading, signal, observation)).tolist()
        before = observation.evaluations.clone()
        fresh = replace(observation, memo={})  # the cascade buys its own short rollouts, whatever a signal has made before
        timed(GUARD, partial(judge, fresh, task.profile.cascade))
        found["guard_evaluations"] = (observation.evaluations - before).tolist()

    probe_run(task.pipe, part.prompt.tolist(), part.seed.tolist(), look, **task.setting)
    return pd.DataFrame(found)


def at_later_calls(task: Task, calls: int, part: pd.DataFrame) -> pd.DataFrame:
    """The published detectors that read later calls, of whole runs of ``calls`` calls of a batch of samples."""
    prompts = part.prompt.tolist()
    lengths = torch.tensor([len(ids) for ids in task.pipe.tokenizer(prompts, truncation=True).input_ids])
    detectors = over_run(calls, lengths)
    found = {f"{detector.name}_run": torch.zeros(len(part)) for detector in detectors}

    def look(observation: Observation) -> None:
        for detector in detectors:
            if observation.step in detector.calls:
                found[f"{detector.name}_run"] += reading(detector, observation).float().cpu()

    probe_run(task.pipe, prompts, part.seed.tolist(), look, calls, **task.setting)
    return pd.DataFrame({"prompt": part.prompt, "seed": part.seed, **{name: values.tolist() for name, values in found.items()}})


def over_runs(task: Task, signals: Sequence[Signal], part: pd.DataFrame, calls: int | None = None) -> pd.DataFrame:
    """Free signals at every call of the runs of a batch, the run's score, p-value and what its decision cost, and seconds an image."""
    series: dict[str, list[list[float]]] = {signal.name: [] for signal in signals}
    score: list[float] = []
    timesteps: list[float] = []
    cost: list[int] = []

    def look(observation: Observation) -> None:
        if not observation.step:
            score[:] = judge(observation.at_reference, task.profile.cascade)[0].tolist()
            cost[:] = observation.evaluations.tolist()
        timesteps.append(observation.timestep)
        for signal in signals:
            series[signal.name].append(signal.read(observation).tolist())

    started = time.perf_counter()
    probe_run(task.pipe, part.prompt.tolist(), part.seed.tolist(), look, calls, **task.setting)
    return pd.DataFrame(
        {
            "prompt": part.prompt,
            "seed": part.seed,
            GUARD: score,
            "p_value": [task.profile.p_value(s) for s in score],
            "decision": cost,
            "run_seconds": (time.perf_counter() - started) / len(part),
            "timesteps": [timesteps] * len(part),
            **{f"{name}_series": [list(row) for row in zip(*values, strict=True)] for name, values in series.items()},
        }
    )


def caption_only(prompts: pd.DataFrame) -> np.ndarray:
    """How memorized each prompt looks to a character-3-gram naive Bayes classifier that sees no model, ``[n]``.

    ``prompts`` has a row a prompt, with ``positive``. Five folds, clusters kept together, lower-cased, both classes
    as likely in every fold.
    """
    folds = GroupKFold(min(5, prompts.cluster.nunique()))
    classifier = make_pipeline(CountVectorizer(analyzer="char", ngram_range=(3, 3)), MultinomialNB(fit_prior=False))
    return cross_val_predict(classifier, prompts.prompt, prompts.positive, groups=prompts.cluster, cv=folds, method="predict_proba")[:, 1]


def values_of(samples: pd.DataFrame, name: str, window: str) -> np.ndarray | None:
    """A detector's value of each sample over a window of calls; None where it was not read there."""
    if f"{name}_series" in samples:
        return np.array([np.mean(series[: WINDOWS[window]]) for series in samples[f"{name}_series"]])
    if f"{name}_run" in samples:
        return samples[f"{name}_run"].to_numpy(float) if window == "all" else None
    return samples[name].to_numpy(float) if window == "first" and name in samples else None


def prompt_level(samples: pd.DataFrame, value: np.ndarray, seeds: int) -> tuple[pd.DataFrame, np.ndarray] | None:
    """The prompts whose first ``seeds`` seeds were all measured, and the mean of ``value`` over those."""
    here = samples.assign(value=value)[samples.seed < seeds].dropna(subset="value")
    grouped = here.groupby("prompt", sort=False)
    prompts = grouped.first()[grouped.size() == seeds]
    return (prompts, grouped.value.mean()[prompts.index].to_numpy()) if len(prompts) else None


def compare(samples: pd.DataFrame, costs: dict[str, float]) -> list[dict[str, Any]]:
    """One row a level, detector, window, seed count, kind of positives and source of negatives: AUC, TPR at `RATE`, cost, seconds."""
    rows = []
    levels: list[tuple[str, int]] = [("sample", 1), *(("prompt", n) for n in SEEDS if n <= samples.seed.max() + 1)]
    for (name, cost), window, (level, seeds) in itertools.product(costs.items(), WINDOWS, levels):
        value = values_of(samples, name, window)
        if value is None:
            continue
        if level == "sample":
            units, score, positive, negative = samples, value, samples.positive, samples.kind.eq("ordinary") & ~samples.positive
        else:
            found = prompt_level(samples, value, seeds)
            if found is None:
                continue
            units, score = found
            positive, negative = units.copy_rate >= 0.5, units.kind.eq("ordinary") & (units.copy_rate == 0)
        known = np.isfinite(score)
        for kind, source in itertools.product(units.kind[positive].unique(), units.source[negative].unique()):
            taken = known & ((positive & (units.kind == kind)) | (negative & (units.source == source))).to_numpy()
            truth = positive.to_numpy()[taken]
            if not 0 < truth.sum() < len(truth):
                continue
            area, rate = estimates(truth, score[taken], units.cluster.to_numpy()[taken], RATE)
            seconds = samples.get(f"{name}_seconds")
            rows.append(
                {
                    "level": level,
                    "seeds": seeds,
                    "steps": window,
                    "kind": kind,
                    "negatives": source,
                    "detector": name,
                    **{f"auc{end}": v for end, v in zip(("", "_low", "_high"), area, strict=True)},
                    **{f"tpr{end}": v for end, v in zip(("", "_low", "_high"), rate, strict=True)},
                    "evaluations": cost * seeds,
                    "milliseconds": None if seconds is None or window != "first" else float(1000 * seconds.mean() * seeds),
                    "positives": int(truth.sum()),
                    "of": int((~truth).sum()),
                }
            )
    return rows


def held_out(seed: int = 90) -> pd.DataFrame:
    """Ordinary captions that neither training's table nor calibration holds."""
    taken = set(pd.read_parquet(testbed.path() / "prompts.parquet").text)
    scenes, rng = sorted(SCENES), np.random.default_rng(seed)
    describe, found = Describer(EMBEDDED, (), seed), dict[str, None]()
    while len(found) < HELD_OUT:
        if (text := describe(some_words(EMBEDDED, scenes, rng), specific=0.0)) not in taken:
            found[text] = None
    return pd.DataFrame({"prompt": list(found), "seed": 1000 + np.arange(len(found))})


def guard_figures(task: Task, samples: pd.DataFrame, ordinary: pd.DataFrame | None) -> dict[str, Any]:
    """What the decision does at its own threshold: flagged shares and cost, and its promise beside what was realised."""
    figures: dict[str, Any] = {"calibration scores": task.profile.prompts, "promised false-positive rate": RATE}
    if ordinary is not None:
        figures |= {
            "interval of the realised rate, long run": task.profile.false_positive_interval(RATE),
            "interval of the realised rate, among the held-out captions": task.profile.false_positive_interval(RATE, of=len(ordinary)),
            "realised on held-out ordinary captions": float((ordinary.p_value <= RATE).mean()),
            "held-out ordinary captions": len(ordinary),
            "held-out ordinary captions that cost nothing": float((ordinary.decision == 0).mean()),
            "mean evaluations of a held-out ordinary caption": float(ordinary.decision.mean()),
        }
    flagged = samples.p_value <= RATE
    for kind, here in samples[samples.positive].groupby("kind"):
        figures[f"copies flagged, {kind}"] = float(flagged[here.index].mean())
        figures[f"copies, {kind}"] = len(here)
    for source, here in samples[samples.kind.eq("ordinary") & ~samples.positive].groupby("source"):
        figures[f"flagged of {source}"] = float(flagged[here.index].mean())
        figures[f"samples of {source}"] = len(here)
    return figures


def measure(task: Task, work: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """The samples with everything that was measured of them, and what each detector costs in evaluations an image."""
    free = [signal for signal in SIGNALS if not signal.cost]
    published = released(prediction_type(task.pipe.scheduler))
    every = (*SIGNALS, *published)
    keys = ["prompt", "seed"]
    free += [signal for signal in published if not signal.cost]
    runs = measured("runs", task.samples[keys], partial(over_runs, task, free), work, task.about, BATCH)
    paid = task.samples[(task.samples.seed < PAID_SEEDS) & ((task.samples.copy_rate > 0) | task.samples.kind.eq("ordinary"))]
    paid = paid[(paid.seed == 0) | (paid.source != "ordinary caption")]
    first = measured("first", paid[keys].reset_index(drop=True), partial(at_first_call, task, every), work, task.about, BATCH)
    calls = len(runs.timesteps.iloc[0])
    later = measured("later", paid[keys].reset_index(drop=True), partial(at_later_calls, task, calls), work, task.about, BATCH)
    samples = task.samples.merge(runs, on=keys)
    for more in (first, later):
        samples = samples.merge(more.drop(columns=list(task.about)), on=keys, how="left")
    prompts = samples.groupby("prompt", sort=False).first().reset_index()
    prompts["positive"] = prompts.copy_rate >= 0.5
    chosen = prompts[prompts.positive | (prompts.kind.eq("ordinary") & (prompts.copy_rate == 0) & (prompts.source != "ordinary caption"))]
    samples[CAPTION] = samples.prompt.map(dict(zip(chosen.prompt, caption_only(chosen), strict=True)))
    decision = float(samples.decision.mean())
    every = (*every, *over_run(calls, torch.zeros(0)))
    return samples, {GUARD: decision, **{signal.name: float(signal.cost) for signal in every}, CAPTION: 0.0}


def configuration(model: str, pipe: Any, profile: Profile, setting: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """All that the figures hang on beside the samples, in plain values."""
    digest = hashlib.sha256(json.dumps(asdict(profile), sort_keys=True).encode()).hexdigest()[:12]
    weights = next(iter(profile.model["weights"][family_of(pipe).denoiser].values()))
    return {"model": model, "profile": digest, "device": device.type, "weights": weights, **setting, **versions()}


def main(
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Prompt sets, memorized and ordinary ones: published ones, or files with a column 'kind'.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the embedded model: development or test.")] = "test",
    seeds: Annotated[int, typer.Option(help="Seeds a prompt, where prompts are given.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps. [default: 10 embedded, 50 else]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: 2.5 embedded, 7.5 else]")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
) -> None:
    """Measure every detector on a model; under 'accelerate launch', processes share the work."""
    state = processes()
    if (model == "embedded") == bool(prompts):
        raise typer.BadParameter("the embedded model brings its prompts; any other needs them", param_hint="--prompts")
    pipe = load_for_runs(model)
    pipe.set_progress_bar_config(disable=True)
    setting = default_setting(model, steps, guidance)
    samples = given_samples(prompts, seeds) if prompts else embedded_samples(split)
    with state.main_process_first():
        profile = profile_of(pipe, GuardConfig())
    assert profile is not None  # calibrated where none was known
    about = configuration(model, pipe, profile, setting, state.device)
    task = Task(pipe, setting, profile, samples, about)
    found, costs = measure(task, work)
    ordinary = None
    if not prompts:
        ordinary = measured("held-out", held_out(), partial(over_runs, task, [], calls=1), work, about, BATCH)
    if not state.is_main_process:
        return
    rows, figures = [row | about for row in compare(found, costs)], guard_figures(task, found, ordinary)
    name = "detection" if not prompts else f"detection-{Path(model).name}"
    out.mkdir(parents=True, exist_ok=True)
    write_table(found, out / f"{name}.parquet")
    write_text(out / f"{name}.json", json.dumps({"about": about, "figures": figures, "rows": rows}, indent=1))
    shown = pd.DataFrame([row for row in rows if row["level"] == "sample" and row["steps"] == "first"]).drop(columns=list(about))
    typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for key, value in figures.items():
        typer.echo(f"{key}: {value}")
