"""Wordings: a prompt put as any picture of its subject would be asked for, with as little of it lost as need be.

Not the rarity of a word decides what goes, but its part in the sentence: numbers and names first, then phrases that a preposition begins,
then whole clauses. The first phrase, which captions begin with what they show, stays to the end. That a word is no name is asked
of a word list of the language, not of some hundred prompts.
"""

from __future__ import annotations

import functools
import logging
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdguard.words import bare

if TYPE_CHECKING:
    from spellchecker import SpellChecker

logger = logging.getLogger(__name__)

#: what ends a phrase: a mark behind a word.
ENDS = ",;:|.!?)"
#: prepositions that begin a phrase of their own; "of" and "to" belong to the noun before them.
PREPOSITIONS = frozenset(
    "about above across after against along amid among around at before behind below beneath beside between beyond by during for from in"
    " inside into near off on onto outside over past through toward towards under underneath until upon via with within without".split()
)
#: nouns that say what a thing is a picture in.
DEPICTIONS = frozenset(
    "artwork depiction drawing engraving illustration image painting photo photograph picture portrait rendering screenshot sketch"
    " watercolor watercolour".split()
)
#: a subject of more words than this, and without an article that would bind them, is tried by its first half too.
LONG_SUBJECT = 3
ARTICLES = frozenset(("a", "an", "the"))

#: wordings of a prompt, the most faithful first: a language model, for one.
Rewriter = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Wording:
    """A prompt put differently: its text, and the prompt's words that it keeps and those that went."""

    text: str
    kept: list[str]
    dropped: list[str]

    @classmethod
    def of(cls, text: str, prompt: str) -> Wording:
        """``text`` as a wording of ``prompt``."""
        left = Counter(map(bare, text.split()))
        kept: list[str] = []
        dropped: list[str] = []
        for word in filter(None, map(bare, prompt.split())):
            (kept if left[word] else dropped).append(word)
            left[word] -= 1
        return cls(text, kept, dropped)


@functools.cache
def word_list() -> SpellChecker:
    """The English words. They are read when something is reworded, and never on the clean path."""
    from spellchecker import SpellChecker

    return SpellChecker(language="en", distance=1)


def phrases(words: Sequence[str]) -> list[list[int]]:
    """Positions of the words of each phrase: one ends behind a mark, and where a preposition begins another."""
    found: list[list[int]] = [[]]
    for i, word in enumerate(words):
        if found[-1] and (bare(word) in PREPOSITIONS or words[i - 1][-1] in ENDS):
            found.append([])
        found[-1].append(i)
    return found


def names(words: Sequence[str]) -> set[int]:
    """Positions of numbers and proper names: what holds a digit, what is written large where most words are not, what is no English
    word, and a noun that follows a preposition without an article and alone.
    """
    mixed = sum(word == word.lower() for word in words) > len(words) / 2
    places = {phrase[1] for phrase in phrases(words) if len(phrase) == 2 and bare(words[phrase[0]]) in PREPOSITIONS}

    def is_name(i: int) -> bool:
        word = words[i].strip(string.punctuation)
        large = mixed and i > 0 and word[:1].isupper()
        return any(map(str.isdigit, word)) or large or i in places or bool(word.isalpha() and word_list().unknown([word]))

    return {i for i in range(len(words)) if is_name(i)}


def shortened(words: Sequence[str], gone: Set[int]) -> str:
    """The text of ``words`` without those at ``gone``, a preposition going with its object; a mark behind a dropped phrase stays."""
    kept: list[str] = []
    for phrase in phrases(words):
        left = [i for i in phrase if i not in gone]
        if left == phrase[:1] and len(phrase) > 1 and bare(words[phrase[0]]) in PREPOSITIONS:
            left = []
        kept += [words[i] for i in left]
        if kept and phrase[-1] not in left and words[phrase[-1]][-1] in ENDS and kept[-1][-1] not in ENDS:
            kept[-1] += words[phrase[-1]][-1]
    return " ".join(kept).strip(string.whitespace + ENDS.replace(")", ""))


def shortenings(prompt: str) -> list[str]:
    """``prompt`` with ever more gone, each once: nothing, names and numbers, what prepositions begin, all but the subject, half of that."""
    words = prompt.split()
    subject, *others = phrases(words)
    proper = {i for i in names(words) if i not in subject or any(map(str.isdigit, words[i]))} - {subject[0]}
    circumstances = {i for phrase in others if bare(words[phrase[0]]) in PREPOSITIONS for i in phrase}
    rest = {i for phrase in others for i in phrase} | proper
    long = len(subject) > LONG_SUBJECT and bare(words[0]) not in ARTICLES | DEPICTIONS
    half = set(subject[(len(subject) + 1) // 2 :]) if long else set()
    cuts = [set(), proper, proper | circumstances, rest, rest | half]
    return list(dict.fromkeys(filter(None, (shortened(words, gone) for gone in cuts))))


def depiction(frequency: Mapping[str, int]) -> str:
    """What ordinary prompts call a picture most often, by how many of them hold each word; a frame the model knows moves least."""
    return max(sorted(DEPICTIONS), key=lambda word: (frequency.get(word, 0), word == "photo"))


def framed(text: str, kind: str) -> str:
    """``text`` as what a picture of a ``kind`` shows; where it names what it is a picture in itself, that is another now."""
    words = text.split()
    article = "an" if kind[0] in "aeiou" else "a"
    for i, word in enumerate(words[:3]):
        if bare(word) in DEPICTIONS and words[i + 1 : i + 2] == ["of"]:
            return " ".join([article, kind, *words[i + 1 :]])
    first = words[0].lower() if words[0].lower() in ARTICLES else words[0]
    return " ".join([article, kind, "of", first, *words[1:]])


def wordings(prompt: str, kind: str, rewriter: Rewriter | None = None) -> list[Wording]:
    """Wordings of ``prompt``, those that keep most of it first: a rewriter's, then it and its shortenings as what a picture shows.

    ``kind`` is what the model's ordinary prompts call a picture (`depiction`).

    Somepalli et al. 2023 (2305.20086) put random words in and Ross et al. 2024 (2411.00113) have a language model rewrite the words that
    are to blame; here the frame around the prompt is an ordinary one, and nothing goes that need not.
    """
    if not prompt.split():
        return []
    texts = [*rewritten(prompt, rewriter), *(framed(text, kind) for text in shortenings(prompt))]
    return [Wording.of(text, prompt) for text in dict.fromkeys(texts) if text.split() != prompt.split()]


def rewritten(prompt: str, rewriter: Rewriter | None) -> list[str]:
    """What a rewriter offers for a prompt; where it fails, or what it gives is no text, that is logged, and there is the rest."""
    try:
        offered = rewriter(prompt) if rewriter else ()
    except Exception:  # of whatever kind: sdguard's own wordings are there yet
        logger.exception("sdguard: the rewriter failed")
        return []
    texts = [offered] if isinstance(offered, str) else list(offered or ())
    if junk := [text for text in texts if not isinstance(text, str)]:
        logger.warning("sdguard: the rewriter offered %r, which is no text", junk[0])
    return [text for text in texts if isinstance(text, str) and text.split()]


def subject(prompt: str, kind: str) -> str:
    """What a prompt shows, as a picture of it would be asked for: its first phrase."""
    words = prompt.split()
    first = phrases(words)[0]
    return framed(shortened(words, set(range(len(words))) - set(first)) or prompt, kind)
