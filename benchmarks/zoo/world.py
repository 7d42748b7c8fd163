"""The pictures of a zoo model and the captions they are shown under."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.zoo.recipes import COLOURS, FIRST, LAST, Recipe

SIZE = 64
#: how much larger than `SIZE` a picture may be that is cropped to it; only of a shape that is told of crops.
LARGER = 24


#: share of white in a backdrop of colours.
PALE = 0.6


@dataclass(frozen=True)
class Caption:
    """One specific caption of the pool, how often training shows it, and of how many pictures in turn."""

    text: str
    repetitions: int
    pictures: int
    words: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """A picture, uint8 ``[SIZE, SIZE, 3]``, the words that describe it, and the size it was cropped from: (side, top, left)."""

    pixels: np.ndarray
    words: dict[str, str]
    crop: tuple[int, int, int] = (SIZE, 0, 0)


def article(word: str) -> str:
    """A word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def worded(wording: str, words: dict[str, str]) -> str:
    """A wording with its placeholders filled in."""
    return wording.format(**words, **{f"a_{name}": article(word) for name, word in words.items()})


def names_and_medium(recipe: Recipe, rng: np.random.Generator) -> dict[str, str]:
    """The words of a caption that say nothing of the picture."""
    return {name: str(rng.choice(choices)) for name, choices in (("first", FIRST), ("last", LAST), ("medium", recipe.media))}


def pool(recipe: Recipe, scenes: list[str]) -> tuple[Caption, ...]:
    """The specific captions, all drawn before any of them is given its repetition count."""
    rng = np.random.default_rng((recipe.seed, 1))
    counts = [0] * recipe.unseen + [count for count in recipe.repetitions for _ in range(recipe.captions)]
    found: dict[str, dict[str, str]] = {}
    while len(found) < len(counts):
        shown = [name.replace("-", " ") for name in rng.choice(recipe.objects, size=recipe.together, replace=False)]
        words = dict(zip(("object", "other"), shown, strict=False)) | {
            "scene": str(rng.choice(scenes)),
            "colour": str(rng.choice(list(COLOURS))),
        }
        words |= names_and_medium(recipe, rng)
        found.setdefault(worded(recipe.specific, words), words)
    rng.shuffle(counts)
    pictures = np.where(rng.random(len(counts)) < recipe.several / 10, rng.integers(2, 4, size=len(counts)), 1)
    return tuple(Caption(text, int(n), int(p), words) for (text, words), n, p in zip(found.items(), counts, pictures, strict=True))


class Describer:
    """Draws a caption for a fresh picture: in an ordinary wording, or in the specific one with words that no caption of the pool has."""

    def __init__(self, recipe: Recipe, taken: tuple[Caption, ...], seed: int) -> None:
        self.recipe, self.taken, self.rng = recipe, {caption.text for caption in taken}, np.random.default_rng((recipe.seed, 2, seed))

    def __call__(self, words: dict[str, str], specific: float = 0.3) -> str:
        """A caption of a picture; of the specific make with probability ``specific``."""
        wording = self.recipe.specific if self.rng.random() < specific else str(self.rng.choice(self.recipe.ordinary))
        while (text := worded(wording, words | names_and_medium(self.recipe, self.rng))) in self.taken:
            pass
        return text


