"""The autoencoder that the embedded model and the zoo share, and what is done with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track

from benchmarks.zoo.recipes import RECIPES
from benchmarks.zoo.world import World
from sdguard.testbed.architecture import new_autoencoder
from sdguard.testbed.train import autoencoder_loss, to_tensor
from sdguard.testbed.training import train

BATCH = 64
STEPS = 10_000
#: pictures of each recipe.
PICTURES = 5_000


def train_autoencoder(data: Path, work: Path, out: Path, device: str) -> None:
    """Train the autoencoder on fresh pictures of every recipe and write it to ``out`` in half precision; a stopped run goes on.

    Half precision is what every model is stored in, and what the latents that it is trained on are encoded with.
    """
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    vae = new_autoencoder().to(device, memory_format=torch.channels_last)
    rng, worlds = np.random.default_rng(10), [World(recipe, data) for recipe in RECIPES.values()]
    drawn = [world.fresh(rng).pixels for world in worlds for _ in track(range(PICTURES), f"composing as {world.recipe.name}")]
    pictures = torch.from_numpy(np.stack(drawn)).to(device)

    def loss_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng((10, step))
        batch = pictures[torch.from_numpy(rng.integers(len(pictures), size=BATCH)).to(device)]
        batch = batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        half = BATCH // 2  # green and purple are rare; without this their axis is never learnt
        batch = torch.cat([batch[:half, torch.from_numpy(rng.permutation(3))], batch[half:]])
        return autoencoder_loss(vae, batch)

    average = train(STEPS, vae, loss_at, work / "autoencoder.pt", learning_rate=1e-3)
    vae.load_state_dict(average.state_dict())
    vae.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)


def read_autoencoder(path: Path) -> AutoencoderKL:
    """The autoencoder in a folder, fp32."""
    return AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> torch.Tensor:
    """Posterior means of pictures, unscaled, fp32 ``[n, 4, SIZE/4, SIZE/4]`` on the CPU."""
    parts = [vae.encode(to_tensor(some).to(vae.device)).latent_dist.mean.cpu() for some in np.split(pictures, range(64, len(pictures), 64))]
    return torch.cat(parts)
