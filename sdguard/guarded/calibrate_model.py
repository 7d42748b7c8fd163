"""The profile of a model made ahead of its runs: enough ordinary prompts, measured; the fallback sequence learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sdguard.decision.cache import (
    cache_folder,
    cache_path,
    cannot_be_written,
    keep_in_cache,
    main_process_alone,
    name_of,
    profile_name,
    told_of_cache,
    why_unwritable,
)
from sdguard.decision.calibration import calibrate, evenly, split
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import known_profile, known_profiles
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.profile import Profile, digest_of, scores_needed
from sdguard.decision.traffic import logged_scores, profile_of_traffic
from sdguard.denoiser.loading import load_for_runs
from sdguard.files.inputs import BadInput
from sdguard.files.outputs import check_file, ensure_writable
from sdguard.files.processes import processes
from sdguard.files.prompt_files import prompts_by_row
from sdguard.files.resumable import parts_folder, remove_folder
from sdguard.guarded.config import GuardConfig
from sdguard.steering.learning import learn_methods


class Calibrated(NamedTuple):
    """A profile that was made ahead."""

    path: Path
    profile: Profile
    #: whether the guard finds it by itself, or another of the model goes before it.
    found: bool


def scored_and_needed(count: int, false_positive_rate: float) -> tuple[int, int]:
    """How many of ``count`` prompts a calibration scores, and how many it has to for a threshold at this rate."""
    return len(split(count)[1]) if count >= 4 else 0, scores_needed(false_positive_rate)


def calibrate_model(
    model: str,
    *,
    prompts: Path | None,
    memorized: Path | None,
    column: str | None = None,
    count: int | None,
    false_positive_rate: float,
    seed: int,
    out: Path | None,
    progress: Callable[[str, int, int], None],
    dtype: str | None = None,
    device: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
    skip_empty: bool = False,
) -> Calibrated | None:
    """Calibrate a model (`load_pipeline`'s name) and keep the profile; a killed calibration goes on.

    Args:
        prompts: a file of ordinary prompts; None for those that come along.
        memorized: a file of prompts known to be memorized, which the order of the steering methods is learnt from.
        column: of these files, that holds the prompts; by default as in `sdguard.files.prompt_files.prompt_column`.
        count: use so many of the ordinary prompts, evenly spaced.
        false_positive_rate: what the profile has to support.
        out: where the profile goes; None for the user's cache.
        progress: called with what is being done, how many prompts are done and how many there are.
        skip_empty: leave out rows of these files without text, and have the log say how many.
        dtype, device, lora, lora_scale: as `load_for_runs`.

    Returns:
        None for all processes but the main one, where several share the work.

    Raises:
        ValueError: a file, model or rate that cannot be used, or too few prompts; one sentence. A profile that turns out too small
            for the rate is not kept, since the guard would find it and refuse every run.
    """
    GuardConfig(false_positive_rate=false_positive_rate)  # refuses a rate that cannot be
    state = processes()
    pipe = load_for_runs(model, device, dtype, lora, lora_scale)
    chosen = list(prompts_by_row(prompts, column, skip_empty).values()) if prompts else ordinary_prompts(pipe)
    if count is not None:
        if count > len(chosen):
            raise BadInput(f"--n asks for {count} prompts, and there are {len(chosen)}.")
        chosen = evenly(chosen, count)
    rate, (scored, needed) = false_positive_rate, scored_and_needed(len(chosen), false_positive_rate)
    if scored < needed:
        raise BadInput(f"A false-positive rate of {rate:g} needs {needed} prompts to score; of {len(chosen)} prompts {scored} are scored.")
    known = list(prompts_by_row(memorized, column, skip_empty).values()) if memorized else []
    own = identity(pipe)
    path = out or cache_path(own, chosen)
    if out:
        check_file(path, prompts, memorized)
        ensure_writable(path.parent)
    elif trouble := why_unwritable(path.parent):
        raise BadInput(cannot_be_written(trouble))
    # a file may become another model's, or another list's, whose kept work stays; in the cache each has a file of its own
    work = parts_folder(path) / profile_name(own, digest_of(chosen), len(chosen)) if out else parts_folder(path)
    with told_of_cache(), main_process_alone(path, state):
        measuring = partial(progress, "calibrating")
        profile = calibrate(pipe, chosen, seed=seed, progress=measuring, work=work, state=state, keep_work=True)
        try:
            if state.is_main_process:
                check_enough(profile, len(chosen), rate)
                if known:
                    learning = partial(progress, "learning the order of methods")
                    profile = learn_methods(pipe, profile, known, seed=seed, progress=learning, work=work)
                if out:
                    profile.save(path)
                else:
                    keep_in_cache(profile, path)
        finally:
            state.wait_for_everyone()
        remove_folder(work)
    return Calibrated(path, profile, known_profile(pipe, own) == profile) if state.is_main_process else None


def check_enough(profile: Profile, count: int, rate: float) -> None:
    """Raise `BadInput` where a profile made of ``count`` prompts has too few scores for a false-positive rate."""
    if profile.prompts < scores_needed(rate):
        raise BadInput(
            f"A false-positive rate of {rate:g} needs {scores_needed(rate)} scored prompts, and {profile.prompts} of {count} are left: "
            f"{len(profile.set_aside)} are memorized themselves and were set aside; give more prompts, or a higher --fpr."
        )


def calibrate_from_log(
    model: str,
    log: Path,
    *,
    memorized_share: float,
    false_positive_rate: float,
    out: Path | None,
    dtype: str | None = None,
    device: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
) -> Calibrated:
    """The known profile of a model with its threshold resting on a log of real traffic (`GuardConfig.score_log`); nothing is evaluated.

    Of several that are known it is the first, in the order in which the guard takes them, that enough of the log's scores were given by.

    Args:
        memorized_share: of the logged pictures that may be memorized, at most (`profile_of_traffic`).
        false_positive_rate: what the profile has to support.
        out: where the profile goes; None for the user's cache.
        dtype, device, lora, lora_scale: as `load_for_runs`.

    Raises:
        ValueError: no profile of the model is known, or the log is none, or too short for the rate; one sentence.
    """
    GuardConfig(false_positive_rate=false_positive_rate)
    pipe = load_for_runs(model, device, dtype, lora, lora_scale)
    own = identity(pipe)
    known = [profile for _, profile in known_profiles(pipe, own)]
    if not known:
        raise BadInput(f"No profile of {model} is known, so that nothing can have been scored by it: 'sdguard calibrate' makes one.")
    profile = profile_of_traffic(*logged_scores(log, known), memorized_share)
    profile.allowed(false_positive_rate)
    path = out or cache_folder() / f"{name_of(profile)}.json"
    check_file(path, log)
    ensure_writable(path.parent)
    if out:
        profile.save(path)
    else:
        with told_of_cache():
            keep_in_cache(profile, path)
    return Calibrated(path, profile, known_profile(pipe, own) == profile)
