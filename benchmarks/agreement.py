"""Do they agree? Every measure of memorization on the embedded model's own pictures, over how often training showed them.

Read on the shipped model: the free and dear signals at the first denoiser call (guidance norm, sharpness, output density), and dimension at
the picture itself, against what the data's dimension there lets one expect. The memorization score is that of `leaving_out`'s small
trainings, because the definition needs trainings without the picture; the copy rate is the shipped label.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks import leaving_out
from benchmarks.running import versions, write
from sdguard import testbed
from sdguard.audit.dimension import DATA, NEITHER, OVERFITTING, Dimension, aligned, classify, data_dimension, deficit, model_dimension
from sdguard.audit.figures import COLOURS
from sdguard.audit.likelihood import signs
from sdguard.measuring import measured
from sdguard.observation import NoiseLevel, Observation, noise_level, to_noise
from sdguard.reading import read
from sdguard.signals import GUIDANCE_NORM, OUTPUT_DENSITY_AHEAD, SHARPNESS, Signal
from sdguard.signals.lid import TIMESTEP
from sdguard.testbed.pictures import World
from sdguard.testbed.train import compositions, encode
from sdguard.testbed.world import ORDINARY, pool, words

SIGNALS = (GUIDANCE_NORM, SHARPNESS, OUTPUT_DENSITY_AHEAD)
SEEDS, PROBES, REFERENCE, BATCH = 2, 8, 200, 16
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
        read(pipe, part.text.tolist(), [seed] * len(part), look, **setting)
    return part.assign(**found)


def read_dimension(pipe: Any, latents: Tensor, part: pd.DataFrame) -> pd.DataFrame:
    """FLIPD under each picture's own caption, at the picture, with its error."""
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


def draw(table: pd.DataFrame, reference: pd.DataFrame, found: dict[str, dict[str, list[float]]]) -> Figure:
    """Each measure over the repetition count; the dimensions with their verdicts; the rank correlations."""
    figure = Figure(figsize=(15, 8))
    grid = figure.add_gridspec(2, 4)
    counts = sorted(table.repetitions.unique())
    shown = ("copy_rate", "score", "guidance_norm", "sharpness", "output_density_ahead", "deficit")
    places = [grid[0, 0], grid[0, 1], grid[0, 2], grid[0, 3], grid[1, 0], grid[1, 1]]
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
        axis.set_xticks(range(len(counts)), counts, fontsize=8)
        axis.set(title=MEASURES[name], xlabel="repetitions in an epoch of training")
        axis.legend(fontsize=7)
    axis = figure.add_subplot(grid[1, 2])
    axis.scatter(reference.data_dimension, reference.dimension, s=6, color="#9aa4b0", label=f"fresh compositions ({len(reference)})")
    for verdict in (NEITHER, DATA, OVERFITTING):
        part = table[table.verdict == verdict]
        axis.scatter(part.data_dimension, part.dimension, s=10, color=COLOURS[verdict], label=f"pictures, {verdict} ({len(part)})")
    axis.set(xlabel="the data's dimension (neighbours)", ylabel="the model's (FLIPD)", title="why")
    axis.legend(fontsize=7)
    axis = figure.add_subplot(grid[1, 3])
    names = list(MEASURES)
    matrix = np.array([[found[a][b][0] for b in names] for a in names])
    axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if abs(value) > 0.6 else "black")
    axis.set_xticks(range(len(names)), [MEASURES[n] for n in names], rotation=60, ha="right", fontsize=7)
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
        "of them OD-Mem": float((memorized.verdict == OVERFITTING).mean()),
        "simple": len(simple),
        "of them OD-Mem ": float((simple.verdict == OVERFITTING).mean()),
        "of them DD-Mem": float((simple.verdict == DATA).mean()),
    }


