"""The lists of ordinary prompts: the one that came with a model, and sdguard's own."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from sdguard.decision.calibration import evenly
from sdguard.decision.model_folder import PROMPTS_FILE, model_folders
from sdguard.decision.profile import digest_of


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard."""
    for folder in model_folders(pipe):
        if (folder / PROMPTS_FILE).exists():
            return _lines((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    return list(_shipped_prompts())


def is_shipped(prompts_digest: str, count: int) -> bool:
    """Whether ``count`` prompts are those of sdguard's list, evenly spaced."""
    return prompts_digest == _shipped_digest(count)


@functools.cache
def _shipped_prompts() -> tuple[str, ...]:
    """The ordinary prompts that come with sdguard."""
    return tuple(_lines(resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text(encoding="utf-8")))


@functools.cache
def _shipped_digest(count: int) -> str:
    """What stands for ``count`` of them, evenly spaced."""
    return digest_of(evenly(_shipped_prompts(), count))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
