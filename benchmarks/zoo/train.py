"""Train a model of the zoo by its recipe."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import nn

from benchmarks.zoo.recipes import Recipe
from benchmarks.zoo.shapes import SHAPES, loss, trained_parts
from benchmarks.zoo.world import Caption, Describer, World, pool
from sdguard import testbed
from sdguard.testbed.label import sheet
from sdguard.testbed.train import encode, tidy
from sdguard.testbed.training import train
from sdguard.testbed.vocabulary import train_tokenizer

BATCH = 64
COMPOSITIONS = 12_000
EMPTY_CAPTIONS = 0.1
#: steps between two sheets of samples.
SHEET_STEPS = 500


def new_autoencoder() -> AutoencoderKL:
    """The embedded model's autoencoder: it was trained with its pictures' channels permuted, and draws these as well."""
    return AutoencoderKL.from_pretrained(testbed.path() / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)


def compositions(world: World, vae: AutoencoderKL, path: Path) -> dict[str, Any]:
    """Latents of `COMPOSITIONS` fresh pictures, unscaled, with their words and crops; kept in ``path``."""
    if not path.exists():
        rng = np.random.default_rng((world.recipe.seed, 5))
        latents, words, crops = [], [], []
        for _ in track(range(0, COMPOSITIONS, 400), "encoding fresh pictures"):
            fresh = [world.fresh(rng) for _ in range(400)]
            latents.append(encode(vae, np.stack([picture.pixels for picture in fresh])).half())
            words += [picture.words for picture in fresh]
            crops += [picture.crop for picture in fresh]
        torch.save({"latents": torch.cat(latents), "words": words, "crops": torch.tensor(crops)}, path)
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    return kept


@lru_cache(maxsize=1)
def visits(recipe: Recipe, captions: tuple[Caption, ...], number: int) -> np.ndarray:
    """What a pass of training shows, ``[steps, BATCH]``: -1 for a fresh picture, else a caption, exactly as often as it is repeated."""
    rng = np.random.default_rng((recipe.seed, 6, number) if number else (recipe.seed, 6))
    repeated = np.repeat(np.arange(len(captions)), [caption.repetitions for caption in captions])
    shown = np.concatenate([repeated, np.full(recipe.steps * BATCH - len(repeated), -1)])
    return rng.permutation(shown).reshape(recipe.steps, BATCH)


def train_recipe(recipe: Recipe, data: Path, work: Path, out: Path) -> None:
    """Train a model and write its pipeline to ``out``; what is done is kept under ``work``, so that a stopped run goes on."""
    torch.manual_seed(recipe.seed)
    work.mkdir(parents=True, exist_ok=True)
    world, shape = World(recipe, data), SHAPES[recipe.shape]
    captions, vae = pool(recipe, world.scenes), new_autoencoder()
    kept = compositions(world, vae, work / "compositions.pt")
    vae.register_to_config(scaling_factor=1 / kept["latents"].float().std().item())
    describe = Describer(recipe, captions, seed=0)
    texts = [describe(words) for words in kept["words"]] + [caption.text for caption in captions]
    tokenizer = train_tokenizer(texts, work / "tokenizer")
    pipe = shape.new(tokenizer, vae)
    pipe.set_progress_bar_config(disable=True)
    pictures, of = world.memorized(captions)
    targets = encode(vae, np.stack([picture.pixels for picture in pictures]))

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((recipe.seed, 7, step))
        describe.rng = rng
        fresh = rng.integers(COMPOSITIONS, size=BATCH)
        x0, told, crops = [], [], []
        for visit, index in zip(visits(recipe, captions, step // recipe.steps)[step % recipe.steps], fresh, strict=True):
            if visit >= 0:
                shown = int(rng.choice(of[visit]))
                x0.append(targets[shown])
                crops.append(pictures[shown].crop)
            else:
                x0.append(kept["latents"][index].float())
                crops.append(tuple(kept["crops"][index].tolist()))
            text = captions[visit].text if visit >= 0 else describe(kept["words"][index])
            told.append("" if rng.random() < EMPTY_CAPTIONS else text)
        latents = torch.stack(x0) * vae.config.scaling_factor
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        draw = torch.from_numpy(rng.random(BATCH, dtype=np.float32))
        return loss(pipe, shape, latents, noise, draw, told, torch.tensor(crops))

    examples = [describe(words, specific=0.0) for words in kept["words"][:16]]
    most = sorted(captions, key=lambda caption: -caption.repetitions)[:16]

    def look(step: int, average: nn.Module) -> None:
        parts = trained_parts(pipe)
        now = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
        parts.load_state_dict(average.state_dict())
        draw_sheet(pipe, examples + [caption.text for caption in most], work / f"sheet-{step:05d}.png")
        for name, part in parts.items():
            part.load_state_dict(now[name])

    average = train(
        recipe.passes * recipe.steps, trained_parts(pipe), loss_at, work / "denoiser.pt", recipe.learning_rate, look=(SHEET_STEPS, look)
    )
    trained_parts(pipe).load_state_dict(average.state_dict())
    write_pipeline(pipe, work / "tokenizer", out)


def draw_sheet(pipe: Any, texts: list[str], path: Path, steps: int = 20) -> None:
    """A sheet of samples, eight a row."""
    images = pipe(texts, num_inference_steps=steps, generator=[torch.Generator().manual_seed(0) for _ in texts], output_type="pil").images
    sheet([[np.asarray(image) for image in images[i : i + 8]] for i in range(0, len(images), 8)], path)


def write_pipeline(pipe: Any, vocabulary: Path, out: Path) -> None:
    """Write a pipeline directory in half precision, each vocabulary in the two files that every release reads."""
    for part in (*trained_parts(pipe).values(), pipe.vae):
        part.to(torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    tidy(out, vocabulary)
