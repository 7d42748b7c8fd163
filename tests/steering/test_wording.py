"""Wordings keep the subject, lose the least first, and are words of the prompt."""

from __future__ import annotations

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdguard.steering.wording import (
    ARTICLES,
    DEPICTIONS,
    Wording,
    depiction,
    framed,
    names,
    phrases,
    shortened,
    shortenings,
    subject,
    word_list,
    wordings,
)  # fmt: skip
from sdguard.words import bare

word_list()  # read from its file here, not within a timed example

PROMPTS = st.text(string.ascii_letters + string.digits + " ,;.:-'", max_size=80).filter(lambda text: bool(text.split()))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a yam, forest on hermes", ["a yam, forest on hermes", "a yam, forest", "a yam"]),
        ("penguins win!, lava on gemstone", ["penguins win!, lava on gemstone", "penguins win!, lava", "penguins win"]),
        ("dog framed canvas print by Ann Gray", ["dog framed canvas print by Ann Gray", "dog framed canvas print", "dog framed"]),
        ("volcano official tour 2014", ["volcano official tour 2014", "volcano official tour", "volcano official"]),
        ("rocket at weinbonmar desert, book cover",
         ["rocket at weinbonmar desert, book cover", "rocket at desert, book cover", "rocket, book cover", "rocket"]),
        ("a great blue heron", ["a great blue heron"]),
        ("koala", ["koala"]),
    ],
)  # fmt: skip
def test_names_go_first_then_what_a_preposition_begins_then_all_but_the_subject(prompt: str, expected: list[str]) -> None:
    assert shortenings(prompt) == expected


@given(PROMPTS)
def test_a_shortening_has_only_words_of_the_prompt_in_their_order(prompt: str) -> None:
    marks = string.whitespace + string.punctuation
    for text in shortenings(prompt):
        rest = iter(prompt.split())
        assert all(any(word.strip(marks) == own.strip(marks) for own in rest) for word in text.split())


@given(PROMPTS)
def test_every_shortening_begins_with_the_subject(prompt: str) -> None:
    first = bare(prompt.split()[0])
    assert all(bare(text.split()[0]) == first for text in shortenings(prompt) if first)


@given(PROMPTS)
def test_phrases_hold_every_word_once_and_in_order(prompt: str) -> None:
    words = prompt.split()
    assert [i for phrase in phrases(words) for i in phrase] == list(range(len(words)))


@given(PROMPTS)
def test_a_wording_says_what_it_keeps_and_what_it_loses(prompt: str) -> None:
    for wording in wordings(prompt, "photo"):
        assert sorted([*wording.kept, *wording.dropped]) == sorted(filter(None, map(bare, prompt.split())))
        assert wording.text != prompt


def test_what_is_a_name_is_asked_of_the_language() -> None:
    assert names("a volcano and a kite".split()) == set()
    assert names("rocket with weinbonmar fields from 2014".split()) == {2, 5}
    assert names("a portrait of Ada Lovelace at a desk".split()) == {3, 4}
    assert names("The Old Signal Box".split()) == set()  # where all is written large, that says nothing


def test_a_frame_is_put_around_what_has_none() -> None:
    assert framed("A dog", "picture") == "a picture of a dog"
    assert framed("Marvel", "image") == "an image of Marvel"
    for kind in DEPICTIONS:
        assert framed(f"a {kind} of a dog", "photo") == "a photo of a dog"  # a prompt is put otherwise too where it has a frame
    assert framed("nike logo shirt", "photo") == "a photo of nike logo shirt"


def test_the_frame_is_the_one_ordinary_prompts_use() -> None:
    assert depiction({"picture": 9, "photo": 3, "dog": 50}) == "picture"
    assert depiction({}) == "photo"


def test_the_subject_is_the_first_phrase() -> None:
    assert subject("a yam, forest on hermes", "picture") == "a picture of a yam"
    assert subject("photo of a yam with forest background", "picture") == "a picture of a yam"
    assert ARTICLES  # those that bind the words behind them
    assert shortened(["a", "yam,", "forest"], {2}) == "a yam"


def test_a_word_is_kept_as_often_as_it_is_there() -> None:
    (first, *_) = wordings("a cat on a mat", "photo")
    assert (first.kept, first.dropped) == (["a", "cat", "on", "a", "mat"], [])
    last = Wording.of("a photo of a cat", "a cat on a mat in a photo")
    assert (last.kept, last.dropped) == (["a", "cat", "a", "photo"], ["on", "mat", "in", "a"])


@pytest.mark.parametrize(
    ("offered", "expected"),
    [("a zebra", ["a zebra"]), (None, []), (["", " ", "a fox"], ["a fox"]), ([1, ["x"]], []), (["a lion "], [])],
    ids=str,
)
def test_what_a_rewriter_gives_is_taken_as_texts_or_left_out(offered: Any, expected: list[str]) -> None:
    own = [wording.text for wording in wordings("a lion", "photo")]
    assert [wording.text for wording in wordings("a lion", "photo", lambda prompt: offered)] == [*expected, *own]


def test_a_rewriter_that_fails_leaves_the_rest() -> None:
    def broken(prompt: str) -> list[str]:
        raise RuntimeError("no luck")

    assert wordings("a lion", "photo", broken) == wordings("a lion", "photo")


def test_a_prompt_without_words_has_no_wording() -> None:
    assert wordings(" ", "photo") == []
