"""Vector algebra of the rows of a batch, each on its own."""

import torch
from torch import Tensor


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of each pair of rows, ``[B]``."""
    return (one * other).flatten(1).sum(1)


def norm(v: Tensor) -> Tensor:
    """Euclidean norm of each row, ``[B]``."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1)


def expand_like(value: Tensor, like: Tensor) -> Tensor:
    """One number a row, ``[B]``, shaped ``[B, 1, ...]`` to broadcast over the rows of ``like``."""
    return value.view(-1, *[1] * (like.ndim - 1))


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation of each pair of images, every channel centred on its own mean over space, ``[B]``."""
    one, other = (z - z.mean(dim=(-2, -1), keepdim=True) for z in (one, other))
    return dot(one, other) / (norm(one) * norm(other)).clamp_min(1e-12)
