"""``python -m benchmarks audit density``: the output density of VAEs that memorize more and more (Feiszli 2017).

Two ways to more memorization: the same network and steps on fewer and fewer digits, and the same ten digits for longer and longer. The
second has one latent, so that the volume element is the speed of the output: with more, a boundary is crossed in one direction only, and
along it the volume collapses as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.audit.results import RESULTS, WORK, Out, Work, percent, write
from benchmarks.documents import markdown
from sdguard.audit import digits
from sdguard.audit.density import concentration, log_volume_element, speed
from sdguard.files.processes import processes
from sdguard.files.resumable import measured


class Trained(NamedTuple):
    """How a VAE was trained."""

    latents: int
    points: int
    steps: int


SIZES, LENGTHS = (1797, 300, 100, 30, 10), (600, 2000, 6000, 20_000, 60_000)
FEWER = [Trained(2, points, digits.STEPS) for points in SIZES]
LONGER = [Trained(1, 10, steps) for steps in LENGTHS]
SEEDS, DRAWS, PATHS = 2, 4096, 100
#: root-mean-square difference, of pixels in [0, 1], under which two pictures are the same.
SAME = 0.02
#: outputs nearer than this count as one, so that the logarithm is finite.
RESOLUTION = 1e-6


def measure(jobs: pd.DataFrame) -> pd.DataFrame:
    """Log volume at draws of the prior, how often two draws give the same picture, and paths between training points."""
    parts = []
    for latents, points, steps, seed in jobs[["latents", "points", "steps", "seed"]].itertuples(index=False):
        model = digits.of_points(points, seed, latents, steps)
        z = torch.randn(DRAWS, latents, generator=torch.Generator().manual_seed(1))
        data = digits.digits()[digits.rows(points, seed)]
        encoded, _ = model.encode(data)
        same = torch.pdist(model.decode(z)) < 8 * SAME  # root mean square over 64 pixels
        ends = torch.randint(points, (2, PATHS), generator=torch.Generator().manual_seed(2))
        start, end = encoded[ends[0]], encoded[ends[1]]
        apart = ends[0] != ends[1]
        parts.append(
            pd.DataFrame(
                {
                    "latents": latents,
                    "points": points,
                    "steps": steps,
                    "seed": seed,
                    "log_volume": log_volume_element(model.decode, z, RESOLUTION).numpy(),
                    "same": float(same.double().mean()),
                    "concentration": float(concentration(model.decode, start[apart], end[apart], 200).mean()),
                    "training_loss": float(model.loss(data, torch.Generator().manual_seed(3)).mean()),
                }
            )
        )
    return pd.concat(parts)


def quantiles(axis: Any, table: pd.DataFrame, by: str, label: str) -> None:
    """Quantiles of the log volume over the prior, against one column."""
    shares = (0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999)
    of = table.groupby(by).log_volume.quantile(list(shares)).unstack()
    for share, colour in zip(shares, ("#0b2d4f", "#2563a8", "#7fa6cf", "black", "#eab37a", "#e08e0b", "#c0392b"), strict=True):
        axis.plot(of.index, of[share], "o-", ms=3, lw=1.8 if share == 0.5 else 0.9, color=colour, label=percent(share))
    axis.set(xscale="log", xlabel=label, ylabel="log volume element, quantiles")
    axis.legend(fontsize=7, ncols=2)


def draw(table: pd.DataFrame) -> Figure:
    """Maps of the volume over two latents, its quantiles both ways, the speed along paths, and the volume along one latent."""
    figure = Figure(figsize=(14, 7.8), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    above, below = halves
    side = torch.linspace(-3, 3, 160)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=2).reshape(-1, 2)
    models = {points: digits.of_points(points) for points in SIZES}
    volumes = {points: log_volume_element(model.decode, plane, RESOLUTION).reshape(160, 160).numpy() for points, model in models.items()}
    low, high = np.quantile(np.stack(list(volumes.values())), [0.02, 0.998])
    maps = above.subplots(1, len(SIZES))
    for axis, points in zip(maps, SIZES, strict=True):
        shown = axis.imshow(volumes[points], origin="lower", extent=(-3, 3, -3, 3), vmin=low, vmax=high, cmap="magma")
        axis.set_title(f"{points} digits", fontsize=10)
        axis.tick_params(labelsize=7)
    above.colorbar(shown, ax=maps, label="log volume element", fraction=0.012, pad=0.01)
    fewer, path, longer, line = below.subplots(1, 4)
    quantiles(fewer, table[table.latents == 2], "points", "digits trained on (two latents)")
    fewer.invert_xaxis()
    times = np.linspace(0, 1, 400)
    for points, colour in ((1797, "#2563a8"), (100, "#e08e0b"), (10, "#c0392b")):
        encoded, _ = models[points].encode(digits.digits()[digits.rows(1797, 0)[:2]])
        path.plot(times, speed(models[points].decode, encoded[:1], encoded[1:], 400)[0].numpy(), color=colour, label=f"{points} digits")
    path.set(xlabel="time on the path between two digits", ylabel="speed of the output (the metric)")
    path.legend(fontsize=8)
    quantiles(longer, table[table.latents == 1], "steps", "steps on ten digits (one latent)")
    at = torch.linspace(-2, 2, 4000)[:, None]
    for steps, colour in ((LENGTHS[0], "#2563a8"), (LENGTHS[-1], "#c0392b")):
        model = digits.of_points(10, 0, 1, steps)
        line.plot(at[:, 0], log_volume_element(model.decode, at, RESOLUTION).numpy(), color=colour, lw=1, label=f"{steps} steps")
    line.set(xlabel="the latent", ylabel="log volume element")
    line.legend(fontsize=8)
    return figure


def summary(part: pd.DataFrame) -> dict[str, float]:
    """The figures of one way of training, means over seeds."""
    by_seed = part.groupby("seed").log_volume.quantile([0.05, 0.5, 0.95, 0.999]).unstack()
    return {
        **{f"log volume, {percent(share)}": float(by_seed[share].mean()) for share in by_seed},
        "spread, 5% to 99.9%": float((by_seed[0.999] - by_seed[0.05]).mean()),
        "spread over seeds": float((by_seed[0.999] - by_seed[0.05]).std()),
        "two draws are the same picture": float(part.groupby("seed").same.first().mean()),
        "path length in its fastest tenth": float(part.groupby("seed").concentration.first().mean()),
    }


def main(out: Out = RESULTS, work: Work = WORK) -> None:
    """The output density of VAEs that memorize more and more: on fewer and fewer digits, and for longer and longer."""
    torch.set_num_threads(1)
    jobs = pd.DataFrame([(*how, seed) for how in FEWER + LONGER for seed in range(SEEDS)], columns=[*Trained._fields, "seed"])
    table = measured("density", jobs, measure, work, {"limit": SAME}, 1).drop(columns="limit")
    if not processes().is_main_process:
        return
    by_training = table.groupby(list(Trained._fields), sort=False)
    rows = [{**Trained(*map(int, how))._asdict(), **summary(part)} for how, part in by_training]
    figures = {"rows": rows, "the same picture": f"root-mean-square difference under {SAME:g} of the range"}
    write("density", table.astype({"log_volume": np.float32}), figures, draw(table), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table."""
    rows = [
        [
            str(row["latents"]),
            str(row["points"]),
            f"{row['steps']:,}",
            *(f"{row[f'log volume, {share}']:.1f}" for share in ("5%", "50%", "95%", "99.9%")),
            f"{row['two draws are the same picture']:.2%}",
            f"{row['path length in its fastest tenth']:.0%}",
        ]
        for row in figures["rows"]
    ]
    header = ["latents", "digits trained on", "steps", "log volume, 5%", "50%", "95%", "99.9%", "two draws are the same picture"]
    return markdown([*header, "path length in its fastest tenth"], rows)
