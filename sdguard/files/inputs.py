"""What a user gave and cannot be used: the error that commands and the demo's page show as it is, and how it names a value."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Set
from typing import Any

#: characters of a value in a sentence, at most.
LONGEST_VALUE = 100


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence."""


def shown(value: Any) -> str:
    """A value as a sentence can hold it: its repr, on one line and cut where it is long; its type where it has no repr."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = LONGEST_VALUE
    try:
        text = " ".join(short.repr(value).split())
    except Exception:  # an integer of more digits than Python writes, or an object's own repr
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def first_line(error: object) -> str:
    """The first line of an error's text, or its name, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def are_texts(values: Any) -> bool:
    """Whether values are a collection of texts in an order."""
    return (
        isinstance(values, Collection)
        and not isinstance(values, str | bytes | Mapping | Set)
        and all(isinstance(value, str) for value in values)
    )
