"""``python -m benchmarks audit agreement``: do all measures of memorization agree on the embedded model's own pictures?

Read on the shipped model, over how often training showed a picture: the free and dear signals at the first denoiser call (guidance norm,
sharpness, output density), and dimension against what the data's dimension lets one expect, at the picture itself and at what the model
makes of its caption. The memorization score is that of `leaving_out`'s small trainings, because the definition needs trainings without
the picture; the copy rate is the shipped label.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.audit import leaving_out, pictures
from benchmarks.audit.pictures import BATCH, WORLD, Data
from benchmarks.audit.results import RESULTS, WORK, Out, Work, interval, write
from benchmarks.documents import markdown
from benchmarks.running import versions
from benchmarks.zoo.train import compositions
from sdguard import testbed
from sdguard.audit.dimension import DATA, NEITHER, OVERFITTING, Dimension, aligned, classify, data_dimension, deficit, model_dimension
from sdguard.audit.figures import COLOURS
from sdguard.audit.likelihood import signs
from sdguard.audit.neighbours import nearest
from sdguard.cli.errors import one_sentence
from sdguard.denoiser.probe import probe_run
from sdguard.files.resumable import measured
from sdguard.observation import NoiseLevel, Observation, noise_level, to_noise
from sdguard.signals import GUIDANCE_NORM, OUTPUT_DENSITY_AHEAD, SHARPNESS, Signal
from sdguard.signals.lid import TIMESTEP
from sdguard.testbed.copies import SSCD

SIGNALS = (GUIDANCE_NORM, SHARPNESS, OUTPUT_DENSITY_AHEAD)
SEEDS, PROBES = 2, 8
#: share of the reference pictures, those of the lowest data dimension, that are called simple.
SIMPLE = 0.1
RESAMPLES = 500
#: what is compared, and what people call it.
MEASURES = {
    "repetitions": "repetitions",
    "copy_rate": "copy rate",
    "score": "memorization score",
    "guidance_norm": "guidance norm",
    "sharpness": "sharpness",
    "output_density_ahead": "output density",
    "deficit": "dimension deficit",
    "minus_dimension": "minus dimension",
}


def read_signals(pipe: Any, signals: tuple[Signal, ...], part: pd.DataFrame) -> pd.DataFrame:
    """Each signal at the first call of each caption's runs, its mean over `SEEDS` seeds."""
    found: dict[str, Any] = {signal.name: 0.0 for signal in signals}

    def look(observation: Observation) -> None:
        for signal in signals:
            found[signal.name] = found[signal.name] + signal.read(observation).double().numpy() / SEEDS

    for seed in range(SEEDS):
        setting: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
        probe_run(pipe, part.text.tolist(), [seed] * len(part), look, **setting)
    return part.assign(**found)


def read_dimension(pipe: Any, latents: Tensor, part: pd.DataFrame) -> pd.DataFrame:
    """FLIPD under each row's own caption, at its ``latents`` ``[n, 4, h, w]``, with its error."""
    x = latents[part.row.tolist()]
    ids = pipe.tokenizer(part.text.tolist(), padding="max_length", truncation=True, return_tensors="pt").input_ids
    level = noise_level(pipe.scheduler, TIMESTEP)
    with torch.no_grad():
        condition = pipe.text_encoder(ids)[0]

    def noise(y: Tensor, level: NoiseLevel) -> Tensor:
        velocity = pipe.unet(y, torch.full((len(y),), TIMESTEP), condition).sample
        return to_noise(velocity, y, level, "v_prediction")

    draws = torch.Generator().manual_seed(int(part.row.iloc[0]))
    found = model_dimension(noise, x, level, signs(x, PROBES, draws))
    return part.assign(dimension=found.value, dimension_error=found.standard_error)


def correlations(table: pd.DataFrame, groups: pd.Series) -> dict[str, dict[str, list[float]]]:
    """Spearman's rank correlation of each two measures, with its 95% interval by bootstrap of whole groups: [value, low, high]."""
    names = list(MEASURES)
    values = table[names].to_numpy(float)
    members = list(groups.groupby(groups.to_numpy()).indices.values())
    rng = np.random.default_rng(0)
    draws = [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(RESAMPLES)]
    with np.errstate(invalid="ignore"):
        known = spearmanr(values).statistic
        drawn = np.stack([spearmanr(values[rows]).statistic for rows in draws])
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return {a: {b: [float(m[i, j]) for m in (known, low, high)] for j, b in enumerate(names)} for i, a in enumerate(names)}


