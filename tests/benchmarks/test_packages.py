"""The benchmark of other people's packages: what it makes of runs, and of packages that are not there; no package is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import typer
from families import PIPELINES

import sdguard
from benchmarks import package_runs, packages
from benchmarks.package_runs import (
    DIFFERS,
    FAILS,
    IDENTICAL,
    NOT_GUARDED,
    NOT_RUN,
    REFUSED,
    Run,
    is_refusal,
    judged_clean,
    judged_flagged,
    measured,
    sentence,
    threshold_of,
)
from benchmarks.package_situations import SITUATIONS, Situation
from sdguard import GuardReport

ONE, OTHER, CHANGED = np.zeros((3, 1)), np.ones((3, 1)), np.array([[0.0], [5.0], [0.0]])
PLAIN = (ONE, OTHER)


def reports(*verdicts: Any, error: str | None = None) -> list[GuardReport]:
    """A report a verdict; of the last one, the error."""
    found = [GuardReport(None, row, verdict) for row, verdict in enumerate(verdicts)]
    found[-1].error = error
    return found


CLEAN = reports("clean", "clean", "clean")


def test_a_run_that_makes_what_the_unguarded_one_makes_is_identical() -> None:
    assert judged_clean(Run(ONE, OTHER, CLEAN), PLAIN) == (IDENTICAL, "")


@pytest.mark.parametrize(
    ("run", "outcome"),
    [
        (Run(CHANGED, OTHER, CLEAN), DIFFERS),
        (Run(ONE, ONE, CLEAN), DIFFERS),
        (Run(ONE, None, CLEAN, "the run after it: no"), FAILS),
        (Run(None, error="KeyError: no"), FAILS),
        (Run(None, error="TypeError: no", is_refusal=True), REFUSED),
        (Run(ONE, OTHER, reports("clean", "clean", "withheld", error="no")), REFUSED),
        (Run(ONE, OTHER), FAILS),
        (Run(ONE, OTHER, warning="it is not guarded"), NOT_GUARDED),
    ],
)
def test_what_else_may_become_of_a_run_is_told_apart(run: Run, outcome: str) -> None:
    found, reason = judged_clean(run, PLAIN)
    assert found == outcome
    assert reason


def test_images_beside_a_flagged_one_are_compared_and_it_is_not() -> None:
    flagged = reports("clean", "steered", "clean")
    assert judged_flagged(Run(CHANGED, OTHER, flagged), PLAIN) == (IDENTICAL, "")
    assert judged_flagged(Run(CHANGED[::-1] + 1, OTHER, flagged), PLAIN)[0] == DIFFERS
    assert judged_flagged(Run(CHANGED, ONE, flagged), PLAIN)[0] == DIFFERS
    assert judged_flagged(Run(ONE, OTHER, CLEAN), PLAIN)[0] == FAILS
    assert judged_flagged(Run(ONE, OTHER, reports("steered", "steered", "clean")), PLAIN)[0] == FAILS


def test_one_image_alone_is_above_the_threshold() -> None:
    found = reports("clean", "clean", "clean")
    for report, norm in zip(found, (1.0, 4.0, 2.0), strict=True):
        report.signals["guidance_norm"] = {"value": norm}
    assert threshold_of(found) == 3.0


def test_what_the_guard_refuses_is_told_from_what_fails_in_it() -> None:
    def raised(call: Any) -> BaseException:
        with pytest.raises((TypeError, KeyError)) as found:
            call()
        return found.value

    refusal = raised(lambda: sdguard.guard(diffusers.DDPMPipeline(None, None)))
    assert is_refusal(refusal)
    assert sentence(refusal).startswith("TypeError: ")
    assert not is_refusal(raised(lambda: dict[str, int]()["missing"]))


def test_a_package_that_cannot_be_applied_does_not_run() -> None:
    def missing(pipe: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'missing'")

    found = measured(Situation("missing", "nothing", "StableDiffusionPipeline", missing))
    assert found == {"outcome": NOT_RUN, "reason": "ModuleNotFoundError: No module named 'missing'"}


def test_what_does_nothing_is_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(package_runs, "STEPS", 2)
    found = measured(Situation("none", "nothing", "StableDiffusionPipeline", lambda pipe: {}))
    assert found == {"outcome": IDENTICAL, "reason": "", "acts": False, "flagged": "steered", "flagged_reason": None}


def test_situations_have_names_of_their_own_and_pipelines_that_are_built() -> None:
    assert len({of.name for of in SITUATIONS}) == len(SITUATIONS)
    assert {of.pipeline for of in SITUATIONS} <= set(PIPELINES)


def test_results_are_kept_and_a_situation_that_differs_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("<!-- packages: ... -->\n<!-- /packages -->\n")
    tried: list[str] = []

    def told(situation: Situation) -> dict[str, Any]:
        tried.append(situation.distribution)
        return {"outcome": DIFFERS, "reason": "an image", "acts": True}

    monkeypatch.setattr(packages, "version_of", lambda name: "1.0" if name == "tomesd" else None)
    monkeypatch.setattr(packages, "in_process", told)
    for _ in range(2):  # the second time nothing is left to be tried
        with pytest.raises(typer.Exit):
            packages.main(only=None, out=tmp_path, root=tmp_path)
    rows = json.loads((tmp_path / "packages.json").read_text())["situations"]
    assert list(rows) == [of.name for of in SITUATIONS]
    assert set(tried) == {"tomesd"}
    assert len(tried) == sum(of.distribution == "tomesd" for of in SITUATIONS)
    shown = (tmp_path / "README.md").read_text()
    assert "| tomesd 1.0 | token merging | `StableDiffusionPipeline` | yes | differs | - |" in shown
    assert "| DeepCache | cache | `StableDiffusionPipeline` | - | not installed | - |" in shown
    assert shown.count("* tomesd, token merging, differs: an image") == 1
