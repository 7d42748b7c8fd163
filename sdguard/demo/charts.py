"""Charts as SVG written by hand: they are redrawn at every denoiser call, follow the page’s colours, and stay sharp at any width.

Pure functions from values to text; every text that is not ours is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
#: classes of the style sheet.
MEMORIZED, ORDINARY, UNGUARDED, GUARDED = "sg-red", "sg-green", "sg-red", "sg-blue"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count``."""
    if high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Line:
    """A curve: its ``points``, the class that colours it, and its name for the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dots: bool = True


def placed(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map of ``[low, high]`` to ``[start, end]``; what lies outside goes to the nearer end."""
    return lambda value: start + (min(max(value, low), high) - low) / ((high - low) or 1) * (end - start)


def frame(x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> str:
    """Axes with grid, ticks and labels."""
    to_x, to_y = placed(*x, LEFT, WIDTH - RIGHT), placed(*y, HEIGHT - BOTTOM, TOP)
    parts = []
    for value in ticks(*y):
        at = to_y(value)
        parts.append(f'<line class="sg-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick_label(value)}</text>')
    for value in x_ticks if x_ticks is not None else ticks(*x):
        parts.append(f'<text x="{to_x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick_label(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="sg-label" x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        up = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text class="sg-label" transform="translate(13 {up}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Names with their colours, above a chart; ``entries`` are ``(name, class)``."""
    shown = "".join(f'<span><i class="{colour}"></i>{escape(name)}</span>' for name, colour in entries if name)
    return f'<div class="sg-legend">{shown}</div>' if shown else ""


def figure(title: str, drawing: str, caption: str = "", key: str = "", height: int = HEIGHT) -> str:
    """A drawing with its title, legend and caption."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{drawing}</svg>'
    return f'<figure class="sg-figure"><h4>{escape(title)}</h4>{key}{svg}{note}</figure>'


def svg_path(points: Sequence[tuple[float, float]]) -> str:
    """The ``d`` of a path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str = "",
    caption: str = "",
    x_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    upright: tuple[float, str] | None = None,
) -> str:
    """Curves; ``upright`` marks a place on the horizontal axis. The range is that of all there is to show."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    margin = 0.06 * (high - low) or 0.5
    y = (0.0 if 0 <= low < 0.3 * high else low - margin, high + margin)
    x = x_range or ((min(xs), max(xs)) if xs else (0.0, 1.0))
    to_x, to_y = placed(*x, LEFT, WIDTH - RIGHT), placed(*y, HEIGHT - BOTTOM, TOP)
    parts = [frame(x, y, x_label, y_label, x_ticks)]
    if upright:
        at = to_x(upright[0])
        parts.append(f'<line class="sg-upright" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in lines:
        there = [(to_x(at), to_y(value)) for at, value in line.points if math.isfinite(value)]
        if there:
            parts.append(f'<path class="sg-line {line.colour}" d="{svg_path(there)}"/>')
            if line.dots:
                parts += [f'<circle class="{line.colour}" cx="{at:.1f}" cy="{up:.1f}" r="3"/>' for at, up in there]
    key = legend((line.name, line.colour) for line in lines)
    return figure(title, "".join(parts), caption, key)


def histogram(
    title: str, scores: Sequence[float], threshold: float, marks: Sequence[tuple[str, float, str]] = (), caption: str = "", bins: int = 36
) -> str:
    """Scores of ordinary prompts with the threshold, and marks ``(name, score, class)``."""
    low, high = min(scores), max([scores[-1], threshold, *(value for _, value, _ in marks)])
    high += 0.06 * (high - low)
    counts, edges = np.histogram(scores, bins=bins, range=(low, high))
    tall = float(counts.max()) * 1.12
    to_x, to_y = placed(low, high, LEFT, WIDTH - RIGHT), placed(0, tall, HEIGHT - BOTTOM, TOP)
    parts = [frame((low, high), (0, tall), "score", "ordinary prompts")]
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x, y = to_x(float(start)), to_y(float(count))
            parts.append(
                f'<rect class="sg-bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{to_x(float(end)) - x - 1:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"/>'
            )
    for _, value, colour in (("threshold", threshold, "sg-ink sg-dashed"), *marks):
        at = to_x(value)
        parts.append(f'<line class="sg-line {colour}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    key = legend([("threshold", "sg-ink"), *((name, colour) for name, _, colour in marks)])
    return figure(title, "".join(parts), caption, key)