def scatter(axis: Any, reference: pd.DataFrame, points: pd.DataFrame, parts: Mapping[str, tuple[Any, str]], of: str) -> None:
    """The model's dimension against the data's: the reference in grey, and some of the points in each colour."""
    axis.scatter(reference.data_dimension, reference.dimension, s=6, color="#9aa4b0", label=f"fresh {of} ({len(reference)})")
    for name, (rows, colour) in parts.items():
        axis.scatter(points.data_dimension[rows], points.dimension[rows], s=10, color=colour, label=f"{name} ({rows.sum()})")
    axis.set(xlabel="the data's dimension (neighbours)", ylabel="the model's (FLIPD)", title=f"dimension at {of}")
    axis.legend(fontsize=7)


def draw(table: pd.DataFrame, fresh: pd.DataFrame, made: pd.DataFrame, found: dict[str, dict[str, list[float]]]) -> Figure:
    """Each measure over the repetition count; dimensions at pictures and at samples; the rank correlations."""
    figure = Figure(figsize=(18, 8))
    grid = figure.add_gridspec(2, 5)
    counts = sorted(table.repetitions.unique())
    shown = ("copy_rate", "score", "guidance_norm", "sharpness", "output_density_ahead", "deficit")
    places = [*(grid[0, i] for i in range(5)), grid[1, 0]]
    for name, place in zip(shown, places, strict=True):
        axis = figure.add_subplot(place)
        for kind, colour in (("verbatim", "#c0392b"), ("template", "#e08e0b")):
            part = table[table.kind.isin([kind, "unseen"]) if kind == "verbatim" else table.kind == kind]
            quantiles = part.groupby("repetitions")[name].quantile([0.1, 0.5, 0.9]).unstack()
            at = [counts.index(count) for count in quantiles.index]
            axis.plot(at, quantiles[0.5], "o-", ms=4, color=colour, label=kind)
            axis.fill_between(at, quantiles[0.1], quantiles[0.9], color=colour, alpha=0.15, lw=0)
        if name == "deficit":
            axis.axhline(1.645, color="grey", ls=":", lw=1)
        axis.set_xticks(range(len(counts)), counts, fontsize=8, rotation=60)
        axis.set(title=MEASURES[name], xlabel="repetitions in a pass of training")
        axis.legend(fontsize=7)
    verdicts = {verdict: (table.verdict == verdict, COLOURS[verdict]) for verdict in (NEITHER, DATA, OVERFITTING)}
    scatter(figure.add_subplot(grid[1, 1]), fresh, table, verdicts, "pictures")
    samples, ordinary = made[~made.ordinary], made[made.ordinary]
    copies = {"copies": (samples.copied, COLOURS[OVERFITTING]), "no copies": (~samples.copied, COLOURS[NEITHER])}
    scatter(figure.add_subplot(grid[1, 2]), ordinary, samples, copies, "samples")
    axis = figure.add_subplot(grid[1, 3:])
    names = list(MEASURES)
    matrix = np.array([[found[a][b][0] for b in names] for a in names])
    axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black")
    axis.set_xticks(range(len(names)), [MEASURES[n] for n in names], rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), [MEASURES[n] for n in names], fontsize=7)
    axis.set_title("rank correlation")
    axis.spines[:].set_visible(False)
    return figure


def apart(memorized: pd.DataFrame, simple: pd.DataFrame) -> dict[str, float]:
    """How well over-repeated pictures (positives) and simple ones are told: by the model's dimension alone, and by its deficit."""
    both = pd.concat([memorized, simple])
    truth = np.repeat([True, False], [len(memorized), len(simple)])
    return {
        "by the model's dimension alone (AUC)": float(roc_auc_score(truth, -both.dimension)),
        "by the deficit (AUC)": float(roc_auc_score(truth, both.deficit)),
        "over-repeated": len(memorized),
        "over-repeated that are OD-Mem": float((memorized.verdict == OVERFITTING).mean()),
        "simple": len(simple),
        "simple that are OD-Mem": float((simple.verdict == OVERFITTING).mean()),
        "simple that are DD-Mem": float((simple.verdict == DATA).mean()),
    }


def verdicts(model: Dimension, own: Dimension, count: int) -> pd.DataFrame:
    """Dimensions, deficits and verdicts, one row a point, the first ``count`` looked at, the others the reference for what to expect."""
    reference, reference_data = (Dimension(d.value[count:], d.standard_error[count:]) for d in (model, own))
    expected = aligned(model, reference, reference_data, own)
    simple = own.value < np.quantile(reference_data.value, SIMPLE)
    return pd.DataFrame(
        {
            "dimension": model.value,
            "dimension_error": model.standard_error,
            "data_dimension": own.value,
            "data_error": own.standard_error,
            "expected": expected.value,
            "deficit": deficit(model, expected),
            "simple": simple,
            "verdict": classify(model, expected, simple),
            "minus_dimension": -model.value,
        }
    )


