"""What is asked of a run or a file, and what the server takes at most."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sdguard.demo.model import Model
from sdguard.denoiser.loading import check_prompts
from sdguard.files import inputs
from sdguard.files.inputs import BadInput
from sdguard.files.prompt_files import read_prompts
from sdguard.guarded.config import GuardConfig

#: what the server takes at most, whatever a page or a client sends.
LONGEST_PROMPT, MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE, MOST_SEEDS = 600, 4, 100, 30.0, 4
LARGEST_FILE, MOST_PROMPTS = 2_000_000, 5_000
#: of a profile made here: three times what the smallest rate on the page asks for.
MOST_ORDINARY = 2_250
#: of any request: a file, and what a form puts around it.
LARGEST_BODY = LARGEST_FILE + 100_000
#: parquet is left out: what a file of that size unpacks to has no bound.
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Setting:
    """What is asked of a guarded run; `checked` says in one sentence what is wrong with it."""

    prompt: str
    seed: int = 0
    images: int = 1
    steps: int = 10
    guidance: float = 2.5
    rate: float = 0.01
    mode: str = "steer"
    steering: Sequence[str] = ()

    def checked(self, model: Model) -> Setting:
        """The same, its prompt stripped; raises `BadInput` or `ValueError`, one sentence each."""
        counts: dict[str, Any] = {
            "images": whole("The number of images", self.images, 1, MOST_IMAGES),
            "steps": whole("The number of steps", self.steps, 2, MOST_STEPS),
            "seed": whole("The seed", self.seed, 0, 2**32 - MOST_IMAGES),
        }
        bounded("The guidance scale", self.guidance, 0, MOST_GUIDANCE)
        if not isinstance(self.steering, (list, tuple)):
            raise BadInput(f"The steering must be a list of methods; it is {shown(self.steering)}.")
        self.config()
        if len(set(self.steering)) < len(self.steering):
            raise BadInput("The steering names a method twice.")
        return replace(self, **counts, prompt=checked_prompt(self.prompt, model), steering=tuple(self.steering))

    def config(self, **more: Any) -> GuardConfig:
        """The configuration of the guard that it asks for, and ``more`` of its fields; raises as `GuardConfig` does."""
        return GuardConfig(self.mode, self.rate, steering=self.steering or None, **more)  # type: ignore[arg-type]

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that make its configuration."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance}


def bounded(what: str, value: float, low: float, high: float) -> None:
    """Raise `BadInput` where a number is none, or out of bounds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise BadInput(f"{what} must lie between {low:,.15g} and {high:,.15g}; it is {shown(value)}.")


def whole(what: str, value: float, low: int, high: int) -> int:
    """A whole number within bounds, 2.0 being one; raises `BadInput`."""
    bounded(what, value, low, high)
    if value != int(value):
        raise BadInput(f"{what} must be a whole number; it is {shown(value)}.")
    return int(value)


def shown(value: Any) -> str:
    """A value that somebody sent as they sent it, or its beginning."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # nothing that JSON can hold, or a number of more digits than Python writes
        text = inputs.shown(value)
    return f"{text:.40}"


def checked_prompt(prompt: str, model: Model) -> str:
    """The prompt, stripped; raises `BadInput` where it is empty, too long, or longer than the text encoder reads."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput("Write a prompt first: there is nothing to generate from.")
    if len(prompt) > LONGEST_PROMPT:
        raise BadInput(f"The prompt has {len(prompt):,} characters; {LONGEST_PROMPT} are taken at most.")
    check_prompts([prompt.strip()], model.pipe.tokenizer)
    return prompt.strip()


def uploaded_prompts(file: str | None, most: int = MOST_PROMPTS) -> pd.Series:
    """The prompts of an uploaded file, by row; raises `BadInput` or `ValueError` in one sentence naming the file, not its folder."""
    if not file:
        raise BadInput("Choose a file of prompts first.")
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path.name} is of a kind that is not taken here: give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if path.stat().st_size > LARGEST_FILE:
        raise BadInput(f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; {LARGEST_FILE / 1e6:.0f} MB are taken at most.")
    try:
        prompts = read_prompts(path)
    except ValueError as error:
        raise BadInput(str(error).replace(str(path), path.name)) from None
    if len(prompts) > most:
        raise BadInput(f"{path.name} holds {len(prompts):,} prompts; {most:,} are taken at most.")
    if (longest := int(prompts.str.len().max())) > LONGEST_PROMPT:
        raise BadInput(f"{path.name} holds a prompt of {longest:,} characters; {LONGEST_PROMPT} are taken at most.")
    return prompts
