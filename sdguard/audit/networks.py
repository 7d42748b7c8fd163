"""The small networks of the worked examples, and how they are trained: a VAE and a noise-predicting network for points.

Small enough that a hundred trainings take minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdguard.audit.likelihood import importance_sampled
from sdguard.geometry.rowwise import expand_like
from sdguard.observation import NoiseLevel

BATCH, HIDDEN, IMPORTANCE_SAMPLES = 128, 256, 128
#: the noise a `Denoiser` is trained on, in the points' own units.
LEAST_NOISE, MOST_NOISE = 0.05, 20.0


class VAE(nn.Module):
    """A VAE of one hidden layer in the encoder and two in the decoder, binomial in each pixel: for two levels a Bernoulli likelihood.

    Pictures are ``[B, pixels]``, whole numbers from 0 to ``levels``.
    """

    def __init__(self, pixels: int, levels: int, latents: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.levels = levels
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of q(z | x), ``[B, k]`` each."""
        mean, log_std = self.encoder(x / (self.levels / 2) - 1).chunk(2, dim=1)
        return mean, log_std

    def decode(self, z: Tensor) -> Tensor:
        """The picture's mean, in [0, 1], ``[B, pixels]``: the generator whose density is looked at."""
        return self.decoder(z).sigmoid()

    def conditional(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), ``[B]``: each pixel binomial in ``levels`` trials."""
        logits = self.decoder(z)
        choose = math.lgamma(self.levels + 1) - torch.lgamma(x + 1) - torch.lgamma(self.levels - x + 1)
        return (choose + x * F.logsigmoid(logits) + (self.levels - x) * F.logsigmoid(-logits)).sum(1)

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

    def __init__(self, d: int, hidden: int = HIDDEN) -> None:
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
        return expand_like(s, x) * x + expand_like(a, x) * self.out(h)  # v-prediction: right by itself where all is noise

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Squared error of the noise at a level drawn evenly in log s / a, ``[B]``: the bound's own weighting, up to a constant."""
        u = torch.rand(len(x), generator=generator)
        sigma = (math.log(LEAST_NOISE) + u * math.log(MOST_NOISE / LEAST_NOISE)).exp()
        a, s = (1 + sigma.square()).rsqrt(), sigma * (1 + sigma.square()).rsqrt()
        eps = torch.randn(x.shape, generator=generator)
        level: Any = (a, s)
        return (eps - self(expand_like(a, x) * x + expand_like(s, x) * eps, level)).square().sum(1)


def seeded(make: Callable[[], Any], seed: int) -> Any:
    """What ``make`` makes, with the initial weights of ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def trained(
    model: Any,
    data: Tensor,
    seed: int,
    epochs: int,
    rate: float,
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