def of_samples(made: pd.DataFrame) -> dict[str, float]:
    """What dimension says of samples, those that are copies and the others."""
    samples = made[~made.ordinary]
    copies, others = samples[samples.copied], samples[~samples.copied]
    return {
        "samples": len(samples),
        "copies": len(copies),
        "copies that are OD-Mem": float((copies.verdict == OVERFITTING).mean()),
        "others that are OD-Mem": float((others.verdict == OVERFITTING).mean()),
        "samples of ordinary captions that are OD-Mem": float((made[made.ordinary].verdict == OVERFITTING).mean()),
        "copies against others, by the model's dimension alone (AUC)": float(roc_auc_score(samples.copied, -samples.dimension)),
        "copies against others, by the deficit (AUC)": float(roc_auc_score(samples.copied, samples.deficit)),
    }


def main(data: Data = WORLD, out: Out = RESULTS, work: Work = WORK) -> None:
    """Every measure on the embedded model's pictures, and whether they agree; needs the world's data (zoo data)."""
    with one_sentence():
        looked = pictures.load(data)
    scored = leaving_out.scores(data, data.parent, work)
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    table = looked.captions.assign(**scored.drop(columns="point"))
    about = {"timestep": TIMESTEP, "probes": PROBES, "seeds": SEEDS, **versions()}
    read_at = measured("signals", table[["text"]], partial(read_signals, pipe, SIGNALS), work, about, BATCH)

    bulk = compositions(looked.world, pipe.vae, work / "compositions.pt")["latents"]
    at, made_at = looked.latents(pipe.vae), pictures.generated(pipe, looked.texts, work)
    known = torch.cat([bulk.float() * pipe.vae.config.scaling_factor, at[: len(table)]]).flatten(1).numpy()
    _, datum = nearest(made_at.flatten(1).numpy(), known)  # or a copy would have its own target for a neighbour, nearer than data come
    found = []
    for name, latents, own_at in (("dimensions", at, at.flatten(1).numpy()), ("dimensions of samples", made_at, known[datum[:, 0]])):
        rows = pd.DataFrame({"text": looked.texts, "row": range(len(latents))})
        dims = measured(name, rows, partial(read_dimension, pipe, latents), work, about, BATCH)
        model = Dimension(dims.dimension.to_numpy(), dims.dimension_error.to_numpy())
        found.append(verdicts(model, data_dimension(own_at, known), len(table)))
    every, made = found
    copied = pictures.copied(pipe.vae, pictures.decoded(pipe.vae, made_at), SSCD())
    made = made.assign(copied=copied, ordinary=np.arange(len(made)) >= len(table))
    table = pd.concat([table, read_at[[s.name for s in SIGNALS]], every.iloc[: len(table)]], axis=1)
    fresh = every.iloc[len(table) :].reset_index(drop=True)

    correlated, repeated = correlations(table, table.group), table[table.repetitions > 1].reset_index(drop=True)
    shares = pd.crosstab(table.repetitions, table.verdict, normalize="index")
    figures = {
        "pictures": len(table),
        "trainings": leaving_out.FOLDS * leaving_out.REPEATS,
        "correlations": correlated,
        "correlations among the repeated": correlations(repeated, repeated.group),
        "over-repeated against simple": apart(table[table.repetitions >= 250], fresh[fresh.simple]),
        "verdicts by repetitions": {str(count): row.to_dict() for count, row in shares.iterrows()},
        "fresh compositions called OD-Mem": float((fresh.verdict == OVERFITTING).mean()),
        "at samples": of_samples(made),
        "data's dimension, reference": [float(v) for v in np.quantile(fresh.data_dimension, [0.1, 0.5, 0.9])],
        "model's dimension, reference": [float(v) for v in np.quantile(fresh.dimension, [0.1, 0.5, 0.9])],
        "dimensions of model and data, reference": float(spearmanr(fresh.dimension, fresh.data_dimension).statistic),
        "scores by repetitions": {str(c): float(v) for c, v in table.groupby("repetitions").score.median().items()},
    }
    samples = made.assign(kind=np.where(made.ordinary, "sample of an ordinary caption", "sample"), text=looked.texts)
    rows = pd.concat([table, fresh.assign(kind="fresh composition"), samples.drop(columns="ordinary")], ignore_index=True)
    write("agreement", rows, figures, draw(table, fresh, made, correlated), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table."""
    every, repeated = figures["correlations"], figures["correlations among the repeated"]
    shown = ((every, "repetitions"), (every, "copy_rate"), (every, "score"), (repeated, "score"))
    rows = [
        [label, *(interval(*of[name][to]) for of, to in shown)] for name, label in MEASURES.items() if name not in ("repetitions", "score")
    ]
    return markdown(["rank correlation of", "repetitions", "copy rate", "memorization score", "the same, repeated pictures only"], rows)
