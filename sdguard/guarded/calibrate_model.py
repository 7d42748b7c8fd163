"""The profile of a configuration made ahead of its runs: enough ordinary prompts, measured; the fallback sequence learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdguard.decision.calibration import calibrate, evenly, split
from sdguard.decision.fingerprint import fingerprint
from sdguard.decision.profile import Profile, scores_needed
from sdguard.decision.store import cache_path, ordinary_prompts
from sdguard.denoiser.families import default_size
from sdguard.denoiser.loading import default_setting, load_pipeline
from sdguard.files.inputs import BadInput
from sdguard.files.outputs import ensure_writable
from sdguard.files.processes import processes
from sdguard.files.prompt_files import prompts_by_row
from sdguard.files.resumable import parts_folder
from sdguard.guarded.config import GuardConfig
from sdguard.steering.learning import learn_methods


def scored_and_needed(count: int, false_positive_rate: float) -> tuple[int, int]:
    """How many of ``count`` prompts a calibration scores, and how many it has to for a threshold at this rate."""
    return len(split(count)[1]) if count >= 4 else 0, scores_needed(false_positive_rate)


def calibrate_model(
    model: str,
    *,
    prompts: Path | None,
    memorized: Path | None,
    count: int | None,
    false_positive_rate: float,
    steps: int | None,
    guidance: float | None,
    height: int | None,
    width: int | None,
    seed: int,
    out: Path | None,
    progress: Callable[[str, int, int], None],
) -> tuple[Path, Profile] | None:
    """Calibrate a configuration of a model (`load_pipeline`'s name) and keep the profile; a killed calibration goes on.

    Args:
        prompts: a file of ordinary prompts; None for those that come along.
        memorized: a file of prompts known to be memorized, which the order of the steering methods is learnt from.
        count: use so many of the ordinary prompts, evenly spaced.
        false_positive_rate: what the profile has to support.
        out: where the profile goes; None for the user's cache, where the guard finds it.
        progress: called with what is being done, how many prompts are done and how many there are.

    Returns:
        where the profile is, and the profile; None for all processes but the main one, where several share the work.

    Raises:
        ValueError: a file, model or rate that cannot be used, or too few prompts; one sentence.
    """
    GuardConfig(false_positive_rate=false_positive_rate)  # refuses a rate that cannot be
    state = processes()
    pipe = load_pipeline(model).to(state.device)
    chosen = list(prompts_by_row(prompts).values()) if prompts else ordinary_prompts(pipe)
    if count is not None:
        if count > len(chosen):
            raise BadInput(f"--n asks for {count} prompts, and there are {len(chosen)}.")
        chosen = evenly(chosen, count)
    rate, (scored, needed) = false_positive_rate, scored_and_needed(len(chosen), false_positive_rate)
    if scored < needed:
        raise BadInput(f"A false-positive rate of {rate:g} needs {needed} prompts to score; of {len(chosen)} prompts {scored} are scored.")
    known = list(prompts_by_row(memorized).values()) if memorized else []
    defaults, size = default_setting(model, steps, guidance), default_size(pipe)
    configuration = {
        "steps": defaults["num_inference_steps"],
        "guidance_scale": defaults["guidance_scale"],
        "height": height or size,
        "width": width or size,
    }
    path = out or cache_path(fingerprint(pipe, **configuration))
    ensure_writable(path.parent)
    measuring = partial(progress, "calibrating")
    profile = calibrate(pipe, chosen, **configuration, seed=seed, progress=measuring, work=parts_folder(path), state=state)
    if not state.is_main_process:
        return None
    if known:
        profile = learn_methods(
            pipe, profile, known, seed=seed, progress=partial(progress, "learning the order of methods"), **configuration
        )
    profile.save(path)
    return path, profile
