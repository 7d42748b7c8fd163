"""Reports survive JSON and explain themselves."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from sdguard.guarded.report import GuardReport


def test_a_report_survives_json() -> None:
    report = GuardReport("a cat", 1, "steered", 3.2, 2.5, 0.001, {"guidance_norm": {"value": 9.0, "z": 3.2}}, {"guidance_norm": [9.0]}, 40)
    assert GuardReport.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("verdict", "says"),
    [("clean", "Nothing memorized"), ("flagged", "nothing was changed"), ("withheld", "withheld")],
)
def test_the_reason_names_what_happened(verdict: str, says: str) -> None:
    assert says in GuardReport("a cat", 0, verdict, score=3.0, threshold=2.5, p_value=0.001).reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("passed", "says"),
    [
        ({"method": "rewording", "wording": "a cat on a mat"}, "reworded to “a cat on a mat”, verified ahead and on the picture"),
        (
            {"method": "rewording", "wording": "a photo of a cat", "dropped": ["on", "mars"]},
            "“a photo of a cat” (without on, mars), verified",
        ),
        ({"method": "neutral blend", "share": 0.7, "alignment": None}, "70% of the way to ordinary prompts, verified"),
        ({"method": "neutral blend", "share": 0.7, "alignment": None}, "whether it shows what was asked for is not known."),
        ({"method": "attractive-repulsive guidance", "wording": "a cat"}, "steered by attractive-repulsive guidance, reworded to “a cat”"),
        ({"method": "embedding descent"}, "steered by embedding descent, verified ahead and on the picture"),
    ],
)
def test_the_reason_names_what_steered(passed: dict[str, str], says: str) -> None:
    assert (
        says
        in GuardReport(
            "a cat", 0, "steered", score=3.0, threshold=2.5, p_value=0.001, steering={"passed": passed, "attempts": [passed]}
        ).reason
    )


def test_an_error_is_the_reason() -> None:
    assert GuardReport(None, 0, "withheld", error="out of memory").reason == "Could not be judged (out of memory); withheld."


def test_a_withheld_image_says_what_was_tried() -> None:
    steering = {"passed": None, "attempts": [{"method": "rewording"}, {"method": "neutral blend"}]}
    report = GuardReport("a cat", 0, "withheld", score=3.0, threshold=2.5, p_value=0.001, steering=steering)
    assert "2 corrections tried and none held; withheld" in report.reason
    assert "tried" not in GuardReport("a cat", 0, "withheld", score=3.0, threshold=2.5, p_value=0.001).reason


def test_a_report_keeps_its_occasion_and_is_equal_to_one_of_another() -> None:
    occasion = {"version": "1", "model": "m", "profile": "p", "false_positive_rate": 0.01, "seed": 7}
    one, other = (GuardReport("a cat", 0, id=id, time=time, **occasion) for id, time in (("a", "now"), ("b", "then")))  # type: ignore[arg-type]
    assert one == other
    assert asdict(GuardReport.from_json(one.to_json())) == asdict(one)
    assert one != replace(one, seed=8)


@pytest.mark.parametrize("steering", [{"wording": "the heron", "dropped": ["snow"]}, {"method": "blend", "share": 0.5}])
def test_a_reason_without_texts_has_nothing_of_the_prompt(steering: dict[str, Any]) -> None:
    passed = {"passed": {"method": "rewording", **steering}}
    report = GuardReport("a heron in snow", 0, "steered", score=3.0, threshold=2.5, p_value=0.001, steering=passed)
    assert not any(word in report.reason_without_texts for word in ("heron", "snow"))
    assert ("heron" in report.reason) == ("wording" in steering)
    assert "verified ahead and on the picture." in report.reason_without_texts
