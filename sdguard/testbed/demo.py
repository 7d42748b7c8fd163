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
from sdguard.calibration import PROFILE_FILE, Profile
from sdguard.cli import generate_guarded, load_pipeline, save_all, verdict_table, writable
from sdguard.report import GuardReport
from sdguard.testbed.copies import RATIO, Targets, load_targets

KINDS = ("verbatim", "template", "ordinary")


def demo_prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first development caption of each kind; memorized ones at the highest repetition count that training copied for seed 0."""
    chosen = []
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind and row["split"] == "development"]
        if kind != "ordinary":
            own = [row for row in own if 0 in row["copied_seeds"]]
        chosen.append(max(own, key=lambda row: row["repetitions"]))
    return chosen


def copy_ratio(targets: Targets, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest target of each image and the distance ratio of the copy criterion."""
    return targets.nearest(np.stack([np.asarray(image.convert("RGB")) for image in images]))


def draw(rows: list[dict[str, Any]], pictures: list[tuple[Any, Any, Any]], clean: Profile, path: Path) -> None:
    """The sheet: one row a prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = {"clean": "#2a7f3f", "flagged": "#b8860b", "steered": "#1f6fb2", "withheld": "#b22222"}
    figure, axes = plt.subplots(len(rows), 5, figsize=(15, 3.5 * len(rows)), width_ratios=[1.15, 1, 1, 1, 1.3], layout="constrained")
    for line, row, trio in zip(axes, rows, pictures, strict=True):
        report = GuardReport(**{k: v for k, v in row.items() if k in GuardReport.__dataclass_fields__})
        line[0].axis("off")
        line[0].text(0, 0.98, row["kind"].upper(), fontsize=9, color="#777777", va="top")
        line[0].text(0, 0.88, textwrap.fill(f"“{row['prompt']}”", 26), fontsize=13, va="top")
        line[0].text(0, 0.58, report.verdict, fontsize=16, weight="bold", color=colour[report.verdict], va="top")
        line[0].text(0, 0.44, textwrap.fill(report.reason, 36), fontsize=9, color="#333333", va="top")
        line[0].text(0, 0.02, f"seed {row['seed']}, {report.extra_evaluations} extra evaluations", fontsize=8, color="#777777")
        titles = (
            f"unguarded: {'a copy' if row['copy_before'] else 'no copy'}",
            f"guarded: {'a copy' if row['copy_after'] else 'no copy'}",
            "nearest training picture",
        )
        for axis, image, title in zip(line[1:4], trio, titles, strict=True):
            axis.imshow(image, interpolation="bicubic")
            axis.set_title(title, fontsize=11, color="#b22222" if title.endswith(": a copy") else "black")
            axis.axis("off")
        norms = clean.guidance_norm
        line[4].hist(norms, bins=40, color="#cccccc", label=f"{len(norms):,} ordinary prompts")
        line[4].axvline(row["threshold_norm"], color="black", linestyle="--", linewidth=1, label="threshold")
        line[4].axvline(row["signals"]["guidance_norm"]["value"], color=colour[report.verdict], linewidth=2.5, label="this prompt")
        line[4].set_xlabel("guidance norm at the first step", fontsize=9)
        line[4].set_yticks([])
        line[4].spines[["top", "left", "right"]].set_visible(False)
        line[4].legend(fontsize=8, frameon=False)
    figure.suptitle("sdguard on its embedded model: decided before the first denoising step", fontsize=14, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Annotated[Path, typer.Option(help="Where demo.png and report.json go.")] = Path("out"), seed: int = 0) -> None:
    """Run the demo."""
    from rich.console import Console

    writable(out)
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
        row["copy_before"], row["copy_after"] = bool(before[i] < RATIO), bool(after[i] < RATIO)
        row["threshold_norm"] = profile.threshold(pipe.guard_config.false_positive_rate)
    pictures = [(twins[i], images[i], targets.pictures[nearest[i]]) for i in range(len(rows))]
    save_all(out, {f"{row['kind']}.png": image for row, image in zip(rows, images, strict=True)}, rows)
    draw(rows, pictures, profile, out / "demo.png")
    Console().print(verdict_table(rows))
    Console().print(f"{out}/demo.png and {out}/report.json")


if __name__ == "__main__":
    typer.run(main)
