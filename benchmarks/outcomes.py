"""What can come of a hostile case, and how it is judged: read rightly, refused in one sentence, or wrong in one of five ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

READ, REFUSED, UNKNOWN = "read rightly", "refused in a sentence", "read, truth unknown"
MISREAD, NEEDLESS, NO_SENTENCE, CRASHED, LEFT = "misread", "refused though sound", "no sentence", "another error", "a file left behind"
BAD = (MISREAD, NEEDLESS, NO_SENTENCE, CRASHED, LEFT)
#: characters that a sentence has at most.
LONGEST_SENTENCE = 1000

#: values that a field of JSON, or an argument, does not expect.
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    5,
    0.5,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "\ud83d",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    ["a"],
)


class Misread(Exception):
    """What was read is not what was written."""


class Needless(Exception):
    """What is sound was refused."""


class NoSentence(Exception):
    """What is refused is not refused in one sentence."""


#: the outcome that each of these is.
WRONG: dict[type[Exception], str] = {Misread: MISREAD, Needless: NEEDLESS, NoSentence: NO_SENTENCE}


def expect(found: Any, written: Any) -> str:
    """The outcome `READ`; raises `Misread` if what was found is not what was written."""
    if found != written:
        raise Misread(f"{str(found)[:200]} in place of {str(written)[:200]}")
    return READ


def is_sentence(text: str) -> bool:
    """Whether a text is one line that ends as a sentence does, and is not long."""
    return text.endswith(".") and "\n" not in text and len(text) <= LONGEST_SENTENCE


def checked_sentence(error: BaseException) -> str:
    """The outcome `REFUSED` of an error whose text is one sentence; raises `NoSentence` for any other."""
    if not is_sentence(str(error)):
        raise NoSentence(f"{type(error).__name__}: {error}")
    return REFUSED


def refused_or(read: Callable[[], Any], documented: type[Exception] | tuple[type[Exception], ...], judge: Callable[[Any], str]) -> str:
    """The outcome of reading: that of the documented error, or what ``judge`` says of what was read."""
    try:
        found = read()
    except documented as error:
        return checked_sentence(error)
    return judge(found)
