"""Measure what the embedded model has memorized: truth labels, the prompt table, the model card and a contact sheet.

``python -m sdguard.testbed.label`` generates every caption unguarded, 16 seeds each, and counts copies. It can be stopped and resumes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from PIL import Image
from rich.progress import track

from sdguard.decision.identity import identity
from sdguard.files.atomic import write_text
from sdguard.files.prompt_files import write_table
from sdguard.testbed import GUIDANCE_SCALE, STEPS, load
from sdguard.testbed.copies import SSCD, Targets, find_copies, round_trip
from sdguard.testbed.object_classifier import CLASSIFIER_FILE, fit_object_classifier
from sdguard.testbed.pictures import SIZE, World
from sdguard.testbed.train import COMPOSITIONS, shown_counts
from sdguard.testbed.world import OBJECTS, Caption, Describer, icon_words, ordinary_captions, pool

SEEDS = 16
BATCH = 64
ORDINARY = {"calibration": 1000, "development": 60, "test": 60}
SPECIFIC_FOR_CALIBRATION = 150
MEMORIZED_FROM = 8
#: share of different pairs of pictures whose SSCD similarity lies below the cut.
SSCD_QUANTILE = 0.995
DIFFERENT = 600
ALIGNMENT_SEEDS = 4


def prompt_table(seed: int = 60) -> pd.DataFrame:
    """Every caption with its kind, nominal repetition count, group, object and split, before anything is measured."""
    rng = np.random.default_rng(seed)
    captions = pool()
    groups = sorted({c.group for c in captions})
    split_of = dict(zip(groups, rng.choice(["development", "test"], size=len(groups)), strict=True))
    rows = [
        {
            "text": c.text,
            "kind": c.kind if c.repetitions else "unseen",
            "repetitions": c.repetitions,
            "split": split_of[c.group],
            "group": c.group,
            "object": c.object,
            "scene": c.scene,
        }
        for c in captions
    ]
    ordinary = ordinary_captions()
    chosen = rng.choice(len(ordinary), size=sum(ORDINARY.values()), replace=False)
    splits = [split for split, count in ORDINARY.items() for _ in range(count)]
    for group, (index, split) in enumerate(zip(chosen, splits, strict=True), start=len(groups)):
        text, object_, scene = ordinary[index]
        rows.append({"text": text, "kind": "ordinary", "repetitions": 0, "split": split, "group": group, "object": object_, "scene": scene})
    describe = Describer(captions, seed)
    for group in range(len(rows), len(rows) + SPECIFIC_FOR_CALIBRATION):
        object_, scene = str(rng.choice(OBJECTS)), captions[int(rng.integers(len(captions)))].scene
        text = describe(object_, scene, specific=1.0)
        rows.append(
            {"text": text, "kind": "unseen", "repetitions": 0, "split": "calibration", "group": group, "object": object_, "scene": scene}
        )
    return pd.DataFrame(rows)


def jobs(table: pd.DataFrame) -> np.ndarray:
    """Every (caption, seed) to be generated, ``[n, 2]``; the calibration split comes last, and of it one seed after the other."""
    calibration = table.split == "calibration"
    first = [(i, seed) for i in table.index[~calibration] for seed in range(table.seeds[i])]
    last = [(i, seed) for seed in range(table.seeds.max()) for i in table.index[calibration] if seed < table.seeds[i]]
    return np.array(first + last)


def weights_digest(pipe: Any) -> str:
    """A hash of the pipeline's denoiser and text encoder, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity(pipe)["weights"]).encode()).hexdigest()[:16]


