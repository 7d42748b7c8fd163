"""The guard on the embedded model's development split: what it flags, and what is still a copy after steering.

``python -m benchmarks development`` writes ``benchmarks/results/development.json`` and prints the table of the documentation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.running import as_png, profile_digest, versions
from sdguard import GuardedPipeline, testbed
from sdguard.choices import BATCH_SIZE
from sdguard.files.atomic import write_text
from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured
from sdguard.guarded.generate import generate_guarded
from sdguard.testbed.copies import SSCD, find_copies, load_targets, shipped_cut


def measure(pipe: GuardedPipeline, seeds: int, judge: Callable[[np.ndarray], np.ndarray], captions: pd.DataFrame) -> pd.DataFrame:
    """One row a sample: verdict, score, and whether it is a copy, before and after; a hash of the picture,
    and of steered ones the two side by side, PNG."""
    call = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
    images, twins, reports = generate_guarded(pipe, captions.text.tolist(), list(range(seeds)), compare=True, **call)
    before, after = (np.stack([np.asarray(image) for image in some]) for some in (twins, images))
    was, still = judge(before), judge(after)
    rows = []
    for i, report in enumerate(reports):
        caption, steered = captions.iloc[i // seeds], report["verdict"] == "steered"
        rows.append(
            {
                **{key: caption[key] for key in ("text", "kind", "repetitions", "group")},
                **{key: report[key] for key in ("seed", "verdict", "score", "p_value", "extra_evaluations")},
                "attempts": len(report["steering"]["attempts"]) if report["steering"] else 0,
                "method": report["steering"]["passed"]["method"] if steered else None,
                "object_kept": kept(report["steering"]["passed"], caption.object) if steered else None,
                "copy_before": bool(was[i]),
                "copy_after": bool(still[i]) and report["verdict"] != "withheld",
                "digest": hashlib.sha256(after[i].tobytes()).hexdigest(),
                "pictures": as_png(np.concatenate([before[i : i + 1], after[i : i + 1]], axis=2))[0] if steered else None,
            }
        )
    return pd.DataFrame(rows)


def kept(passed: dict[str, Any], object_: str) -> bool:
    """Whether the wording that passed still names the caption's object; an embedding that was moved names nothing."""
    return object_ in passed.get("wording", "")


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
    seeds: Annotated[int, typer.Option(help="Seeds per caption.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    pairs: Annotated[Path, typer.Option(help="Where pictures before and after steering go.")] = Path("out/development"),
    split: Annotated[str, typer.Option(help="development or test.")] = "development",
) -> None:
    """Run the guard over a split and report; under 'accelerate launch', processes share the work."""
    plain = testbed.load()
    plain.set_progress_bar_config(disable=True)
    (targets, _), sscd = load_targets(testbed.path(), plain.vae), SSCD()
    cut = shipped_cut(testbed.path())
    about = {"profile": profile_digest(), "steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE, "seeds": seeds, **versions()}
    captions = pd.read_parquet(testbed.path() / "prompts.parquet")
    captions = captions.loc[captions.split == split, ["text", "kind", "repetitions", "group", "object"]].reset_index(drop=True)

    def judge(pictures: np.ndarray) -> np.ndarray:
        return find_copies(pictures, targets, sscd, cut).copy

    samples = measured(split, captions, partial(measure, GuardedPipeline(plain), seeds, judge), work, about, BATCH_SIZE)
    if not processes().is_main_process:
        return
    shutil.rmtree(pairs, ignore_errors=True)
    pairs.mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    for i, file in samples.pop("pictures").dropna().head(48).items():
        (pairs / f"{i:04}.png").write_bytes(file)
    write_table(samples, out / f"{split}.parquet")
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
    write_text(out / f"{split}.json", json.dumps({"about": about, "figures": figures, "table": summary.to_dict("records")}, indent=1))
    typer.echo(summary.to_string(index=False))
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.4g}")
