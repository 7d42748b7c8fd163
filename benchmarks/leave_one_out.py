"""Leave one model out: a decision is chosen on all models but one and measured on that one, in turn.

``python -m benchmarks leave-one-out DIR [DIR ...]`` takes directories of the form of `benchmarks.models`; the embedded model always
takes part. Three passes. *Pictures*: every case drawn to the end, which tells copies. *Readings*: at the first denoiser call of the same
samples, and of ordinary prompts, the ingredients of the decision in all their variants (`benchmarks.rules`); of ordinary prompts also
whether two noises give the same picture. Both are kept in parts (`sdguard.files.resumable.measured`). *Choice and measurement*, from
the tables alone.

The zoo's control, which memorizes nothing, is measured and never chosen on.

Writes ``results/leave-one-out.json`` (the table) and ``leave-one-out.parquet`` (a row a sample: numbers, and of its case the role, group
and count; no caption, since those of a directory may not be ours to publish), and the docs' tables: of rules, and of single signals,
ranked. What is watched at later calls is not in them.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.documents import ROOT, markdown, put
from benchmarks.models import EMBEDDED, SAME_PICTURE, Model, development_models, embedded_model, pictures, read_model
from benchmarks.rules import (
    AHEAD,
    AT_START,
    COMPARED_AT,
    FREE,
    GEOMETRIC,
    LOG_SNRS,
    NOISES,
    PERSISTENCE,
    RATE,
    READINGS,
    SHIPPED_NAMES,
    Fitted,
    Readings,
    Rule,
    agreement_name,
    calibrated,
    choose,
    negatives,
    persistence_name,
    read_on_all,
    threshold,
)
from benchmarks.running import versions
from benchmarks.statistics import Estimate, estimates, share_estimate
from sdguard.cli.errors import one_sentence
from sdguard.decision.calibration import evenly, same_picture
from sdguard.decision.cascade import BY_NAME, PLAN
from sdguard.decision.profile import Profile, ProfileError
from sdguard.decision.store import FIRST_USE_PROMPTS
from sdguard.denoiser.probe import probe_run
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput
from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured
from sdguard.geometry.reference import estimate_ahead, estimate_at_start
from sdguard.geometry.rowwise import correlation, norm
from sdguard.observation import Observation
from sdguard.signals.persistence import detail
from sdguard.signals.signal import UnsupportedModel

BATCH = 24
#: version of what `read` reads: to be raised with it, so that parts that were kept are read again.
READ = 1
#: the seed of the first ordinary prompt, away from those of the cases.
CALIBRATION_SEED = 500_000
NAME, RANKED = "leave-one-out", "signals"
RESULTS = Path(__file__).parent / "results"
OWN = "never seen, cleaned; copies of their own caption"
MEAN = "mean"
CHOSEN, SHIPPED, ORACLE = "chosen on the others", "shipped", "correlation of two finished pictures"


def read(observation: Observation) -> dict[str, Tensor]:
    """All of `READINGS` at a first call, ``[B]`` each, higher = more memorized; nan where the denoiser lacks the part.

    Cost: 13 evaluations and those of sharpness and dimension; 2 of them are the bottleneck's, whose features a rule that takes them as free
    would capture in the run's own call.
    """
    found = {name: read_signal(name, observation) for name in (*FREE, *GEOMETRIC)}
    first = estimate_at_start(observation)
    for log_snr in LOG_SNRS:
        later = estimate_ahead(observation, log_snr)
        change = norm(later - first)
        found[persistence_name(log_snr, "relative")] = log_ratio(norm(later), change)
        found[persistence_name(log_snr, "over detail")] = log_ratio(detail(later), change)
    draws: list[int | None] = [None, *range(max(NOISES) - 1)]
    found |= agreements(None, [estimate_at_start(observation, draw) for draw in draws])
    for log_snr in COMPARED_AT:
        noises = draws if log_snr == COMPARED_AT[0] else draws[:2]
        found |= agreements(log_snr, [estimate_ahead(observation, log_snr, draw) for draw in noises])
    return found


def read_signal(name: str, observation: Observation) -> Tensor:
    """A signal of the guard, ``[B]``; nan where the denoiser lacks the part."""
    try:
        return BY_NAME[name].read(observation)
    except UnsupportedModel:
        return torch.full((len(observation.x),), torch.nan)


def log_ratio(one: Tensor, other: Tensor) -> Tensor:
    """``log(one / other)`` of positive values."""
    return one.clamp_min(1e-12).log() - other.clamp_min(1e-12).log()


def agreements(log_snr: float | None, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """How alike estimates from several noises are, ``[B]`` each, by name: closest pair and mean of the first two, three, ... of them.

    Channel-centred correlation, and minus the log of the distance over the root-mean-square norm of the two.
    """
    found = {}
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "correlation": correlation,
        "distance": lambda a, b: log_ratio(((norm(a).square() + norm(b).square()) / 2).sqrt(), norm(a - b)),
    }
    for measure, like in measures.items():
        pairs = {(i, j): like(pictures[i], pictures[j]) for i, j in itertools.combinations(range(len(pictures)), 2)}
        for noises in [n for n in NOISES if n <= len(pictures)]:
            values = torch.stack([value for (_, j), value in pairs.items() if j < noises])
            found[agreement_name(log_snr, noises, "mean", measure)] = values.mean(dim=0)
            if noises > 2:
                found[agreement_name(log_snr, noises, "closest", measure)] = values.amax(dim=0)
    return found


def same(observation: Observation) -> Tensor:
    """What calibration tells prompts that are memorized themselves by, ``[B]``. Cost: 7 evaluations."""
    return torch.tensor(same_picture(observation)["reference_agreement"])


def read_samples(model: Model, whether_same: bool, part: pd.DataFrame) -> pd.DataFrame:
    """The readings of a batch of samples with columns ``caption`` and ``seed``, and `same` where that is asked for."""
    found: dict[str, list[float]] = {}

    def look(observation: Observation) -> None:
        values = read(observation) | ({"same": same(observation)} if whether_same else {})
        found.update({name: value.float().cpu().tolist() for name, value in values.items()})

    probe_run(model.pipe, part.caption.tolist(), part.seed.tolist(), look, **model.setting)
    return part.assign(**found)


def readings(model: Model, shipped: Sequence[str], work: Path) -> Readings:
    """Everything that is known of a model, measured or found among the parts under ``work``."""

    def of(what: str, samples: pd.DataFrame, whether_same: bool) -> pd.DataFrame:
        about = {**model.about, "read": READ}
        return measured(f"{what}-{model.name}", samples, partial(read_samples, model, whether_same), work, about, BATCH)

    def ordinary(captions: Sequence[str]) -> pd.DataFrame:
        return pd.DataFrame({"caption": captions, "seed": CALIBRATION_SEED + np.arange(len(captions))})

    cases = pictures(model, work).drop(columns="latents")
    read_cases = of("cases", model.samples[["caption", "seed"]], False)
    own, other = (of(what, ordinary(prompts), True) for what, prompts in (("own", model.ordinary), ("shipped", shipped)))
    return Readings(cases.join(read_cases[list(READINGS)]), own, other)


def shipped_prompts() -> list[str]:
    """The ordinary prompts that come with sdguard, as many as a calibration on first use takes."""
    lines = resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text(encoding="utf-8").splitlines()
    return evenly([line for line in lines if line.strip()], FIRST_USE_PROMPTS)


def shipped_rule() -> Rule | None:
    """The decision that the guard ships, as a rule; None where it reads what this benchmark does not, or has not two stages."""
    if len(PLAN) != 2:
        return None
    gate, evidence = (tuple(SHIPPED_NAMES.get(name, name) for name in stage.fused) for stage in PLAN)
    return Rule(gate, PLAN[0].share, evidence) if set(gate) | set(evidence) <= set(READINGS) else None


def rules_for(models: Mapping[str, Readings], left_out: str) -> dict[str, Rule]:
    """What is measured on the model that is left out, by name: the rule chosen on the others, the shipped one, each single signal.

    A model without copies, a control, takes no part in the choice. Only what the left-out model has can be read on it.
    """
    others = {name: readings for name, readings in models.items() if name != left_out and readings.cases["copy"].any()}
    found = {CHOSEN: choose(others, read_on_all([*others.values(), models[left_out]]))}
    if shipped := shipped_rule():
        found[SHIPPED] = shipped
    return found | {name: Rule((), 1.0, (name,)) for name in READINGS}


def own_copies(cases: pd.DataFrame) -> np.ndarray:
    """Which samples are copies that a memorized caption gives; the others are given by captions that were never shown."""
    return (cases["copy"] & (cases.role == "memorized")).to_numpy()


def comparison(cases: pd.DataFrame, score: np.ndarray) -> dict[str, Any]:
    """AUC and TPR at `RATE` of a score, copies against each kind of `negatives`, with their intervals, and the counts.

    Of all copies, and of `own_copies` alone against the cleaned ones.
    """
    others, copies = negatives(cases), cases["copy"].to_numpy()
    compared = {name: (copies, rest) for name, rest in others.items()} | {OWN: (own_copies(cases), others["never seen, cleaned"])}
    found = {}
    for name, (positive, negative) in compared.items():
        taken = (positive | negative) & np.isfinite(score)
        truth = positive[taken]
        if 0 < truth.sum() < len(truth):
            area, rate = estimates(truth, score[taken], cases.case.to_numpy()[taken], RATE)
        else:
            area = rate = Estimate(math.nan, math.nan, math.nan)
        found[name] = {"auc": area, "tpr": rate, "copies": int(truth.sum()), "of": int((~truth).sum())}
    return found


def flagged(cases: pd.DataFrame, fitted: Fitted, profile: Profile) -> dict[str, Any]:
    """Shares flagged at the promised rate, with intervals: of copies, of those of their own caption, of each kind of negatives."""
    over, limit = fitted.score(cases), threshold(profile)
    groups = {"copies": cases["copy"].to_numpy(), "copies, own caption": own_copies(cases), **negatives(cases)}
    hits = over > limit if math.isfinite(limit) else np.full(len(cases), math.nan)
    return {name: share_estimate(hits[group], cases.case.to_numpy()[group]) for name, group in groups.items()}


def realised(cases: pd.DataFrame, fitted: Fitted, profile: Profile) -> dict[str, Any]:
    """The share flagged of held-out ordinary captions, one sample each, beside the interval that the promise gives it; and their cost."""
    held_out = cases[cases.role == "ordinary"]
    first = held_out.drop_duplicates("case")
    passes, of = fitted.passes(held_out), len(first)
    try:
        interval = profile.false_positive_interval(RATE, of=of) if of else (math.nan, math.nan)
    except ProfileError:
        interval = (math.nan, math.nan)
    share = float((fitted.score(first) > threshold(profile)).mean()) if of else math.nan
    return {
        "realised": share,
        "interval": interval,
        "inside": bool(interval[0] <= share <= interval[1]),
        "captions": of,
        "evaluations": float(passes.mean() * fitted.rule.cost) if of else math.nan,
        "free": float(1 - passes.mean()) if of else math.nan,
    }


def measure(name: str, rule: Rule, model: Readings) -> dict[str, Any]:
    """What a rule does on a model: what it flags by own and by shipped prompts, with the collapse check and without, and tells apart."""
    row: dict[str, Any] = {"rule": name, **asdict(rule), "cost": rule.cost}
    for prompts, check in itertools.product(("own", "shipped"), (True, False)):
        fitted, profile, aside = calibrated(rule, getattr(model, prompts), check)
        key = f"{prompts}, {'checked' if check else 'as it is'}"
        row[key] = {
            "flagged": flagged(model.cases, fitted, profile),
            **realised(model.cases, fitted, profile),
            "scored prompts": profile.prompts,
            "set aside": aside,
        }
        if (prompts, check) == ("own", True):
            row["told apart"] = comparison(model.cases, fitted.score(model.cases))
    return row


def table(models: Mapping[str, Readings]) -> list[dict[str, Any]]:
    """A row a left-out model and rule."""
    rows = []
    for left_out, model in models.items():
        for name, rule in rules_for(models, left_out).items():
            if all(np.isfinite(t[list(rule.evidence)]).all(axis=None) for t in model):
                rows.append({"left out": left_out, **measure(name, rule, model)})
        rows.append({"left out": left_out, "rule": ORACLE, "told apart": comparison(model.cases, model.cases.twin.to_numpy(float))})
    return rows


def counts(model: Readings) -> dict[str, Any]:
    """How many samples, copies and pictures of another caption each role has, and how many ordinary prompts collapse."""
    near = ~model.cases["copy"] & (model.cases.resembles > SAME_PICTURE)
    grouped = model.cases.assign(resembling=near).groupby("role")
    shown = grouped.agg(samples=("copy", "size"), copies=("copy", "sum"), resembling=("resembling", "sum"))
    return {**shown.to_dict("index"), "own": len(model.own), "shipped": len(model.shipped)}


#: comparisons that the documentation shows, AUC / TPR at 1% false positives, and what it calls them.
COLUMNS = {
    "never seen": "AUC / TPR at 1%, never seen",
    "never seen, cleaned": "never seen, cleaned",
    OWN: "the same, copies of their own caption",
    "ordinary": "ordinary",
    "too rarely seen": "too rarely seen",
}


def brief_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The documentation's table: what was chosen on the others, what ships, and what two finished pictures tell."""
    lines = []
    for row in rows:
        if row["rule"] not in (CHOSEN, SHIPPED, ORACLE):
            continue
        told, lacking = row["told apart"], row["rule"] == ORACLE
        shares = [
            "-" if lacking else " / ".join(share(row[f"{prompts}, {check}"]["flagged"][group][0]) for check in ("checked", "as it is"))
            for prompts in ("own", "shipped")
            for group in ("copies", "never seen, cleaned")
        ]
        apart = [f"{told[name]['auc'][0]:.3f} / {share(told[name]['tpr'][0])}" for name in COLUMNS]
        held = row.get("own, checked", {})
        promise = "-" if lacking else f"{share(held['realised'])} ({share(held['interval'][0])} to {share(held['interval'][1])})"
        cost = "-" if lacking else f"{held['evaluations']:.2f}, {share(held['free'])}"
        lines.append([f"{row['left out']}: {row['rule']}", *shares, *apart, promise, cost])
    header = [
        "left out: rule",
        "copies flagged, own prompts, collapse check on / off",
        "never seen flagged, same",
        "copies flagged, shipped prompts",
        "never seen flagged, same",
        *COLUMNS.values(),
        "ordinary flagged (promised), own prompts",
        "evaluations an ordinary sample, share that pays none",
    ]
    return markdown(header, lines)


