"""Train the embedded model: autoencoder, tokenizer, text encoder and UNet.

``python -m sdguard.testbed.train`` runs every stage that has not finished, each resumable from its last checkpoint, and writes
a ``StableDiffusionPipeline`` directory.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import track
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from sdguard.files.atomic import write_text
from sdguard.testbed.architecture import SCHEDULE, new_autoencoder, new_text_encoder, new_unet
from sdguard.testbed.pictures import World
from sdguard.testbed.training import train
from sdguard.testbed.vocabulary import train_tokenizer
from sdguard.testbed.world import Caption, Describer, pool

AUTOENCODER_BATCH = 8
DENOISER_BATCH = 64
EPOCH_STEPS = 1700
COMPOSITIONS = 24_000
EMPTY_CAPTIONS = 0.1


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 ``[n, h, w, 3]`` to float ``[n, 3, h, w]`` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def autoencoder_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and edges, squared error of pixels and colour, and a weak pull of the posterior to the unit Gaussian.

    Without the squared error of colour (each channel's difference from the mean of the three) rare colours come back grey.
    """
    with torch.autocast(pictures.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample.float()
    error = decoded - pictures
    edge_error = sum((F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pictures), strict=True)), torch.zeros(()))
    colour_error = error - error.mean(dim=1, keepdim=True)
    squared = error.square().mean() + 2 * colour_error.square().mean()
    return error.abs().mean() + edge_error + 3 * squared + 1e-6 * posterior.kl().mean()


