"""The training side: what the papers behind `sdguard.audit` claim, tried on small models where all of it can be measured.

``python -m benchmarks audit score`` (the memorization score on digits), ``density`` (volume against memorization), ``lid`` (known
manifolds) and ``agreement`` (all measures on the embedded model's pictures). Each goes on where it was stopped and writes
``results/audit/NAME.parquet``, ``NAME.json`` and ``NAME.png``; under ``accelerate launch -m benchmarks audit score`` processes share
the trainings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import roc_auc_score

from benchmarks import agreement
from benchmarks.readme import markdown
from benchmarks.running import write
from sdguard.audit import digits, manifolds
from sdguard.audit.density import concentration, log_volume, speed
from sdguard.audit.dimension import below, classify, data_dimension, model_dimension
from sdguard.audit.figures import COLOURS
from sdguard.audit.memorization import memorization
from sdguard.audit.neighbours import nearest, sample_ratio, second_ratio
from sdguard.measuring import measured
from sdguard.processes import processes
from sdguard.testbed.copies import RATIO

RESULTS = Path(__file__).parent / "results" / "audit"
#: the share of points with the highest scores that is called the most memorized.
TOP = 0.05

app = typer.Typer(help="What the papers behind sdguard.audit claim, measured on small models.")
app.command("agreement")(agreement.main)

Out = Annotated[Path, typer.Option(help="Where the results go.")]
Work = Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")]
WORK = Path("build/audit")


def rank_correlation(one: Any, other: Any) -> dict[str, float]:
    """Spearman's rank correlation with its 95% percentile bootstrap interval over points."""
    pair = (np.asarray(one), np.asarray(other))
    found = bootstrap(
        pair, lambda x, y: spearmanr(x, y).statistic, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0
    ).confidence_interval
    return {"rho": float(spearmanr(*pair).statistic), "low": float(found.low), "high": float(found.high)}


MODELS = {
    "VAE": (digits.vae, 10, 4),
    "VAE, a tenth of the learning rate": (digits.slow_vae, 10, 2),
    "diffusion, bound": (digits.diffusion, 5, 2),
    "diffusion, probability flow": (digits.diffusion_flow, 5, 2),
}


def curves(rate: float, held_out: int = 180) -> pd.DataFrame:
    """The VAE's bound on training and held-out points after each epoch, in nats."""
    training, rest = digits.split(held_out)
    data, model = digits.digits(), digits.new_vae(0)
    rows: list[dict[str, float]] = []

    def look() -> None:
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            rows.append({name: -model.loss(data[some], draws).mean().item() for name, some in (("training", training), ("held out", rest))})

    digits.trained(model, data[training], 0, digits.EPOCHS, rate, each=look)
    return pd.DataFrame(rows).assign(epoch=range(1, digits.EPOCHS + 1), rate=rate)


def neighbour_tests() -> pd.DataFrame:
    """One row a digit: distance to the nearest other one, and the sample ratio where it was trained on (nan where held out)."""
    data, (training, _) = digits.digits().numpy(), digits.split(450)
    distances, _ = nearest(data, data, 2)
    found = pd.DataFrame({"point": range(len(data)), "distance": distances[:, 1], "sample_ratio": np.nan})
    samples = digits.samples(450)
    found.loc[training.numpy(), "sample_ratio"] = sample_ratio(samples.training, samples.held_out, samples.generated)
    return found.assign(copies=float((second_ratio(samples.generated, samples.training) < RATIO).mean()))


def told(table: pd.DataFrame) -> dict[str, Any]:
    """What the scores of one model say of the paper's findings."""
    top = table.score >= table.score.quantile(1 - TOP)
    tested = table[table.sample_ratio.notna()]
    return {
        "trainings": int(table.trainings.iloc[0]),
        "train-test gap (mean score)": float(table.score.mean()),
        "median score": float(table.score.median()),
        "95% quantile": float(table.score.quantile(0.95)),
        "99.9% quantile": float(table.score.quantile(0.999)),
        "highest score": float(table.score.max()),
        "median standard error": float(table.standard_error.median()),
        "points over two standard errors": float((table.score > 2 * table.standard_error).mean()),
        "score and unseen log-likelihood": rank_correlation(table.score, table.unseen),
        "score and distance to the nearest other point": rank_correlation(table.score, table.distance),
        "score and sample ratio": rank_correlation(tested.score, tested.sample_ratio),
        "AUC of the sample ratio for the most memorized": float(roc_auc_score(top[tested.index], tested.sample_ratio)),
        "most memorized with a sample ratio above 1": float((tested.sample_ratio[top[tested.index]] > 1).mean()),
        "all points with a sample ratio above 1": float((tested.sample_ratio > 1).mean()),
    }


