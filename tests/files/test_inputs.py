"""How a value that cannot be used stands in the sentence that says so."""

from typing import Any

import pytest
import torch

from sdguard import GuardConfig, calibrate, guard
from sdguard.files.inputs import LONGEST_VALUE, are_texts, shown


def kind(value: Any) -> str:
    """What a case is called, since some of these have no text."""
    return type(value).__name__


class Unspeakable:
    """Has no repr."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", ["a" * 5000, 10**400, 10**5000, list(range(9999)), torch.zeros(40, 40), "a\nb", Unspeakable(), {1: "x" * 900}], ids=kind
)
def test_any_value_is_short_and_on_one_line(value: Any) -> None:
    assert "\n" not in shown(value)
    assert 0 < len(shown(value)) <= LONGEST_VALUE


def test_what_is_short_is_shown_as_it_is() -> None:
    assert [shown(value) for value in ("a", 5, None, [1, "a"], 0.5)] == ["'a'", "5", "None", "[1, 'a']", "0.5"]


@pytest.mark.parametrize("value", ["a" * 5000, 10**5000, Unspeakable(), list(range(9999))], ids=kind)
@pytest.mark.parametrize("field", ["mode", "false_positive_rate", "on_failure", "profile", "steering", "score_log", "rewriter"])
def test_a_config_is_refused_in_a_short_sentence_whatever_it_was_given(field: str, value: Any) -> None:
    if field in ("profile", "score_log") and isinstance(value, str):
        return  # a name is a name, however long
    with pytest.raises((ValueError, TypeError), match=rf"^{field}[^\n]{{1,400}}\.$"):
        GuardConfig(**{field: value})


@pytest.mark.parametrize("values", ["a cat", b"a cat", {"a": 1}, {"a", "b"}, [1], [None], 5, None])
def test_what_is_no_list_of_texts_is_told_from_one(values: Any) -> None:
    assert not are_texts(values)
    assert are_texts(["a"])
    assert are_texts(())


@pytest.mark.parametrize("prompts", ["a cat", 5, [1, 2, 3, 4, 5], {"a": 1, "b": 2, "c": 3, "d": 4}, 0.5])
def test_calibration_is_refused_in_a_sentence_on_what_is_no_list_of_prompts(prompts: Any, tiny: Any) -> None:
    with pytest.raises(TypeError, match=r"^Calibration needs a list of prompts, and was given [^\n]{1,100}\.$"):
        calibrate(tiny, prompts)
    with pytest.raises((TypeError, ValueError), match=r"^calibration_prompts [^\n]+\.$"):
        guard(tiny).calibrate(prompts)
