"""Calibration: ordinary prompts measured on a configuration. Some fit the cascade, the others are scored by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from sdguard.decision.cascade import BY_NAME, LATER_CALLS, PLAN, Cascade, judge, judge_later
from sdguard.decision.fingerprint import fingerprint
from sdguard.decision.profile import FORMAT, SERIES, Profile, digest_of
from sdguard.denoiser.families import parameters_of
from sdguard.denoiser.probe import BATCH_SIZE, probe_run
from sdguard.files.resumable import Parts, run_pieces
from sdguard.geometry.alignment import alignment
from sdguard.geometry.rollout import independent_start, rollout_end, short_rollout
from sdguard.observation import Observation
from sdguard.signals.agreement import correlation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.signals.signal import UnsupportedModel
from sdguard.words import document_frequency

#: ordinary prompts that fit the cascade, at most, and whose later steps are measured.
FITTING_PROMPTS, SERIES_PROMPTS = 200, 32
#: signals whose values on ordinary prompts steering and its verification are held to.
STEERED_BY = ("guidance_norm", "agreement")
#: how the pictures are drawn that tell a memorized prompt among ordinary ones, and the correlation from which two are the same.
PICTURE_STEPS, PICTURE_GUIDANCE, SAME_PICTURE = 8, 3.0, 0.95
#: share of the prompts that may be memorized before the list is refused.
MOST_COLLAPSED = 0.5


def split(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` prompts fit the cascade (every third, at most `FITTING_PROMPTS`, evenly spaced) and which are scored by it."""
    stride = math.ceil(count / max(2, min(FITTING_PROMPTS, count // 3)))
    return [i for i in range(count) if i % stride == 0], [i for i in range(count) if i % stride]


def evenly(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def call_setting(pipe: Any, steps: int, guidance_scale: float, height: int, width: int) -> dict[str, Any]:
    """The arguments of a pipeline's call that make a configuration; those it does not have are left out."""
    setting = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    return {name: value for name, value in setting.items() if name in parameters_of(pipe)}


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    work: Path | None = None,
    state: PartialState | None = None,
) -> Profile:
    """Measure ordinary prompts on a pipeline, one seed each, and return the `Profile`.

    A part of the prompts fits the cascade (see `split`), the others are scored by it. Prompts that turn out to be memorized themselves,
    which no list of captions is free of, are set aside (see `collapsed`): the promise is about prompts whose picture hangs on the noise.
    Cost: 2 denoiser evaluations a prompt for each of the first ``1 + LATER_CALLS`` calls; for the fitting ones every signal's and
    alignment's beside, for the others what the cascade buys; `same_picture`'s for the most suspicious; and `SERIES_PROMPTS` full runs.

    Args:
        inputs: what else the pipeline's call is given, such as the picture of an image-to-image run; the same for every prompt.
        progress: called with prompts done and prompts in all.
        work: a folder that keeps what has been measured, so that a killed calibration goes on; removed at the end.
        state: accelerate's, where several processes share the work, each on its own pipeline; every one of them returns the profile.

    Raises:
        ValueError: fewer than 4 prompts, or most of them are memorized.
    """
    if len(prompts) < 4:
        raise ValueError(f"Calibration needs at least 4 ordinary prompts; {len(prompts)} given.")
    configuration = fingerprint(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width, inputs=inputs)
    about = [FORMAT, configuration, list(prompts), seed, PLAN, BATCH_SIZE, PICTURE_STEPS, PICTURE_GUIDANCE, SAME_PICTURE]
    parts = Parts(work, "calibration", about)
    setting = call_setting(pipe, steps, guidance_scale, height, width) | dict(inputs or {})
    drawn_from_pictures = any("image" in name for name in inputs or {})  # what all prompts begin from makes any two pictures alike
    measurement = Measurement(pipe, prompts, setting, seed, parts, state, progress, may_collapse=not drawn_from_pictures)
    fitting, scoring = split(len(prompts))
    cascade, values, unfit = fit(measurement, fitting)
    scores, aside = score(measurement, scoring, cascade)
    series, timesteps = measure_series(measurement, [position for position in scoring if position not in aside][:SERIES_PROMPTS])
    parts.remove()
    gone = sorted([*unfit, *aside])
    words = document_frequency(prompt for position, prompt in enumerate(prompts) if position not in gone)
    return Profile(
        configuration, cascade, scores, values, series, timesteps, words,
        prompts_digest=digest_of(prompts), set_aside=[prompts[position] for position in gone],
    )  # fmt: skip


class Measurement:
    """The prompts of one calibration on its pipeline, measured in batches that are kept in ``parts`` and shared by processes."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        setting: Mapping[str, Any],
        seed: int,
        parts: Parts,
        state: PartialState | None,
        progress: Callable[[int, int], None] | None,
        may_collapse: bool,
    ) -> None:
        self.pipe, self.prompts, self.setting, self.seed, self.may_collapse = pipe, prompts, setting, seed, may_collapse
        self.parts, self.state, self.progress = parts, state, progress
        self.done = 0

    def read(self, what: str, positions: Sequence[int], look: Callable[[Observation], Any], calls: int | None = 1) -> list[list[Any]]:
        """What ``look`` makes of the first ``calls`` calls (all with None) of the prompts at ``positions``: by batch, then by call."""
        batches = [positions[start : start + BATCH_SIZE] for start in range(0, len(positions), BATCH_SIZE)]
        pieces = {f"{what}-{number:06d}": batch for number, batch in enumerate(batches)}
        return run_pieces(self.parts, pieces, partial(self.read_batch, look, calls), self.state, partial(self.advance, what != "series"))

    def read_batch(self, look: Callable[[Observation], Any], calls: int | None, batch: Sequence[int]) -> list[Any]:
        """What ``look`` makes of each call of one batch."""
        found: list[Any] = []
        prompts, seeds = [self.prompts[i] for i in batch], [self.seed + i for i in batch]
        probe_run(self.pipe, prompts, seeds, lambda observation: found.append(look(observation)), calls, **self.setting)
        return found

    def advance(self, first_time: bool, batch: Sequence[int]) -> None:
        """Report the progress after a batch, whose prompts count the first time that they are measured."""
        self.done += len(batch) * first_time
        if self.progress:
            processes = self.state.num_processes if self.state else 1
            self.progress(min(len(self.prompts), self.done * processes), len(self.prompts))


def fit(measurement: Measurement, positions: Sequence[int]) -> tuple[Cascade, dict[str, list[float]], list[int]]:
    """The cascade fitted on the prompts at ``positions``, the signals' values there, ascending, and which positions were set aside."""
    batches = measurement.read("fit", positions, values_to_fit, 1 + LATER_CALLS)
    values = {name: np.array(flatten(first[name] for first, *_ in batches)) for name in batches[0][0]}
    later = np.array([flatten(call["later"] for call in calls) for calls in list(zip(*batches, strict=True))[1:]])
    check_finite(values, positions, measurement.prompts)
    suspicion = Cascade.fit(as_lists(values)).suspicion(as_lists(values)).tolist()
    aside = collapsed(measurement, "fit", sorted_by(suspicion, positions))
    kept = np.array([position not in aside for position in positions])
    values = {name: found[kept] for name, found in values.items()}
    cascade = Cascade.fit(as_lists(values), later=later[:, kept].tolist() if len(later) else [])
    return cascade, as_lists({name: np.sort(found) for name, found in values.items()}), aside


def check_finite(values: Mapping[str, np.ndarray], positions: Sequence[int], prompts: Sequence[str]) -> None:
    """Raise `ValueError` naming a prompt on which something that was read is no number."""
    for name, found in values.items():
        if not np.isfinite(found).all():
            prompt = prompts[positions[int(np.argmin(np.isfinite(found)))]]
            raise ValueError(f"The {name} of the prompt {prompt!r} is no number, so that nothing can be calibrated by it.")


def as_lists(values: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Arrays as lists."""
    return {name: found.tolist() for name, found in values.items()}


def sorted_by(scores: Sequence[float], positions: Sequence[int]) -> list[int]:
    """``positions``, those of the highest of their ``scores`` first."""
    return [position for _, position in sorted(zip(scores, positions, strict=True), key=lambda pair: -pair[0])]


def collapsed(measurement: Measurement, what: str, positions: Sequence[int]) -> list[int]:
    """Which of the prompts at ``positions``, the most suspicious first, give the same picture from two noises: they are memorized.

    They are looked at in batches, until a batch has none; not at all in runs that begin from a picture, whose outputs are alike whatever
    the prompt. Cost: that of `same_picture` for each prompt looked at.

    Raises:
        ValueError: more than `MOST_COLLAPSED` of them do, or fewer than two are left.
    """
    found: list[int] = []
    if not measurement.may_collapse:
        return found
    for start in range(0, len(positions), BATCH_SIZE):
        batch = positions[start : start + BATCH_SIZE]
        ((agreements,),) = measurement.read(f"collapsed-{what}-{start:06d}", batch, same_picture)
        same = [position for position, agreement in zip(batch, agreements, strict=True) if agreement > SAME_PICTURE]
        found += same
        if not same:
            break
    if len(found) > MOST_COLLAPSED * len(positions) or len(positions) - len(found) < 2:
        raise ValueError(
            f"Of {len(positions)} prompts {len(found)} give one picture from any noise: they are not ordinary ones of this model."
        )
    return found


def same_picture(observation: Observation) -> list[float]:
    """Correlation of the pictures that each prompt gives from two noises, ``[B]`` in [-1, 1].

    They are drawn in `PICTURE_STEPS` DDIM steps at `PICTURE_GUIDANCE`. Cost: ``4 * PICTURE_STEPS - 2`` evaluations.
    """
    here = replace(observation, guidance_scale=PICTURE_GUIDANCE, memo=None)
    pictures = (short_rollout(here, noise, PICTURE_STEPS) for noise in (None, independent_start(here)))
    return correlation(*pictures).tolist()


def values_at_first_call(observation: Observation) -> dict[str, list[float]]:
    """Every signal of the plan that the denoiser has the parts for, and what steering and its verification are held to."""
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys([*(name for stage in PLAN for name in stage.signals), *STEERED_BY]):
        with suppress(UnsupportedModel):
            found[name] = BY_NAME[name].read(observation).tolist()
    return {**found, "alignment": alignment(observation, rollout_end(observation), observation.condition).tolist()}


def values_to_fit(observation: Observation) -> dict[str, list[float]]:
    """`values_at_first_call`, and at the later ones the guidance norm."""
    return {"later": guidance_norm(observation).tolist()} if observation.step else values_at_first_call(observation)


def score(measurement: Measurement, positions: Sequence[int], cascade: Cascade) -> tuple[list[float], list[int]]:
    """The scores of the runs of the prompts at ``positions``, later calls included, ascending, and which positions were set aside."""
    batches = measurement.read("score", positions, partial(scores_of_call, cascade), 1 + LATER_CALLS)
    scores = [max(run) for calls in batches for run in zip(*calls, strict=True)]
    check_finite({"score": np.array(scores)}, positions, measurement.prompts)
    aside = collapsed(measurement, "score", sorted_by(scores, positions))
    return sorted(value for value, position in zip(scores, positions, strict=True) if position not in aside), aside


def scores_of_call(cascade: Cascade, observation: Observation) -> list[float]:
    """The score of each row at this call alone."""
    if observation.step:
        return judge_later(guidance_norm(observation), observation.step, cascade).tolist()
    return judge(observation, cascade)[0].tolist()


def measure_series(measurement: Measurement, positions: Sequence[int]) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Mean and standard deviation of the signals in `SERIES` at every call of whole runs, and the calls' timesteps."""
    batches = measurement.read("series", positions, values_of_series, None)
    timesteps = [call[0][0] for call in batches[0]]
    calls = list(zip(*batches, strict=True))
    series = {name: [mean_and_deviation(flatten(part[i] for part in call)) for call in calls] for i, name in enumerate(SERIES, start=1)}
    return series, timesteps


def values_of_series(observation: Observation) -> list[list[float]]:
    """The timestep, alone in its list, and each signal of `SERIES`."""
    return [[observation.timestep], *(BY_NAME[name].read(observation).tolist() for name in SERIES)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of at least two values."""
    return statistics.fmean(values), statistics.stdev(values)


def flatten(lists: Iterable[Sequence[float]]) -> list[float]:
    """The values of all lists, in order."""
    return [value for values in lists for value in values]
