"""The autoencoder that the embedded model and the zoo share, and what is done with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from rich.progress import track

from benchmarks.zoo.recipes import RECIPES
from benchmarks.zoo.training import train
from benchmarks.zoo.world import SIZE, World

BATCH = 64
STEPS = 10_000
#: pictures of each recipe.
PICTURES = 5_000


def new_autoencoder() -> AutoencoderKL:
    """A 4-channel autoencoder with a downsampling factor of 4, in options that diffusers .18 already had."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


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
    edge_error = sum((F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pictures), strict=True)), error.new_zeros(()))
    colour_error = error - error.mean(dim=1, keepdim=True)
    squared = error.square().mean() + 2 * colour_error.square().mean()
    return error.abs().mean() + edge_error + 3 * squared + 1e-6 * posterior.kl().mean()


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
