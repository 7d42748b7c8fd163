"""Is it memorized, and why: the model's local intrinsic dimension against the data's.

Ross et al. 2024 (2411.00113), the manifold memorization hypothesis: a point is memorized where the model's manifold has too few
dimensions there. OD-Mem, driven by overfitting: ``LID_model(x) < LID_data(x)``. DD-Mem, driven by the data: the two agree, and
``LID_data(x)`` is itself small. The model's by FLIPD (Kamkari et al. 2024, 2406.03537), the data's by nearest neighbours
(Levina & Bickel 2004), from scikit-dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import linregress, norm
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from sdguard.audit.likelihood import divergence
from sdguard.audit.subjects import Noise
from sdguard.geometry.dimension import flipd
from sdguard.geometry.hessian import exact_product, trace
from sdguard.observation import NoiseLevel

OVERFITTING, DATA, NEITHER = "OD-Mem", "DD-Mem", "neither"
NEIGHBOURS = 50
#: share of the distance to the last neighbour under which the first is the point itself; distances come out of a difference of squares.
SAME = 1e-5


class Dimension(NamedTuple):
    """A local intrinsic dimension and its standard error, ``[n]`` each."""

    value: np.ndarray
    standard_error: np.ndarray


def model_dimension(noise: Noise, x: Tensor, level: NoiseLevel, probes: Sequence[Tensor] | None = None) -> Dimension:
    """FLIPD at clean points ``x`` ``[n, ...]``, read at ``level``: with the exact trace, or by ``probes`` of signs and with their error.

    The bias of a learned network and of a noise level that is not small is not in the error; nor is a few probes' own error sure, which
    is small where their value happens to be. Cost: 1 evaluation and one forward-mode product a probe, or a dimension.
    """

    def score(y: Tensor) -> Tensor:
        return -noise(y, level) / level.s

    with torch.no_grad():
        y = level.a * x
        if probes is None:
            _, value = divergence(score, y, None)
            return Dimension(flipd(score, value, y, level).numpy(), np.zeros(len(y)))
        estimate = trace(exact_product(score, y), probes)
        return Dimension(flipd(score, estimate.value, y, level).numpy(), level.s**2 * estimate.standard_error.numpy())


def data_dimension(points: np.ndarray, data: np.ndarray, neighbours: int = NEIGHBOURS) -> Dimension:
    """The data's dimension at ``points`` ``[n, d]`` from their nearest of ``data`` ``[N, d]``; points themselves do not count.

    The maximum-likelihood estimator of Levina & Bickel 2004, unbiased as MacKay & Ghahramani 2005 correct it; its error is the
    asymptotic ``m / sqrt(k - 3)``. It is too low where the dimension is high against log N, whatever the library.

    Raises:
        ModuleNotFoundError: scikit-dimension (extra ``audit``) is not installed; the message says so.
        ValueError: there are fewer data than neighbours.
    """
    try:
        import skdim
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The data's dimension needs scikit-dimension: pip install 'sdguard[audit]'.") from None
    if len(data) <= neighbours:
        raise ValueError(f"{neighbours} nearest neighbours cannot be had of {len(data)} data points.")
    data, points = data.astype(np.float64), points.astype(np.float64)
    distances, rows = NearestNeighbors(n_neighbors=neighbours + 1).fit(data).kneighbors(points)
    itself = distances[:, 0] < SAME * distances[:, -1]
    distances = np.where(itself[:, None], distances[:, 1:], distances[:, :-1])
    rows = np.where(itself[:, None], rows[:, 1:], rows[:, :-1])
    estimator = skdim.id.MLE(unbiased=True).fit(data, precomputed_knn_arrays=(np.maximum(distances, 1e-12), rows))
    return Dimension(estimator.dimension_pw_, estimator.dimension_pw_ / (neighbours - 3) ** 0.5)


def aligned(model: Dimension, reference: Dimension, reference_data: Dimension, data: Dimension) -> Dimension:
    """What the data's dimension at a point lets one expect of the model's, by a line through ``reference`` points that are not memorized.

    A network biases FLIPD, and the nearest-neighbour estimate is too low where dimensions are high, so that on pictures the two have
    no common scale. The error is the spread of the reference points about their line.
    """
    line = linregress(reference_data.value, reference.value)
    expected = line.intercept + line.slope * data.value
    spread = np.std(reference.value - line.intercept - line.slope * reference_data.value, ddof=2)
    return Dimension(expected, np.full_like(model.value, spread))


def deficit(model: Dimension, data: Dimension) -> np.ndarray:
    """By how many standard errors the model has fewer dimensions than the data (or than `aligned` expects), ``[n]``."""
    return (data.value - model.value) / np.hypot(model.standard_error, data.standard_error)


def classify(model: Dimension, data: Dimension, simple: np.ndarray, level: float = 0.05) -> np.ndarray:
    """`OVERFITTING`, `DATA` or `NEITHER` for each point, ``[n]``, each claim at a one-sided error of ``level``.

    Args:
        data: the data's dimension, or what is expected of the model's (`aligned`).
        simple: ``[n]`` of bool, where the data's dimension is small.
    """
    overfitted = deficit(model, data) > norm.ppf(1 - level)
    return np.where(overfitted, OVERFITTING, np.where(simple, DATA, NEITHER))


def below(data: Dimension, bound: float, level: float = 0.05) -> np.ndarray:
    """Where a dimension is smaller than ``bound`` at a one-sided error of ``level``, ``[n]`` of bool."""
    return data.value + norm.ppf(1 - level) * data.standard_error < bound