def main(
    data: Annotated[Path, typer.Option(help="world.npz of sdguard.testbed.build_data.")] = Path("build/testbed/world.npz"),
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results" / "audit",
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/audit"),
) -> None:
    """Every measure on the embedded model's pictures, and whether they agree; needs the world's data (sdguard.testbed.build_data)."""
    if not data.exists():
        typer.secho(f"{data} is not there: run 'python -m sdguard.testbed.build_data' first.", err=True, fg="red")
        raise typer.Exit(1)
    scored = leaving_out.scores(data, data.parent, work)
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    world, captions = World(data), pool()
    labels = pd.read_parquet(testbed.path() / "prompts.parquet")[["text", "kind", "repetitions", "group", "copy_rate"]]
    table = labels.iloc[scored.caption].reset_index(drop=True).assign(**scored.drop(columns="point"))
    scale = pipe.vae.config.scaling_factor

    rng = np.random.default_rng(90)
    drawn = [world.composition(rng) for _ in range(REFERENCE)]
    texts = [str(rng.choice(ORDINARY[1:])).format(object=words(o), scene=s) for _, o, s in drawn]
    looked = torch.cat([encode(pipe.vae, world.targets(captions))[scored.caption], encode(pipe.vae, np.stack([p for p, _, _ in drawn]))])
    looked = (looked * scale).contiguous()  # forward-mode group norm takes no other layout
    about = {"timestep": TIMESTEP, "probes": PROBES, "seeds": SEEDS, **versions()}
    read_at = measured("signals", table[["text"]], partial(read_signals, pipe, SIGNALS), work, about, BATCH)
    rows = pd.DataFrame({"text": [*table.text, *texts], "row": range(len(looked))})
    dimensions = measured("dimensions", rows, partial(read_dimension, pipe, looked), work, about, BATCH)

    bulk, _, _ = compositions(world, pipe.vae, data.parent)
    known = torch.cat([bulk.float() * scale, looked[: len(table)]]).flatten(1).numpy()
    own = data_dimension(looked.flatten(1).numpy(), known)
    model = Dimension(dimensions.dimension.to_numpy(), dimensions.dimension_error.to_numpy())
    fresh = slice(len(table), None)
    reference, reference_data = (Dimension(d.value[fresh], d.standard_error[fresh]) for d in (model, own))
    expected = aligned(model, reference, reference_data, own)
    bound = np.quantile(reference_data.value, SIMPLE)
    every = pd.DataFrame(
        {
            "dimension": model.value,
            "dimension_error": model.standard_error,
            "data_dimension": own.value,
            "data_error": own.standard_error,
            "expected": expected.value,
            "deficit": deficit(model, expected),
            "verdict": classify(model, expected, own.value < bound),
        }
    )
    every["minus_dimension"] = -every.dimension
    table = pd.concat([table, read_at[[s.name for s in SIGNALS]], every.iloc[: len(table)]], axis=1)
    compared = every.iloc[fresh].reset_index(drop=True)
    found = correlations(table, table.group)
    repeated = table.repetitions > 1
    verdicts = pd.crosstab(table.repetitions, table.verdict, normalize="index")
    figures = {
        "pictures": len(table),
        "trainings": leaving_out.FOLDS * leaving_out.REPEATS,
        "correlations": found,
        "correlations among the repeated": correlations(
            table[repeated].reset_index(drop=True), table.group[repeated].reset_index(drop=True)
        ),
        "over-repeated against simple": apart(table[table.repetitions >= 250], compared[compared.data_dimension < bound]),
        "verdicts by repetitions": {str(count): row.to_dict() for count, row in verdicts.iterrows()},
        "fresh compositions called OD-Mem": float((compared.verdict == OVERFITTING).mean()),
        "data's dimension, reference": [float(v) for v in np.quantile(reference_data.value, [0.1, 0.5, 0.9])],
        "model's dimension, reference": [float(v) for v in np.quantile(reference.value, [0.1, 0.5, 0.9])],
        "dimensions of model and data, reference": float(spearmanr(reference.value, reference_data.value).statistic),
        "scores by repetitions": {str(c): float(v) for c, v in table.groupby("repetitions").score.median().items()},
    }
    joined = pd.concat([table, compared.assign(kind="fresh composition")], ignore_index=True)
    write("agreement", joined, figures, draw(table, compared, found), out)
