"""``make demo``: one verbatim, one template and one ordinary prompt of the embedded model, unguarded and guarded.

Writes ``demo.png`` (prompt, unguarded, guarded, nearest memorized picture, verdict, signal against its threshold) and
``report.json``.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer

from sdguard import GuardedPipeline, testbed
from sdguard.decision.model_folder import PROFILE_FILE
from sdguard.decision.profile import Profile
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.outputs import ensure_writable, save_pictures
from sdguard.guarded.generate import generate_guarded, verdict_table
from sdguard.guarded.report import GuardReport
from sdguard.testbed.copies import RATIO, Targets, load_targets

#: kinds of the table of prompts, and what a reader is told of them
KINDS = {
    "verbatim": "verbatim: the whole picture is memorized",
    "template": "template: the backdrop is memorized, under several objects",
    "ordinary": "ordinary",
}
#: of the noise of the sheet; the first four were looked at, and this chosen. What comes of all seeds is in the benchmarks.
SEED = 3


def most_shown(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The development captions of a kind, those that training showed most often first, among equals those most often copied."""
    of_kind = (row for row in rows if row["split"] == "development" and row["kind"] == kind)
    return sorted(of_kind, key=lambda row: (-row["repetitions"], -row["copy_rate"]))


def demo_prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of each kind by `most_shown`."""
    return [most_shown(rows, kind)[0] for kind in KINDS]


def copy_ratio(targets: Targets, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest target of each image and the distance ratio of the copy criterion."""
    return targets.nearest(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def draw_sheet(rows: list[dict[str, Any]], pictures: list[tuple[Any, Any, Any]], clean: Profile, path: Path) -> None:
    """The sheet: one row a prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    colour = {"clean": "#2a7f3f", "flagged": "#b8860b", "steered": "#1f6fb2", "withheld": "#b22222"}
    headings = ("unguarded", "guarded", "nearest training picture")
    figure, axes = plt.subplots(
        len(rows),
        5,
        figsize=(15, 3.3 * len(rows) + 0.8),
        width_ratios=[1.15, 1, 1, 1, 1.3],
        layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08),
    )
    left, right = min(clean.scores), 1.1 * max(clean.scores[-1], *(row["score"] for row in rows))
    for number, (line, row, trio) in enumerate(zip(axes, rows, pictures, strict=True)):
        report = GuardReport.from_row(row)
        line[0].axis("off")
        line[0].text(0, 1, textwrap.fill(KINDS[row["kind"]], 46), fontsize=8.5, color="#777777", va="top")
        line[0].text(0, 0.87, textwrap.fill(f"“{row['prompt']}”", 25), fontsize=13, va="top")
        line[0].text(0, 0.6, report.verdict, fontsize=16, weight="bold", color=colour[report.verdict], va="top")
        line[0].text(0, 0.49, textwrap.fill(report.reason, 37), fontsize=9.5, color="#333333", va="top")
        line[0].text(0, 0, f"seed {row['seed']}, {report.extra_evaluations} extra denoiser evaluations", fontsize=8.5, color="#777777")
        notes = (copy_note(row["ratio_before"]), "" if report.verdict == "withheld" else copy_note(row["ratio_after"]), "")
        for axis, image, heading, note in zip(line[1:4], trio, headings, notes, strict=True):
            axis.imshow(image, interpolation="bicubic")
            axis.set_title(heading if number == 0 else "", fontsize=12)
            axis.set_xlabel(note, fontsize=10, color="#b22222" if note.startswith("a copy") else "#555555")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[4].hist(clean.scores, bins=40, color="#cccccc")
        line[4].axvline(row["threshold"], color="black", linestyle="--", linewidth=1)
        line[4].axvline(row["score"], color=colour[report.verdict], linewidth=2.5)
        top = line[4].get_ylim()[1]
        line[4].set(ylim=(0, 1.25 * top), xlim=(left, right), yticks=[])
        line[4].text(row["threshold"], 1.22 * top, " threshold", fontsize=9, va="top")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        line[4].text(row["score"], 1.08 * top, "this prompt ", fontsize=9, va="top", ha="right", color=colour[report.verdict], bbox=behind)
        line[4].set_xlabel("score at the first denoiser call\n(beyond the gap, prompts that were looked at twice)", fontsize=9)
        line[4].set_title(f"against {clean.prompts:,} ordinary prompts" if number == 0 else "", fontsize=12)
        line[4].spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle("sdguard on its embedded model: decided before the first denoising step", fontsize=15)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def copy_note(ratio: float) -> str:
    """The copy criterion in words."""
    return f"{'a copy' if ratio < RATIO else 'no copy'} (distance ratio {ratio:.2f})"


def main(out: Annotated[Path, typer.Option(help="Where demo.png and report.json go.")] = Path("out"), seed: int = SEED) -> None:
    """Run the demo."""
    from rich.console import Console

    ensure_writable(out)
    model = testbed.path()
    chosen = demo_prompts(pq.read_table(model / "prompts.parquet").to_pylist())
    plain = load_pipeline("embedded")
    targets, _ = load_targets(model, plain.vae)
    profile = Profile.load(model / PROFILE_FILE)
    pipe = GuardedPipeline(plain)
    images, twins, rows = generate_guarded(
        pipe,
        [row["text"] for row in chosen],
        [seed],
        compare=True,
        num_inference_steps=testbed.STEPS,
        guidance_scale=testbed.GUIDANCE_SCALE,
    )
    nearest, before = copy_ratio(targets, twins)
    _, after = copy_ratio(targets, images)
    for i, row in enumerate(rows):
        row["kind"] = chosen[i]["kind"]
        row["ratio_before"], row["ratio_after"] = float(before[i]), float(after[i])
        row["copy_before"], row["copy_after"] = bool(before[i] < RATIO), bool(after[i] < RATIO) and row["verdict"] != "withheld"
    pictures = [(twins[i], images[i], targets.pictures[nearest[i]]) for i in range(len(rows))]
    save_pictures(out, {f"{row['kind']}.png": image for row, image in zip(rows, images, strict=True)}, rows)
    draw_sheet(rows, pictures, profile, out / "demo.png")
    Console().print(verdict_table(rows))
    Console().print(f"{out}/demo.png and {out}/report.json", markup=False)


if __name__ == "__main__":
    typer.run(main)
