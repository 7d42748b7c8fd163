"""One situation of `benchmarks.package_situations`, in a process of its own: what is made of it unguarded and guarded.

``python -m benchmarks.package_runs NAME FILE`` with the folder ``tests`` on the path; `benchmarks.packages` runs it. Each run is of a
pipeline made anew, as packages keep much in pipelines, and is followed by an unguarded one of the same pipeline, which shows what was left
behind.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

import sdguard
from benchmarks.package_situations import SITUATIONS, Situation
from sdguard import GuardConfig, GuardReport, testbed
from sdguard.denoiser.probe import read_prompts

#: enough of them for caches to skip some.
STEPS = 8
#: characters of a reason that are kept.
LONGEST_REASON = 300
#: what becomes of a situation.
IDENTICAL, REFUSED, NOT_GUARDED, DIFFERS, FAILS = "identical", "refused", "not guarded, as a warning says", "differs", "fails"
NOT_REPEATED, NOT_RUN = "does not repeat itself", "does not run unguarded"


class Run(NamedTuple):
    """A run under guard, and the unguarded one after it.

    Attributes:
        pictures: what was made; None where an error was raised.
        after: what the unguarded run after it made; None where an error was raised.
        reports: the guard's, none where nothing was guarded.
        error: what was raised, in a sentence.
        is_refusal: whether the guard itself raised it, and no code that it called.
        warning: that what is made is not guarded, if it was said.
    """

    pictures: np.ndarray | None
    after: np.ndarray | None = None
    reports: Sequence[GuardReport] = ()
    error: str | None = None
    is_refusal: bool = False
    warning: str | None = None


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]


def is_refusal(error: BaseException) -> bool:
    """Whether the guard itself raised an error on purpose."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, (TypeError, ValueError)) and Path(sdguard.__file__).parent in raised_in.parents


def built(situation: Situation) -> tuple[Any, dict[str, Any]]:
    """A pipeline without the package, and the arguments of its call."""
    families = import_module("families")
    pipe = families.build(situation.pipeline, testbed.load().tokenizer)
    situation.prepare(pipe)
    return pipe, {"prompt": families.PROMPTS, **families.PIPELINES[situation.pipeline][1](), **situation.given}


def made(situation: Situation) -> tuple[Any, dict[str, Any]]:
    """A pipeline with the package, and the arguments of its call."""
    pipe, given = built(situation)
    return pipe, {**given, **situation.apply(pipe)}


def output(pipe: Any, method: str, given: Mapping[str, Any]) -> Any:
    """What a call gives; every call begins with the same random numbers, whoever draws them."""
    torch.manual_seed(0)
    seeds = [torch.Generator().manual_seed(7 + row) for row in range(3)]
    usual = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np", "generator": seeds}
    return (pipe if method == "__call__" else getattr(pipe, method))(**usual, **given)


def unguarded(situation: Situation) -> tuple[np.ndarray, np.ndarray]:
    """What two calls of one pipeline make, one after the other."""
    pipe, given = made(situation)
    one, other = (output(pipe, situation.method, given).images for _ in range(2))
    return one, other


def without(situation: Situation) -> np.ndarray:
    """What is made without the package."""
    pipe, given = built(situation)
    images: np.ndarray = output(pipe, "__call__", given).images
    return images


def guarded(situation: Situation, threshold: float, first: bool = False) -> Run:
    """A run in which a score above ``threshold`` is flagged; the package is applied to the guarded pipeline with ``first``."""
    pipe, given = built(situation)
    config = GuardConfig(profile=import_module("families").profile_for(threshold))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if not first:
                given |= situation.apply(pipe)
            guard = sdguard.guard(pipe, config)
            if first:
                given |= situation.apply(guard)
            found = output(guard, situation.method, given)
            reports: Sequence[GuardReport] = getattr(found, "guard", ())
    except Exception as error:
        return Run(None, None, (), sentence(error), is_refusal(error))
    warning = next((str(of.message) for of in said if "is not guarded" in str(of.message)), None)
    try:
        after = output(pipe, situation.method, given).images
    except Exception as error:
        return Run(found.images, None, reports, f"the run after it: {sentence(error)}", False, warning)
    return Run(found.images, after, reports, None, False, warning)


def read(situation: Situation, plain: Sequence[np.ndarray]) -> tuple[str, str]:
    """What becomes of prompts that are read as a calibration reads them, and of the unguarded run after it."""
    pipe, given = made(situation)
    try:
        read_prompts(pipe, import_module("families").PROMPTS, [7, 8, 9])
        after = output(pipe, situation.method, given).images
    except Exception as error:
        return (REFUSED if is_refusal(error) else FAILS), f"where prompts are read: {sentence(error)}"
    return (IDENTICAL, "") if same([after], plain[:1]) else (DIFFERS, "the unguarded run after prompts were read")


