"""Train a model of the zoo by its recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.zoo.autoencoder import encode, read_autoencoder
from benchmarks.zoo.recipes import Recipe
from benchmarks.zoo.shapes import SHAPES, Denoiser, as_graph, loss, trained_parts
from benchmarks.zoo.sheets import sheet
from benchmarks.zoo.training import train
from benchmarks.zoo.vocabulary import train_tokenizer
from benchmarks.zoo.world import Caption, Describer, World, pool
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.atomic import write_text

BATCH = 64
COMPOSITIONS = 30_000
EMPTY_CAPTIONS = 0.1
#: in a model's folder: how long and where it was trained.
TRAINING_FILE = "training.json"
#: sheets of samples while it trains.
SHEETS = 8
#: processes that prepare captions for a GPU, which is faster than they are written.
WORKERS = 2


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
    repeated, steps = np.repeat(np.arange(len(captions)), [caption.repetitions for caption in captions]), recipe.passes[number]
    shown = np.concatenate([repeated, np.full(steps * BATCH - len(repeated), -1)])
    return rng.permutation(shown).reshape(steps, BATCH)


class Shown(NamedTuple):
    """One step's pictures, by their index among fresh and memorized ones, their captions, noise, and how much of it, ``[BATCH, ...]``."""

    pictures: Tensor
    texts: list[str]
    noise: Tensor
    draw: Tensor


class Steps(Dataset[Shown]):
    """What each step of training shows: fresh pictures come first by index, then memorized ones, of which a caption may have several."""

    def __init__(
        self, recipe: Recipe, captions: tuple[Caption, ...], of: list[list[int]], words: list[dict[str, str]], latent: tuple[int, ...]
    ) -> None:
        self.recipe, self.captions, self.of, self.words, self.latent = recipe, captions, of, words, latent
        self.describe = Describer(recipe, captions, seed=0)
        self.begins = np.cumsum([0, *recipe.passes])

    def __getitem__(self, step: int) -> Shown:
        rng = np.random.default_rng((self.recipe.seed, 7, step))
        self.describe.rng = rng
        pictures, texts = [], []
        fresh = rng.integers(len(self.words), size=BATCH).tolist()
        number = int(np.searchsorted(self.begins, step, side="right")) - 1
        now = visits(self.recipe, self.captions, number)[step - self.begins[number]]
        for visit, index in zip(now, fresh, strict=True):
            pictures.append(len(self.words) + int(rng.choice(self.of[visit])) if visit >= 0 else index)
            text = self.captions[visit].text if visit >= 0 else self.describe(self.words[index])
            texts.append("" if rng.random() < EMPTY_CAPTIONS else text)
        noise = torch.from_numpy(rng.standard_normal((BATCH, *self.latent), dtype=np.float32))
        return Shown(torch.tensor(pictures), texts, noise, torch.from_numpy(rng.random(BATCH, dtype=np.float32)))


def stages_of(folder: Path) -> list[dict[str, Any]]:
    """How long each stage of a trained model took, ``seconds``, and on what ``device``."""
    stages: list[dict[str, Any]] = json.loads((folder / TRAINING_FILE).read_text())
    return stages


def trained_in(folder: Path) -> str:
    """Of a model's training, the minutes and where, in words."""
    stages = stages_of(folder)
    return f"{sum(stage['seconds'] for stage in stages) / 60:.0f} minutes on {', then '.join({s['device']: 0 for s in stages})}"