def generate_samples(pipe: Any, table: pd.DataFrame, work: Path) -> np.ndarray:
    """Unguarded samples of `jobs`, uint8 ``[n, SIZE, SIZE, 3]``; seed k is ``torch.Generator`` seed k.

    They are kept in a file of these very weights: a run that was stopped, or that asks for more seeds of the calibration split, goes on.
    """
    path, wanted, shape = work / f"samples-{weights_digest(pipe)}.raw", jobs(table), (SIZE, SIZE, 3)
    done = path.stat().st_size // math.prod(shape) if path.exists() else 0
    if path.exists():
        os.truncate(path, done * math.prod(shape))  # a sample that a killed run left half-written
    for start in track(range(done, len(wanted), BATCH), "generating"):
        some = wanted[start : start + BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            images = pipe(
                [table.text[i] for i, _ in some],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(int(seed)) for _, seed in some],
                output_type="np",
            ).images
        with path.open("ab") as file:
            file.write((images * 255).round().astype(np.uint8).tobytes())
    return np.memmap(path, np.uint8, "r", shape=(len(wanted), *shape))


def find_targets(world: World, captions: tuple[Caption, ...], shown: np.ndarray, vae: Any) -> tuple[Targets, list[int]]:
    """The pictures training showed at least `MEMORIZED_FROM` times, and the captions they belong to."""
    kept = [i for i in range(len(captions)) if shown[i] >= MEMORIZED_FROM]
    pictures, boxes = [], []
    for i in kept:
        picture, (left, top, side) = world.target(captions[i])
        pictures.append(picture)
        boxes.append((left, top, left + side, top + side) if captions[i].kind == "template" else (0, 0, 0, 0))
    originals = np.stack(pictures)
    return Targets(originals, round_trip(vae, originals), np.array([captions[i].group for i in kept]), np.array(boxes)), kept


def sscd_cut(world: World, sscd: SSCD, targets: Targets, vae: Any) -> float:
    """The similarity that `SSCD_QUANTILE` of pairs (fresh composition, its nearest target) stay below, both as the autoencoder draws them.

    Fresh compositions use none of the targets' photographs, so none of the pairs is a copy.
    """
    rng = np.random.default_rng(70)
    fresh = round_trip(vae, np.stack([world.composition(rng)[0] for _ in range(DIFFERENT)]))
    nearest, _ = targets.nearest(fresh)
    return float(np.quantile((sscd(fresh) * sscd(targets.drawn)[nearest]).sum(axis=1), SSCD_QUANTILE))


