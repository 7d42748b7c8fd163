"""The memorization score: by how much having seen a training point raises its log-likelihood.

van den Burg & Williams 2021 (2106.03216), section 3: the leave-one-out score
``M_i = E log p(x_i | D) - E log p(x_i | D without x_i)``, the expectation over trainings, estimated by their algorithm 1, repeated K-fold
cross-validation. It is Feldman's (2020) memorization score with a log density for a classifier's accuracy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sdguard.audit.subjects import Trainable
from sdguard.files.resumable import measured


class Scores(NamedTuple):
    """The memorization score of each point, ``[n]`` each, in nats.

    Attributes:
        score: ``seen - unseen``.
        standard_error: over the repeats, of which each is an independent draw of folds and trainings; infinite for a single one.
        seen: mean log-likelihood under models trained on the point.
        unseen: under models trained without it.
    """

    score: np.ndarray
    standard_error: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray


def scores(log_likelihood: np.ndarray, fold: np.ndarray) -> Scores:
    """Algorithm 1's end, of each point's ``log_likelihood`` under each model, ``[L, K, n]``, and the ``fold`` that held it out, ``[L, n]``.

    In each repeat the mean over the K - 1 models whose training held the point, minus the one whose training did not; then the mean
    over repeats. With K folds the models compared differ by n/K points, not by one.
    """
    repeats, folds, _ = log_likelihood.shape
    held_out = fold[:, None, :] == np.arange(folds)[None, :, None]
    unseen = np.where(held_out, log_likelihood, 0).sum(1)
    seen = np.where(held_out, 0, log_likelihood).sum(1) / (folds - 1)
    each = seen - unseen
    error = each.std(0, ddof=1) / repeats**0.5 if repeats > 1 else np.full(each.shape[1], np.inf)
    return Scores(each.mean(0), error, seen.mean(0), unseen.mean(0))


def fold_of(groups: np.ndarray, folds: int, repeat: int, seed: int) -> np.ndarray:
    """The fold in which each point is held out, ``[n]``: groups whole, drawn at random, as even as can be."""
    names, member = np.unique(groups, return_inverse=True)
    return (np.random.default_rng((seed, repeat)).permutation(len(names)) % folds)[member]


def training_seed(seed: int, repeat: int, fold: int) -> int:
    """Each training's own seed, so that its initial weights and batches are independent of the others'."""
    return int(np.random.SeedSequence((seed, repeat, fold)).generate_state(1)[0])


def log_likelihoods(
    subject: Trainable, folds: int, repeats: int, seed: int, work: Path, about: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Train ``folds * repeats`` models: every point's log-likelihood under each ``[L, K, n]``, and the fold it was held out in ``[L, n]``.

    Each training is kept in ``work`` as it is done, so that a stopped audit goes on and more repeats add to what there is; under
    ``accelerate launch`` processes take turns with the folds. ``about`` has what moves the result beside the data.

    Raises:
        ValueError: fewer than two folds, or more than there are groups.
    """
    groups = np.arange(len(subject.data)) if subject.groups is None else subject.groups
    if not 2 <= folds <= len(np.unique(groups)):
        raise ValueError(f"{folds} folds cannot be had of {len(np.unique(groups))} points that may be left out one by one; at least 2 can.")
    digest = hashlib.sha256(subject.data.numpy().tobytes() + groups.tobytes()).hexdigest()[:12]
    placed = np.stack([fold_of(groups, folds, repeat, seed) for repeat in range(repeats)])

    def train(jobs: pd.DataFrame) -> pd.DataFrame:
        parts = []
        for repeat, fold in jobs[["repeat", "fold"]].itertuples(index=False):
            kept = np.flatnonzero(placed[repeat] != fold)
            likelihood = subject.fit(subject.data[kept], training_seed(seed, repeat, fold))
            values = likelihood(subject.data).double().numpy()
            parts.append(pd.DataFrame({"repeat": repeat, "fold": fold, "point": range(len(values)), "log_likelihood": values}))
        return pd.concat(parts)

    tables = []
    for repeat in range(repeats):
        jobs = pd.DataFrame({"repeat": repeat, "fold": range(folds)})
        tables.append(measured(f"trainings-{repeat}", jobs, train, work, {"data": digest, "seed": seed, **about}, batch=1))
    found = pd.concat(tables).sort_values(["repeat", "fold", "point"])
    return found.log_likelihood.to_numpy().reshape(repeats, folds, len(subject.data)), placed


def memorization(subject: Trainable, folds: int, repeats: int, seed: int, work: Path, about: Mapping[str, Any]) -> pd.DataFrame:
    """One row a training point: ``point`` and `Scores`. Cost: ``folds * repeats`` trainings; see `log_likelihoods`."""
    return pd.DataFrame(
        {"point": range(len(subject.data)), **scores(*log_likelihoods(subject, folds, repeats, seed, work, about))._asdict()}
    )
