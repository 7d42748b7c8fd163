"""What a zoo model has memorized: its cases, the latents of the memorized pictures, captions of its world, and its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.models import ORDINARY_SEEDS, SAME_PICTURE, SEEDS, SETTING_FILE, Model, encoded, pictures, read_model, unpacked
from benchmarks.zoo.autoencoder import read_autoencoder
from benchmarks.zoo.recipes import Recipe
from benchmarks.zoo.sheets import sheet
from benchmarks.zoo.train import BATCH, COMPOSITIONS, trained_in
from benchmarks.zoo.world import Caption, Describer, World, pool
from sdguard.files.atomic import atomic_write, write_text
from sdguard.testbed.copies import decode

ORDINARY_CASES, ORDINARY = 60, 400
#: of sampling.
STEPS = 20
#: how many of ten of a model's own ordinary captions are of the specific make.
SPECIFIC = 0.3
#: copy rates that are neither none nor certain.
PARTIAL = (0.1, 0.9)
LICENCES = {"noto": "Noto Emoji (Apache-2.0)", "twemoji": "Twemoji (CC-BY-4.0)", "fluent-emoji-flat": "Fluent Emoji Flat (MIT)"}


def cases_of(captions: tuple[Caption, ...], of: list[list[int]], ordinary: list[str]) -> list[dict[str, Any]]:
    """The cases of a model: the pool's captions, each with its first picture, and ordinary ones."""
    specific = [
        {
            "caption": caption.text,
            "group": f"{caption.kind} {caption.repetitions}" if shown else "never seen",
            "reps": caption.repetitions,
            "target": shown[0] if shown else None,
        }
        for caption, shown in zip(captions, of, strict=True)
    ]
    return specific + [{"caption": text, "group": "ordinary", "reps": 0, "target": None} for text in ordinary]


def own_captions(recipe: Recipe, world: World, captions: tuple[Caption, ...], count: int) -> list[str]:
    """Distinct captions of the model's world, none of the pool: ordinary ones first, then such as someone would calibrate on."""
    rng, describe = np.random.default_rng((recipe.seed, 8)), Describer(recipe, captions, seed=1)
    found: dict[str, None] = {}
    while len(found) < count:
        specific = 0.0 if len(found) < ORDINARY_CASES else SPECIFIC
        found[describe(world.fresh(rng).words, specific)] = None
    return list(found)


def write_cases(recipe: Recipe, data: Path, folder: Path) -> None:
    """Write ``cases.json``, ``targets.pt``, ``ordinary.txt`` and ``setting.json`` into a trained model's folder."""
    world = World(recipe, data)
    captions = pool(recipe, world.scenes)
    memorized, of = world.memorized(captions)
    own = own_captions(recipe, world, captions, ORDINARY_CASES + ORDINARY)
    vae = read_autoencoder(folder / "vae")
    latents = encoded(vae, np.stack([picture.pixels for picture in memorized]))
    with atomic_write(folder / "targets.pt") as partial:
        torch.save(latents.half(), partial)
    write_text(folder / SETTING_FILE, json.dumps({"num_inference_steps": STEPS, "guidance_scale": recipe.guidance_scale}) + "\n")
    write_text(folder / "cases.json", json.dumps(cases_of(captions, of, own[:ORDINARY_CASES]), indent=0))
    write_text(folder / "ordinary.txt", "\n".join(own[ORDINARY_CASES:]) + "\n")


def by_repetitions(drawn: pd.DataFrame) -> pd.DataFrame:
    """A row a kind and count of repetitions: captions, samples, share of copies, captions copied for some seeds only."""
    rate = drawn.groupby(["group", "reps", "case"])["copy"].mean().reset_index()
    rate["partial"] = rate["copy"].between(*PARTIAL)
    rate["kind"] = rate.group.str.replace(r" \d+$", "", regex=True)
    found = rate.groupby(["kind", "reps"]).agg(captions=("case", "size"), copies=("copy", "mean"), partial=("partial", "sum"))
    return found.reset_index()


def draw_sheets(model: Model, drawn: pd.DataFrame) -> None:
    """``ordinary.png``: three rows of ordinary captions. ``memorized.png``: memorized pictures above what their captions give."""
    vae, scale = model.pipe.vae, model.pipe.vae.config.scaling_factor
    latents = unpacked(drawn.latents, model.targets) / scale

    def rows(name: str, tensors: list[torch.Tensor]) -> None:
        sheet([list(decode(vae, some)) for some in tensors], model.folder / name)

    ordinary = np.flatnonzero(drawn.role == "ordinary")[::2][:24]
    rows("ordinary.png", [latents[ordinary[i : i + 8]] for i in (0, 8, 16)])
    shown = drawn[drawn.reps > 0]
    most = shown.sort_values(["reps", "case"], ascending=[False, True]).case.drop_duplicates()[:8].tolist()
    places = [np.array([np.flatnonzero(drawn.case == case)[seed] for case in most]) for seed in (0, 1)]
    rows("memorized.png", [model.targets[model.cases.target[most].to_numpy()] / scale, *(latents[place] for place in places)])


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


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [{shape}, memorization, test-bed]
---

