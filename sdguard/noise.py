"""Noise that nobody's random generator is asked for: a fixed function of each image's own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def independent_noise(x: Tensor, draw: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
    """Gaussian noise like ``x``, or of another ``shape`` for each row; independent of it, a function of each row alone and of ``draw``."""
    rows = []
    for row in x.cpu():
        digest = hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=7, key=draw.to_bytes(4, "big") if draw else b"")
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))
        rows.append(torch.randn(shape or row.shape, generator=generator))
    return torch.stack(rows).to(x)
