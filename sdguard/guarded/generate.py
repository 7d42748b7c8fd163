"""Prompts x seeds under guard: pictures, reports, and the unguarded twins beside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from rich.markup import escape
from rich.table import Table

from sdguard.choices import BATCH_SIZE
from sdguard.denoiser.probe import for_each
from sdguard.guarded.pipeline import unguard
from sdguard.guarded.report import GuardReport

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


def picture_files(images: list[Any], twins: list[Any]) -> dict[str, Any]:
    """File names for guarded images and, where there are any, their unguarded twins and the sheet of both."""
    files = {f"{i:02d}.png": image for i, image in enumerate(images)}
    files.update({f"{i:02d}-unguarded.png": image for i, image in enumerate(twins)})
    if twins:
        files["compare.png"] = side_by_side(twins, images)
    return files


def side_by_side(twins: list[Any], images: list[Any]) -> Image.Image:
    """Unguarded pictures above, guarded below."""
    width, height = images[0].size
    canvas = Image.new("RGB", (width * len(images), 2 * height))
    for i, (twin, image) in enumerate(zip(twins, images, strict=True)):
        canvas.paste(twin, (i * width, 0))
        canvas.paste(image, (i * width, height))
    return canvas


def verdict_table(rows: list[dict[str, Any]]) -> Table:
    """The report rows of `generate_guarded` as a table for people."""
    table = Table("prompt", "seed", "verdict", "extra evaluations", "why", title="sdguard", show_lines=True)
    for row in rows:
        report = GuardReport.from_row(row)
        verdict = f"[{COLOURS[report.verdict]}]{report.verdict}[/]"
        table.add_row(escape(report.prompt or ""), str(row["seed"]), verdict, str(report.extra_evaluations), escape(report.reason))
    return table
