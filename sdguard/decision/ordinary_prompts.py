"""The lists of ordinary prompts: the one that came with a model, and sdguard's own."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from sdguard.decision.calibration import evenly
from sdguard.decision.model_folder import PROMPTS_FILE, model_folders
from sdguard.decision.profile import digest_of
from sdguard.files.prompt_files import prompts_by_row


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard; raises as `prompts_by_row`."""
    for folder in model_folders(pipe):
        if (folder / PROMPTS_FILE).exists():
            return list(prompts_by_row(folder / PROMPTS_FILE).values())
    return list(_shipped_prompts())


def is_shipped(prompts_digest: str, count: int) -> bool:
    """Whether ``count`` prompts are those of sdguard's list, evenly spaced."""
    return prompts_digest == _shipped_digest(count)


@functools.cache
def _shipped_prompts() -> tuple[str, ...]:
    """The ordinary prompts that come with sdguard."""
    text = resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


@functools.cache
def _shipped_digest(count: int) -> str:
    """What stands for ``count`` of them, evenly spaced."""
    return digest_of(evenly(_shipped_prompts(), count))