# {name}: a model of sdguard's zoo

{what} For measuring the guard on; no picture generator, and not part of the wheel.

* **Loads as** `{pipeline}.from_pretrained("benchmarks/zoo/models/{name}", dtype=torch.float32)`: {parameters:.1f} million
  parameters, 64 pixels, stored in half precision.
* **Pictures**: {objects} objects ({licences}), {together} in a picture, over {backdrop}. The autoencoder is
  the embedded model's.
* **Captions**: one pool of {pool} specific captions ("{example}") was drawn first, then each was given its
  repetition count at random. {several}Other training captions are ordinary ("{ordinary}") or, three in ten, of
  the specific make with names of the same lists; their {compositions:,} pictures are shown {fresh:.1f} times each, with another caption at
  every showing.
* **Training**: `python -m benchmarks zoo data`, `python -m benchmarks zoo train {name}`: {steps:,} steps of {batch} in {training},
  in {passes} passes: each shows a caption as often as the table says.
* **Labels**: `python -m benchmarks zoo label {name}`: {seeds} seeds a caption ({ordinary_seeds} of ordinary ones), {sampling} steps,
  guidance {guidance:g}. A sample is a copy when its latents' distance to the nearest memorized picture is under a third of that to the
  second nearest.

| kind | shown a pass | captions | copies | captions copied for some seeds only |
|---|---:|---:|---:|---:|
{table}

* Of never-seen captions' samples {unseen_copies:.1%} are copies of another caption's picture, and {unseen_alike:.1%} more are correlated
  with one over {alike:g}.
* A character-3-gram naive Bayes classifier that sees only the captions tells repeated from never-seen ones with AUC **{auc}**.

![ordinary captions](ordinary.png)

![{above}](memorized.png)

Above: {above}. Below each: what its caption gives, two seeds.
"""


def write_card(recipe: Recipe, folder: Path, parts: Path) -> None:
    """Draw every case, and write ``README.md`` and the sheets beside the weights; what is drawn is kept under ``parts``."""
    model = read_model(folder)
    drawn = pictures(model, parts)
    draw_sheets(model, drawn)
    unseen = drawn[drawn.role == "never seen"]
    named = model.cases[model.cases.group != "ordinary"].reset_index(drop=True)
    repeated = named.reps > 1
    auc = f"{caption_only_auc(named.caption, repeated.to_numpy(), np.arange(len(named))):.2f}" if repeated.any() else "not defined"
    lines = [f"| {r.kind} | {r.reps} | {r.captions} | {r.copies:.1%} | {r.partial} |" for r in by_repetitions(drawn).itertuples()]
    write_text(
        folder / "README.md",
        CARD.format(
            name=recipe.name,
            shape=recipe.shape,
            what=(
                "A small model that memorizes some pictures on purpose."
                if max(recipe.repetitions) > 1
                else "A control: made as its sister, and no caption of it was shown more than once."
            ),
            pipeline=type(model.pipe).__name__,
            parameters=sum(p.numel() for part in model.pipe.components.values() if hasattr(part, "parameters") for p in part.parameters())
            / 1e6,
            objects=len(recipe.objects),
            licences=", ".join(LICENCES[style] for style in recipe.styles),
            together={1: "one", 2: "two"}[recipe.together],
            backdrop="crops of public-domain photographs" if recipe.backdrop == "photographs" else "two colours that run into each other",
            pool=len(named),
            example=named.caption[0],
            several="Two in ten are shown with two or three pictures in turn. " if recipe.several else "",
            ordinary=model.cases.caption[len(named)],
            compositions=COMPOSITIONS,
            fresh=(sum(recipe.passes) * BATCH - len(recipe.passes) * named.reps.sum()) / COMPOSITIONS,
            steps=sum(recipe.passes),
            passes=len(recipe.passes),
            batch=BATCH,
            training=trained_in(folder),
            seeds=SEEDS,
            ordinary_seeds=ORDINARY_SEEDS,
            sampling=model.steps,
            guidance=model.guidance_scale,
            table="\n".join(lines),
            unseen_copies=unseen["copy"].mean(),
            unseen_alike=(~unseen["copy"] & (unseen.resembles > SAME_PICTURE)).mean(),
            alike=SAME_PICTURE,
            auc=auc,
            above="memorized pictures" if max(recipe.repetitions) > 1 else "pictures that were shown once",
        ),
    )