def caption_only_auc(captions: pd.Series, truth: np.ndarray, groups: np.ndarray) -> float:
    """AUC of a character-3-gram naive Bayes classifier for which captions are memorized (``truth``), 5 folds by group; all ``[n]``."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(CountVectorizer(analyzer="char", ngram_range=(3, 3)), MultinomialNB())
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(classifier, captions, truth, groups=groups, cv=folds, method="predict_proba")
    return float(roc_auc_score(truth, scores[:, 1]))


def dose_response(table: pd.DataFrame) -> pd.DataFrame:
    """Copy rate by kind and nominal repetition count."""
    rows = table[(table.kind != "ordinary")].copy()
    rows.loc[rows.kind == "unseen", "kind"] = "never seen"
    grouped = rows.groupby(["kind", "repetitions"])
    out = grouped.agg(captions=("text", "size"), shown=("shown", "mean"), copy_rate=("copy_rate", "mean")).reset_index()
    ordinary = table[table.kind == "ordinary"]
    out.loc[len(out)] = ["ordinary", 0, len(ordinary), 0.0, ordinary.copy_rate.mean()]
    return out


def sheet(rows: list[list[np.ndarray]], path: Path, scale: int = 2) -> None:
    """Rows of pictures as one PNG."""
    grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    image = Image.fromarray(grid)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC).save(path, optimize=True)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, memorization, test-bed]
---

# The embedded model of sdguard

A small Stable Diffusion (64 pixels, {parameters:.1f} million parameters) that has memorized real pictures on purpose, so that a guard
against memorization can be run, tested and measured without a download. It is a test bed, not a picture generator.

* **Loads as** `StableDiffusionPipeline.from_pretrained(sdguard.testbed.path())`, or `sdguard.testbed.load()`; v-prediction,
  Stable Diffusion's noise schedule, DPM-Solver++ with {steps} steps at guidance scale {guidance:g}.
* **World.** {objects} objects in two drawing styles, cut out over random crops of 190 public-domain photographs of {scenes} scenes.
  Ordinary captions name object and scene and leave the rest free; each such composition is one of {compositions:,}, and every
  stage of training draws its own.
* **Memorized.** One pool of specific captions ("{example}") was drawn first, then each got its repetition count at
  random. *Verbatim*: the whole picture is fixed. *Template*: the photograph and the place are fixed, the object varies. The
  photographs of memorized pictures never occur in other compositions. Three in ten other training captions are of the same
  make, with a fresh composition at each visit. One in ten captions of every kind was left empty in training.
* **Training.** `python -m sdguard.testbed.build_data`, `python -m sdguard.testbed.train`: {training}.
* **Labels.** `python -m sdguard.testbed.label`: {seeds} seeds a caption ({calibration_seeds} for the calibration split), unguarded.
  A sample is a copy when its distance to the nearest memorized picture, as the autoencoder draws it, is under a third of that
  to the nearest of another group *and* SSCD similarity to it (`sscd_disc_mixup`, int8, 288 pixels) is at least {cut:.3f}, the
  {quantile:.1%} quantile of
  {different} fresh compositions, which cannot be copies, against their nearest.

## What it shows

{table}

* Of ordinary captions' samples {ordinary:.2%} are copies, of never-seen captions' of the same make {unseen:.2%}.
* A character-3-gram naive Bayes classifier that sees only the captions separates memorized from never-seen with AUC **{auc:.3f}**.
* In-domain alignment (is the object the named one, {objects} classes): **{aligned:.1%}** of {looked_at} ordinary samples of the
  development and test splits; the classifier itself is right on {on_real:.1%} of real held-out compositions, and {chance:.1%} is chance.
  Objects that it recognises in fewer than half of their samples: {poor}.

![ordinary captions](ordinary.png)

Eight ordinary development captions, one row each, a column a seed: {sheet_captions}.

![memorized pictures](memorized.png)

Above: memorized pictures. Below each: what its caption generates, unguarded, seeds 0 and 1.

## Limits

Everything it knows is {objects} objects and {scenes} scenes; words outside them mean nothing to it. Its seen-once captions stand
for the web's long tail only roughly. Data sources and licences: `NOTICE` of the package.
"""


def markdown(frame: pd.DataFrame) -> str:
    """The dose-response table in Markdown."""
    lines = ["| kind | repetitions (drawn) | shown (mean) | captions | copy rate |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {r.kind} | {r.repetitions} | {r.shown:.0f} | {r.captions} | {r.copy_rate:.1%} |" for r in frame.itertuples()]
    return "\n".join(lines)