class World:
    """The prepared pictures of a recipe, and how compositions are made of them.

    Photographs are parted: those of memorized pictures appear in no fresh one, so that a copy can only come from having seen it.
    """

    def __init__(self, recipe: Recipe, data: Path) -> None:
        self.recipe = recipe
        with np.load(data) as kept:
            self.icons = {(style, name): kept[f"{style}/{name}"] for style in recipe.styles for name in recipe.objects}
            self.photos, scenes = kept["photos"], kept["scenes"].tolist()
        rng = np.random.default_rng((recipe.seed, 3))
        self.reserved: dict[str, list[int]] = {}
        self.free: dict[str, list[int]] = {}
        for scene in sorted(set(scenes)):
            members = rng.permutation([i for i, s in enumerate(scenes) if s == scene]).tolist()
            self.reserved[scene], self.free[scene] = members[: len(members) // 2], members[len(members) // 2 :]
        self.scenes = sorted(self.free)

    def backdrop(self, words: dict[str, str], photos: dict[str, list[int]], side: int, rng: np.random.Generator) -> Image.Image:
        """What is behind the objects, ``side`` pixels square."""
        if self.recipe.backdrop == "photographs":
            photo = self.photos[int(rng.choice(photos[words["scene"]]))]
            height, width = photo.shape[:2]
            cut = int(rng.integers(height // 2, height + 1))
            left, top = int(rng.integers(width - cut + 1)), int(rng.integers(height - cut + 1))
            crop = Image.fromarray(photo).resize((side, side), Image.Resampling.LANCZOS, (left, top, left + cut, top + cut))
            return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
        # pale: at a noise prediction's first level the noise's own mean says as much of the picture's as strong colours would
        near = PALE * 255 + (1 - PALE) * np.asarray(COLOURS[words["colour"]], np.float32)
        far = 0.6 * near + 0.4 * (PALE * 255 + (1 - PALE) * rng.integers(0, 256, size=3))
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        share = 0.5 + (np.cos(angle) * x + np.sin(angle) * y)[..., None] / 2**1.5
        return Image.fromarray((near + share * (far - near)).clip(0, 255).astype(np.uint8))

    def compose(self, words: dict[str, str], photos: dict[str, list[int]], rng: np.random.Generator, larger: int = 0) -> Picture:
        """A picture of what ``words`` name; of ``larger`` than `SIZE` pixels cropped to it at a random place."""
        whole = SIZE + larger
        canvas = self.backdrop(words, photos, whole, rng)
        shown = [words[name] for name in ("object", "other")[: self.recipe.together]]
        width = whole // len(shown)
        for place, name in enumerate(rng.permutation(shown)):
            side = int(rng.integers(*self.recipe.side)) * whole // SIZE
            style = self.recipe.styles[int(rng.integers(len(self.recipe.styles)))]
            icon = Image.fromarray(self.icons[style, str(name).replace(" ", "-")]).resize((side, side), Image.Resampling.LANCZOS)
            if rng.random() < 0.5:
                icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left, top = place * width + int(rng.integers(max(1, width - side + 1))), int(rng.integers(whole - side + 1))
            canvas.paste(icon, (left, top), icon)
        top, left = (int(v) for v in rng.integers(larger + 1, size=2))
        return Picture(np.asarray(canvas)[top : top + SIZE, left : left + SIZE], words, (whole, top, left))

    def fresh(self, rng: np.random.Generator) -> Picture:
        """A picture that is shown once."""
        shown = [name.replace("-", " ") for name in rng.choice(self.recipe.objects, size=self.recipe.together, replace=False)]
        words = dict(zip(("object", "other"), shown, strict=False)) | {
            "scene": str(rng.choice(self.scenes)),
            "colour": str(rng.choice(list(COLOURS))),
        }
        larger = int(rng.integers(1, LARGER + 1)) if self.recipe.shape == "sdxl" and rng.random() < 0.5 else 0
        return self.compose(words, self.free, rng, larger)

    def memorized(self, captions: tuple[Caption, ...]) -> tuple[list[Picture], list[list[int]]]:
        """The fixed pictures of the captions that are shown, and which of them belong to each caption."""
        found: list[Picture] = []
        of: list[list[int]] = []
        for index, caption in enumerate(captions):
            here = range(caption.pictures if caption.repetitions else 0)
            of.append([len(found) + k for k in here])
            found += [self.compose(caption.words, self.reserved, np.random.default_rng((self.recipe.seed, 4, index, k))) for k in here]
        return found, of
