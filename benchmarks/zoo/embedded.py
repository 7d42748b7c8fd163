"""Measure what the embedded model has memorized: truth labels, the prompt table, the model card and a contact sheet.

``python -m benchmarks zoo label embedded`` generates every caption unguarded, 16 seeds each, those for calibration once, and counts
copies. It can be stopped and resumes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from rich.progress import track

from benchmarks.object_classifier import CLASSIFIER_FILE, fit_object_classifier
from benchmarks.zoo.label import PARTIAL, caption_only_auc
from benchmarks.zoo.recipes import Recipe
from benchmarks.zoo.sheets import sheet
from benchmarks.zoo.train import BATCH as TRAINING_BATCH
from benchmarks.zoo.train import COMPOSITIONS, trained_in
from benchmarks.zoo.world import SIZE, Caption, Describer, Picture, World, pool, some_words
from sdguard.decision.identity import identity
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.atomic import write_text
from sdguard.files.prompt_files import write_table
from sdguard.testbed import GUIDANCE_SCALE, STEPS
from sdguard.testbed.copies import SSCD, Targets, find_copies, round_trip

SEEDS = 16
BATCH = 64
ORDINARY = {"calibration": 1000, "development": 60, "test": 60}
SPECIFIC_FOR_CALIBRATION = 150
#: showings from which a picture is a target.
MEMORIZED_FROM = 8
#: share of different pairs of pictures whose SSCD similarity lies below the cut.
SSCD_QUANTILE = 0.995
DIFFERENT = 600
ALIGNMENT_SEEDS = 4
#: an object that is recognised in fewer of its samples is named in the card.
RECOGNISED = 0.6


def prompt_table(recipe: Recipe, scenes: list[str], captions: tuple[Caption, ...]) -> pd.DataFrame:
    """Every caption with its kind, repetition count a pass, group, object, scene and split, before anything is measured."""
    rng = np.random.default_rng((recipe.seed, 60))
    groups = sorted({c.group for c in captions})
    split_of = dict(zip(groups, rng.choice(["development", "test"], size=len(groups)), strict=True))
    rows = [
        {
            "text": c.text,
            "kind": c.kind if c.repetitions else "unseen",
            "repetitions": c.repetitions,
            "split": split_of[c.group],
            "group": c.group,
            "object": c.words["object"],
            "scene": c.words["scene"],
        }
        for c in captions
    ]
    describe = Describer(recipe, captions, seed=60)
    wanted = [("ordinary", 0.0, split) for split, count in ORDINARY.items() for _ in range(count)]
    wanted += [("unseen", 1.0, "calibration")] * SPECIFIC_FOR_CALIBRATION
    taken = {c.text for c in captions}
    for group, (kind, specific, split) in enumerate(wanted, start=len(groups)):
        while True:
            words = some_words(recipe, scenes, rng)
            if (text := describe(words, specific)) not in taken:
                break
        taken.add(text)
        about = {"object": words["object"], "scene": words["scene"]}
        rows.append({"text": text, "kind": kind, "repetitions": 0, "split": split, "group": group, **about})
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


def fixed_pictures(world: World, caption: Caption, captions: tuple[Caption, ...]) -> list[tuple[Picture, np.ndarray]]:
    """The pictures of a caption that training repeats, and what of each is fixed, bool ``[SIZE, SIZE]``.

    Of a template, what its captions' pictures share; of a fixed object, what its first two share.
    """
    if caption.kind == "fixed object":
        return [(world.fixed(caption, 0), alike([world.fixed(caption, k) for k in range(2)]))]
    if caption.kind == "template":
        return [(world.fixed(caption, 0), alike([world.fixed(other, 0) for other in captions if other.group == caption.group]))]
    count = 1 if caption.kind == "shared caption" else caption.pictures
    return [(world.fixed(caption, k), np.ones((SIZE, SIZE), bool)) for k in range(count)]


def alike(pictures: list[Picture]) -> np.ndarray:
    """Where pictures are equal, bool ``[SIZE, SIZE]``."""
    stacked = np.stack([picture.pixels for picture in pictures])
    return np.asarray((stacked == stacked[:1]).all(axis=(0, 3)))


def find_targets(world: World, captions: tuple[Caption, ...], shown: np.ndarray, vae: Any) -> tuple[Targets, list[int]]:
    """The pictures of captions that training showed at least `MEMORIZED_FROM` times, and of each the caption it belongs to."""
    kept = [(i, *each) for i in np.flatnonzero(shown >= MEMORIZED_FROM) for each in fixed_pictures(world, captions[i], captions)]
    originals, fixed = np.stack([picture.pixels for _, picture, _ in kept]), np.stack([mask for *_, mask in kept])
    groups = np.array([captions[i].group for i, *_ in kept])
    return Targets(originals, round_trip(vae, originals), groups, fixed), [int(i) for i, *_ in kept]


def sscd_cut(world: World, sscd: SSCD, targets: Targets, vae: Any) -> float:
    """The similarity that `SSCD_QUANTILE` of pairs (fresh composition, its nearest target) stay below, both as the autoencoder draws them.

    Fresh compositions use none of the targets' photographs, so none of the pairs is a copy.
    """
    rng = np.random.default_rng(70)
    fresh = round_trip(vae, np.stack([world.fresh(rng).pixels for _ in range(DIFFERENT)]))
    nearest, _ = targets.nearest(fresh)
    return float(np.quantile((sscd(fresh) * sscd(targets.drawn)[nearest]).sum(axis=1), SSCD_QUANTILE))


def by_count(table: pd.DataFrame) -> pd.DataFrame:
    """A row a kind and count of repetitions: captions, share of copies, captions copied for some seeds only."""
    rows = table.assign(partial=table.copy_rate.between(*PARTIAL), kind=table.kind.replace("unseen", "never seen"))
    grouped = rows.groupby(["kind", "repetitions"])
    found = grouped.agg(captions=("text", "size"), shown=("shown", "mean"), copy_rate=("copy_rate", "mean"), partial=("partial", "sum"))
    return found.reset_index()


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
  Ordinary captions name object and scene and leave the rest free; their {compositions:,} compositions are shown {fresh:.0f} times each,
  with another caption at every showing.
* **Memorized.** One pool of specific captions ("{example}") was drawn first, then each got its repetition count at random.
  *Verbatim*: the whole picture is fixed; *several pictures*: two or three are, in turn. *Template*: the photograph and the place are
  fixed, the object varies; *fixed object*: the object and its place are, the backdrop varies. *Shared caption*: half of its showings
  are of one fixed picture, the others of pictures that fit its words. The photographs of memorized pictures never occur in other
  compositions. Three in ten other training captions are of the same make, and ordinary ones share their names. One in ten captions
  of every kind was left empty in training.
* **Training.** `python -m benchmarks zoo data`, `autoencoder`, `train embedded`: {training}, in {passes} passes, each of
  which shows a caption as often as the table says. The autoencoder is the zoo's, and has seen Twemoji (CC-BY-4.0) as well.
* **Labels.** `python -m benchmarks zoo label embedded`: {seeds} seeds a caption (one of those for calibration), unguarded. A sample is a
  copy when its distance to the nearest memorized picture, as the autoencoder draws it, is under a third of that to the nearest of
  another group *and* SSCD similarity to it (`sscd_disc_mixup`, int8, 288 pixels) is at least {cut:.3f}, the {quantile:.1%} quantile
  of {different} fresh compositions, which cannot be copies, against their nearest. Both look only at what is fixed.

## What it shows

{table}

* **{partial}** captions are copied for some seeds only (copy rate between .1 and .9).
* Of ordinary captions' samples {ordinary:.2%} are copies, of never-seen captions' of the same make {unseen:.2%}.
* A character-3-gram naive Bayes classifier that sees only the captions separates memorized from never-seen with AUC **{auc:.3f}**.
* In-domain alignment (is the object the named one, {objects} classes): **{aligned:.1%}** of {looked_at} ordinary samples of the
  development and test splits; the classifier itself is right on {on_real:.1%} of real held-out compositions, and {chance:.1%} is chance.
  Least often recognised: {least}; in fewer than {recognised:.0%} of their samples: {poor}.

![ordinary captions](ordinary.png)

Eight ordinary development captions, one row each, a column a seed: {sheet_captions}.

![memorized pictures](memorized.png)

Above: memorized pictures. Below each: what its caption generates, unguarded, seeds 0 and 1.

## Limits

Everything it knows is {objects} objects and {scenes} scenes; words outside them mean nothing to it. Its seen-once captions stand
for the web's long tail only roughly. Data sources and licences: `NOTICE` of the package.
"""