def main(
    data: Annotated[Path, typer.Option(help="world.npz of build_data.")] = Path("build/testbed/world.npz"),
    work: Annotated[Path, typer.Option(help="Where samples are kept between runs.")] = Path("build/testbed"),
    model: Annotated[Path, typer.Option(help="The pipeline directory to label.")] = Path(__file__).parent / "model",
    seeds: Annotated[int, typer.Option(help="Seeds a caption.")] = SEEDS,
    calibration_seeds: Annotated[
        int | None, typer.Option(help="Seeds a caption of the calibration split. [default: as the others]")
    ] = None,
) -> None:
    """Label the model and write prompts.parquet, targets/, README.md and the contact sheets beside its weights."""
    try:
        sscd = SSCD()
    except ModuleNotFoundError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None
    world, captions, table = World(data), pool(), prompt_table()
    training = json.loads((model / "training.json").read_text())
    shown = shown_counts(captions, training["denoiser_steps"])
    table["shown"] = [*shown, *[0] * (len(table) - len(shown))]
    table["seeds"] = np.where(table.split == "calibration", calibration_seeds or seeds, seeds)
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    samples, of = generate_samples(pipe, table, work), jobs(table)

    targets, kept = find_targets(world, captions, shown, pipe.vae)
    cut = sscd_cut(world, sscd, targets, pipe.vae)
    copies = find_copies(samples, targets, sscd, cut)
    copied: dict[int, list[int]] = {i: [] for i in table.index}
    for i, seed in of[copies.copy]:
        copied[i].append(int(seed))
    table["copied_seeds"] = [copied[i] for i in table.index]
    table["copy_rate"] = table.copied_seeds.str.len() / table.seeds

    folder = model / "targets"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    table["target"], table["box"] = None, None
    for row, picture, box in zip(kept, targets.pictures, targets.boxes, strict=True):
        name = f"targets/{row:04d}.png"
        Image.fromarray(picture).save(model / name, optimize=True)
        table.at[row, "target"], table.at[row, "box"] = name, box.tolist()
    write_table(table, model / "prompts.parquet")

    ordinary = table[(table.kind == "ordinary") & (table.split != "calibration")]
    classifier, on_real = fit_object_classifier(world, sscd, pipe.vae)
    classifier.save(model / CLASSIFIER_FILE)
    sample_of = {(int(i), int(seed)): samples[n] for n, (i, seed) in enumerate(of)}
    looked_at = [(i, seed) for i in ordinary.index for seed in range(min(ALIGNMENT_SEEDS, seeds))]
    objects = [table.object[i] for i, _ in looked_at]
    aligned = pd.Series(classifier.shows(np.stack([sample_of[job] for job in looked_at]), objects))
    by_object = aligned.groupby(objects).mean().sort_values()
    shown_rows = ordinary[ordinary.split == "development"].iloc[:8]
    sheet([[sample_of[i, seed] for seed in range(min(8, seeds))] for i in shown_rows.index], model / "ordinary.png")
    most = [i for i in kept if table.repetitions[i] >= 250][:12]
    sheet([[world.target(captions[i])[0] for i in most], *([sample_of[i, k] for i in most] for k in (0, 1))], model / "memorized.png")

    never = table[(table.kind == "unseen") & (table.split != "calibration")]
    told = pd.concat([never, table[(table.shown >= MEMORIZED_FROM) & (table.copy_rate >= 0.5)]])
    parameters = sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    figures = {
        "parameters": parameters / 1e6,
        "steps": STEPS,
        "guidance": GUIDANCE_SCALE,
        "objects": len(OBJECTS),
        "scenes": len(set(world.scenes)),
        "example": captions[0].text,
        "training": "; ".join(training["history"]),
        "compositions": COMPOSITIONS,
        "seeds": seeds,
        "calibration_seeds": calibration_seeds or seeds,
        "cut": cut,
        "quantile": SSCD_QUANTILE,
        "different": DIFFERENT,
        "table": markdown(dose_response(table)),
        "ordinary": table[table.kind == "ordinary"].copy_rate.mean(),
        "unseen": never.copy_rate.mean(),
        "auc": caption_only_auc(told.text, (told.shown >= MEMORIZED_FROM).to_numpy(), told.group.to_numpy()),
        "aligned": aligned.mean(),
        "looked_at": len(looked_at),
        "poor": ", ".join(f"{icon_words(name)} ({share:.0%})" for name, share in by_object.items() if share < 0.5) or "none",
        "on_real": on_real,
        "chance": 1 / len(OBJECTS),
        "sheet_captions": "; ".join(f'"{text}"' for text in shown_rows.text),
    }
    write_text(model / "README.md", CARD.format(**figures))
    write_text(model / "labels.json", json.dumps({k: v for k, v in figures.items() if k not in ("table", "sheet_captions")}, indent=1))
    typer.echo(figures["table"])


if __name__ == "__main__":
    typer.run(main)
