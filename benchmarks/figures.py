"""The figures of the README and the documentation that show single prompts of the embedded model: ``python -m benchmarks figures``.

* ``filmstrip.webp``, moving: what the denoiser promises step by step, unguarded and guarded, for a memorized prompt beside its training
  picture and for an ordinary one.
* ``geometry.webp``: density, sharpness, dimension and agreement of both prompts.
* ``demo.png``: the sheet of ``make demo``, to the bit.

Prompts are those that the demo's page offers first, so that another embedded model brings its own. A figure that would say something
untrue is not written: the command ends with exit code 1 where the unguarded picture is no copy, the guarded one is, or the ordinary ones
differ.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from benchmarks.documents import ROOT
from sdguard.cli.errors import one_sentence
from sdguard.demo.comparison import Comparison, compare
from sdguard.demo.landscape import Landscape, landscape
from sdguard.demo.model import Model
from sdguard.demo.settings import Setting
from sdguard.files.inputs import BadInput
from sdguard.geometry.rowwise import correlation
from sdguard.testbed import demo
from sdguard.testbed.copies import RATIO

SEED = 0
#: of the filmstrip: side of a picture in pixels, space between them, milliseconds a step, and at the end.
SIDE, GAP, STEP, LAST = 168, 10, 450, 3500
#: of the filmstrip: most bytes.
MOST = 1_000_000
MEMORIZED_COLOUR, ORDINARY_COLOUR, GREY = "#b22222", "#1f6fb2", "#666666"


def prompts_of(model: Model) -> tuple[str, str]:
    """A memorized prompt and an ordinary one."""
    memorized, ordinary = (next(example.text for example in model.examples if example.kind == kind) for kind in ("verbatim", "ordinary"))
    return memorized, ordinary


def setting_of(model: Model, prompt: str) -> Setting:
    """The setting that the model is meant for."""
    return Setting(prompt, SEED, steps=model.defaults["num_inference_steps"], guidance=model.defaults["guidance_scale"])


def compared(model: Model, prompt: str) -> Comparison:
    """A prompt without and with the guard, from the same noise."""
    seen: list[Any] = []
    compare(model, setting_of(model, prompt), None, seen.append)
    return next(found for found in reversed(seen) if isinstance(found, Comparison))


def check(memorized: Comparison, ordinary: Comparison) -> None:
    """Raise `BadInput` where the filmstrip would show something else than it says."""
    if memorized.ratios_before[0] >= RATIO:
        raise BadInput(
            f"The unguarded picture of “{memorized.setting.prompt}” is no copy: its distance ratio is {memorized.ratios_before[0]:.2f}."
        )
    if memorized.reports[0].verdict != "steered" or memorized.ratios_after[0] < RATIO:
        raise BadInput(f"The guarded picture of “{memorized.setting.prompt}” did not depart: {memorized.reports[0].reason}")
    if np.any(np.asarray(ordinary.unguarded.images[0]) != np.asarray(ordinary.guarded.images[0])):
        raise BadInput(f"The pictures of “{ordinary.setting.prompt}” are not identical: {ordinary.reports[0].reason}")


def frames(memorized: Comparison, ordinary: Comparison, nearest: Image.Image) -> list[Image.Image]:
    """The filmstrip's frames, a step each, and the finished pictures last."""
    columns = [
        (GAP, "unguarded", memorized.unguarded, "a copy"),
        (GAP + SIDE + GAP, "guarded", memorized.guarded, f"verdict: {memorized.reports[0].verdict}"),
        (5 * GAP + 3 * SIDE, "unguarded", ordinary.unguarded, "the same, bit by bit"),
        (6 * GAP + 4 * SIDE, "guarded", ordinary.guarded, f"verdict: {ordinary.reports[0].verdict}"),
    ]
    large, small = (ImageFont.truetype(findfont("DejaVu Sans"), size) for size in (15, 13))
    steps, top = len(memorized.unguarded.estimates), 56
    size = (7 * GAP + 5 * SIDE, top + SIDE + 30)
    found = []
    for step in range(steps + 1):
        done = step == steps
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)

        def put(left: int, name: str, picture: Image.Image, below: str, colour: str = GREY, sheet: Any = sheet, draw: Any = draw) -> None:
            draw.text((left + SIDE // 2, 42), name, GREY, small, anchor="mm")
            sheet.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
            draw.text((left + SIDE // 2, top + SIDE + 15), below, colour, small, anchor="mm")

        for left, prompt in ((GAP, memorized.setting.prompt), (columns[2][0], ordinary.setting.prompt)):
            draw.text((left, 16), f"“{prompt}”", "black", large, anchor="lm")
        draw.text((size[0] - GAP, 16), "done" if done else f"step {step + 1} of {steps}", GREY, small, anchor="rm")
        for left, name, course, last in columns:
            picture = course.images[0] if done else course.estimates[step]
            copied = course is memorized.unguarded
            put(left, name, picture, last if done else "", MEMORIZED_COLOUR if copied else ORDINARY_COLOUR)
        put(3 * GAP + 2 * SIDE, "the training picture", nearest, "")
        found.append(sheet)
    return found


def write_filmstrip(model: Model, path: Path) -> None:
    """Run both prompts and write the moving picture."""
    memorized, ordinary = (compared(model, prompt) for prompt in prompts_of(model))
    check(memorized, ordinary)
    assert model.targets is not None
    nearest = Image.fromarray(model.targets.pictures[memorized.nearest[0]])
    first, *others = frames(memorized, ordinary, nearest)
    durations = [STEP] * len(others) + [LAST]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=80, method=6)
    if path.stat().st_size > MOST:
        raise BadInput(f"{path} has {path.stat().st_size:,} bytes, more than {MOST:,}.")


def draw_density(axis: Axes, found: Landscape) -> None:
    """Minus the log volume element of the denoised estimate at each call: how densely noises are mapped onto the picture."""
    for values, colour in zip(found.density, (MEMORIZED_COLOUR, ORDINARY_COLOUR), strict=True):
        axis.plot(found.timesteps, values, color=colour, marker="o", markersize=3)
    axis.invert_xaxis()  # as the run goes
    axis.set(title="density: how close together noises end up", xlabel="timestep, as the run goes", ylabel="minus log volume, nats")


def draw_sharpness(axis: Axes, found: Landscape) -> None:
    """The spectrum of ``1 + s**2 H``, as a share of directions up to each value."""
    for nodes, weights, colour in zip(found.nodes, found.weights, (MEMORIZED_COLOUR, ORDINARY_COLOUR), strict=True):
        order = np.argsort(nodes)
        axis.step(np.asarray(nodes)[order], np.cumsum(np.asarray(weights)[order]) / np.sum(weights), color=colour, where="post")
    axis.set(title="sharpness: how many directions are pinned", xlabel="1 + s² × curvature: 0 pinned, 1 free", ylabel="share of directions")


def draw_dimension(axis: Axes, found: Landscape) -> None:
    """FLIPD of both samples over the noise level."""
    for values, colour in zip(found.lid, (MEMORIZED_COLOUR, ORDINARY_COLOUR), strict=True):
        axis.plot(found.levels, values, color=colour, marker="o", markersize=3)
    axis.set(title="dimension: ways in which the sample can vary", xlabel="timestep at which it is read", ylabel="FLIPD")


def draw_agreement(axis: Axes, rows: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> None:
    """The pictures of each prompt from two noises, and how far they are one."""
    axis.axis("off")
    axis.set(title="agreement: the pictures of two noises", xlim=(0, 3.1), ylim=(0, 2.1))
    for place, (prompt, colour, pictures) in enumerate(rows):
        bottom = 1.07 - 1.07 * place
        for column, picture in enumerate(pictures):
            axis.imshow(np.asarray(picture), extent=(column * 1.05, column * 1.05 + 1, bottom, bottom + 1), interpolation="bicubic")
        first, second = (torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] for picture in pictures)
        axis.text(2.15, bottom + 0.5, f"{prompt}\ncorrelation\n{float(correlation(first, second)):.2f}", color=colour, va="center")
    axis.set(xlim=(0, 3.1), ylim=(0, 2.1))


def write_geometry(model: Model, path: Path) -> None:
    """Walk both prompts' runs and write the four panels."""
    prompts, seen = list(prompts_of(model)), list[Any]()
    setting = setting_of(model, prompts[0])
    landscape(model, prompts, setting, setting.steps // 2, seen.append)
    found = seen[-1]
    pipe = model.own()
    kinds = (("memorized", MEMORIZED_COLOUR), ("ordinary", ORDINARY_COLOUR))
    rows = []
    for prompt, (kind, colour) in zip(prompts, kinds, strict=True):
        noises = [torch.Generator().manual_seed(seed) for seed in (SEED, SEED + 1)]
        rows.append((kind, colour, pipe([prompt] * 2, generator=noises, **setting.call).images))
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.2), layout="constrained")
    draw_density(axes[0, 0], found)
    draw_sharpness(axes[0, 1], found)
    draw_dimension(axes[1, 0], found)
    draw_agreement(axes[1, 1], rows)
    for axis in axes.flat[:3]:
        axis.spines[["top", "right"]].set_visible(False)
    for (kind, colour), prompt in zip(kinds, prompts, strict=True):
        axes[0, 0].plot([], [], color=colour, label=f"{kind}: “{prompt}”")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """A matplotlib figure as WebP."""
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85, "method": 6})
    plt.close(figure)


def write_sheet(_: Model, path: Path) -> None:
    """The sheet of ``make demo``."""
    with tempfile.TemporaryDirectory() as folder:
        demo.main(Path(folder), seed=demo.SEED)
        shutil.copy(Path(folder) / path.name, path)


#: what draws each figure.
FIGURES = {"filmstrip.webp": write_filmstrip, "geometry.webp": write_geometry, "demo.png": write_sheet}


def main(
    only: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(FIGURES)}. [default: all]", metavar="FIGURE...")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "docs",
) -> None:
    """Draw the figures of single prompts that the README and the documentation show."""
    matplotlib.use("Agg")
    with one_sentence():
        if unknown := [name for name in only or () if name not in FIGURES]:
            raise BadInput(f"There is no figure {unknown[0]!r}; there are {', '.join(FIGURES)}.")
        model = Model.load("embedded")
        out.mkdir(parents=True, exist_ok=True)
        for name in only or FIGURES:
            FIGURES[name](model, out / name)
