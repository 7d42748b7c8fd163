"""One figure for each audit."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sdguard.files.atomic import atomic_write

matplotlib.rcParams["axes.spines.top"] = matplotlib.rcParams["axes.spines.right"] = False
COLOURS = {"OD-Mem": "#c0392b", "DD-Mem": "#2563a8", "neither": "#5b8c5a"}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def draw_scores(table: pd.DataFrame) -> Figure:
    """Memorization scores: how they are spread, and against the log-likelihood a point has when it was not seen."""
    figure = Figure(figsize=(10, 4))
    spread, against = figure.subplots(1, 2)
    spread.hist(table.score, bins=60, color="#2563a8", log=True)
    for share in (0.95, 0.999):
        spread.axvline(table.score.quantile(share), color="grey", ls=":", lw=1)
    spread.set(xlabel="memorization score, nats (dotted: 95% and 99.9%)", ylabel="training points")
    error = table.standard_error.where(np.isfinite(table.standard_error), 0)
    against.errorbar(table.unseen, table.score, error, fmt=".", ms=3, lw=0.4, color="#2563a8", ecolor="#b8c8de")
    against.set(xlabel="log-likelihood when left out, nats", ylabel="memorization score, nats")
    return figure


def draw_density(table: pd.DataFrame, speeds: np.ndarray) -> Figure:
    """The log volume element over latents, and how fast the output moves along paths, ``[paths, times]``."""
    figure = Figure(figsize=(10, 4))
    volumes, paths = figure.subplots(1, 2)
    volumes.hist(table.log_volume, bins=60, color="#2563a8")
    volumes.set(xlabel="log volume element, nats", ylabel="latents")
    times = np.linspace(0, 1, speeds.shape[1])
    for one in speeds[:8]:
        paths.plot(times, one, lw=1)
    paths.set(xlabel="time on the straight path between two latents", ylabel="speed of the output")
    return figure


def draw_dimensions(table: pd.DataFrame) -> Figure:
    """The model's dimension against the data's, with errors and verdicts."""
    figure = Figure(figsize=(5.6, 5))
    axis = figure.subplots()
    for verdict, part in table.groupby("verdict"):
        axis.errorbar(
            part.data, part.model, part.model_error, part.data_error, fmt="o", ms=4, lw=0.5, color=COLOURS[str(verdict)],
            label=f"{verdict} ({len(part)})",
        )  # fmt: skip
    ends = [table.data.min(), table.data.max()]
    axis.plot(ends, ends, color="grey", ls=":", lw=1)
    axis.set(xlabel="the data's local intrinsic dimension", ylabel="the model's")
    axis.legend(fontsize=8)
    return figure


def draw_neighbours(generated: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """Both ratios' histograms, each with the value beyond which it speaks of copying."""
    figure = Figure(figsize=(10, 4))
    second, sample = figure.subplots(1, 2)
    second.hist(generated.second_ratio, bins=50, range=(0, 1), color="#2563a8")
    second.set(xlabel="nearest over second nearest training point (small: a copy)", ylabel="generated points")
    sample.hist(training.sample_ratio, bins=50, color="#2563a8")
    sample.axvline(1, color="grey", ls=":", lw=1)
    sample.set(xlabel="nearest held-out over nearest generated point (large: drawn near)", ylabel="training points")
    return figure
