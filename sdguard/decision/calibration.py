"""Calibration: ordinary prompts read on a model. Some fit the cascade, the others are scored by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState

from sdguard.choices import BATCH_SIZE
from sdguard.decision.cascade import BY_NAME, PLAN, Cascade, judge
from sdguard.decision.identity import identity
from sdguard.decision.profile import FORMAT, SAME_PICTURE, SERIES, Profile, digest_of
from sdguard.denoiser.probe import fitting, read_prompts
from sdguard.denoiser.reference_call import reference_timestep
from sdguard.files.inputs import are_texts, shown
from sdguard.files.resumable import Parts, run_pieces
from sdguard.geometry.alignment import alignment
from sdguard.geometry.reference import NOISED_LOG_SNR, recurrence, reference_end, timestep_at
from sdguard.geometry.rollout import observations
from sdguard.geometry.rowwise import correlation
from sdguard.observation import Observation, is_flow, noise_level
from sdguard.signals.signal import UnsupportedModel
from sdguard.words import document_frequency

#: ordinary prompts that fit the cascade, at most.
FITTING_PROMPTS = 200
#: of those, on how many is read what decides nothing by itself: what is reported only, and what verification is held to.
REPORTED_PROMPTS = 27
#: on how many is read how the free signals move with the noise level that a run begins at, and those levels, as shares of training's.
TILT_PROMPTS, OTHER_LEVELS = 14, (0.95, 0.998)
#: runs whose free signals are followed, and in how many steps.
SERIES_PROMPTS, SERIES_STEPS = 8, 8
#: share of the prompts of a list that is looked at for such, the most suspicious of them, before the look may end.
LOOKED_AT = 0.02
#: share of the prompts that may be memorized before the list is refused.
MOST_COLLAPSED = 0.5

Item = TypeVar("Item")
#: what is read of a batch: by name, a value a prompt.
Values = dict[str, list[float]]


def split(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` prompts fit the cascade (every third, at most `FITTING_PROMPTS`, evenly spaced) and which are scored by it."""
    stride = math.ceil(count / max(2, min(FITTING_PROMPTS, count // 3)))
    return [i for i in range(count) if i % stride == 0], [i for i in range(count) if i % stride]


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    adapter_scale: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    work: Path | None = None,
    state: PartialState | None = None,
    keep_work: bool = False,
) -> Profile:
    """Read ordinary prompts on a pipeline, one seed each, at the guard's own reference call, and return the `Profile`.

    A part of the prompts fits the cascade (see `split`), the others are scored by it. Prompts that turn out to be memorized themselves,
    which no list of captions is free of, are set aside (see `collapsed`): the promise is about prompts whose picture hangs on the noise.
    Cost: 2 denoiser evaluations a prompt; for the fitting ones those of the signals that decide, and for `REPORTED_PROMPTS` of them all
    that is reported or verified; for the others what the cascade buys; `SERIES_PROMPTS` short runs.

    Args:
        adapter_scale: what the calls scale LoRA by, where they do.
        progress: called with prompts done and prompts in all.
        work: a folder that keeps what has been measured, so that a killed calibration goes on; removed at the end.
        keep_work: leave it, for who has to keep the profile before it goes: whenever the process is killed, the one or the other is there.
        state: accelerate's, where several processes share the work, each on its own pipeline; every one of them returns the profile.

    Raises:
        TypeError: ``prompts`` is no list of texts; one sentence.
        ValueError: fewer than 4 prompts, or most of them are memorized.
    """
    if not are_texts(prompts):
        raise TypeError(f"Calibration needs a list of prompts, and was given {shown(prompts)}.")
    prompts = list(prompts)
    if len(prompts) < 4:
        raise ValueError(f"Calibration needs at least 4 ordinary prompts; {len(prompts)} given.")
    model = identity(pipe, adapter_scale)
    parts = Parts(work, "calibration", [FORMAT, model, prompts, seed, PLAN, BATCH_SIZE, SAME_PICTURE, REPORTED_PROMPTS, TILT_PROMPTS])
    measurement = Measurement(pipe, prompts, seed, adapter_scale, parts, state, progress)
    fitting, scoring = split(len(prompts))
    cascade, values, unfit = fit(measurement, fitting)
    scores, aside = score(measurement, scoring, cascade)
    series, timesteps = measure_series(measurement, [position for position in scoring if position not in aside][:SERIES_PROMPTS])
    if not keep_work:
        parts.remove()
    gone = sorted([*unfit, *aside])
    words = document_frequency(prompt for position, prompt in enumerate(prompts) if position not in gone)
    return Profile(
        model, cascade, scores, values, series, timesteps, words,
        prompts_digest=digest_of(prompts), set_aside=[prompts[position] for position in gone],
    )  # fmt: skip


class Measurement:
    """The prompts of one calibration on its pipeline, read in batches that are kept in ``parts`` and shared by processes."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seed: int,
        adapter_scale: float | None,
        parts: Parts,
        state: PartialState | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.pipe, self.prompts, self.seed, self.adapter_scale = pipe, prompts, seed, adapter_scale
        self.parts, self.state, self.progress = parts, state, progress
        self.done = 0

    def read(
        self,
        what: str,
        positions: Sequence[int],
        look: Callable[[Observation], Values],
        first_time: bool = False,
        timestep: float | None = None,
    ) -> Values:
        """What ``look`` makes of the prompts at ``positions``, in their order; ``first_time``: they count as progress.

        ``timestep`` is another than the reference call's, where one is given.
        """
        batches = [positions[start : start + BATCH_SIZE] for start in range(0, len(positions), BATCH_SIZE)]
        pieces = {f"{what}-{number:06d}": batch for number, batch in enumerate(batches)}
        read = partial(self.read_batch, look, timestep)
        return joined(run_pieces(self.parts, pieces, read, self.state, partial(self.advance, first_time)))

    @torch.no_grad()
    def read_batch(self, look: Callable[[Observation], Values], timestep: float | None, batch: Sequence[int]) -> Values:
        """What ``look`` makes of one batch; of its halves, where it does not fit into memory."""

        def read(some: Sequence[int]) -> Values:
            prompts, seeds = [self.prompts[i] for i in some], [self.seed + i for i in some]
            return look(read_prompts(self.pipe, prompts, seeds, self.adapter_scale, timestep))

        return joined(fitting(read, batch))

    def advance(self, first_time: bool, batch: Sequence[int]) -> None:
        """Report the progress after a batch, whose prompts count the first time that they are read."""
        self.done += len(batch) * first_time
        if self.progress:
            processes = self.state.num_processes if self.state else 1
            self.progress(min(len(self.prompts), self.done * processes), len(self.prompts))


def joined(parts: Sequence[Values]) -> Values:
    """The values of several batches as those of one."""
    return {name: flatten(part[name] for part in parts) for name in parts[0]}


def fit(measurement: Measurement, positions: Sequence[int]) -> tuple[Cascade, dict[str, list[float]], list[int]]:
    """The cascade fitted on the prompts at ``positions``, what was read there, ascending, and which positions were set aside."""
    values = measurement.read("fit", positions, deciding_values, first_time=True)
    check_finite(values, positions, measurement.prompts)
    suspicion = Cascade.fit(values).suspicion(values).tolist()
    aside = collapsed(measurement, "fit", sorted_by(suspicion, positions))
    kept = [i for i, position in enumerate(positions) if position not in aside]
    values = {name: [found[i] for i in kept] for name, found in values.items()}
    reported = measurement.read("reported", evenly([positions[i] for i in kept], REPORTED_PROMPTS), reported_values)
    values |= {name: found for name, found in reported.items() if name not in values}
    check_finite(values, positions, measurement.prompts)
    chosen = evenly(range(len(kept)), TILT_PROMPTS)
    here = {name: [values[name][i] for i in chosen] for name in PLAN[0].fused}
    cascade = tilted(measurement, [positions[kept[i]] for i in chosen], here, Cascade.fit(values))
    return cascade, {name: sorted(found) for name, found in values.items()}, aside


def tilted(measurement: Measurement, positions: Sequence[int], here: Values, cascade: Cascade) -> Cascade:
    """The cascade whose first stage, read at whatever level near the reference call's a run begins at, allows for that level.

    ``here`` has the stage's signals at the reference call of the prompts at ``positions``. Nothing to allow for in flow matching, where
    runs begin with noise alone. Cost: 2 evaluations a prompt and level.
    """
    scheduler = measurement.pipe.scheduler
    if is_flow(scheduler):
        return cascade
    timesteps = [float(round(level * scheduler.config.num_train_timesteps) + 1) for level in OTHER_LEVELS]
    at, *levels = (noise_level(scheduler, t).log_snr for t in (reference_timestep(scheduler), *timesteps))
    there = [measurement.read(f"level {t:g}", positions, free_values, timestep=t) for t in timesteps]
    scales = {
        name: cascade.scales[name].tilted(at, here[name], [(level, values[name]) for level, values in zip(levels, there, strict=True)])
        for name in here
        if name in cascade.scales
    }
    return replace(cascade, scales={**cascade.scales, **scales})


def check_finite(values: Mapping[str, Sequence[float]], positions: Sequence[int], prompts: Sequence[str]) -> None:
    """Raise `ValueError` naming a prompt on which something that was read is no number."""
    for name, found in values.items():
        if not np.isfinite(found).all():
            prompt = prompts[positions[int(np.argmin(np.isfinite(found)))]]
            raise ValueError(f"The {name} of the prompt {prompt!r} is no number, so that nothing can be calibrated by it.")


def sorted_by(scores: Sequence[float], positions: Sequence[int]) -> list[int]:
    """``positions``, those of the highest of their ``scores`` first."""
    return [position for _, position in sorted(zip(scores, positions, strict=True), key=lambda pair: -pair[0])]


def collapsed(measurement: Measurement, what: str, positions: Sequence[int]) -> list[int]:
    """Which of the prompts at ``positions``, the most suspicious first, give the same picture from two noises: they are memorized.

    They are looked at in batches, until a batch has none and `LOOKED_AT` of them have been. Cost: that of `same_picture` for each.

    Raises:
        ValueError: more than `MOST_COLLAPSED` of them do, or fewer than two are left.
    """
    found: list[int] = []
    for start in range(0, len(positions), BATCH_SIZE):
        batch = positions[start : start + BATCH_SIZE]
        agreements = measurement.read(f"collapsed-{what}-{start:06d}", batch, same_picture)["reference_agreement"]
        same = [position for position, agreement in zip(batch, agreements, strict=True) if agreement > SAME_PICTURE]
        found += same
        if not same and start + BATCH_SIZE >= LOOKED_AT * len(positions):
            break
    if len(found) > MOST_COLLAPSED * len(positions) or len(positions) - len(found) < 2:
        raise ValueError(
            f"Of {len(positions)} prompts {len(found)} give one picture from any noise: they are not ordinary ones of this model."
        )
    return found


def same_picture(observation: Observation) -> Values:
    """Correlation of what each text draws from two noises, in [-1, 1]. Cost: 7 evaluations."""
    return {"reference_agreement": correlation(reference_end(observation), reference_end(observation, 0)).tolist()}


def read_signals(observation: Observation, names: Iterable[str]) -> Values:
    """Those of the signals that the denoiser has the parts for. Cost: theirs."""
    found = {}
    for name in names:
        with suppress(UnsupportedModel):
            found[name] = BY_NAME[name].read(observation).tolist()
    return found


def deciding_values(observation: Observation) -> Values:
    """Every signal of the plan that decides, and the guidance norm, which steering aims by."""
    return read_signals(observation, dict.fromkeys([*(name for stage in PLAN for name in stage.fused), "guidance_norm"]))


def free_values(observation: Observation) -> Values:
    """The signals of the first stage, which cost nothing."""
    return read_signals(observation, PLAN[0].fused)


def reported_values(observation: Observation) -> Values:
    """What is reported beside, and what verification is held to: agreement, recurrence, and alignment with what the text draws."""
    reported = read_signals(observation, dict.fromkeys(name for stage in PLAN for name in stage.signals if name not in stage.fused))
    drawn = reference_end(observation)
    held = {
        "recurrence": recurrence(observation, drawn, timestep_at(observation, NOISED_LOG_SNR)),
        "alignment": alignment(observation, drawn, observation.condition),
    }
    return {**reported, **same_picture(observation), **{name: values.tolist() for name, values in held.items()}}


def score(measurement: Measurement, positions: Sequence[int], cascade: Cascade) -> tuple[list[float], list[int]]:
    """The scores of the prompts at ``positions``, ascending, and which positions were set aside."""
    scores = measurement.read("score", positions, partial(scores_by, cascade), first_time=True)["score"]
    check_finite({"score": scores}, positions, measurement.prompts)
    aside = collapsed(measurement, "score", sorted_by(scores, positions))
    return sorted(value for value, position in zip(scores, positions, strict=True) if position not in aside), aside


def scores_by(cascade: Cascade, observation: Observation) -> Values:
    """The score of each prompt."""
    return {"score": judge(observation, cascade)[0].tolist()}


def measure_series(measurement: Measurement, positions: Sequence[int]) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Mean and standard deviation of the signals in `SERIES` along short guided runs, and the timesteps of their calls."""
    found = measurement.read("series", positions, values_along)
    timesteps = list(dict.fromkeys(float(name.split("@")[1]) for name in found))
    return {name: [mean_and_deviation(found[f"{name}@{timestep:g}"]) for timestep in timesteps] for name in SERIES}, timesteps


def values_along(observation: Observation) -> Values:
    """Each signal of `SERIES` at every call of a short run, named ``signal@timestep``. Cost: ``2 (SERIES_STEPS - 1)`` evaluations."""
    calls = observations(observation, steps=SERIES_STEPS)
    return {f"{name}@{call.timestep:g}": read(call).tolist() for call in calls for name, read in SERIES.items()}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of at least two values."""
    return statistics.fmean(values), statistics.stdev(values)


def flatten(lists: Iterable[Sequence[float]]) -> list[float]:
    """The values of all lists, in order."""
    return [value for values in lists for value in values]
