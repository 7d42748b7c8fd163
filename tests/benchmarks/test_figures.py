"""The filmstrip shows what it says, or is not written."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.figures import check, frames
from sdguard.demo.comparison import Comparison, Course
from sdguard.demo.settings import Setting
from sdguard.files.inputs import BadInput
from sdguard.guarded.report import GuardReport


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def course(value: int, steps: int = 3) -> Course:
    return Course("", estimates={step: picture(value) for step in range(steps)}, images=[picture(value)])


def comparison(verdict: Any, before: int, after: int, ratios: tuple[float, float]) -> Comparison:
    profile: Any = SimpleNamespace()
    found = Comparison(Setting("a prompt"), profile, course(before), course(after), [GuardReport("a prompt", 0, verdict)], [0])
    return replace(found, ratios_before=[ratios[0]], ratios_after=[ratios[1]])


MEMORIZED, ORDINARY = comparison("steered", 10, 200, (0.1, 0.9)), comparison("clean", 50, 50, (0.9, 0.9))


def test_the_filmstrip_has_a_frame_a_step_and_the_finished_pictures_last() -> None:
    check(MEMORIZED, ORDINARY)
    found = frames(MEMORIZED, ORDINARY, picture(90))
    assert len(found) == 4
    assert len({frame.size for frame in found}) == 1
    assert np.any(np.asarray(found[-1]) != np.asarray(found[-2]))  # the verdicts
    shown = {tuple(colour) for colour in np.asarray(found[0]).reshape(-1, 3)}
    assert {(value,) * 3 for value in (10, 200, 50, 90)} <= shown


@pytest.mark.parametrize(
    ("memorized", "ordinary", "why"),
    [
        (comparison("steered", 10, 200, (0.9, 0.9)), ORDINARY, "is no copy"),
        (comparison("steered", 10, 200, (0.1, 0.1)), ORDINARY, "did not depart"),
        (comparison("withheld", 10, 200, (0.1, 0.9)), ORDINARY, "did not depart"),
        (MEMORIZED, comparison("clean", 50, 51, (0.9, 0.9)), "not identical"),
    ],
)
def test_a_filmstrip_that_would_say_something_untrue_is_refused(memorized: Comparison, ordinary: Comparison, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        check(memorized, ordinary)
