"""The guard on the embedded model's development split: what it flags, and what is still a copy after steering.

``python -m benchmarks development`` writes ``benchmarks/results/development.json`` and prints the table of the README.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from PIL import Image
from rich.progress import track

from sdguard import GuardedPipeline, testbed
from sdguard.cli import generate_guarded
from sdguard.testbed.copies import SSCD, find_copies, load_targets
from sdguard.testbed.world import words

BATCH = 16


def measure(table: pd.DataFrame, seeds: int, folder: Path) -> pd.DataFrame:
    """One row a sample: verdict, score and copy before and after, for ``seeds`` seeds of each caption."""
    plain = testbed.load()
    plain.set_progress_bar_config(disable=True)
    targets, _ = load_targets(testbed.path(), plain.vae)
    cut = json.loads((testbed.path() / "labels.json").read_text())["cut"]
    sscd = SSCD()
    pipe = GuardedPipeline(plain)
    rows = []
    for start in track(range(0, len(table), BATCH), "measuring"):
        part = table.iloc[start : start + BATCH]
        images, twins, reports = generate_guarded(
            pipe,
            part.text.tolist(),
            list(range(seeds)),
            compare=True,
            num_inference_steps=testbed.STEPS,
            guidance_scale=testbed.GUIDANCE_SCALE,
        )
        before, after = (find_copies(np.stack([np.asarray(i) for i in some]), targets, sscd, cut).copy for some in (twins, images))
        for i, report in enumerate(reports):
            caption = part.iloc[i // seeds]
            rows.append(
                {
                    **{key: caption[key] for key in ("text", "kind", "repetitions", "group")},
                    **{key: report[key] for key in ("seed", "verdict", "score", "p_value", "extra_evaluations")},
                    "attempts": len(report["steering"]["attempts"]) if report["steering"] else 0,
                    "method": report["steering"]["passed"]["method"] if report["verdict"] == "steered" else None,
                    "object_kept": kept(report["steering"]["passed"], caption.object) if report["verdict"] == "steered" else None,
                    "copy_before": bool(before[i]),
                    "copy_after": bool(after[i]) and report["verdict"] != "withheld",
                }
            )
            if report["verdict"] == "steered" and len(list(folder.glob("*.png"))) < 48:
                pair = np.concatenate([np.asarray(twins[i]), np.asarray(images[i])], axis=1)
                Image.fromarray(pair).save(folder / f"{start + i // seeds:04d}-{report['seed']}.png")
    return pd.DataFrame(rows)


def kept(passed: dict[str, Any], object_: str) -> bool:
    """Whether the wording that passed still names the caption's object; an embedding that was moved names nothing."""
    return words(object_) in passed.get("wording", "")


def summarise(samples: pd.DataFrame) -> pd.DataFrame:
    """Flagged share, copies, and copies left, by kind and repetition count."""
    samples = samples.assign(flagged=samples.verdict != "clean", copy_flagged=(samples.verdict != "clean") & samples.copy_before)
    grouped = samples.groupby(["kind", "repetitions"])
    out = grouped.agg(
        samples=("flagged", "size"),
        copies=("copy_before", "sum"),
        flagged=("flagged", "mean"),
        copies_flagged=("copy_flagged", "sum"),
        copies_left=("copy_after", "sum"),
        withheld=("verdict", lambda v: (v == "withheld").sum()),
        evaluations=("extra_evaluations", "mean"),
    )
    return out.reset_index()


def main(
    seeds: Annotated[int, typer.Option(help="Seeds per caption.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    pairs: Annotated[Path, typer.Option(help="Where pictures before and after steering go.")] = Path("out/development"),
    split: Annotated[str, typer.Option(help="development or test.")] = "development",
) -> None:
    """Run the guard over a split and report."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    shutil.rmtree(pairs, ignore_errors=True)
    pairs.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    samples = measure(table[table.split == split], seeds, pairs)
    samples.to_parquet(out / f"{split}.parquet", index=False)
    summary = summarise(samples)
    top = samples[(samples.repetitions == samples.repetitions.max()) & samples.copy_before]
    flagged = samples[samples.verdict != "clean"]
    ordinary = samples[samples.kind == "ordinary"]
    steered = samples[samples.verdict == "steered"]
    figures = {
        "copies at the highest repetition count that are flagged": float((top.verdict != "clean").mean()),
        "ordinary samples that are flagged": float((ordinary.verdict != "clean").mean()),
        "never-seen samples of the same make that are flagged": float((samples[samples.kind == "unseen"].verdict != "clean").mean()),
        "flagged samples that are still copies": float(flagged.copy_after.mean()),
        "flagged copies that are still copies": float(flagged[flagged.copy_before].copy_after.mean()),
        "flagged samples that are withheld": float((flagged.verdict == "withheld").mean()),
        "steered samples that were reworded": float((steered.method == "rewording").mean()),
        "steered samples whose wording still names the object": float(steered.object_kept.astype(bool).mean()),
        "mean extra evaluations of a flagged sample": float(flagged.extra_evaluations.mean()),
        "mean extra evaluations of an unflagged sample": float(samples[samples.verdict == "clean"].extra_evaluations.mean()),
        "samples": len(samples),
        "seeds": seeds,
    }
    (out / f"{split}.json").write_text(json.dumps({"figures": figures, "table": summary.to_dict("records")}, indent=1))
    typer.echo(summary.to_string(index=False))
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.4g}")
