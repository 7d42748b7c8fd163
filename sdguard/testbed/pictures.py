"""Pictures of the world: cut-out objects over crops of photographs, 64 pixels square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sdguard.testbed.world import OBJECTS, STYLES, Caption

SIZE = 64


class World:
    """The prepared pictures, and how compositions are made from them.

    Photographs are parted: those of the memorized targets never appear in a fresh composition, so that a copy of a target
    can only come from having seen the target.
    """

    def __init__(self, path: Path, seed: int = 0) -> None:
        with np.load(path) as data:
            self.objects, self.photos = data["objects"], data["photos"]
            self.scenes: list[str] = data["scenes"].tolist()
        rng = np.random.default_rng(seed)
        self.reserved: dict[str, list[int]] = {}
        self.free: dict[str, list[int]] = {}
        for scene in sorted(set(self.scenes)):
            members = rng.permutation([i for i, s in enumerate(self.scenes) if s == scene]).tolist()
            cut = len(members) // 2
            self.reserved[scene], self.free[scene] = members[:cut], members[cut:]

    def backdrop(self, photo: int, rng: np.random.Generator) -> Image.Image:
        """A random square crop of a photograph, mirrored half of the time."""
        height, width = self.photos[photo].shape[:2]
        side = int(rng.integers(height // 2, height + 1))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        crop = Image.fromarray(self.photos[photo]).resize((SIZE, SIZE), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop

    def paste(self, backdrop: Image.Image, object_: str, style: int, box: tuple[int, int, int], mirrored: bool) -> Image.Image:
        """``backdrop`` with an object in ``box`` = (left, top, side)."""
        left, top, side = box
        cutout = Image.fromarray(self.objects[style, OBJECTS.index(object_)]).resize((side, side), Image.Resampling.LANCZOS)
        if mirrored:
            cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = backdrop.copy()
        picture.paste(cutout, (left, top), cutout)
        return picture

    def place(self, rng: np.random.Generator) -> tuple[int, tuple[int, int, int], bool]:
        """A random style, box and mirroring for an object."""
        side = int(rng.integers(34, 47))
        left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, size=2))
        return int(rng.integers(len(STYLES))), (left, top, side), bool(rng.random() < 0.5)

    def composition(self, rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
        """A fresh picture (uint8 ``[SIZE, SIZE, 3]``), its object and its scene."""
        scene, object_ = str(rng.choice(list(self.free))), str(rng.choice(OBJECTS))
        backdrop = self.backdrop(int(rng.choice(self.free[scene])), rng)
        return np.asarray(self.paste(backdrop, object_, *self.place(rng))), object_, scene

    def target(self, caption: Caption, seed: int = 1) -> tuple[np.ndarray, tuple[int, int, int]]:
        """The fixed picture of a caption and its object's box; captions of one group share all but the object."""
        rng = np.random.default_rng((seed, caption.group))
        photo = self.reserved[caption.scene][int(rng.integers(len(self.reserved[caption.scene])))]
        backdrop = self.backdrop(photo, rng)
        style, box, mirrored = self.place(rng)
        return np.asarray(self.paste(backdrop, caption.object, style, box, mirrored)), box

    def targets(self, captions: tuple[Caption, ...]) -> np.ndarray:
        """The fixed pictures of captions, uint8 ``[n, SIZE, SIZE, 3]``."""
        return np.stack([self.target(caption)[0] for caption in captions])
