"""Worked examples on the 1,797 handwritten digits that ship in scikit-learn: 8x8 pixels of 17 levels, a VAE and a diffusion model.

Small enough that a hundred trainings take minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sdguard.audit.likelihood import elbo, importance_sampled, levels_between, probability_flow, signs
from sdguard.audit.subjects import Generator, LogLikelihood, Samples, Trainable
from sdguard.geometry import spread
from sdguard.observation import NoiseLevel

LEVELS, PIXELS = 16, 64
#: the training of a VAE: long enough that the held-out likelihood has levelled off, and not begun to fall.
EPOCHS, BATCH, LEARNING_RATE, HIDDEN, LATENTS = 100, 128, 3e-3, 256, 16
#: steps of the VAEs that memorize: enough for ten digits to be driven to deltas.
STEPS = 6000
#: a tenth of the learning rate, as in the paper: memorizes less.
SLOW = LEARNING_RATE / 10
IMPORTANCE_SAMPLES = 128
#: the diffusion model's noise, in units of the scaled pixels, which span 2.
LEAST_NOISE, MOST_NOISE = 0.05, 20.0


def digits() -> Tensor:
    """The pictures, ``[1797, 64]``, levels 0 to 16."""
    return torch.from_numpy(load_digits().data.astype(np.float32))


class VAE(nn.Module):
    """A VAE of one hidden layer on each side, binomial in each pixel, which for two levels is the paper's Bernoulli likelihood."""

    def __init__(self, latents: int = LATENTS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, PIXELS))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z | x), ``[B, k]`` each."""
        mean, log_std = self.encoder(x / (LEVELS / 2) - 1).chunk(2, dim=1)
        return mean, log_std

    def decode(self, z: Tensor) -> Tensor:
        """The picture's mean, in [0, 1], ``[B, 64]``: the generator whose density is looked at."""
        return self.decoder(z).sigmoid()

    def conditional(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[B]``: each pixel binomial in `LEVELS` trials."""
        logits = self.decoder(z)
        choose = math.lgamma(LEVELS + 1) - torch.lgamma(x + 1) - torch.lgamma(LEVELS - x + 1)
        return (choose + x * F.logsigmoid(logits) + (LEVELS - x) * F.logsigmoid(-logits)).sum(1)

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Minus the bound of log p(x), ``[B]``: one draw of z, the divergence to the prior in closed form."""
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
        divergence = (mean.square() + (2 * log_std).exp() - 1).sum(1) / 2 - log_std.sum(1)
        return divergence - self.conditional(x, z)

    def log_likelihood(self, x: Tensor, samples: int = IMPORTANCE_SAMPLES) -> Tensor:
        """log p(x) by importance sampling, ``[B]``; the same draws for every model, so that differences of models are sharper."""
        with torch.no_grad():
            return importance_sampled(self.encode, self.conditional, x, samples, torch.Generator().manual_seed(0))


class Denoiser(nn.Module):
    """A noise-predicting network of three hidden layers for points ``[B, d]``, at any noise level."""

    def __init__(self, d: int = PIXELS, hidden: int = 256) -> None:
        super().__init__()
        self.into = nn.Linear(d + 17, hidden)
        self.layers = nn.ModuleList(nn.Linear(hidden + 17, hidden) for _ in range(2))
        self.out = nn.Linear(hidden, d)
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 ** torch.arange(8) / 4)

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Noise predictions, ``[B, d]``; ``level`` may hold a tensor ``[B]`` each."""
        a, s = (torch.as_tensor(part, dtype=x.dtype).expand(len(x)) for part in level)
        log_sigma = (s / a).log()[:, None]
        angles = log_sigma * self.frequencies
        time = torch.cat([log_sigma / 3, angles.sin(), angles.cos()], dim=1)
        h = F.silu(self.into(torch.cat([x, time], dim=1)))
        for layer in self.layers:
            h = h + F.silu(layer(torch.cat([h, time], dim=1)))
        return spread(s, x) * x + spread(a, x) * self.out(h)  # v-prediction: right by itself where all is noise

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Squared error of the noise at a level drawn evenly in log s / a, ``[B]``: the bound's own weighting, up to a constant."""
        u = torch.rand(len(x), generator=generator)
        sigma = (math.log(LEAST_NOISE) + u * math.log(MOST_NOISE / LEAST_NOISE)).exp()
        a, s = (1 + sigma.square()).rsqrt(), sigma * (1 + sigma.square()).rsqrt()
        eps = torch.randn(x.shape, generator=generator)
        level: Any = (a, s)
        return (eps - self(spread(a, x) * x + spread(s, x) * eps, level)).square().sum(1)


def trained(
    model: Any,
    data: Tensor,
    seed: int,
    epochs: int,
    rate: float = LEARNING_RATE,
    batch: int = BATCH,
    each: Callable[[], None] = lambda: None,
) -> Any:
    """Minimise ``model.loss`` over ``data`` by Adam, its rate falling to nothing along a cosine; ``each`` is called after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    steps = epochs * math.ceil(len(data) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(batch):
            optimizer.zero_grad()
            model.loss(data[rows], generator).mean().backward()
            optimizer.step()
            schedule.step()
        each()
    return model.eval().requires_grad_(False)


def new_vae(seed: int, latents: int = LATENTS, hidden: int = HIDDEN) -> VAE:
    """A VAE with the initial weights of ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VAE(latents, hidden)


def new_denoiser(seed: int, d: int = PIXELS) -> Denoiser:
    """A denoiser with the initial weights of ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Denoiser(d)


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


def of_points(points: int, seed: int = 0, latents: int = 2, steps: int = STEPS) -> VAE:
    """A VAE with few latents trained for so many steps on ``points`` of the digits: the fewer, the more of them it memorizes."""
    rows = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(seed))[:points]
    return trained(new_vae(seed, latents), digits()[rows], seed, math.ceil(steps / math.ceil(points / BATCH)))


def decoder(points: int = 1797) -> Generator:
    """The decoder of `of_points`, at draws of the prior."""
    model = of_points(points)
    return Generator(model.decode, torch.randn(512, 2, generator=torch.Generator().manual_seed(1)))


def split(held_out: int) -> tuple[Tensor, Tensor]:
    """Rows of the training points and of ``held_out`` others, at random."""
    rows = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    return rows[held_out:], rows[:held_out]


def samples(held_out: int = 450) -> Samples:
    """What the VAE draws, as many as are held out, beside what it was trained on and what it was not."""
    training, rest = split(held_out)
    model = trained(new_vae(0), digits()[training], 0, EPOCHS)
    z = torch.randn(held_out, LATENTS, generator=torch.Generator().manual_seed(1))
    return Samples((LEVELS * model.decode(z)).numpy(), digits()[training].numpy(), digits()[rest].numpy())
