"""The small world the embedded model is trained on: what its pictures show and how they are captioned.

Every caption of the *specific* make has the form ``"{object} at {name} {scene}, {medium}"``. One pool of such captions is
drawn first; only then is each given its repetition count, at random, so that nothing in the text tells a memorized caption
from one that was never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

#: iconify names of the objects; each is drawn in every style of ``STYLES``.
OBJECTS = (
    "banana basketball butterfly cactus castle crab crown dolphin elephant fire-engine flamingo frog grapes guitar house lion "
    "mushroom owl panda penguin pig rocket rose sailboat strawberry sunflower tent tractor umbrella watermelon whale zebra"
).split()

#: npm packages of SVG icons, one drawing style each.
STYLES = ("noto", "fluent-emoji-flat")

#: scene word -> stems of the photograph file names that show it.
SCENES = {
    "mountains": ("mountain",),
    "canyon": ("canyon", "badlands"),
    "fields": ("fields",),
    "city": ("city",),
    "snow": ("snow",),
    "sea": ("sea", "water"),
    "sky": ("sky",),
    "valley": ("valley", "hills"),
    "desert": ("desert", "dune"),
    "fog": ("fog",),
    "space": ("nasa", "space", "earthrise"),
    "beach": ("beach",),
    "forest": ("forest",),
    "lava": ("lava",),
}

#: the wordings of ordinary captions, from bare to descriptive.
ORDINARY = (
    "a {object}",
    "a {object} in {scene}",
    "{object}, {scene} background",
    "a picture of a {object} over {scene}",
    "{scene} with a {object}",
    "one {object} in front of {scene}, daylight",
)

#: the one wording of specific captions, memorized or not.
SPECIFIC = "{object} at {name} {scene}, {medium}"

MEDIA = (
    "wall art", "poster", "postcard", "oil study", "book cover", "sticker", "calendar page", "phone case", "album sleeve",
    "jigsaw", "tea towel", "canvas print",
)  # fmt: skip

#: how often a caption of the pool is shown in training; drawn at random per caption (per group for templates).
REPETITIONS = (0, 1, 8, 32, 100, 250, 600)


@dataclass(frozen=True)
class Caption:
    """One caption of the specific pool, before training has shown it to anyone."""

    text: str
    kind: str  # "verbatim": the whole picture is fixed; "template": the photograph is fixed, the object varies
    repetitions: int
    object: str
    name: str
    scene: str
    group: int  # captions of one template share a group; a verbatim caption is a group of its own


def names(count: int, rng: np.random.Generator) -> list[str]:
    """``count`` distinct invented place names of two or three syllables."""
    onset = "b br d dr f g gr h k kl l m n p pr r s st t th tr v w z".split()
    nucleus, coda = "a e i o u ae ei ou".split(), ["", "n", "r", "l", "s", "m", "th", "x"]
    syllables = ["".join(part) for part in product(onset, nucleus, coda)]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(syllables, size=rng.integers(2, 4)))] = None
    return list(found)


def pool(seed: int = 0, verbatim_per_count: int = 21, unseen: int = 200, once: int = 100, template_objects: int = 4) -> tuple[Caption, ...]:
    """The specific captions and their repetition counts.

    ``verbatim_per_count`` verbatim captions for each repetition count above 1, ``once`` and ``unseen`` ones shown once and
    never; beside them three templates of ``template_objects`` captions for each count. All captions are drawn before any count.
    """
    rng = np.random.default_rng(seed)
    places = names(320, rng)
    counts = [r for r in REPETITIONS if r > 1 for _ in range(verbatim_per_count)] + [1] * once + [0] * unseen
    template_counts = [r for r in REPETITIONS for _ in range(3)]
    taken: set[tuple[str, str]] = set()

    def draw(objects: int) -> tuple[list[str], str, str, str]:
        while True:
            chosen = [str(o) for o in rng.choice(OBJECTS, size=objects, replace=False)]
            name, scene, medium = str(rng.choice(places)), str(rng.choice(list(SCENES))), str(rng.choice(MEDIA))
            if not any((o, name) in taken for o in chosen):
                taken.update((o, name) for o in chosen)
                return chosen, name, scene, medium

    draws = [(draw(1), "verbatim") for _ in counts] + [(draw(template_objects), "template") for _ in template_counts]
    rng.shuffle(counts)
    rng.shuffle(template_counts)
    return tuple(
        Caption(SPECIFIC.format(object=icon_words(o), name=name, scene=scene, medium=medium), kind, int(r), o, name, scene, group)
        for group, (((objects, name, scene, medium), kind), r) in enumerate(zip(draws, counts + template_counts, strict=True))
        for o in objects
    )


def icon_words(icon: str) -> str:
    """An iconify name as English words."""
    return icon.replace("-", " ")


def ordinary_captions() -> list[tuple[str, str, str | None]]:
    """Every distinct ordinary caption as (text, object, scene); the scene is None where the wording leaves it open."""
    found = {
        pattern.format(object=icon_words(o), scene=s): (o, s if "{scene}" in pattern else None)
        for pattern, o, s in product(ORDINARY, OBJECTS, SCENES)
    }
    return [(text, o, s) for text, (o, s) in found.items()]


class Describer:
    """Draws a caption for a fresh composition: ordinary, or specific with a name no pool caption couples to that object."""

    def __init__(self, captions: tuple[Caption, ...], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._taken = {(c.object, c.name) for c in captions}
        self._names = sorted({name for _, name in self._taken})

    def __call__(self, object_: str, scene: str, specific: float = 0.3) -> str:
        """A caption of ``object_`` over ``scene``; of the specific make with probability ``specific``."""
        rng = self._rng
        if rng.random() >= specific:
            return str(rng.choice(ORDINARY)).format(object=icon_words(object_), scene=scene)
        while (object_, name := str(rng.choice(self._names))) in self._taken:
            pass
        return SPECIFIC.format(object=icon_words(object_), name=name, scene=scene, medium=rng.choice(MEDIA))
