"""Where the training side's results go, and what its benchmarks share in writing them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import bootstrap, spearmanr

from benchmarks.running import versions
from sdguard.audit.figures import save
from sdguard.files.atomic import write_text
from sdguard.files.prompt_files import write_table

RESULTS, WORK = Path(__file__).parents[1] / "results" / "audit", Path("build/audit")
Out = Annotated[Path, typer.Option(help="Where the results go.")]
Work = Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")]
#: the share of points with the highest scores that is called the most memorized.
TOP = 0.05


def write(name: str, table: pd.DataFrame, figures: Mapping[str, Any], figure: Figure, out: Path) -> None:
    """The table, the figures in numbers with the versions they hang on, and the figure."""
    out.mkdir(parents=True, exist_ok=True)
    write_table(table, out / f"{name}.parquet")
    write_text(out / f"{name}.json", json.dumps({"about": versions(), **figures}, indent=1) + "\n")
    save(figure, out / f"{name}.png")
    typer.echo(json.dumps(figures, indent=1))


def rank_correlation(one: Any, other: Any) -> dict[str, float]:
    """Spearman's rank correlation with its 95% percentile bootstrap interval over points."""
    pair = (np.asarray(one), np.asarray(other))
    found = bootstrap(
        pair, lambda x, y: spearmanr(x, y).statistic, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=0
    ).confidence_interval
    return {"rho": float(spearmanr(*pair).statistic), "low": float(found.low), "high": float(found.high)}


def interval(rho: float, low: float, high: float) -> str:
    """A rank correlation as people read it."""
    return f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def percent(share: float) -> str:
    """A share with one decimal, where it is not a whole percent."""
    return f"{share:.1%}".replace(".0%", "%")


def contact_sheet(axis: Axes, above: np.ndarray, below: np.ndarray, title: str) -> None:
    """Two lots of pictures ``[n, h, w]``, eight in a row, n a multiple of eight, with a dark bar between them."""
    framed = [np.pad(part, ((0, 0), (1, 1), (1, 1))) for part in (above, below)]
    rows = [np.concatenate([np.hstack(list(part[k : k + 8])) for k in range(0, len(part), 8)]) for part in framed]
    axis.imshow(np.concatenate([rows[0], np.full((4, rows[0].shape[1]), max(above.max(), below.max())), rows[1]]), cmap="gray_r")
    axis.set(title=title)
    axis.axis("off")