def draw_score(table: pd.DataFrame, learning: pd.DataFrame) -> Figure:
    """Curves; scores' spread at two rates; scores against unseen likelihood; the most memorized digits; neighbours' test."""
    figure = Figure(figsize=(13, 7.6))
    (curve, spread, against), (ratio, agree, pictures) = figure.subplots(2, 3)
    for (rate, part), colour in zip(learning.groupby("rate"), ("#2563a8", "#c0392b"), strict=True):
        curve.plot(part.epoch, part.training, color=colour, label=f"training, rate {rate:g}")
        curve.plot(part.epoch, part["held out"], color=colour, ls="--", label=f"held out, rate {rate:g}")
    curve.set(xlabel="epoch", ylabel="bound of log p(x), nats", ylim=(-130, None), title="the held-out likelihood levels off")
    curve.legend(fontsize=8)
    by_model = {str(name): part.set_index("point") for name, part in table.groupby("model", sort=False)}
    fast, slow = by_model["VAE"], by_model["VAE, a tenth of the learning rate"]
    bins = np.linspace(slow.score.min(), fast.score.max(), 60)
    for part, colour, name in ((slow, "#2563a8", f"rate {digits.SLOW:g}"), (fast, "#c0392b", f"rate {digits.LEARNING_RATE:g}")):
        spread.hist(part.score, bins=bins, color=colour, alpha=0.5, log=True, label=name)
    spread.set(xlabel="memorization score, nats", ylabel="digits", title="a tail of memorized points")
    spread.legend(fontsize=8)
    against.errorbar(fast.unseen, fast.score, fast.standard_error, fmt=".", ms=3, lw=0.4, color="#c0392b", ecolor="#e8c4bf")
    against.set(xlabel="log-likelihood when left out, nats", ylabel="memorization score, nats", title="atypical points score high")
    ratio.scatter(fast.score, fast.sample_ratio, s=4, color="#2563a8")
    ratio.axhline(1, color="grey", ls=":", lw=1)
    ratio.set(xlabel="memorization score, nats", ylabel="nearest held-out / nearest sample", title="the neighbours' test")
    agree.scatter(fast.score, by_model["diffusion, bound"].score, s=4, color="#2563a8")
    agree.set(xlabel="score of the VAE, nats", ylabel="score of the diffusion model, nats", title="two models")
    most, least = fast.score.sort_values().index[::-1][:24], fast.score.abs().sort_values().index[:24]
    data = digits.digits().numpy().reshape(-1, 8, 8)
    rows = [np.concatenate([np.pad(data[i], 1) for i in part[k : k + 8]], axis=1) for part in (most, least) for k in (0, 8, 16)]
    pictures.imshow(np.concatenate([*rows[:3], np.full((4, rows[0].shape[1]), 16.0), *rows[3:]]), cmap="gray_r")
    pictures.set(title="highest scores (above), near zero (below)")
    pictures.axis("off")
    return figure


@app.command()
def score(out: Out = RESULTS, work: Work = WORK) -> None:
    """The memorization score on digits: a VAE at two learning rates, a diffusion model under two likelihoods."""
    torch.set_num_threads(1)
    parts = []
    for name, (make, folds, repeats) in MODELS.items():
        found = memorization(make(), folds, repeats, 0, work, {"model": name, "folds": folds})
        parts.append(found.assign(model=name, trainings=folds * repeats))
    if not processes().is_main_process:
        return
    table = pd.concat(parts).merge(neighbour_tests(), on="point")
    learning = pd.concat([curves(rate) for rate in (digits.SLOW, digits.LEARNING_RATE)])
    models = {str(name): told(part.reset_index(drop=True)) for name, part in table.groupby("model", sort=False)}
    scores = {str(name): part.score.to_numpy() for name, part in table.groupby("model", sort=False)}
    fast = scores["VAE"]
    ends = learning.groupby("rate")["held out"].agg(["last", "max"])
    figures = {
        "models": models,
        "rank correlation with the VAE's scores": {name: rank_correlation(fast, s) for name, s in scores.items() if name != "VAE"},
        "bound and probability flow": rank_correlation(scores["diffusion, bound"], scores["diffusion, probability flow"]),
        "held-out bound, last epoch against best": {f"{rate:g}": [float(r["last"]), float(r["max"])] for rate, r in ends.iterrows()},
        "VAE's samples within a third of the second nearest's distance": float(table.copies.iloc[0]),
    }
    write("score", table.drop(columns="copies"), figures, draw_score(table, learning), out)


SIZES, SEEDS, DRAWS, PATHS = (1797, 300, 100, 30, 10), 2, 4096, 100
#: root-mean-square difference, of pixels in [0, 1], under which two pictures are the same.
SAME = 0.02


