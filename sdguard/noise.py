"""Noise that nobody's random generator is asked for: a fixed function of each image's own; and generators left as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def independent_noise(x: Tensor, draw: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
    """Gaussian noise like ``x``, or of another ``shape`` for each row; independent of it, a function of each row alone and of ``draw``.

    Of every bit of the row: what a network has computed, whose last bits round with threads and processor, gives another draw on each.
    """
    rows = []
    for row in x.cpu():
        digest = hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=7, key=draw.to_bytes(4, "big") if draw else b"")
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big"))
        rows.append(torch.randn(shape or row.shape, generator=generator, device="cpu"))
    return torch.stack(rows).to(x)


@contextmanager
def generators_kept(drawn_from: bool) -> Iterator[None]:
    """After the block the generators of torch, numpy and Python are where they were, if they may be ``drawn_from``, as by dropout."""
    if not drawn_from:
        yield
        return
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)