def mean_of(found: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, with the interval of their combined half-widths."""
    value = float(np.mean([one.value for one in found]))
    below, above = (
        math.sqrt(sum(width**2 for width in widths)) / len(found)
        for widths in ([one.value - one.low for one in found], [one.high - one.value for one in found])
    )
    return Estimate(value, value - below, value + above)


def ranking(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """AUC of each single signal, copies against never-seen captions (cleaned), by model and their mean, the best mean first.

    Of the signals that every model with copies has.
    """
    found: dict[str, dict[str, Estimate]] = {name: {} for name in READINGS}
    for row in rows:
        if row["rule"] in found:
            found[row["rule"]][row["left out"]] = Estimate(*row["told apart"]["never seen, cleaned"]["auc"])
    with_copies = {name for by_model in found.values() for name, area in by_model.items() if math.isfinite(area.value)}
    whole = {
        signal: {m: a for m, a in by_model.items() if m in with_copies}
        for signal, by_model in found.items()
        if with_copies <= set(by_model)
    }
    ranked = {signal: {**by_model, MEAN: mean_of(list(by_model.values()))} for signal, by_model in whole.items() if by_model}
    return dict(sorted(ranked.items(), key=lambda entry: -entry[1][MEAN].value))


def shown_signals(ranked: Mapping[str, Any]) -> list[str]:
    """The signals that the documentation ranks: the free ones, those that ship, geometry, and the best of each kind that is bought."""
    kinds = (PERSISTENCE, AT_START, AHEAD)
    best = [next(name for name in ranked if name in kind) for kind in kinds if any(name in kind for name in ranked)]
    chosen = {*FREE, *GEOMETRIC, *SHIPPED_NAMES.values(), *best}
    return [name for name in ranked if name in chosen]


def ranking_table(ranked: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The documentation's table of single signals: their mean AUC with its interval, and the AUC on each model."""
    names = shown_signals(ranked)
    models = [name for name in ranked[names[0]] if name != MEAN] if names else []
    lines = [
        [name, f"{ranked[name][MEAN].value:.3f} ({ranked[name][MEAN].low:.3f} to {ranked[name][MEAN].high:.3f})"]
        + [f"{ranked[name][model].value:.3f}" for model in models]
        for name in names
    ]
    return markdown(["signal", "mean AUC (95%)", *models], lines)


def share(value: float) -> str:
    """A share in per cent; a dash where it is not known."""
    return "-" if math.isnan(value) else f"{value:.0%}" if value in (0.0, 1.0) else f"{value:.1%}"


def samples(models: Mapping[str, Readings]) -> pd.DataFrame:
    """Every sample's numbers, and no caption."""
    numbers = ["role", "group", "reps", "case", "copy", "ratio", "resembles", "twin", "same"]
    tables = [
        t.reindex(columns=[*numbers, "seed", *READINGS]).assign(model=name, prompts=what)
        for name, model in models.items()
        for what, t in zip(Readings._fields, model, strict=True)
    ]
    whole = pd.concat(tables, ignore_index=True)
    return whole.astype(dict.fromkeys((*READINGS, "ratio", "resembles", "twin", "same"), np.float32))


def main(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Model directories. [default: the zoo, and those of ../shared/models]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose tables are written.")] = ROOT,
) -> None:
    """Choose on all models but one and measure on that one, in turn; under 'accelerate launch', processes share the work."""
    with one_sentence():
        found = [read_model(folder) for folder in folders or development_models()]
        named = [*found, embedded_model()]
        if len({model.name for model in named}) < len(named):
            raise BadInput(f"Two models have the same name: {', '.join(model.name for model in named)}; none may be called {EMBEDDED}.")
        shipped = shipped_prompts()
        models = {model.name: readings(model, shipped, work) for model in named}
        if not processes().is_main_process:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means of no sample, where a model has none of a kind
            rows = table(models)
        about = {"rate": RATE, "models": {model.name: {**model.about, **counts(models[model.name])} for model in named}, **versions()}
        out.mkdir(parents=True, exist_ok=True)
        write_table(samples(models), out / f"{NAME}.parquet")
        write_text(out / f"{NAME}.json", json.dumps({"about": about, "rows": rows}, indent=1))
        shown = brief_table(rows)
        typer.echo(shown)
        put(NAME, shown, root)
        put(RANKED, ranking_table(ranking(rows)), root)