def measure_density(jobs: pd.DataFrame) -> pd.DataFrame:
    """Log volume at draws of the prior, how often two draws give the same picture, and paths between training points."""
    parts = []
    for points, seed in jobs[["points", "seed"]].itertuples(index=False):
        model = digits.of_points(points, seed)
        z = torch.randn(DRAWS, 2, generator=torch.Generator().manual_seed(1))
        rows = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))[:points]
        data = digits.digits()[rows]
        encoded, _ = model.encode(data)
        same = torch.pdist(model.decode(z)) < 8 * SAME  # root mean square over 64 pixels
        ends = torch.randint(points, (2, PATHS), generator=torch.Generator().manual_seed(2))
        start, end = encoded[ends[0]], encoded[ends[1]]
        apart = ends[0] != ends[1]
        parts.append(
            pd.DataFrame(
                {
                    "points": points,
                    "seed": seed,
                    "log_volume": log_volume(model.decode, z, 1e-6).numpy(),
                    "same": float(same.double().mean()),
                    "concentration": float(concentration(model.decode, start[apart], end[apart], 200).mean()),
                    "training_loss": float(model.loss(data, torch.Generator().manual_seed(3)).mean()),
                }
            )
        )
    return pd.concat(parts)


def draw_density(table: pd.DataFrame) -> Figure:
    """Maps of the volume over latent space, its quantiles against the number of points, and the speed along paths."""
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    grid = figure.add_gridspec(2, 5, height_ratios=(1, 1.3))
    side = torch.linspace(-3, 3, 160)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=2).reshape(-1, 2)
    models = {points: digits.of_points(points) for points in SIZES}
    volumes = {points: log_volume(model.decode, plane, 1e-6).reshape(160, 160).numpy() for points, model in models.items()}
    low, high = np.quantile(np.stack(list(volumes.values())), [0.02, 0.998])
    maps = [figure.add_subplot(grid[0, i]) for i in range(len(SIZES))]
    for axis, points in zip(maps, SIZES, strict=True):
        shown = axis.imshow(volumes[points], origin="lower", extent=(-3, 3, -3, 3), vmin=low, vmax=high, cmap="magma")
        axis.set_title(f"{points} digits", fontsize=10)
        axis.tick_params(labelsize=7)
    figure.colorbar(shown, ax=maps, label="log volume element", fraction=0.012, pad=0.01)
    quantile, path = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    by_size = table.groupby("points").log_volume.quantile(list(shares)).unstack()
    for share in shares:
        quantile.plot(by_size.index, by_size[share], "o-", ms=3, lw=1.8 if share == 0.5 else 0.9, label=f"{share:.0%}")
    quantile.set(xscale="log", xlabel="digits trained on (fewer: more memorized)", ylabel="log volume element, quantiles over the prior")
    quantile.invert_xaxis()
    quantile.legend(fontsize=7, ncols=2)
    times = np.linspace(0, 1, 400)
    for points, colour in ((1797, "#2563a8"), (100, "#e08e0b"), (10, "#c0392b")):
        encoded, _ = models[points].encode(digits.digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:2]])
        path.plot(times, speed(models[points].decode, encoded[:1], encoded[1:], 400)[0].numpy(), color=colour, label=f"{points} digits")
    path.set(xlabel="time on the straight path between two training digits", ylabel="speed of the output (the metric)")
    path.legend(fontsize=8)
    return figure


@app.command()
def density(out: Out = RESULTS, work: Work = WORK) -> None:
    """The output density of VAEs that memorize more and more: the same network and steps, on fewer and fewer digits."""
    torch.set_num_threads(1)
    jobs = pd.DataFrame([(points, seed) for points in SIZES for seed in range(SEEDS)], columns=["points", "seed"])
    table = measured("density", jobs, measure_density, work, {"steps": digits.STEPS, "limit": SAME}, 1).drop(columns=["steps", "limit"])
    if not processes().is_main_process:
        return
    rows = []
    for points in SIZES:
        part = table[table.points == points]
        by_seed = part.groupby("seed").log_volume.quantile([0.05, 0.5, 0.95, 0.999]).unstack()
        rows.append(
            {
                "digits": points,
                **{f"log volume, {share:.1%}".replace(".0%", "%"): float(by_seed[share].mean()) for share in by_seed},
                "spread, 5% to 95%": float((by_seed[0.95] - by_seed[0.05]).mean()),
                "spread over seeds": float((by_seed[0.95] - by_seed[0.05]).std()),
                "two draws are the same picture": float(part.groupby("seed").same.first().mean()),
                "path length in its fastest tenth": float(part.groupby("seed").concentration.first().mean()),
            }
        )
    write(
        "density",
        table,
        {"rows": rows, "the same picture": f"root-mean-square difference under {SAME:g} of the range"},
        draw_density(table),
        out,
    )


