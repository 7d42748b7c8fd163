"""The learned density drawn: spectra of its Hessian, and slices of the density as surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import RectBivariateSpline

from sdguard.demo.charts import WIDTH, Line, chart, figure, svg_path, tick_label, ticks
from sdguard.demo.landscape import Slice

#: of a surface: points a side as drawn, an odd number, and pixels that it is high.
DRAWN, TALL = 61, 170.0
#: share of a surface's height under which it is drawn as its floor, in one piece.
FLAT = 0.003


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


def refined(cut: Slice, points: int = DRAWN) -> np.ndarray:
    """The density of a slice over that of its sample, at so many points a side: a spline of log p, which noise has made smooth."""
    at = np.linspace(cut.offsets[0], cut.offsets[-1], points)
    return np.exp(RectBivariateSpline(cut.offsets, cut.offsets, cut.heights)(at, at))


def surface(cut: Slice, name: str, colour: str, most: float) -> str:
    """A slice's density as a surface seen from above, the sample in the middle: linear from 0, cut off at ``most`` times the sample's."""
    heights = np.minimum(refined(cut), most)
    n = len(heights)
    wide, deep = 185.0 / (n - 1), 62.0 / (n - 1)
    nought = max(TALL - 34.0, *(heights[i, j] / most * TALL - (i + j) * deep for i in range(n) for j in range(n))) + 14

    def at(i: int, j: int, height: float) -> tuple[float, float]:
        return WIDTH / 2 + (j - i) * wide, nought + (i + j) * deep - height / most * TALL

    parts = []
    left = at(n - 1, 0, 0.0)[0] - 6
    for value in ticks(0, most, 4):
        up = at(n - 1, 0, value)[1]
        parts.append(f'<line class="sg-grid" x1="{left - 4:.1f}" x2="{left:.1f}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{left - 7:.1f}" y="{up + 4:.1f}" text-anchor="end">{tick_label(value)}</text>')
    foot, head = (at(n - 1, 0, value)[1] for value in (0.0, most))
    parts.append(f'<line class="sg-grid" x1="{left:.1f}" x2="{left:.1f}" y1="{foot:.1f}" y2="{head:.1f}"/>')
    parts.append(f'<text class="sg-label" x="4" y="{head - 14:.1f}">p over the sample’s</text>')
    floor = [at(*corner, 0.0) for corner in ((0, 0), (0, n - 1), (n - 1, n - 1), (n - 1, 0))]
    parts.append(f'<path class="sg-quad {colour}" style="--up:0" d="{svg_path(floor)}Z"/>')
    for i in range(n - 1):
        for j in range(n - 1):
            corners = [at(*each, float(heights[each])) for each in ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))]
            share = float(heights[i : i + 2, j : j + 2].mean()) / most
            if share > FLAT:
                parts.append(f'<path class="sg-quad {colour}" style="--up:{share:.2f}" d="{svg_path(corners)}Z"/>')
    x, y = at(n // 2, n // 2, float(heights[n // 2, n // 2]))
    parts.append(f'<circle class="sg-sample" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    under = at(n - 1, n - 1, 0.0)[1]
    for text, where in (("flattest direction ↘", 0.2), ("↙ sharpest direction", 0.8)):
        parts.append(f'<text class="sg-label" x="{WIDTH * where:.0f}" y="{under + 4:.0f}" text-anchor="middle">{text}</text>')
    caption = (
        f"Steepness along the flattest direction {cut.steepness[0]:.2f}, along the sharpest {cut.steepness[1]:.2f}: noise alone around a "
        f"single picture gives 1, under 0 log p bends up. {cut.rest:.0%} of the score in this plane is no gradient and is left out."
    )
    return figure(name, "".join(parts), caption, height=int(under) + 14)
