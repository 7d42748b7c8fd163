"""Pieces of the page: status lines, pictures, verdicts, tables. Every text that is not ours is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image

from sdguard.guarded.report import GuardReport
from sdguard.words import bare

HEADLINES = {
    "clean": "Nothing memorized",
    "flagged": "Predicted to be memorized, let through",
    "steered": "Predicted to be memorized, steered away",
    "withheld": "Predicted to be memorized, withheld",
}


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


def lesson(text: str) -> str:
    """What a tab teaches, in one sentence."""
    return f'<p class="sg-lesson">{escape(text)}</p>'


def hint(text: str) -> str:
    """What a pane says before there is something to see in it."""
    return f'<div class="sg-empty">{escape(text)}</div>'


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


def highlighted_words(names: Sequence[str], shares: Sequence[float], unit: str, gone: Iterable[str] = ()) -> str:
    """A prompt's words, each on red as strong as its share of the strongest; a negative share counts as none.

    Words that are ``gone``, which are bare ones, are crossed out.
    """
    strongest, crossed = max([1e-9, *shares]), set(gone)
    spans = [
        f'<span style="--pull:{max(0.0, share) / strongest:.3f}" title="{share:.0%} {escape(unit)}">'
        f"{f'<s>{escape(name)}</s>' if bare(name) in crossed else escape(name)}<small>{max(share, 0):.0%}</small></span>"
        for name, share in zip(names, shares, strict=True)
    ]
    return f'<p class="sg-words">{" ".join(spans)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], name: str = "") -> str:
    """A plain table."""
    top = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sg-table" tabindex="0" role="region" aria-label="{escape(name or head[0])}">{inside}</div>'
