"""Prompts x seeds under guard: pictures, reports, and the unguarded twins beside them."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape
from rich.table import Table

from sdguard.choices import BATCH_SIZE
from sdguard.denoiser.probe import for_each
from sdguard.files.outputs import enlarged
from sdguard.guarded.pipeline import unguard
from sdguard.guarded.report import GuardReport

#: of the sheet: about so many pixels the longer side of a picture has at least, the text beside pictures in width, and its letters.
SHEET_SIDE, TEXT_WIDTH, LETTERS = 256, 480, 16

COLOURS = {"clean": "green", "flagged": "yellow", "steered": "cyan", "withheld": "red"}


def generate_guarded(
    pipe: Any, prompts: list[str], seeds: list[int], compare: bool = False, **setting: Any
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Run a guarded pipeline over prompts x seeds: images, unguarded twins (empty unless ``compare``), report rows.

    ``setting`` goes to the pipeline, a single text or picture in it as one for each prompt.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images: list[Any] = []
    twins: list[Any] = []
    rows: list[dict[str, Any]] = []
    for start in range(0, len(jobs), BATCH_SIZE):
        some = jobs[start : start + BATCH_SIZE]

        def call(target: Any, some: list[tuple[str, int]] = some) -> Any:
            generators = [torch.Generator().manual_seed(seed) for _, seed in some]
            inputs = {name: for_each(len(some), value) for name, value in setting.items()}
            return target([prompt for prompt, _ in some], generator=generators, **inputs)

        output = call(pipe)
        images.extend(output.images)
        rows.extend({**asdict(report), "seed": seed} for report, (_, seed) in zip(output.guard, some, strict=True))
        if compare:
            twins.extend(call(unguard(pipe)).images)
    return images, twins, rows


def picture_files(images: list[Any], twins: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """File names for guarded images and, where there are any, their unguarded twins and the sheet of both."""
    files = {f"{i:02d}.png": image for i, image in enumerate(images)}
    files.update({f"{i:02d}-unguarded.png": image for i, image in enumerate(twins)})
    if twins:
        files["compare.png"] = side_by_side(twins, images, rows)
    return files


def side_by_side(twins: list[Any], images: list[Any], rows: list[dict[str, Any]]) -> Image.Image:
    """A line for each image: unguarded, guarded, and what its report row says."""
    pairs = [(enlarged(twin, SHEET_SIDE), enlarged(image, SHEET_SIDE)) for twin, image in zip(twins, images, strict=True)]
    width, height = pairs[0][0].size
    head = 3 * LETTERS
    sheet = Image.new("RGB", (2 * width + TEXT_WIDTH, head + height * len(pairs)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for place, heading in enumerate(("unguarded", "guarded")):
        draw.text((place * width + LETTERS, LETTERS), heading, "black", font)
    for line, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
        top = head + line * height
        for place, picture in enumerate(pair):
            sheet.paste(picture, (place * width, top))
        said = [f"“{row['prompt']}”, seed {row['seed']}", row["verdict"], GuardReport.from_row(row).reason]
        text = "\n\n".join(textwrap.fill(part, 2 * TEXT_WIDTH // LETTERS - 6) for part in said)
        draw.multiline_text((2 * width + LETTERS, top + LETTERS), text, "black", font)
    return sheet


def verdict_table(rows: list[dict[str, Any]]) -> Table:
    """The report rows of `generate_guarded` as a table for people."""
    table = Table("prompt", "seed", "verdict", "extra evaluations", "why", title="sdguard", show_lines=True)
    for row in rows:
        report = GuardReport.from_row(row)
        verdict = f"[{COLOURS[report.verdict]}]{report.verdict}[/]"
        table.add_row(escape(report.prompt or ""), str(row["seed"]), verdict, str(report.extra_evaluations), escape(report.reason))
    return table
