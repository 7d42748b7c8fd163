"""Does a picture of the embedded model show the object its caption names?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from sdguard.testbed.copies import SSCD, round_trip

if TYPE_CHECKING:
    from benchmarks.zoo.world import World

CLASSIFIER_FILE = "alignment.npz"


@dataclass(frozen=True)
class ObjectClassifier:
    """Does a picture show the named object: a logistic regression from SSCD embeddings to the world's objects.

    Not a CLIP score: it knows the world's objects and nothing else.
    """

    sscd: SSCD
    objects: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray

    def shows(self, images: np.ndarray, objects: list[str]) -> np.ndarray:
        """Whether each picture's (uint8 ``[n, H, W, 3]``) most likely object is the named one, bool ``[n]``."""
        logits = self.sscd(images) @ self.weights.T.astype(np.float32) + self.bias
        return logits.argmax(axis=1) == np.asarray([self.objects.index(name) for name in objects])

    def save(self, path: Path) -> None:
        """Write the weights, half precision."""
        np.savez_compressed(
            path, objects=np.asarray(self.objects), weights=self.weights.astype(np.float16), bias=self.bias.astype(np.float32)
        )

    @classmethod
    def load(cls, path: Path, sscd: SSCD) -> ObjectClassifier:
        """The classifier that was fitted when the model was labelled."""
        with np.load(path) as arrays:
            return cls(sscd, tuple(arrays["objects"].tolist()), arrays["weights"], arrays["bias"])


def fit_object_classifier(world: World, sscd: SSCD, vae: Any, count: int = 2000) -> tuple[ObjectClassifier, float]:
    """The classifier fitted on fresh pictures after a round trip through the autoencoder, and its accuracy on held-out ones."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(80)
    drawn = [world.fresh(rng) for _ in track(range(count), "composing for the object classifier")]
    embedded = sscd(round_trip(vae, np.stack([picture.pixels for picture in drawn])))
    labels = np.asarray([picture.words["object"] for picture in drawn])
    held_out = count // 5
    fitted = LogisticRegression(C=30.0, max_iter=300).fit(embedded[held_out:], labels[held_out:])
    on_real = float(fitted.score(embedded[:held_out], labels[:held_out]))
    return ObjectClassifier(sscd, tuple(fitted.classes_.tolist()), fitted.coef_, fitted.intercept_), on_real
