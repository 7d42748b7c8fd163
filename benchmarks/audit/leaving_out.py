"""Small trainings of the embedded model's recipe with some of its pictures left out, for their memorization score.

The shipped model has seen every picture, so that the definition needs others. These share its world, autoencoder, tokenizer and loss; the
UNet has half the channels and trains for `STEPS` steps from scratch, text encoder included. A picture comes as often as in an epoch of the
recipe, beside half as many fresh compositions; one that is left out gives its visits to those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from benchmarks.zoo.autoencoder import encode
from benchmarks.zoo.recipes import EMBEDDED
from benchmarks.zoo.shapes import SCHEDULE, new_embedded_unet, new_text_encoder
from benchmarks.zoo.train import EMPTY_CAPTIONS, compositions
from benchmarks.zoo.training import ema_update
from benchmarks.zoo.world import Caption, Describer, World, pool
from sdguard import testbed
from sdguard.audit.likelihood import elbo
from sdguard.audit.memorization import memorization
from sdguard.audit.subjects import LogLikelihood, Trainable
from sdguard.observation import NoiseLevel, noise_level, to_noise

STEPS, BATCH, RATE, EMA = 600, 32, 1e-3, 0.99
#: share of training visits that are fresh compositions, beside those given up by what is left out.
FRESH = 0.36
LEVELS, DRAWS = 24, 2
FOLDS, REPEATS = 2, 2
#: captions shown once or never that are looked at beside the repeated ones.
FEW = 40


def chosen(captions: tuple[Caption, ...]) -> list[int]:
    """The captions with one picture that are looked at: every one repeated, and `FEW` each of those shown once and never."""
    single = [i for i, c in enumerate(captions) if c.kind in ("verbatim", "template")]
    some = {n: [i for i in single if captions[i].repetitions == n and captions[i].kind == "verbatim"][:FEW] for n in (0, 1)}
    return sorted([i for i in single if captions[i].repetitions > 1] + some[0] + some[1])


def visits(captions: tuple[Caption, ...], left_out: set[int], rng: np.random.Generator, count: int) -> np.ndarray:
    """What each of ``count`` visits shows, ``FRESH`` of them -1 for a fresh composition, the others in the recipe's proportions."""
    repetitions = np.array([c.repetitions for c in captions])
    times = np.floor(repetitions * (1 - FRESH) * count / repetitions.sum() + rng.random(len(captions))).astype(int)
    shown = np.full(count, -1)
    picked = np.repeat(np.arange(len(captions)), times)[:count]
    shown[: len(picked)] = np.where(np.isin(picked, list(left_out)), -1, picked)
    return rng.permutation(shown)


def small_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """The embedded model's UNet at half its channels."""
    config = dict(new_embedded_unet(cross_attention_dim).config)
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return UNet2DConditionModel.from_config({**kept, "block_out_channels": (32, 64, 96), "norm_num_groups": 8})


class LeavingOut:
    """The trainings, with everything in memory that they share."""

    def __init__(self, data: Path, work: Path, steps: int = STEPS) -> None:
        pipe = testbed.load()
        world = World(EMBEDDED, data)
        self.captions, self.steps = pool(EMBEDDED, world.scenes), steps
        self.tokenizer, self.scale = pipe.tokenizer, pipe.vae.config.scaling_factor
        kept = compositions(world, pipe.vae, work / "compositions.pt")
        self.latents, self.words = kept["latents"], kept["words"]
        self.targets = encode(pipe.vae, np.stack([world.fixed(caption, 0).pixels for caption in self.captions])) * self.scale
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def ids(self, texts: list[str]) -> Tensor:
        """Token ids, ``[B, T]``."""
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def fit(self, kept: Tensor, seed: int, looked_at: list[int]) -> LogLikelihood:
        """Train without those of ``looked_at`` that are not ``kept``; the bound of log p(picture | caption) of pool captions by index."""
        rng = np.random.default_rng(seed)
        left_out = set(looked_at) - set(kept.tolist())
        shown = visits(self.captions, left_out, rng, self.steps * BATCH).reshape(self.steps, BATCH)
        describe = Describer(EMBEDDED, self.captions, seed=seed % 2**31)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            text_encoder = new_text_encoder(self.tokenizer)
            both: Any = nn.ModuleDict({"text_encoder": text_encoder, "unet": small_unet(text_encoder.config.hidden_size)})
            average: Any = nn.ModuleDict({"text_encoder": new_text_encoder(self.tokenizer), "unet": small_unet(160)})
        average.load_state_dict(both.state_dict())
        optimizer = torch.optim.AdamW(both.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.steps // 10, self.steps)
        for step, row in enumerate(shown):
            fresh = rng.integers(len(self.words), size=BATCH)
            x0 = torch.stack([self.targets[v] if v >= 0 else self.latents[i].float() * self.scale for v, i in zip(row, fresh, strict=True)])
            texts = [self.captions[v].text if v >= 0 else describe(self.words[i]) for v, i in zip(row, fresh, strict=True)]
            ids = self.ids(["" if rng.random() < EMPTY_CAPTIONS else text for text in texts])
            noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
            t = torch.from_numpy(rng.integers(self.scheduler.config.num_train_timesteps, size=len(x0)))
            with torch.autocast("cpu", torch.bfloat16):
                velocity = both["unet"](self.scheduler.add_noise(x0, noise, t), t, both["text_encoder"](ids)[0]).sample
            loss = F.mse_loss(velocity.float(), self.scheduler.get_velocity(x0, noise, t))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema_update(average, both, step, EMA)
        average.eval().requires_grad_(False)
        return lambda points: self.bound(average, points)

    def bound(self, model: Any, points: Tensor) -> Tensor:
        """The variational bound of log p(picture | caption) for captions by index, in nats of their latents, ``[n]``."""
        timesteps = torch.linspace(20, 980, LEVELS).round().tolist()
        levels = {noise_level(self.scheduler, t): t for t in timesteps}
        draws, found = torch.Generator().manual_seed(0), []
        for some in points.split(64):
            condition = model["text_encoder"](self.ids([self.captions[i].text for i in some.tolist()]))[0]

            def noise(x: Tensor, level: NoiseLevel, condition: Tensor = condition) -> Tensor:
                t = torch.full((len(x),), levels[level])
                with torch.autocast("cpu", torch.bfloat16):
                    return to_noise(model["unet"](x, t, condition).sample.float(), x, level, "v_prediction")

            found.append(elbo(noise, self.targets[some], list(levels), DRAWS, draws))
        return torch.cat(found)


def subject(data: Path, work: Path, steps: int = STEPS) -> Trainable:
    """The audit's subject: indices of pool captions; those of one template, which share a photograph, are left out together."""
    trainings = LeavingOut(data, work, steps)
    looked_at = chosen(trainings.captions)
    groups = np.array([trainings.captions[i].group for i in looked_at])
    return Trainable(torch.tensor(looked_at), lambda kept, seed: trainings.fit(kept, seed, looked_at), groups)


def scores(data: Path, testbed_work: Path, work: Path) -> pd.DataFrame:
    """The memorization score of each caption that is looked at, in `FOLDS` folds and `REPEATS` repeats; resumable, shared by processes."""
    found = subject(data, testbed_work)
    table = memorization(found, FOLDS, REPEATS, 0, work, {"model": "leaving out", "folds": FOLDS, "steps": STEPS, "batch": BATCH})
    return table.assign(caption=[int(i) for i in found.data])
