"""Nearest-neighbour tests: the baseline that the three papers argue against.

They see a copy where a picture lies near another in some metric, and nothing where a model has memorized without copying
(van den Burg & Williams 2021, section 4).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.neighbors import NearestNeighbors

#: pictures or points ``[n, ...]`` -> what distances are taken of, ``[n, k]``.
Embedding = Callable[[np.ndarray], np.ndarray]


def pixels(points: np.ndarray) -> np.ndarray:
    """Points as they are, ``[n, d]`` float; pictures of bytes in [0, 1]."""
    flat = points.reshape(len(points), -1)
    return flat.astype(np.float32) / 255 if points.dtype == np.uint8 else flat.astype(np.float32)


def nearest(of: np.ndarray, among: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances to the ``count`` nearest, and which they are, ``[n, count]`` each."""
    return NearestNeighbors(n_neighbors=count).fit(among).kneighbors(of)


def second_ratio(generated: np.ndarray, training: np.ndarray, embed: Embedding = pixels) -> np.ndarray:
    """Distance of each generated point to its nearest training point over that to the second nearest, ``[n]``; small for a copy."""
    distances, _ = nearest(embed(generated), embed(training), 2)
    return distances[:, 0] / np.maximum(distances[:, 1], 1e-12)


def sample_ratio(training: np.ndarray, held_out: np.ndarray, generated: np.ndarray, embed: Embedding = pixels) -> np.ndarray:
    """Distance of each training point to its nearest held-out point over that to its nearest generated one, ``[n]``.

    The rho_i of van den Burg & Williams 2021, section 4: above 1 the model draws nearer to the point than unseen data come. To be
    comparable, there should be as many generated points as held-out ones.
    """
    among = embed(training)
    to_held_out, _ = nearest(among, embed(held_out))
    to_generated, _ = nearest(among, embed(generated))
    return to_held_out[:, 0] / np.maximum(to_generated[:, 0], 1e-12)
