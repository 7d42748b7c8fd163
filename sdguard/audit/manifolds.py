"""Worked example where all is known: data on linear manifolds, models whose score is exact, and one that a network has learned.

Each component is a Gaussian on a random linear subspace; the model's manifold is chosen beside the data's, so that every kind of point
of Ross et al. 2024 (their figure 1) is there: learned, overfitted to a point or to a line, and plain by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdguard.audit.dimension import DATA, NEITHER, OVERFITTING
from sdguard.audit.likelihood import level_of
from sdguard.audit.networks import Denoiser, seeded, trained
from sdguard.audit.subjects import Diffusion
from sdguard.observation import NoiseLevel

AMBIENT, APART = 20, 8.0
#: where the model's dimension is read, and under which dimension a point counts as simple.
LEVEL, SIMPLE = level_of(1e-3), 3.0
#: training of the network: enough to drive it to points that are shown often, as a larger network is driven to pictures.
EPOCHS, RATE = 300, 1e-3


class Component(NamedTuple):
    """A part of the data: its own dimension, the one the model has given it, and what that makes its points."""

    data: int
    model: int
    truth: str


#: learned; overfitted to points and to lines; plain, and learned.
COMPONENTS = (
    Component(8, 8, NEITHER),
    Component(8, 0, OVERFITTING),
    Component(8, 1, OVERFITTING),
    Component(1, 1, DATA),
    Component(1, 0, OVERFITTING),
)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians of one weight: means ``[m, D]`` and covariances ``[m, D, D]``, which may be singular."""

    means: Tensor
    covariances: Tensor

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws, ``[count, D]``."""
        which = torch.randint(len(self.means), (count,), generator=generator)
        eigenvalues, axes = self.axes
        white = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + torch.einsum("nde,ne->nd", axes[which], eigenvalues[which].clamp_min(0).sqrt() * white)

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[m, D]`` and eigenvectors ``[m, D, D]`` of the covariances."""
        found = torch.linalg.eigh(self.covariances)
        return found.eigenvalues, found.eigenvectors

    def noise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The exact noise prediction ``-s grad log p_t(x)``, ``[B, D]``."""
        eigenvalues, axes = self.axes
        variances = level.a**2 * eigenvalues + level.s**2
        along = torch.einsum("mde,bmd->bme", axes, x[:, None] - level.a * self.means)
        logs = -(along.square() / variances + variances.log()).sum(2) / 2
        return level.s * torch.einsum("bm,mde,bme->bd", logs.softmax(1), axes, along / variances)


def subspaces(dimensions: list[int], generator: torch.Generator) -> Tensor:
    """Covariances of unit Gaussians on nested random subspaces of these dimensions, ``[m, D, D]``."""
    basis = torch.linalg.qr(torch.randn(AMBIENT, AMBIENT, generator=generator, dtype=torch.double)).Q
    return torch.stack([basis[:, :d] @ basis[:, :d].T for d in dimensions])


class Drawn(NamedTuple):
    """Data and models of `COMPONENTS`, in their order.

    Attributes:
        points: the points looked at, as many of each component, ``[n, D]``.
        of: their components, ``[n]``.
        data: draws of the data, points included, ``[N, D]``.
        models: each component's own part of the model; where it is overfitted, a manifold through every point looked at.
    """

    points: Tensor
    of: list[Component]
    data: Tensor
    models: list[Mixture]

    @property
    def model(self) -> Mixture:
        """The whole model."""
        return Mixture(torch.cat([part.means for part in self.models]), torch.cat([part.covariances for part in self.models]))


def centres() -> Tensor:
    """The centre of each component, ``[m, D]``."""
    return APART * torch.eye(len(COMPONENTS), AMBIENT, dtype=torch.double)


def draw_sample(points: int, each: int, seed: int) -> Drawn:
    """``each`` data a component, of which the first ``points`` are looked at."""
    generator = torch.Generator().manual_seed(seed)
    looked, data, models = [], [], []
    for component, centre in zip(COMPONENTS, centres(), strict=True):
        own, modelled = subspaces([component.data, component.model], generator)
        drawn = centre + torch.randn(each, AMBIENT, generator=generator, dtype=torch.double) @ own
        means = drawn[:points] if component.model < component.data else centre[None]
        looked.append(drawn[:points])
        data.append(drawn)
        models.append(Mixture(means, modelled.expand(len(means), -1, -1)))
    return Drawn(torch.cat(looked), [component for component in COMPONENTS for _ in range(points)], torch.cat(data), models)


def learned(drawn: Drawn, seed: int = 0, epochs: int = EPOCHS) -> Denoiser:
    """A network trained on draws of the model, as many of each component as there are data: fewer points looked at come more often."""
    generator, each = torch.Generator().manual_seed(seed), len(drawn.data) // len(COMPONENTS)
    shown = torch.cat([part.sample(each, generator) for part in drawn.models]).float()
    return trained(seeded(lambda: Denoiser(AMBIENT), seed), shown, seed, epochs, RATE)


def manifolds(points: int = 20, each: int = 2000, seed: int = 0) -> Diffusion:
    """The example: 20 points of each component, dimension read where the noise is a thousandth of the manifolds' own scale."""
    drawn = draw_sample(points, each, seed)
    return Diffusion(drawn.model.noise, LEVEL, drawn.points, drawn.data, SIMPLE)