def train_autoencoder(world: World, work: Path, steps: int, device: str) -> AutoencoderKL:
    """Train the autoencoder on fresh compositions and on the targets."""
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    targets = world.targets(pool())

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((10, step))
        fresh = [world.composition(rng)[0] for _ in range(AUTOENCODER_BATCH - 1)]
        batch = np.stack([*fresh, targets[rng.integers(len(targets))]])
        for picture in batch[: AUTOENCODER_BATCH // 2]:  # green and purple are rare; without this their axis is never learnt
            picture[:] = picture[..., rng.permutation(3)]
        return autoencoder_loss(vae, to_tensor(batch).to(device))

    return train(steps, vae, loss_at, work / "autoencoder.pt", learning_rate=1e-3)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Posterior means of pictures, unscaled, fp32 ``[n, 4, SIZE/4, SIZE/4]`` on the CPU."""
    latents = []
    for start in range(0, len(pictures), 64):
        with torch.autocast(vae.device.type, torch.bfloat16):
            batch = to_tensor(pictures[start : start + 64]).to(vae.device)
            latents.append(vae.encode(batch).latent_dist.mean.float().cpu())
    return torch.cat(latents)


def compositions(world: World, vae: AutoencoderKL, work: Path, first_step: int = 0) -> tuple[torch.Tensor, list[str], list[str]]:
    """Latents of `COMPOSITIONS` fresh pictures with their objects and scenes, kept in ``work``; others for each ``first_step``."""
    path = work / f"compositions-{first_step}.pt"
    if not path.exists():
        rng = np.random.default_rng((20, first_step))
        latents, objects, scenes = [], [], []
        for _ in track(range(0, COMPOSITIONS, 400), "encoding compositions"):
            pictures, some_objects, some_scenes = zip(*(world.composition(rng) for _ in range(400)), strict=True)
            latents.append(encode(vae, np.asarray(pictures)).half())
            objects.extend(some_objects)
            scenes.extend(some_scenes)
        torch.save({"latents": torch.cat(latents), "objects": objects, "scenes": scenes}, path)
    kept = torch.load(path, weights_only=True)
    return kept["latents"], kept["objects"], kept["scenes"]


@lru_cache(maxsize=1)
def visiting_order(captions: tuple[Caption, ...], epoch: int) -> np.ndarray:
    """What each training visit of an epoch shows: -1 for a fresh composition, else a pool caption's index, shuffled.

    Within an epoch of ``DENOISER_BATCH * EPOCH_STEPS`` visits each pool caption comes exactly as often as it is to be repeated.
    """
    visits = np.full(DENOISER_BATCH * EPOCH_STEPS, -1)
    repeated = np.repeat(np.arange(len(captions)), [caption.repetitions for caption in captions])
    visits[: len(repeated)] = repeated
    return np.random.default_rng(30 + epoch).permutation(visits)


def shown_counts(captions: tuple[Caption, ...], steps: int) -> np.ndarray:
    """How often training shows each pool caption's picture in its first ``steps`` steps."""
    epochs, rest = divmod(steps, EPOCH_STEPS)
    partial = visiting_order(captions, epochs)[: rest * DENOISER_BATCH]
    whole = np.array([caption.repetitions for caption in captions])
    return epochs * whole + np.bincount(partial[partial >= 0], minlength=len(captions))


def train_denoiser(
    world: World,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    work: Path,
    steps: int,
    first_step: int,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Train text encoder and UNet together on what step ``first_step`` and the following ones show; returns their averages."""
    captions, device = pool(), vae.device
    latents, objects, scenes = compositions(world, vae, work, first_step)
    targets = encode(vae, world.targets(captions))
    describe = Describer(captions, seed=40 + first_step)
    scheduler = DDPMScheduler(**SCHEDULE)
    text_encoder, unet = text_encoder.to(device), unet.to(device, memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        epoch, at = divmod(first_step + step, EPOCH_STEPS)
        rng = np.random.default_rng((50, first_step + step))
        visits = visiting_order(captions, epoch)[at * DENOISER_BATCH : (at + 1) * DENOISER_BATCH]
        fresh = rng.integers(len(objects), size=DENOISER_BATCH)
        x0 = torch.stack([targets[v] if v >= 0 else latents[i].float() for v, i in zip(visits, fresh, strict=True)])
        texts = [captions[v].text if v >= 0 else describe(objects[i], scenes[i]) for v, i in zip(visits, fresh, strict=True)]
        texts = ["" if rng.random() < EMPTY_CAPTIONS else text for text in texts]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        x0 = (x0 * vae.config.scaling_factor).to(device, memory_format=torch.channels_last)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(x0)
        t = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=len(x0))).to(device)
        with torch.autocast(x0.device.type, torch.bfloat16):
            condition = text_encoder(ids)[0]
            velocity = unet(scheduler.add_noise(x0, noise, t), t, condition).sample
        return F.mse_loss(velocity.float(), scheduler.get_velocity(x0, noise, t))

    both = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    average: Any = train(steps, both, loss_at, work / f"denoiser-{first_step}.pt", learning_rate=8e-4)
    return average["text_encoder"], average["unet"]


def new_model(world: World, work: Path, autoencoder_steps: int, device: str) -> tuple[Any, ...]:
    """A trained autoencoder with its latents' scale, the tokenizer, and an untrained text encoder and UNet."""
    vae = train_autoencoder(world, work, autoencoder_steps, device).eval()
    latents, objects, scenes = compositions(world, vae, work)
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    captions = pool()
    describe = Describer(captions, seed=40)
    sample = [describe(o, s) for o, s in zip(objects, scenes, strict=True)]
    tokenizer = train_tokenizer([*sample, *(caption.text for caption in captions)], work / "tokenizer")
    text_encoder = new_text_encoder(tokenizer)
    return vae, tokenizer, text_encoder, new_unet(text_encoder.config.hidden_size)


def write_pipeline(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, vocabulary: Path, out: Path
) -> None:
    """Write the pipeline directory: UNet and autoencoder in fp16, the small text encoder in fp32.

    diffusers brings a half-precision UNet back in fp32 while transformers keeps the stored precision, so that a half-precision
    text encoder would not fit the rest after a plain ``from_pretrained(path)``.
    """
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.float(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out, safe_serialization=True)
    tidy(out, vocabulary)


def tidy(out: Path, vocabulary: Path) -> None:
    """Make a pipeline directory that was just saved fit to be shipped: no word of where parts came from, vocabularies in both forms."""
    for config in out.glob("*/config.json"):
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        write_text(config, json.dumps(kept, indent=2) + "\n")
    for folder in out.glob("tokenizer*"):
        for name in ("vocab.json", "merges.txt"):  # older transformers read these and no tokenizer.json
            if not (folder / name).exists():
                shutil.copy(vocabulary / name, folder / name)


def record(work: Path, out: Path, first_step: int, device: str) -> None:
    """Add this run to the model's training.json: steps so far, and one line a run."""
    path = out / "training.json"
    before = json.loads(path.read_text())["history"] if first_step else []
    where = torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    lines, steps = [], first_step
    for stage in [*([] if first_step else ["autoencoder"]), f"denoiser-{first_step}"]:
        state = torch.load(work / f"{stage}.pt", weights_only=True, mmap=True)
        lines.append(f"{stage.split('-')[0]}, {state['step']:,} steps in {state['seconds'] / 60:.0f} minutes on {where}")
        steps = first_step + state["step"]
    write_text(path, json.dumps({"denoiser_steps": steps, "history": before + lines}, indent=1) + "\n")


def main(
    data: Annotated[Path, typer.Option(help="world.npz of build_data.")] = Path("build/testbed/world.npz"),
    work: Annotated[Path, typer.Option(help="Checkpoints and loss logs.")] = Path("build/testbed"),
    out: Annotated[Path, typer.Option(help="The pipeline directory.")] = Path(__file__).parent / "model",
    autoencoder_steps: Annotated[int, typer.Option(help="Steps of the autoencoder's training.")] = 5600,
    denoiser_steps: Annotated[int, typer.Option(help="Steps of the training of text encoder and UNet.")] = 7000,
    go_on: Annotated[bool, typer.Option("--go-on", help="Train the denoiser of the pipeline in --out further.")] = False,
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train what has not been trained yet and write the pipeline."""
    if not data.exists():
        typer.secho(f"{data} is not there: run 'python -m sdguard.testbed.build_data' first.", err=True, fg="red")
        raise typer.Exit(1)
    torch.manual_seed(0)
    world, first_step = World(data), 0
    if go_on:
        pipe = StableDiffusionPipeline.from_pretrained(out).to(device)
        vae, tokenizer, text_encoder, unet = pipe.vae, pipe.tokenizer, pipe.text_encoder, pipe.unet
        first_step = json.loads((out / "training.json").read_text())["denoiser_steps"]
    else:
        vae, tokenizer, text_encoder, unet = new_model(world, work, autoencoder_steps, device)
    own = deepcopy(tokenizer)  # a tokenizer saves the padding and truncation of its last call
    text_encoder, unet = train_denoiser(world, vae, own, text_encoder, unet, work, denoiser_steps, first_step)
    write_pipeline(vae, tokenizer, text_encoder, unet, work / "tokenizer", out)
    record(work, out, first_step, device)


if __name__ == "__main__":
    typer.run(main)