@app.command()
def lid(out: Out = RESULTS) -> None:
    """Dimensions and verdicts on manifolds where all of it is known."""
    looked, data, model, of = manifolds.draw(points=40, each=2000, seed=0)
    own = data_dimension(looked.numpy(), data.numpy())
    found = model_dimension(model.noise, looked, manifolds.LEVEL)
    table = pd.DataFrame(
        {
            "true_data": [component.data for component in of],
            "true_model": [component.model for component in of],
            "truth": [component.truth for component in of],
            "data": own.value,
            "data_error": own.standard_error,
            "model": found.value,
            "model_error": found.standard_error,
            "verdict": classify(found, own, below(own, manifolds.SIMPLE)),
        }
    )
    rows = [
        {
            "dimension of the data": int(data_dimension_),
            "of the model": int(model_dimension_),
            "truth": str(part.truth.iloc[0]),
            "data, estimated": float(part.data.mean()),
            "model, estimated": float(part.model.mean()),
            "verdicts right": float((part.verdict == part.truth).mean()),
        }
        for (data_dimension_, model_dimension_), part in table.groupby(["true_data", "true_model"], sort=False)
    ]
    figure = Figure(figsize=(5.8, 5))
    axis = figure.subplots()
    for verdict, part in table.groupby("verdict"):
        axis.errorbar(part.data, part.model, None, part.data_error, fmt="o", ms=3, lw=0.5, color=COLOURS[str(verdict)], label=verdict)
    axis.plot(table.true_data, table.true_model, "k+", ms=12)
    axis.set(xlabel="the data's dimension (crosses: the truth)", ylabel="the model's dimension")
    axis.legend(fontsize=8)
    write("lid", table, {"rows": rows, "right": float((table.verdict == table.truth).mean())}, figure, out)


def interval(found: Mapping[str, float]) -> str:
    """A rank correlation as people read it."""
    return f"{found['rho']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def readme_score(figures: Mapping[str, Any]) -> str:
    """The README's table of the memorization score."""
    rows = {
        "trainings": lambda m: str(m["trainings"]),
        "mean score, which is the train-test gap, nats": lambda m: f"{m['train-test gap (mean score)']:.1f}",
        "95% and 99.9% quantile, nats": lambda m: f"{m['95% quantile']:.1f}, {m['99.9% quantile']:.1f}",
        "median standard error, nats": lambda m: f"{m['median standard error']:.1f}",
        "rank correlation with the left-out log-likelihood": lambda m: interval(m["score and unseen log-likelihood"]),
        "with the distance to the nearest other digit": lambda m: interval(m["score and distance to the nearest other point"]),
        "neighbours' test (AUC for the top 5%)": lambda m: f"{m['AUC of the sample ratio for the most memorized']:.2f}",
    }
    return markdown(["", *figures["models"]], [[name, *(cell(m) for m in figures["models"].values())] for name, cell in rows.items()])


def readme_density(figures: Mapping[str, Any]) -> str:
    """The README's table of the output density."""
    rows = [
        [
            str(row["digits"]),
            *(f"{row[f'log volume, {share}']:.1f}" for share in ("5%", "50%", "95%", "99.9%")),
            f"{row['two draws are the same picture']:.2%}",
            f"{row['path length in its fastest tenth']:.0%}",
        ]
        for row in figures["rows"]
    ]
    header = [
        "digits trained on",
        "log volume, 5%",
        "50%",
        "95%",
        "99.9%",
        "two draws are the same picture",
        "path length in its fastest tenth",
    ]
    return markdown(header, rows)


def readme_lid(figures: Mapping[str, Any]) -> str:
    """The README's table of the known manifolds."""
    rows = [
        [
            f"{row['dimension of the data']} and {row['of the model']}",
            f"{row['data, estimated']:.1f} and {row['model, estimated']:.2f}",
            row["truth"],
            f"{row['verdicts right']:.0%}",
        ]
        for row in figures["rows"]
    ]
    return markdown(["dimension of the data and of the model", "estimated", "what it is", "verdicts that say so"], rows)


def readme_agreement(figures: Mapping[str, Any]) -> str:
    """The README's table of the agreement study."""

    def cell(found: list[float]) -> str:
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)

    every, repeated = figures["correlations"], figures["correlations among the repeated"]
    rows = [
        [label, cell(every[name]["repetitions"]), cell(every[name]["copy_rate"]), cell(every[name]["score"]), cell(repeated[name]["score"])]
        for name, label in agreement.MEASURES.items()
        if name not in ("repetitions", "score")
    ]
    return markdown(["rank correlation of", "repetitions", "copy rate", "memorization score", "the same, repeated pictures only"], rows)


#: what of each result stands in the README.
TABLES = {"score": readme_score, "density": readme_density, "lid": readme_lid, "agreement": readme_agreement}
