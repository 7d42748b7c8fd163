"""Detection statistics: area under the ROC curve, true-positive rate at a false-positive rate, shares; their cluster-bootstrap intervals.

Samples come with a weight each. The weights of a bootstrap draw count how often it drew each sample's cluster, so that all draws are
computed at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A statistic and its 95% percentile interval; nan where it cannot be told."""

    value: float
    low: float
    high: float


def auc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of ``weights`` ``[R, n]``, ``[R]``: the probability that a positive scores over a negative.

    Ties count half (Mann & Whitney 1947). nan where a row draws one class only.
    """
    positive, negative = score[truth], score[~truth]
    over = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    w_positive, w_negative = weights[:, truth], weights[:, ~truth]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("rp,pn,rn->r", w_positive, over, w_negative, optimize=True) / (w_positive.sum(1) * w_negative.sum(1))


def true_positive_rates(truth: np.ndarray, score: np.ndarray, weights: np.ndarray, false_positive_rates: np.ndarray) -> np.ndarray:
    """`true_positive_rate` at each of ``false_positive_rates``, ``[F, R]``, for one sort and one pass over the weights."""
    order = np.argsort(-score[~truth], kind="stable")
    negative, w_negative = score[~truth][order], weights[:, ~truth][:, order]
    last = np.append(negative[1:] != negative[:-1], True)  # of equal scores; a threshold cannot part them
    exceed = np.cumsum(w_negative, axis=1)[:, last]
    negatives = w_negative.sum(1)
    bounds = false_positive_rates[:, None] * negatives + 1e-9
    allowed = np.stack([np.searchsorted(e, bound, side="right") for e, bound in zip(exceed, bounds.T, strict=True)], axis=1)
    # the threshold is the score of the first group of equal negatives that is no longer allowed
    groups = np.append(negative[last], -np.inf)
    ascending = np.argsort(score[truth])
    over = len(ascending) - np.searchsorted(score[truth], groups, side="right", sorter=ascending)
    hit = np.cumsum(np.pad(weights[:, truth][:, ascending[::-1]], ((0, 0), (1, 0))), axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = hit[np.arange(len(weights)), over[allowed]] / hit[:, -1]
    return np.where(negatives > 0, rate, np.nan)


def true_positive_rate(truth: np.ndarray, score: np.ndarray, weights: np.ndarray, false_positive_rate: float) -> np.ndarray:
    """Share of positives over the smallest threshold that at most ``false_positive_rate`` of the negatives exceed, ``[R]``; see `auc`."""
    return true_positive_rates(truth, score, weights, np.array([false_positive_rate]))[0]


def bootstrap_weights(clusters: np.ndarray, seed: int = 0) -> np.ndarray:
    """How often each sample is drawn in `RESAMPLES` draws of as many whole clusters as there are, ``[R, n]``."""
    names, member = np.unique(clusters, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return draws[:, member].astype(float)


def estimates(truth: np.ndarray, score: np.ndarray, clusters: np.ndarray, false_positive_rate: float) -> tuple[Estimate, Estimate]:
    """`auc` and `true_positive_rate` of n samples with intervals by bootstrap of whole clusters."""
    weights = np.concatenate([np.ones((1, len(truth))), bootstrap_weights(clusters)])
    found = []
    for values in (auc(truth, score, weights), true_positive_rate(truth, score, weights, false_positive_rate)):
        finite = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
        found.append(Estimate(float(values[0]), float(low), float(high)))
    return found[0], found[1]


def share_estimate(hits: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The share of ``hits`` ``[n]`` with its interval by bootstrap of whole clusters; nan where there are none, or one is not a number."""
    if not len(hits):
        return Estimate(np.nan, np.nan, np.nan)
    weights = bootstrap_weights(clusters)
    low, high = np.quantile(weights @ hits / weights.sum(axis=1), [0.025, 0.975])
    return Estimate(float(hits.mean()), float(low), float(high))


def roc_band(truth: np.ndarray, score: np.ndarray, clusters: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ROC curve's true-positive rate at each of ``rates``, and its 95% bootstrap band: three arrays ``[len(rates)]``."""
    weights = np.concatenate([np.ones((1, len(truth))), bootstrap_weights(clusters)])
    curves = true_positive_rates(truth, score, weights, rates)
    low, high = np.nanquantile(curves[:, 1:], [0.025, 0.975], axis=1)
    return curves[:, 0], low, high
