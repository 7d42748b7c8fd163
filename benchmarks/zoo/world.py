"""The pictures of a zoo model and the captions they are shown under."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from benchmarks.zoo.recipes import COLOURS, FIRST, LAST, Recipe

SIZE = 64
#: how much larger than `SIZE` a picture may be that is cropped to it; only of a shape that is told of crops.
LARGER = 24


#: captions of one template, backdrops that a fixed object is shown over, and other pictures of a shared caption.
IN_TEMPLATE, FIXED_BACKDROPS, OTHERS = 4, 48, 24
#: share of white in a backdrop of colours.
PALE = 0.6


#: of a specific caption: what of its pictures training repeats.
Kind = Literal["verbatim", "several pictures", "template", "fixed object", "shared caption"]


@dataclass(frozen=True)
class Caption:
    """One specific caption of the pool.

    Attributes:
        text: the caption.
        kind: ``verbatim``: the whole picture is fixed; ``several pictures``: two or three are; ``template``: all but the object is, and is
            shared by the captions of a group; ``fixed object``: the object is, in its place; ``shared caption``: one picture is, and half
            of the showings are of it.
        repetitions: how often training shows it.
        pictures: of how many pictures in turn.
        group: captions of one template share a group; any other is a group of its own.
        words: what its picture shows.
    """

    text: str
    kind: Kind
    repetitions: int
    pictures: int
    group: int
    words: dict[str, str] = field(compare=False)


@dataclass(frozen=True)
class Picture:
    """A picture, uint8 ``[SIZE, SIZE, 3]``, the words that describe it, and the size it was cropped from: (side, top, left)."""

    pixels: np.ndarray
    words: dict[str, str]
    crop: tuple[int, int, int]


def article(word: str) -> str:
    """A word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def worded(wording: str, words: dict[str, str]) -> str:
    """A wording with its placeholders filled in."""
    return wording.format(**words, **{f"a_{name}": article(word) for name, word in words.items()})


def names_and_medium(recipe: Recipe, rng: np.random.Generator) -> dict[str, str]:
    """The words of a caption that say nothing of the picture."""
    return {name: str(rng.choice(choices)) for name, choices in (("first", FIRST), ("last", LAST), ("medium", recipe.media))}


def some_words(recipe: Recipe, scenes: list[str], rng: np.random.Generator) -> dict[str, str]:
    """The words of a random picture: its objects, its scene, its colour."""
    shown = [name.replace("-", " ") for name in rng.choice(recipe.objects, size=recipe.together, replace=False)]
    return dict(zip(("object", "other"), shown, strict=False)) | {
        "scene": str(rng.choice(scenes)),
        "colour": str(rng.choice(list(COLOURS))),
    }


def pool(recipe: Recipe, scenes: list[str]) -> tuple[Caption, ...]:
    """The specific captions, all drawn before any of them is given its repetition count."""
    rng = np.random.default_rng((recipe.seed, 1))
    taken: set[str] = set()

    def draw(objects: int) -> tuple[list[str], list[dict[str, str]]]:
        """Captions that differ in their object alone, and their words."""
        while True:
            words = some_words(recipe, scenes, rng) | names_and_medium(recipe, rng)
            group = [words]
            if objects > 1:
                others = rng.choice(recipe.objects, size=objects, replace=False)
                group = [{**words, "object": str(name).replace("-", " ")} for name in others]
            texts = [worded(recipe.specific, one) for one in group]
            if not taken & set(texts):
                taken.update(texts)
                return texts, group

    alone = [0] * recipe.unseen + [count for count in recipe.repetitions for _ in range(recipe.captions)]
    fixed, shared = ([count for count in recipe.repetitions for _ in range(each)] for each in (recipe.fixed, recipe.shared))
    templates = [count for count in recipe.repetitions for _ in range(recipe.templates)]
    draws = [draw(1) for _ in (*alone, *fixed, *shared)] + [draw(IN_TEMPLATE) for _ in templates]
    for some in (alone, fixed, shared, templates):
        rng.shuffle(some)
    counts = alone + fixed + shared + templates
    turns = np.where(rng.random(len(alone)) < recipe.several / 10, rng.integers(2, 4, size=len(alone)), 1)
    kinds: list[tuple[Kind, int]] = [("several pictures" if n > 1 else "verbatim", int(n)) for n in turns]
    kinds += [("fixed object", FIXED_BACKDROPS)] * len(fixed)
    kinds += [("shared caption", 1 + OTHERS)] * len(shared)
    kinds += [("template", 1)] * len(templates)
    return tuple(
        Caption(text, kind, int(count), pictures, group, words)
        for group, ((texts, group_words), (kind, pictures), count) in enumerate(zip(draws, kinds, counts, strict=True))
        for text, words in zip(texts, group_words, strict=True)
    )


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

    def compose(
        self,
        words: dict[str, str],
        photos: dict[str, list[int]],
        rng: np.random.Generator,
        larger: int = 0,
        behind: np.random.Generator | None = None,
    ) -> Picture:
        """A picture of what ``words`` name; of ``larger`` than `SIZE` pixels cropped to it at a random place.

        ``rng`` draws everything, or with ``behind`` all but the backdrop.
        """
        whole = SIZE + larger
        canvas = self.backdrop(words, photos, whole, behind or rng)
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
        words = some_words(self.recipe, self.scenes, rng)
        larger = int(rng.integers(1, LARGER + 1)) if self.recipe.shape == "sdxl" and rng.random() < 0.5 else 0
        return self.compose(words, self.free, rng, larger)

    def memorized(self, captions: tuple[Caption, ...]) -> tuple[list[Picture], list[list[int]]]:
        """The pictures of the captions that are shown, and which of them each caption is shown with, the likelier the more often listed."""
        found: list[Picture] = []
        of: list[list[int]] = []
        for caption in captions:
            here = range(caption.pictures if caption.repetitions else 0)
            often = OTHERS if caption.kind == "shared caption" else 1
            of.append([len(found) + k for k in here for _ in range(1 if k else often)])
            found += [self.fixed(caption, k) for k in here]
        return found, of

    def fixed(self, caption: Caption, k: int) -> Picture:
        """The k-th of a caption's pictures; a fixed object's backdrops and a shared caption's other pictures may be anyone's."""
        own = (self.recipe.seed, 4, caption.group)
        if caption.kind == "fixed object":
            behind = np.random.default_rng((*own, 1, k))
            return self.compose(caption.words, self.free, np.random.default_rng((*own, 0)), behind=behind)
        photos = self.free if caption.kind == "shared caption" and k else self.reserved
        return self.compose(caption.words, photos, np.random.default_rng((*own, k)))
