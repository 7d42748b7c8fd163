"""The embedded model's own pictures that the training side looks at: what it was shown, fresh ones, and what it makes of their captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from benchmarks.audit.leaving_out import chosen
from benchmarks.running import versions
from benchmarks.zoo.autoencoder import encode
from benchmarks.zoo.recipes import EMBEDDED
from benchmarks.zoo.world import Describer, World, pool
from sdguard import testbed
from sdguard.files.inputs import BadInput
from sdguard.files.resumable import measured
from sdguard.testbed.copies import SSCD, decode, find_copies, load_targets, shipped_cut

#: fresh compositions beside the pictures, and images a batch.
REFERENCE, BATCH = 200, 16
Data = Annotated[Path, typer.Option(help="pictures.npz of 'python -m benchmarks zoo data'.")]
WORLD = Path("build/zoo/pictures.npz")


class Pictures(NamedTuple):
    """The pictures of captions of the pool, ``n``, and ``m`` fresh compositions with captions of their own.

    Attributes:
        world: the prepared pictures they are made of.
        captions: rows of the pool, one a picture: text, kind, repetitions, group, copy_rate.
        shown: uint8 ``[n, H, W, 3]``.
        fresh: uint8 ``[m, H, W, 3]``, and ``fresh_texts``.
    """

    world: World
    captions: pd.DataFrame
    shown: np.ndarray
    fresh: np.ndarray
    fresh_texts: list[str]

    @property
    def texts(self) -> list[str]:
        """All captions, the fresh ones last."""
        return [*self.captions.text, *self.fresh_texts]

    def latents(self, vae: Any) -> Tensor:
        """All pictures as the denoiser sees them, ``[n + m, 4, h, w]``."""
        encoded = torch.cat([encode(vae, self.shown), encode(vae, self.fresh)])
        return (encoded * vae.config.scaling_factor).contiguous()  # forward-mode group norm takes no other layout


def load(data: Path) -> Pictures:
    """The pictures of `chosen` captions; raises `BadInput` where the world's data are not there."""
    if not data.exists():
        raise BadInput(f"{data} is not there: run 'python -m benchmarks zoo data' first.")
    world, rng = World(EMBEDDED, data), np.random.default_rng(90)
    captions = pool(EMBEDDED, world.scenes)
    which = chosen(captions)
    labels = pd.read_parquet(testbed.path() / "prompts.parquet")[["text", "kind", "repetitions", "group", "copy_rate"]]
    drawn, describe = [world.fresh(rng) for _ in range(REFERENCE)], Describer(EMBEDDED, captions, seed=90)
    texts = [describe(picture.words, specific=0.0) for picture in drawn]
    shown = np.stack([world.fixed(captions[i], 0).pixels for i in which])
    return Pictures(world, labels.iloc[which].reset_index(drop=True), shown, np.stack([picture.pixels for picture in drawn]), texts)


def generate(pipe: Any, part: pd.DataFrame) -> pd.DataFrame:
    """The latents that a plain run with seed 0 makes of each caption."""
    generators = [torch.Generator().manual_seed(0) for _ in range(len(part))]
    setting: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
    made = pipe(part.text.tolist(), generator=generators, output_type="latent", **setting).images
    return part.assign(latents=[row.numpy().tobytes() for row in made.float()])


def generated(pipe: Any, texts: Sequence[str], work: Path) -> Tensor:
    """What plain runs with seed 0 make of the captions, latents ``[n, 4, h, w]``; resumable, shared by processes."""
    table = measured("generated", pd.DataFrame({"text": list(texts)}), partial(generate, pipe), work, versions(), BATCH)
    made = np.stack([np.frombuffer(row, np.float32) for row in table.latents])
    side = int((made.shape[1] // pipe.unet.config.in_channels) ** 0.5)
    return torch.from_numpy(made).view(len(made), -1, side, side)


def decoded(vae: Any, latents: Tensor) -> np.ndarray:
    """The pictures of the denoiser's latents, uint8 ``[n, H, W, 3]``."""
    return decode(vae, latents / vae.config.scaling_factor)


def copied(vae: Any, images: np.ndarray, sscd: SSCD) -> np.ndarray:
    """Which pictures are copies of a target by the shipped criterion, ``[n]`` of bool."""
    targets, _ = load_targets(testbed.path(), vae)
    return find_copies(images, targets, sscd, shipped_cut(testbed.path())).copy
