"""Words of prompts, as they are counted."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence


def bare(word: str) -> str:
    """A word in lower case, without the punctuation around it."""
    return word.strip(string.punctuation).lower()


def document_frequency(prompts: Iterable[str]) -> dict[str, int]:
    """How many of ``prompts`` hold each word, in the order in which they come first."""
    return dict(Counter(word for prompt in prompts for word in dict.fromkeys(map(bare, prompt.split())) if word))


def without(words: Sequence[str], dropped: Sequence[int]) -> str:
    """The text of ``words`` without those at the positions ``dropped``."""
    return " ".join(word for i, word in enumerate(words) if i not in dropped)