def train_recipe(recipe: Recipe, data: Path, autoencoder: Path, work: Path, out: Path, device: str, go_on: bool = False) -> None:
    """Train a model and write its pipeline to ``out``; what is done is kept under ``work``, so that a stopped run goes on.

    With ``go_on`` the model that is in ``out`` goes through the stages that are left to it; raises `ValueError` if none is.
    """
    done = stages_of(out) if go_on else []
    if len(done) == len(recipe.stages):
        raise ValueError(f"{out} has been through all stages of its training.")
    torch.manual_seed(recipe.seed)
    work.mkdir(parents=True, exist_ok=True)
    world, shape = World(recipe, data), SHAPES[recipe.shape]
    captions, vae = pool(recipe, world.scenes), read_autoencoder(autoencoder).to(device)
    kept = compositions(world, vae, work / "compositions.pt")
    vae.register_to_config(scaling_factor=1 / kept["latents"].float().std().item())
    describe = Describer(recipe, captions, seed=0)
    texts = [describe(words) for words in kept["words"]] + [caption.text for caption in captions]
    trained = load_pipeline(str(out)) if done else None
    pipe = shape.new(trained.tokenizer if trained else train_tokenizer(texts, work / "tokenizer"), vae).to(device)
    if trained:
        trained_parts(pipe).load_state_dict(trained_parts(trained).state_dict())
    pipe.set_progress_bar_config(disable=True)
    memorized, of = world.memorized(captions)
    latents = torch.cat([kept["latents"].float(), encode(vae, np.stack([picture.pixels for picture in memorized]))])
    latents = (latents * vae.config.scaling_factor).to(device)
    crops = torch.cat([kept["crops"], torch.tensor([picture.crop for picture in memorized])]).to(device)
    steps = Steps(recipe, captions, of, kept["words"], tuple(latents.shape[1:]))
    denoiser = Denoiser(pipe)
    if device == "cuda":
        denoiser = as_graph(pipe, shape, denoiser, latents[:BATCH], texts[:BATCH], crops[:BATCH])

    def loss_from(begin: int, end: int) -> Callable[[int], Tensor]:
        """The loss at a step counted from ``begin``; steps are asked for in their order."""
        shown: Iterator[Shown] | None = None

        def loss_at(step: int) -> Tensor:
            nonlocal shown
            if shown is None:
                workers, order = WORKERS if device == "cuda" else 0, range(begin + step, end)
                shown = iter(DataLoader(steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=workers > 0))
            now = next(shown)
            pictures, noise, draw = (each.to(device, non_blocking=True) for each in (now.pictures, now.noise, now.draw))
            return loss(pipe, shape, denoiser, latents[pictures], noise, draw, now.texts, crops[pictures])

        return loss_at

    examples = [describe(words, specific=0.0) for words in kept["words"][:16]]
    most = sorted(captions, key=lambda caption: -caption.repetitions)[:16]

    def look(step: int, average: nn.Module) -> None:
        parts = trained_parts(pipe)
        now = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
        parts.load_state_dict(average.state_dict())
        draw_sheet(recipe, pipe, examples + [caption.text for caption in most], work / f"sheet-{len(done)}-{step:05d}.png")
        for name, part in parts.items():
            part.load_state_dict(now[name])

    for number in range(len(done), len(recipe.stages)):
        stage, checkpoint = recipe.stages[number], work / f"denoiser-{number}.pt"
        total, begin = stage.passes * stage.steps, sum(each.passes * each.steps for each in recipe.stages[:number])
        loss_at = loss_from(begin, begin + total)
        average = train(total, trained_parts(pipe), loss_at, checkpoint, stage.learning_rate, look=(total // SHEETS, look))
        trained_parts(pipe).load_state_dict(average.state_dict())
        seconds = torch.load(checkpoint, weights_only=True, mmap=True)["seconds"]
        where = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
        done.append({"seconds": round(seconds), "device": where})
    write_pipeline(pipe.to("cpu"), work / "tokenizer", out, plain=recipe.shape == "embedded")
    write_text(out / TRAINING_FILE, json.dumps(done) + "\n")


def draw_sheet(recipe: Recipe, pipe: Any, texts: list[str], path: Path, steps: int = 20) -> None:
    """A sheet of samples, eight a row."""
    generators = [torch.Generator().manual_seed(0) for _ in texts]
    images = pipe(texts, num_inference_steps=steps, guidance_scale=recipe.guidance_scale, generator=generators).images
    sheet([[np.asarray(image) for image in images[i : i + 8]] for i in range(0, len(images), 8)], path)


def write_pipeline(pipe: Any, vocabulary: Path, out: Path, plain: bool) -> None:
    """Write a pipeline directory in half precision, each vocabulary in the two files that every release reads.

    One that has to load ``plain`` keeps its text encoder in fp32: after ``from_pretrained(path)`` a half-precision denoiser is in fp32, a
    text encoder in what is stored, and the two would not fit.
    """
    for name, part in (*trained_parts(pipe).items(), ("vae", pipe.vae)):
        part.to(torch.float32 if plain and name == "text_encoder" else torch.float16)
    pipe.save_pretrained(out, safe_serialization=True)
    tidy(out, vocabulary)


def tidy(out: Path, vocabulary: Path) -> None:
    """Make a pipeline directory that was just saved fit to be shipped.

    No word of where parts came from; vocabularies in both forms; a text encoder's weights by the names that every release of transformers
    reads (the fifth writes those of `CLIPTextModel` without their prefix, and reads both).
    """
    for weights in out.glob("text_encoder*/model.safetensors"):
        named = load_file(weights)
        old = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": part for name, part in named.items()}
        save_file(old, weights, metadata={"format": "pt"})
    for config in out.glob("*/config.json"):
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        write_text(config, json.dumps(kept, indent=2) + "\n")
    for path in out.glob("tokenizer*/tokenizer.json"):  # which keeps what the last call asked for
        asked = {"truncation": None, "padding": None}
        write_text(path, json.dumps(json.loads(path.read_text()) | asked, indent=2, ensure_ascii=False))
    for folder in out.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):  # older transformers read these and no tokenizer.json
            if not (folder / name).exists():
                shutil.copy(vocabulary / name, folder / name)
