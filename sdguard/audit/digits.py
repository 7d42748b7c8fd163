"""Worked examples on the 1,797 handwritten digits that ship in scikit-learn: 8x8 pixels of 17 levels, a VAE and a diffusion model."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from sdguard.audit.likelihood import elbo, levels_between, probability_flow, signs
from sdguard.audit.networks import BATCH, LEAST_NOISE, MOST_NOISE, VAE, Denoiser, seeded, trained
from sdguard.audit.subjects import Generator, LogLikelihood, Samples, Trainable

LEVELS, PIXELS = 16, 64
#: the training of a VAE: long enough that the held-out likelihood has levelled off, and not begun to fall.
EPOCHS, LEARNING_RATE, LATENTS = 100, 3e-3, 16
#: steps of the VAEs that memorize: enough for ten digits to be driven to deltas.
STEPS = 6000
#: digits held out where samples are compared with what was and what was not trained on.
HELD_OUT = 450
#: a tenth of the learning rate, as in the paper: memorizes less.
SLOW = LEARNING_RATE / 10


def digits() -> Tensor:
    """The pictures, ``[1797, 64]``, levels 0 to 16."""
    return torch.from_numpy(load_digits().data.astype(np.float32))


def new_vae(seed: int, latents: int = LATENTS) -> VAE:
    """An untrained VAE of digits."""
    return seeded(lambda: VAE(PIXELS, LEVELS, latents), seed)


def new_denoiser(seed: int) -> Denoiser:
    """An untrained denoiser of digits."""
    return seeded(lambda: Denoiser(PIXELS), seed)


def vae(rate: float = LEARNING_RATE, epochs: int = EPOCHS) -> Trainable:
    """The VAE, under its importance-sampled likelihood."""

    def fit(data: Tensor, seed: int) -> LogLikelihood:
        return trained(new_vae(seed), data, seed, epochs, rate).log_likelihood

    return Trainable(digits(), fit)


def scaled(data: Tensor) -> Tensor:
    """Levels as the diffusion model sees them, in [-1, 1]."""
    return data / (LEVELS / 2) - 1


def slow_vae() -> Trainable:
    """The VAE at a tenth of the learning rate."""
    return vae(SLOW)


def diffusion_flow() -> Trainable:
    """The diffusion model under the likelihood of its probability flow."""
    return diffusion("flow")


def diffusion(likelihood: str = "elbo", epochs: int = 100) -> Trainable:
    """The diffusion model, under its bound (``"elbo"``) or the likelihood of its probability flow (``"flow"``)."""
    levels = levels_between(LEAST_NOISE, MOST_NOISE, 48 if likelihood == "elbo" else 16)

    def fit(data: Tensor, seed: int) -> LogLikelihood:
        model = trained(new_denoiser(seed), scaled(data), seed, epochs, rate=1e-3)

        def log_likelihood(points: Tensor) -> Tensor:
            draws = torch.Generator().manual_seed(0)  # the same for every model, so that differences of models are sharper
            x = scaled(points)
            if likelihood == "elbo":
                return elbo(model, x, levels, draws=4, generator=draws)
            return probability_flow(model, x, levels, signs(x, 2, draws))

        return log_likelihood

    return Trainable(digits(), fit)


def rows(points: int, seed: int) -> Tensor:
    """Rows of ``points`` digits drawn at random."""
    return torch.randperm(len(digits()), generator=torch.Generator().manual_seed(seed))[:points]


def of_points(points: int, seed: int = 0, latents: int = 2, steps: int = STEPS) -> VAE:
    """A VAE with few latents trained for so many steps on ``points`` of the digits: the fewer or the longer, the more it memorizes."""
    epochs = math.ceil(steps / math.ceil(points / BATCH))
    return trained(new_vae(seed, latents), digits()[rows(points, seed)], seed, epochs, LEARNING_RATE)


def decoder(points: int = 1797) -> Generator:
    """The decoder of `of_points`, at draws of the prior."""
    model = of_points(points)
    return Generator(model.decode, torch.randn(512, 2, generator=torch.Generator().manual_seed(1)))


def split_digits(held_out: int) -> tuple[Tensor, Tensor]:
    """Rows of the training points and of ``held_out`` others, at random."""
    every = rows(len(digits()), 0)
    return every[held_out:], every[:held_out]


def samples(held_out: int = HELD_OUT) -> Samples:
    """What the VAE draws, as many as are held out, beside what it was trained on and what it was not."""
    training, rest = split_digits(held_out)
    model = trained(new_vae(0), digits()[training], 0, EPOCHS, LEARNING_RATE)
    z = torch.randn(held_out, LATENTS, generator=torch.Generator().manual_seed(1))
    return Samples((LEVELS * model.decode(z)).numpy(), digits()[training].numpy(), digits()[rest].numpy())