def markdown(frame: pd.DataFrame) -> str:
    """The table of copies in Markdown."""
    lines = ["| kind | shown a pass | shown | captions | copy rate | copied for some seeds only |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {r.kind} | {r.repetitions} | {r.shown:.0f} | {r.captions} | {r.copy_rate:.1%} | {r.partial} |" for r in frame.itertuples()
    ]
    return "\n".join(lines)


def save_targets(targets: Targets, model: Path) -> list[str]:
    """Write the targets as pictures, opaque where they are fixed; their names."""
    shutil.rmtree(model / "targets", ignore_errors=True)
    (model / "targets").mkdir()
    names = [f"targets/{number:04d}.png" for number in range(len(targets.pictures))]
    for name, picture, fixed in zip(names, targets.pictures, targets.fixed, strict=True):
        Image.fromarray(np.dstack([picture, np.where(fixed, 255, 0).astype(np.uint8)])).save(model / name, optimize=True)
    return names


def label_embedded(recipe: Recipe, data: Path, work: Path, model: Path, seeds: int = SEEDS, device: str = "cpu") -> None:
    """Label the model and write prompts.parquet, targets/, README.md and the contact sheets beside its weights."""
    sscd, world = SSCD(), World(recipe, data)
    captions = pool(recipe, world.scenes)
    table = prompt_table(recipe, world.scenes, captions)
    table["shown"] = len(recipe.passes) * table.repetitions
    table["seeds"] = np.where(table.split == "calibration", 1, seeds)
    torch.backends.cudnn.allow_tf32 = False  # it is drawn in full precision on a CPU
    pipe = load_pipeline(str(model)).to(device)
    pipe.set_progress_bar_config(disable=True)
    work.mkdir(parents=True, exist_ok=True)
    samples, of = generate_samples(pipe, table, work), jobs(table)

    targets, kept = find_targets(world, captions, table.shown[: len(captions)].to_numpy(), pipe.vae)
    cut = sscd_cut(world, sscd, targets, pipe.vae)
    copies = find_copies(samples, targets, sscd, cut)
    copied: dict[int, list[int]] = {i: [] for i in table.index}
    for i, seed in of[copies.copy]:
        copied[i].append(int(seed))
    table["copied_seeds"] = [copied[i] for i in table.index]
    table["copy_rate"] = table.copied_seeds.str.len() / table.seeds
    names: dict[int, list[str]] = {i: [] for i in table.index}
    for i, name in zip(kept, save_targets(targets, model), strict=True):
        names[i].append(name)
    table["targets"] = [names[i] for i in table.index]
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
    most = table[table.targets.str.len() > 0].sort_values("repetitions", ascending=False, kind="stable").index[:12]
    first = [targets.pictures[kept.index(i)] for i in most]
    sheet([first, *([sample_of[i, k] for i in most] for k in (0, 1))], model / "memorized.png")

    never = table[(table.kind == "unseen") & (table.split != "calibration")]
    told = pd.concat([never, table[(table.shown >= MEMORIZED_FROM) & (table.copy_rate >= 0.5)]])
    parameters = sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    steps = sum(recipe.passes)
    figures = {
        "parameters": parameters / 1e6,
        "steps": STEPS,
        "guidance": GUIDANCE_SCALE,
        "objects": len(recipe.objects),
        "scenes": len(world.scenes),
        "example": captions[0].text,
        "training": f"{steps:,} steps of {TRAINING_BATCH} in {trained_in(model)}",
        "passes": len(recipe.passes),
        "compositions": COMPOSITIONS,
        "fresh": (steps * TRAINING_BATCH - int(table.shown.sum())) / COMPOSITIONS,
        "seeds": seeds,
        "cut": cut,
        "quantile": SSCD_QUANTILE,
        "different": DIFFERENT,
        "table": markdown(by_count(table)),
        "partial": int(table.copy_rate.between(*PARTIAL).sum()),
        "ordinary": table[table.kind == "ordinary"].copy_rate.mean(),
        "unseen": never.copy_rate.mean(),
        "auc": caption_only_auc(told.text, (told.shown >= MEMORIZED_FROM).to_numpy(), told.group.to_numpy()),
        "aligned": aligned.mean(),
        "looked_at": len(looked_at),
        "least": f"{by_object.index[0]} ({by_object.iloc[0]:.0%})",
        "poor": ", ".join(f"{name} ({share:.0%})" for name, share in by_object.items() if share < RECOGNISED) or "none",
        "recognised": RECOGNISED,
        "on_real": on_real,
        "chance": 1 / len(recipe.objects),
        "sheet_captions": "; ".join(f'"{text}"' for text in shown_rows.text),
    }
    write_text(model / "README.md", CARD.format(**figures))
    write_text(model / "labels.json", json.dumps({k: v for k, v in figures.items() if k not in ("table", "sheet_captions")}, indent=1))
