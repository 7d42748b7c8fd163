"""Worked example where everything is known: data on linear manifolds of known dimension, and models whose score is exact.

Each component is a Gaussian on a random linear subspace; the model's manifold is chosen beside the data's, so that every kind of point
of Ross et al. 2024 (their figure 1) is there: learnt, overfitted to a point or to a line, and plain by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sdguard.audit.dimension import DATA, NEITHER, OVERFITTING
from sdguard.audit.likelihood import level_of
from sdguard.audit.subjects import Diffusion
from sdguard.observation import NoiseLevel

AMBIENT, APART = 20, 30.0
#: where the model's dimension is read, and under which dimension a point counts as simple.
LEVEL, SIMPLE = level_of(1e-3), 3.0


class Component(NamedTuple):
    """A part of the data: its own dimension, the one the model has given it, and what that makes its points."""

    data: int
    model: int
    truth: str


#: learnt; overfitted to points and to lines; plain, and learnt.
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


def draw(points: int, each: int, seed: int) -> tuple[Tensor, Tensor, Mixture, list[Component]]:
    """``each`` data a component, of which the first ``points`` are looked at: these, the data, the model, and their components.

    A model that is overfitted has a manifold of its own through every point that is looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    looked, data, means, covariances, of = [], [], [], [], []
    for i, component in enumerate(COMPONENTS):
        centre = torch.zeros(AMBIENT, dtype=torch.double)
        centre[i] = APART
        own, modelled = subspaces([component.data, component.model], generator)
        drawn = centre + torch.randn(each, AMBIENT, generator=generator, dtype=torch.double) @ own
        own_mean = drawn[:points] if component.model < component.data else centre[None]
        looked.append(drawn[:points])
        data.append(drawn)
        means.append(own_mean)
        covariances.append(modelled.expand(len(own_mean), -1, -1))
        of += [component] * points
    return torch.cat(looked), torch.cat(data), Mixture(torch.cat(means), torch.cat(covariances)), of


def manifolds(points: int = 20, each: int = 2000, seed: int = 0) -> Diffusion:
    """The example: 20 points of each component, dimension read where the noise is a thousandth of the manifolds' own scale."""
    looked, data, model, _ = draw(points, each, seed)
    return Diffusion(model.noise, LEVEL, looked, data, SIMPLE)
