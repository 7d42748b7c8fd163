"""``python -m benchmarks audit lid``: overfitting or the data, on manifolds where both dimensions are known (Ross et al. 2024).

Three times: with the model's exact score, and with the score of a network trained on draws of that model, at the training points and at
points that the network itself generates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.audit.results import RESULTS, Out, write
from benchmarks.documents import markdown
from sdguard.audit import manifolds
from sdguard.audit.dimension import below, classify, data_dimension, model_dimension
from sdguard.audit.figures import COLOURS
from sdguard.audit.likelihood import level_of, levels_between, probability_flow_draws
from sdguard.audit.neighbours import nearest
from sdguard.audit.networks import LEAST_NOISE, MOST_NOISE
from sdguard.audit.subjects import Noise
from sdguard.observation import NoiseLevel

EXACT, LEARNED, GENERATED = "exact", "learned", "learned, generated points"
#: points looked at of each component: forty where the score is exact; five for the network, which has to be driven to each of them.
POINTS, SHOWN, EACH, DRAWS = 40, 5, 2000, 400
#: noise levels (s / a) at which the network's dimension is drawn, and the one its verdicts are read at.
SIGMAS, SIGMA = (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5), 0.15


def component_of(points: Tensor) -> list[manifolds.Component]:
    """The component whose centre is nearest, for each point."""
    return [manifolds.COMPONENTS[i] for i in torch.cdist(points, manifolds.centres().to(points)).argmin(1).tolist()]


def looked_at(noise: Noise, points: Tensor, of: list[manifolds.Component], data: Tensor, level: NoiseLevel, name: str) -> pd.DataFrame:
    """Dimensions and verdicts, one row a point.

    The data's dimension is that at the nearest data point, lest a point beside a manifold is taken for one of a high dimension.
    """
    _, at = nearest(points.numpy(), data.numpy())
    own, found = data_dimension(data[at[:, 0]].numpy(), data.numpy()), model_dimension(noise, points, level)
    return pd.DataFrame(
        {
            "score": name,
            "true_data": [component.data for component in of],
            "true_model": [component.model for component in of],
            "truth": [component.truth for component in of],
            "data": own.value,
            "data_error": own.standard_error,
            "model": found.value,
            "verdict": classify(found, own, below(own, manifolds.SIMPLE)),
        }
    )


def over_levels(noise: Noise, drawn: manifolds.Drawn) -> pd.DataFrame:
    """Mean dimension of each component at each noise level, of the network and of the exact score."""
    rows = []
    for sigma in SIGMAS:
        for name, score, points in ((LEARNED, noise, drawn.points.float()), (EXACT, drawn.model.noise, drawn.points)):
            found = model_dimension(score, points, level_of(sigma)).value.reshape(len(manifolds.COMPONENTS), -1).mean(1)
            rows += [{"sigma": sigma, "score": name, "component": i, "dimension": float(value)} for i, value in enumerate(found)]
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, levels: pd.DataFrame) -> Figure:
    """Dimensions with their verdicts for each score, and the network's dimension over noise levels."""
    figure = Figure(figsize=(15, 4.4))
    *places, last = figure.subplots(1, 4)
    for axis, (name, part) in zip(places, table.groupby("score", sort=False), strict=True):
        for verdict, some in part.groupby("verdict"):
            label = f"{verdict} ({len(some)})"
            axis.errorbar(some.data, some.model, None, some.data_error, fmt="o", ms=3, lw=0.5, color=COLOURS[str(verdict)], label=label)
        axis.plot(part.true_data, part.true_model, "k+", ms=12)
        axis.set(title=name, xlabel="the data's dimension (crosses: the truth)", ylabel="the model's dimension", ylim=(-1, 13))
        axis.legend(fontsize=8, loc="upper left")
    for (i, name), part in levels.groupby(["component", "score"], sort=False):
        component = manifolds.COMPONENTS[i]
        label = f"{component.data} and {component.model}" if name == LEARNED else "_"
        last.plot(part.sigma, part.dimension, "o-" if name == LEARNED else ":", ms=3, color=f"C{i}", label=label)
    last.axvline(SIGMA, color="grey", lw=0.8)
    last.set(
        xscale="log",
        xticks=SIGMAS,
        xticklabels=SIGMAS,
        xlabel="noise level it is read at",
        ylabel="the model's dimension",
        title="learned (dotted: exact)",
    )
    last.minorticks_off()
    last.legend(fontsize=8, title="data and model")
    return figure


def main(out: Out = RESULTS) -> None:
    """Dimensions and verdicts on manifolds where all of it is known: of an exact score, and of a network that has learned it."""
    torch.set_num_threads(1)
    drawn = manifolds.draw_sample(POINTS, EACH, seed=0)
    exact = looked_at(drawn.model.noise, drawn.points, drawn.of, drawn.data, manifolds.LEVEL, EXACT)
    drawn = manifolds.draw_sample(SHOWN, EACH, seed=0)
    network, level = manifolds.learned(drawn), level_of(SIGMA)
    learned = looked_at(network, drawn.points.float(), drawn.of, drawn.data, level, LEARNED)
    eps = torch.randn(DRAWS, manifolds.AMBIENT, generator=torch.Generator().manual_seed(2))
    made = probability_flow_draws(network, eps, levels_between(LEAST_NOISE, MOST_NOISE, 60))
    generated = looked_at(network, made, component_of(made), drawn.data, level, GENERATED)
    table = pd.concat([exact, learned, generated], ignore_index=True)
    rows = [
        {
            "score": str(name),
            "dimension of the data": int(data),
            "of the model": int(model),
            "points": len(part),
            "truth": str(part.truth.iloc[0]),
            "data, estimated": float(part.data.mean()),
            "model, estimated": float(part.model.mean()),
            "verdicts right": float((part.verdict == part.truth).mean()),
        }
        for (name, data, model), part in table.groupby(["score", "true_data", "true_model"], sort=False)
    ]
    right = {str(name): float((part.verdict == part.truth).mean()) for name, part in table.groupby("score", sort=False)}
    write("lid", table, {"rows": rows, "right": right, "noise level of the network": SIGMA}, draw(table, over_levels(network, drawn)), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table: one row a kind of point, for each score the model's dimension and the verdicts that are right."""
    table = pd.DataFrame(figures["rows"])
    rows = []
    for (data, model), part in table.groupby(["dimension of the data", "of the model"], sort=False):
        by_score = part.set_index("score")
        cells = [
            f"{by_score['model, estimated'][name]:.1f} ({by_score['verdicts right'][name]:.0%})" for name in (EXACT, LEARNED, GENERATED)
        ]
        rows.append([f"{data} and {model}", part.truth.iloc[0], f"{by_score['data, estimated'][EXACT]:.1f}", *cells])
    header = ["dimension of the data and of the model", "what it is", "data's, estimated"]
    return markdown([*header, *(f"model's: {name} (verdicts right)" for name in (EXACT, LEARNED, GENERATED))], rows)
