"""What the demo draws: pure functions from values to SVG and HTML. Every text that is not ours is escaped here.

Charts are SVG written by hand: they are redrawn at every denoiser call, follow the page's colours, and stay sharp at any width.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sdguard.decision.cascade import BY_NAME
from sdguard.decision.profile import SERIES, Profile
from sdguard.guarded.report import GuardReport

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 44
HEADLINES = {
    "clean": "Nothing memorized",
    "flagged": "Predicted to be memorized, let through",
    "steered": "Predicted to be memorized, steered away",
    "withheld": "Predicted to be memorized, withheld",
}
MEMORIZED, ORDINARY, UNGUARDED, GUARDED = "sg-red", "sg-green", "sg-red", "sg-blue"


def data_uri(image: Image.Image, side: int | None = None) -> str:
    """An image as a ``data:`` address, enlarged to at least ``side`` pixels where it is smaller."""
    image = image.convert("RGB")
    if side and image.width < side:
        image = image.resize((side, side * image.height // image.width), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def status(text: str, kind: str = "hint", done: float | None = None) -> str:
    """A line that says how things stand; ``kind`` is hint, busy, done or error, ``done`` a share for a bar."""
    bar = "" if done is None else f'<progress max="1" value="{done:.4f}" aria-label="{escape(text)}"></progress>'
    role = "alert" if kind == "error" else "status"
    return f'<div class="sg-status sg-{kind}" role="{role}" aria-live="polite"><span>{escape(text)}</span>{bar}</div>'


def hint(text: str) -> str:
    """What a pane says before there is something to see in it."""
    return f'<div class="sg-empty">{escape(text)}</div>'


# charts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about ``count``."""
    if high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Line:
    """A curve: its ``points``, the class that colours it, and its name for the legend; ``dashed`` for what is no measurement."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    dots: bool = True


@dataclass(frozen=True)
class Band:
    """A range of values at every place: ``(x, low, high)``."""

    name: str
    points: Sequence[tuple[float, float, float]]


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
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks if x_ticks is not None else ticks(*x):
        parts.append(f'<text x="{to_x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(value)}</text>')
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


def path(points: Sequence[tuple[float, float]]) -> str:
    """The ``d`` of a path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str = "",
    bands: Sequence[Band] = (),
    caption: str = "",
    x_range: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    upright: tuple[float, str] | None = None,
) -> str:
    """Curves over bands; ``upright`` marks a place on the horizontal axis. The range is that of all there is to show."""
    xs = [x for line in lines for x, _ in line.points] + [p[0] for band in bands for p in band.points]
    ys = [y for line in lines for _, y in line.points] + [v for band in bands for p in band.points for v in p[1:]]
    ys = [y for y in ys if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    margin = 0.06 * (high - low) or 0.5
    y = (0.0 if 0 <= low < 0.3 * high else low - margin, high + margin)
    x = x_range or ((min(xs), max(xs)) if xs else (0.0, 1.0))
    to_x, to_y = placed(*x, LEFT, WIDTH - RIGHT), placed(*y, HEIGHT - BOTTOM, TOP)
    parts = [frame(x, y, x_label, y_label, x_ticks)]
    for band in bands:
        there = [(to_x(at), to_y(top)) for at, _, top in band.points] + [(to_x(at), to_y(under)) for at, under, _ in reversed(band.points)]
        parts.append(f'<path class="sg-band" d="{path(there)}Z"/>' if there else "")
    if upright:
        at = to_x(upright[0])
        parts.append(f'<line class="sg-upright" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in lines:
        there = [(to_x(at), to_y(value)) for at, value in line.points if math.isfinite(value)]
        if there:
            dashes = " sg-dashed" if line.dashed else ""
            parts.append(f'<path class="sg-line {line.colour}{dashes}" d="{path(there)}"/>')
            if line.dots:
                parts += [f'<circle class="{line.colour}" cx="{at:.1f}" cy="{up:.1f}" r="3"/>' for at, up in there]
    key = legend([*((band.name, "sg-band") for band in bands), *((line.name, line.colour) for line in lines)])
    return figure(title, "".join(parts), caption, key)


PLAIN = {"guidance_norm": "Guidance norm", "guidance_peak": "Guidance peak", "denoised_norm": "Norm of the denoised estimate"}


def plain(name: str) -> str:
    """A signal's name for people."""
    return PLAIN.get(name, name.replace("_", " ").capitalize())


def later_threshold(profile: Profile, rate: float) -> list[float]:
    """The guidance norm from which each later call that is watched flags an image."""
    threshold = profile.threshold(rate)
    bounds = [scale.mean + threshold * scale.std for scale in profile.cascade.later]
    return [math.exp(bound) if scale.log else bound for bound, scale in zip(bounds, profile.cascade.later, strict=True)]


def signal_chart(
    name: str, profile: Profile, rate: float, steps: int, courses: Sequence[tuple[str, Sequence[float], Sequence[float], str]]
) -> str:
    """A free signal over the calls of runs ``(name, timesteps, values, class)`` against ordinary prompts, two deviations to either side."""
    known = sorted(profile.timesteps, reverse=True)
    at = [(call, *profile.at(name, timestep)) for call, timestep in enumerate(known, start=1)]
    band = Band("ordinary prompts, ±2 deviations", [(float(call), mean - 2 * std, mean + 2 * std) for call, mean, std in at])
    lines = []
    caption = "Watched for free at every call; it decides nothing by itself."
    if name == "guidance_norm":
        flags = [(float(call), value) for call, value in enumerate(later_threshold(profile, rate), start=2)]
        lines.append(Line("threshold at the later calls", flags, "sg-ink", dashed=True, dots=False))
        caption = (
            "How hard the text pulls. The first call is judged by the score; at the calls after it the norm alone can still flag an image."
        )
    lines += [Line(run, [(float(i), v) for i, v in enumerate(values, start=1)], colour) for run, _, values, colour in courses]
    last = float(max(steps, len(known)))
    return chart(plain(name), lines, "denoiser call", "", [band], caption, (1.0, last), [t for t in ticks(1, last, 6) if t >= 1])


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


# pictures and verdicts


def slider(before: Image.Image, after: Image.Image, alt: str) -> str:
    """Two pictures over each other and a slider between them, moved by pointer or by the arrow keys."""
    return (
        '<div class="sg-compare" style="--cut:50%">'
        f'<img src="{data_uri(after, 384)}" alt="guarded: {escape(alt)}"/>'
        f'<img class="sg-before" src="{data_uri(before, 384)}" alt="unguarded: {escape(alt)}"/>'
        '<span class="sg-tag sg-tag-left">unguarded</span><span class="sg-tag sg-tag-right">guarded</span><i class="sg-cut"></i>'
        '<input type="range" min="0" max="100" value="50" aria-label="Slide between the unguarded and the guarded picture" '
        "oninput=\"this.parentNode.style.setProperty('--cut', this.value + '%')\"/></div>"
    )


def picture(image: Image.Image, caption: str, side: int = 384, name: str = "sg-picture") -> str:
    """A picture with a caption under it."""
    text = escape(caption)
    return f'<figure class="{name}"><img src="{data_uri(image, side)}" alt="{text}"/><figcaption>{text}</figcaption></figure>'


def verdict(report: GuardReport, generated: bool = True) -> str:
    """The verdict as the library words it, under a headline; where nothing was ``generated`` nothing was let through either."""
    headline = HEADLINES[report.verdict] if generated else HEADLINES[report.verdict].split(",")[0]
    return (
        f'<div class="sg-verdict sg-{report.verdict}" data-verdict="{report.verdict}"><strong>{headline}</strong>'
        f"<p>{escape(report.reason)}</p></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return '<dl class="sg-facts">' + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs) + "</dl>"


def filmstrip(name: str, estimates: Sequence[tuple[int, Image.Image]], last: Image.Image | None = None) -> str:
    """The denoised estimates of a run, call by call, and its picture."""
    cells = [(f"call {call + 1}", image) for call, image in estimates] + ([("picture", last)] if last else [])
    shown = "".join(f'<li><img src="{data_uri(image)}" alt="{escape(name)}, {text}"/><span>{text}</span></li>' for text, image in cells)
    return (
        f'<div class="sg-strip"><h4>{escape(name)}</h4><ol tabindex="0" aria-label="{escape(name)}: denoised estimates">{shown}</ol></div>'
    )


def words(names: Sequence[str], shares: Sequence[float], unit: str) -> str:
    """A prompt's words, each on red as strong as its share of the strongest; a negative share counts as none."""
    strongest = max([1e-9, *shares])
    spans = [
        f'<span style="--pull:{max(0.0, share) / strongest:.3f}" title="{share:.0%} {escape(unit)}">{escape(name)}'
        f"<small>{max(share, 0):.0%}</small></span>"
        for name, share in zip(names, shares, strict=True)
    ]
    return f'<p class="sg-words">{" ".join(spans)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], name: str = "") -> str:
    """A plain table."""
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sg-table" tabindex="0" role="region" aria-label="{escape(name or head[0])}">{inside}</div>'


def price(name: str) -> str:
    """What a signal costs, in words."""
    return str(BY_NAME[name].cost or "free")


def signals_table(report: GuardReport, profile: Profile) -> str:
    """Every signal that was read at the first call, against ordinary prompts."""
    rows = []
    for name, found in report.signals.items():
        rows.append((plain(name), f"{found['value']:.3g}", f"{found['z']:+.1f}", price(name), "decides"))
    for name in SERIES:
        if name not in report.signals and report.series.get(name):
            mean, std = profile.at(name, max(profile.timesteps))
            value = report.series[name][0]
            rows.append((plain(name), f"{value:.3g}", f"{(value - mean) / std:+.1f}", price(name), "watched"))
    unread = [name for name in profile.cascade.signals if name not in report.signals]
    rows += [(plain(name), "not bought", "–", price(name), "decides in doubt") for name in unread]
    return table(("signal", "value", "z-score", "evaluations", "role"), rows, "signals at the first call")


# geometry


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
    return chart("Spectrum of the Hessian", lines, "freedom of a direction", "density", (), caption, (-0.15, 1.15))


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
            parts.append(f'<path class="sg-quad {colour}" style="--up:{share:.2f}" d="{path(corners)}Z"/>')
    x, y = at(n // 2, n // 2)
    parts.append(f'<circle class="sg-sample" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    for text, where in (("freest direction ↘", 0.2), ("↙ sharpest direction", 0.8)):
        parts.append(f'<text class="sg-label" x="{WIDTH * where:.0f}" y="{under + 4:.0f}" text-anchor="middle">{text}</text>')
    caption = (
        f"Steepness along the freest direction {cut.steepness[0]:.2f}, along the sharpest {cut.steepness[1]:.2f}: noise alone around a "
        f"single picture gives 1, under 0 log p bends up. {cut.rest:.0%} of the score in this plane is no gradient and is left out."
    )
    return figure(name, "".join(parts), caption, height=int(under) + 14)