def threshold_of(reports: Sequence[GuardReport]) -> float:
    """What one image alone is above."""
    norms = sorted(report.signals["guidance_norm"]["value"] for report in reports)
    return sum(norms[-2:]) / 2


def same(some: Sequence[np.ndarray | None], others: Sequence[np.ndarray | None]) -> bool:
    """Whether pictures are the same, bit by bit."""
    return all(
        one is not None and other is not None and np.array_equal(one, other, equal_nan=True)
        for one, other in zip(some, others, strict=True)
    )


def failed(run: Run, plain: Sequence[np.ndarray]) -> tuple[str, str] | None:
    """What is wrong with a guarded run whatever its verdicts are, as outcome and reason; ``plain`` are two unguarded runs."""
    if run.pictures is None:
        return (REFUSED if run.is_refusal else FAILS), str(run.error)
    if run.error is not None:
        return FAILS, run.error
    if run.after is None or not same([run.after], plain[1:]):
        return DIFFERS, "the unguarded run after the guarded one"
    return None


def judged_clean(run: Run, plain: Sequence[np.ndarray]) -> tuple[str, str]:
    """What becomes of a run in which nothing is flagged."""
    if (wrong := failed(run, plain)) is not None:
        return wrong
    if errors := [report.error for report in run.reports if report.error]:
        return REFUSED, errors[0][:LONGEST_REASON]
    if not same([run.pictures], plain[:1]):
        return DIFFERS, "where nothing is flagged"
    if not run.reports:
        return (FAILS, "pictures are made unguarded, and nothing says so") if run.warning is None else (NOT_GUARDED, run.warning)
    return IDENTICAL, ""


def judged_flagged(run: Run, plain: Sequence[np.ndarray]) -> tuple[str, str]:
    """What becomes of a run in which one image is flagged."""
    if (wrong := failed(run, plain)) is not None:
        return wrong
    assert run.pictures is not None
    others = [row for row, report in enumerate(run.reports) if report.verdict == "clean"]
    if len(others) != len(run.reports) - 1:
        verdicts = ", ".join(report.verdict for report in run.reports)
        return FAILS, f"one image of three was to be flagged: {verdicts}"
    if not same([run.pictures[others]], [plain[0][others]]):
        return DIFFERS, "an image beside a flagged one"
    return IDENTICAL, ""


def flagged_one(reports: Sequence[GuardReport]) -> dict[str, str | None]:
    """What became of the flagged image of a run, with the reason where it could not be judged or steered."""
    return next(({"flagged": report.verdict, "flagged_reason": report.error} for report in reports if report.verdict != "clean"), {})


def measured(situation: Situation) -> dict[str, Any]:
    """What is told of a situation: its "outcome" and "reason", whether the package "acts" on pictures, and what was "flagged"."""
    try:
        bare = without(situation)
        plain, again = unguarded(situation), unguarded(situation)
    except Exception as error:
        return {"outcome": NOT_RUN, "reason": sentence(error)}
    acts = not same([bare], plain[:1])
    if not same(plain, again):
        return {"outcome": NOT_REPEATED, "reason": "two pipelines made the same way give different pictures", "acts": acts}
    clean = guarded(situation, 1e6)
    (outcome, reason), flagged = judged_clean(clean, plain), {}
    if outcome == IDENTICAL:
        one = guarded(situation, threshold_of(clean.reports))
        (outcome, reason), flagged = judged_flagged(one, plain), flagged_one(one.reports)
    if outcome == IDENTICAL:
        outcome, reason = read(situation, plain)
    if outcome in (IDENTICAL, NOT_GUARDED):
        found, why = judged_clean(guarded(situation, 1e6, first=True), plain)
        outcome, reason = (outcome, reason) if found == outcome else (found, f"applied to a guarded pipeline: {why}")
    return {"outcome": outcome, "reason": reason, "acts": acts, **flagged}


def main(name: str, file: str) -> None:
    """Measure the situation of a name, and write what is told of it."""
    torch.set_num_threads(1)
    situation = next(of for of in SITUATIONS if of.name == name)
    # a configuration's profile is taken as it is, whatever model it is of
    with patch.object(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile):
        Path(file).write_text(json.dumps(measured(situation)))


if __name__ == "__main__":
    main(*sys.argv[1:])
