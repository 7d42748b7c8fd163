"""What the app runs on, and the prompts it offers to try."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdguard import testbed
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.demo.streaming import stoppable
from sdguard.demo.turns import Turns
from sdguard.denoiser.families import denoiser_of
from sdguard.denoiser.loading import default_setting, load_for_runs
from sdguard.denoiser.schedulers import clone_scheduler
from sdguard.guarded.pipeline import guard
from sdguard.testbed.copies import Targets, load_targets
from sdguard.testbed.demo import most_shown


@dataclass(frozen=True)
class Example:
    """A prompt to try: its ``kind`` (verbatim, template, ordinary, near miss) and its ``text``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Model:
    """What the app runs on; nothing in it is changed by a run.

    Attributes:
        name: ``embedded``, a directory, or a hub id.
        pipe: the pipeline; every run takes a copy of its own (`own`).
        defaults: steps and guidance scale it is meant for.
        targets: the memorized pictures, of the embedded model only.
        captions: theirs.
        examples: prompts to try.
        listed: a list of prompts to try a scan on; empty where it is not known which of the model's prompts are memorized.
        turns: whose turn it is to run it.
    """

    name: str
    pipe: Any
    defaults: Mapping[str, Any]
    targets: Targets | None = None
    captions: Sequence[str] = ()
    examples: Sequence[Example] = ()
    listed: Sequence[str] = ()
    turns: Turns = field(default_factory=Turns)

    @classmethod
    def load(cls, name: str) -> Model:
        """Load a model onto the fastest device there is; raises `BadInput` in one sentence."""
        pipe = load_for_runs(name)
        guard(pipe)  # a class that is not supported is refused now
        stoppable(denoiser_of(pipe))
        defaults = default_setting(name, None, None)
        if name != "embedded":
            ordinary = [Example("ordinary", text) for text in ordinary_prompts(pipe)[:4]]
            return cls(name, pipe, defaults, examples=ordinary)
        targets, captions = load_targets(testbed.path(), pipe.vae)
        return cls(name, pipe, defaults, targets, captions, embedded_examples(), embedded_list())

    def own(self) -> Any:
        """A pipeline of a run's own: the same parts, another scheduler."""
        twin = copy.copy(self.pipe)
        twin.scheduler = clone_scheduler(self.pipe.scheduler)
        twin.set_progress_bar_config(disable=True)
        return twin


def embedded_captions(kind: str) -> list[str]:
    """The embedded model's captions of a kind, in the order of `most_shown`."""
    import pyarrow.parquet as pq

    return [row["text"] for row in most_shown(pq.read_table(testbed.path() / "prompts.parquet").to_pylist(), kind)]


def embedded_list() -> list[str]:
    """Captions of the embedded model for a scan, six memorized ones among four times as many ordinary ones, by the alphabet."""
    return sorted([*embedded_captions("verbatim")[:3], *embedded_captions("template")[:3], *embedded_captions("ordinary")[:24]])


def embedded_examples() -> list[Example]:
    """Captions of the embedded model, and the wording of one of them changed a little and a lot.

    The ordinary ones are, where there are any, of the things that the memorized ones show: it is not these that are memorized.
    """
    verbatim, template, ordinary = (embedded_captions(kind) for kind in ("verbatim", "template", "ordinary"))
    thing, rest = verbatim[0].split(" at ")
    place, medium = rest.split(", ")
    things = [text.split(" at ")[0] for text in verbatim]
    of_them = (next((text for text in ordinary if f" {each} " in f" {text.replace(',', '')} "), None) for each in things)
    alike = list(dict.fromkeys(filter(None, of_them)))[:2] or ordinary[:2]
    return [
        Example("verbatim", verbatim[0]),
        Example("verbatim", verbatim[1]),
        Example("template", template[0]),
        Example("template", next(text for text in template if text.split(" at ")[1] != template[0].split(" at ")[1])),
        *(Example("ordinary", text) for text in alike),
        Example("near miss", f"{thing} at {place}, {'poster' if medium != 'poster' else 'sticker'}"),
        Example("near miss", f"the {thing} of {place} as a {medium}"),
    ]
