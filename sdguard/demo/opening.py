"""What the page opens on: a memorized prompt and an ordinary one without and with the guard, run once for all who come; no page in here."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from functools import partial
from typing import Any

from sdguard.demo.comparison import Comparison, compare
from sdguard.demo.model import Model
from sdguard.demo.settings import Setting
from sdguard.demo.turns import Client

logger = logging.getLogger(__name__)

#: who takes the opening's turns; no address is empty.
ITSELF = Client("", "opening")


def opening_prompts(model: Model) -> list[str]:
    """A memorized prompt and an ordinary one; none of a model of which it is not known what it has memorized."""
    if model.targets is None:
        return []
    first, *others = model.examples
    return [first.text, next(example.text for example in others if example.kind == "ordinary")]


def make_opening(model: Model) -> list[Comparison]:
    """The comparisons of `opening_prompts`, at the model's own setting, each in its own turn. Cost: two runs a prompt, and steering."""
    made = []
    for prompt in opening_prompts(model):
        setting = Setting(prompt, steps=model.defaults["num_inference_steps"], guidance=model.defaults["guidance_scale"])
        seen: list[Any] = []
        model.turns.taken(ITSELF, partial(compare, model, setting, None))(seen.append)
        made.append(seen[-1])
    return made


def begin_opening(model: Model) -> Future[list[Comparison]]:
    """Have `make_opening` done by a thread beside this one, which ends with the process. What goes wrong is logged and in the future."""
    opening: Future[list[Comparison]] = Future()

    def run() -> None:
        try:
            opening.set_result(make_opening(model))
        except BaseException as error:  # of whatever kind: the page is there without it, and asks for it until it is told
            logger.exception("sdguard demo: the opening")
            opening.set_exception(error)

    threading.Thread(target=run, name="sdguard-opening", daemon=True).start()
    return opening
