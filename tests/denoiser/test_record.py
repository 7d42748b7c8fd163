"""What the record of a run tells from one call to the next: whether the text condition is another, and past norms."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdguard.denoiser import record as record_module
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.record import RunRecord


def changes(*calls: Callable[[], Tensor]) -> list[bool]:
    """Of calls with these embeddings, whether each had others than the one before."""
    record, found = RunRecord(), []
    for embeddings in calls:
        record.note_embeddings((embeddings(), None), 1)
        found.append(record.new_condition)
    return found


def written(held: Tensor, into: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """The same tensor, once a part of it was written into."""

    def write() -> Tensor:
        into(held).add_(1)
        return held

    return write


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether values can be read without waiting."""
    monkeypatch.setattr(record_module, "at_hand", lambda tensor: request.param == "cpu")


@pytest.mark.parametrize(
    ("made_in", "written_in"),
    [(nullcontext, torch.no_grad), (nullcontext, torch.inference_mode), (torch.inference_mode, torch.inference_mode)],
)
@pytest.mark.parametrize("part", [lambda of: of, lambda of: of[1:], lambda of: of.detach().flatten()[-3:]])
def test_embeddings_that_are_written_into_are_new_at_that_call_alone(
    made_in: Callable[[], AbstractContextManager[None]],
    written_in: Callable[[], AbstractContextManager[None]],
    part: Callable[[Tensor], Tensor],
) -> None:
    with made_in():
        held = torch.zeros(2, 3, 4)
    with written_in():
        assert changes(lambda: held, lambda: held, written(held, part), lambda: held) == [False, False, True, False]


def test_what_is_written_where_no_prompt_is_changes_nothing() -> None:
    held = torch.zeros(2, 3, 4)
    assert changes(lambda: held, written(held, lambda of: of[:1])) == [False, False]


def test_other_tensors_are_new_where_their_values_are() -> None:
    first, other = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    calls = [first, first.clone(), other, other.clone(), first, first[:, :2]]
    assert changes(*(lambda of=of: of for of in calls)) == [False, False, True, False, True, True]


def test_on_a_gpu_the_same_tensors_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "at_hand", lambda tensor: False)
    monkeypatch.setattr(record_module, "same_embedding", None)
    held = torch.zeros(2, 3, 4)
    assert changes(lambda: held, lambda: held) == [False, False]


def test_a_text_of_another_length_is_compared_though_another_was_written_in_unseen_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "at_hand", lambda tensor: False)
    short, long = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    assert changes(lambda: short, lambda: short, lambda: long, lambda: long, lambda: long) == [False, False, True, False, False]


@pytest.mark.parametrize("pooled", [False, True])
@given(texts=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1, max_size=6))
def test_texts_written_in_unseen_are_told_by_image(pooled: bool, texts: list[list[int]]) -> None:
    """Of two images, by the call; 0 is what was judged."""

    def embeddings(values: list[int]) -> tuple[Tensor, Tensor | None]:
        tokens = torch.tensor(values, dtype=torch.float)
        return tokens.view(2, 1, 1).expand(2, 3, 4), tokens.view(2, 1).expand(2, 5) if pooled else None

    judged = embeddings([0, 0])
    hidden = HiddenTexts(judged)
    for step, values in enumerate(texts):
        hidden.note(judged, embeddings(values), 10 + step)
    first, several = hidden.found.tolist()
    for image, of in enumerate(zip(*texts, strict=True)):
        others = [value for value in of if value]
        assert first[image] == (of.index(others[0]) if others else -1)
        assert bool(several[image]) == (len(set(others)) > 1)
        assert hidden.texts[0][image, 0, 0] == (others[-1] if others else 0)
    assert hidden.steps == [10 + step for step in range(len(texts))]
