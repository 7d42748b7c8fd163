"""Words of prompts, as they are counted."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable


def bare(word: str) -> str:
    """A word in lower case, without the punctuation around it."""
    return word.strip(string.punctuation).lower()


def document_frequency(prompts: Iterable[str]) -> dict[str, int]:
    """How many of ``prompts`` hold each word."""
    return dict(Counter(word for prompt in prompts for word in {bare(word) for word in prompt.split()} if word))
