"""The learned density drawn: spectra of its Hessian, and slices of log p as surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdguard.demo.charts import WIDTH, Line, chart, figure, svg_path


def spectrum_chart(
    nodes: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], names: Sequence[str], colours: Sequence[str]
) -> str:
    """Spectra of ``1 + s**2 H`` as seen by one probe, smoothed: what share of the directions is how free."""
    grid = np.linspace(-0.15, 1.15, 131)
    width = 0.03
    lines = []
    for name, at, mass, colour in zip(names, nodes, weights, colours, strict=True):
        bumps = np.exp(-0.5 * np.square((grid[:, None] - np.clip(at, -0.1, 1.1)[None]) / width)) / (width * math.sqrt(2 * math.pi))
        lines.append(Line(name, list(zip(grid.tolist(), (bumps @ np.asarray(mass)).tolist(), strict=True)), colour, dots=False))
    caption = (
        "Eigenvalues of 1 + s²H, H the Hessian of log p at the run’s own point: 0 is a direction in which the text pins the picture, "
        "1 one it leaves free. Lanczos from one probe, 24 steps, smoothed by 0.03."
    )
    return chart("Spectrum of the Hessian", lines, "freedom of a direction", "density", caption, (-0.15, 1.15))


def surface(cut: Any, name: str, colour: str, floor: float, ceiling: float, per_nat: float = 11.0) -> str:
    """A slice of log p as a surface seen from above, the sample in the middle, cut off at ``floor`` and ``ceiling`` nats against it.

    A nat is ``per_nat`` high.
    """
    heights = np.clip(cut.heights, floor, ceiling)
    n = len(cut.offsets)
    wide, deep = 195.0 / (n - 1), 62.0 / (n - 1)
    over = 14 - min(float((i + j) * deep - heights[i, j] * per_nat) for i in range(n) for j in range(n))
    under = over - floor * per_nat + 2 * (n - 1) * deep

    def at(i: int, j: int) -> tuple[float, float]:
        return WIDTH / 2 + (j - i) * wide, over + (i + j) * deep - float(heights[i, j]) * per_nat

    parts = []
    for i in range(n - 1):
        for j in range(n - 1):
            corners = [at(i, j), at(i, j + 1), at(i + 1, j + 1), at(i + 1, j)]
            share = (float(heights[i : i + 2, j : j + 2].mean()) - floor) / (ceiling - floor)
            parts.append(f'<path class="sg-quad {colour}" style="--up:{share:.2f}" d="{svg_path(corners)}Z"/>')
    x, y = at(n // 2, n // 2)
    parts.append(f'<circle class="sg-sample" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    for text, where in (("flattest direction ↘", 0.2), ("↙ sharpest direction", 0.8)):
        parts.append(f'<text class="sg-label" x="{WIDTH * where:.0f}" y="{under + 4:.0f}" text-anchor="middle">{text}</text>')
    caption = (
        f"Steepness along the flattest direction {cut.steepness[0]:.2f}, along the sharpest {cut.steepness[1]:.2f}: noise alone around a "
        f"single picture gives 1, under 0 log p bends up. {cut.rest:.0%} of the score in this plane is no gradient and is left out."
    )
    return figure(name, "".join(parts), caption, height=int(under) + 14)
