"""``python -m benchmarks audit score``: the memorization score on digits (van den Burg & Williams 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from benchmarks.audit.results import RESULTS, TOP, WORK, Out, Work, contact_sheet, interval, rank_correlation, write
from benchmarks.documents import markdown
from sdguard.audit import digits
from sdguard.audit.memorization import memorization
from sdguard.audit.neighbours import nearest, sample_ratio
from sdguard.audit.networks import trained
from sdguard.files.processes import processes

MODELS = {
    "VAE": (digits.vae, 10, 4),
    "VAE, a tenth of the learning rate": (digits.slow_vae, 10, 2),
    "diffusion, bound": (digits.diffusion, 5, 2),
    "diffusion, probability flow": (digits.diffusion_flow, 5, 2),
}


def curves(rate: float, held_out: int = 180) -> pd.DataFrame:
    """The VAE's bound on training and held-out points after each epoch, in nats."""
    training, rest = digits.split_digits(held_out)
    data, model = digits.digits(), digits.new_vae(0)
    rows: list[dict[str, float]] = []

    def look() -> None:
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            rows.append({name: -model.loss(data[some], draws).mean().item() for name, some in (("training", training), ("held out", rest))})

    trained(model, data[training], 0, digits.EPOCHS, rate, each=look)
    return pd.DataFrame(rows).assign(epoch=range(1, digits.EPOCHS + 1), rate=rate)


def neighbour_tests() -> pd.DataFrame:
    """One row a digit: distance to the nearest other one, and the sample ratio where it was trained on (nan where held out)."""
    data, (training, _) = digits.digits().numpy(), digits.split_digits(digits.HELD_OUT)
    distances, _ = nearest(data, data, 2)
    found = pd.DataFrame({"point": range(len(data)), "distance": distances[:, 1], "sample_ratio": np.nan})
    samples = digits.samples()
    found.loc[training.numpy(), "sample_ratio"] = sample_ratio(samples.training, samples.held_out, samples.generated)
    return found


def summary(table: pd.DataFrame) -> dict[str, Any]:
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


def draw(table: pd.DataFrame, learning: pd.DataFrame) -> Figure:
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
    contact_sheet(pictures, data[most], data[least], "highest scores (above), near zero (below)")
    return figure


def main(out: Out = RESULTS, work: Work = WORK) -> None:
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
    models = {str(name): summary(part.reset_index(drop=True)) for name, part in table.groupby("model", sort=False)}
    scores = {str(name): part.score.to_numpy() for name, part in table.groupby("model", sort=False)}
    fast = scores["VAE"]
    ends = learning.groupby("rate")["held out"].agg(["last", "max"])
    figures = {
        "models": models,
        "rank correlation with the VAE's scores": {name: rank_correlation(fast, s) for name, s in scores.items() if name != "VAE"},
        "bound and probability flow": rank_correlation(scores["diffusion, bound"], scores["diffusion, probability flow"]),
        "held-out bound, last epoch against best": {f"{rate:g}": [float(r["last"]), float(r["max"])] for rate, r in ends.iterrows()},
    }
    write("score", table, figures, draw(table, learning), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table of the memorization score."""
    rows = {
        "trainings": lambda m: str(m["trainings"]),
        "mean score, which is the train-test gap, nats": lambda m: f"{m['train-test gap (mean score)']:.1f}",
        "95% and 99.9% quantile, nats": lambda m: f"{m['95% quantile']:.1f}, {m['99.9% quantile']:.1f}",
        "median standard error, nats": lambda m: f"{m['median standard error']:.1f}",
        "rank correlation with the left-out log-likelihood": lambda m: interval(**m["score and unseen log-likelihood"]),
        "with the distance to the nearest other digit": lambda m: interval(**m["score and distance to the nearest other point"]),
        "neighbours' test (AUC for the top 5%)": lambda m: f"{m['AUC of the sample ratio for the most memorized']:.2f}",
    }
    return markdown(["", *figures["models"]], [[name, *(cell(m) for m in figures["models"].values())] for name, cell in rows.items()])
