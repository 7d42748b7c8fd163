"""Calibration: ordinary prompts measured on a configuration, and where the profiles that come of it are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sdguard.decision import BY_NAME, PLAN, Cascade, judge
from sdguard.hook import family_of
from sdguard.observation import Observation
from sdguard.profile import FORMAT, Profile
from sdguard.reading import read
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.words import document_frequency

PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"
BATCH = 8
#: ordinary prompts that fit the cascade, at most, and whose later steps are measured.
FITTING_PROMPTS, SERIES_PROMPTS = 200, 32


def fingerprint(pipe: Any, *, steps: int, guidance_scale: float, height: int, width: int) -> dict[str, Any]:
    """Everything about a run that moves the statistics of ordinary prompts."""
    scheduler = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_") and k != "trained_betas"}
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights_digest(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": hashlib.sha256(json.dumps(scheduler, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "steps": steps,
        "guidance_scale": float(guidance_scale),
        "height": height,
        "width": width,
        "dtype": str(getattr(pipe, family_of(pipe).denoiser).dtype),
    }


@torch.no_grad()
def weights_digest(pipe: Any) -> str:
    """A hash over 16 evenly spaced values of every parameter of denoiser and text encoder: cheap, and moved by any fine-tune."""
    digest = hashlib.sha256()
    for module in (getattr(pipe, family_of(pipe).denoiser), pipe.text_encoder):
        values = []
        for parameter in module.parameters() if module is not None else ():
            flat = parameter.reshape(-1)
            values.append(flat[:: max(1, len(flat) // 16)][:16].float())
        if values:
            digest.update(torch.cat(values).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Within the block the pipeline shows no progress bar of its own."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    height: int,
    width: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure ordinary prompts on a pipeline, one seed each, and return the `Profile`.

    Every third prompt, at most `FITTING_PROMPTS`, fits the cascade; the others are scored by it. ``progress`` is called with prompts done
    and prompts in all. Cost: 2 denoiser evaluations a prompt; for the fitting ones every signal's beside, for the others what the cascade
    buys; and `SERIES_PROMPTS` full runs.

    Raises:
        ValueError: fewer than 4 prompts, or no unconditional branch to compare with (``guidance_scale <= 1``).
    """
    if len(prompts) < 4:
        raise ValueError(f"Calibration needs at least 4 ordinary prompts; {len(prompts)} given.")
    setting: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    apart = math.ceil(len(prompts) / max(2, min(FITTING_PROMPTS, len(prompts) // 3)))
    fitting = list(range(0, len(prompts), apart))
    scoring = [i for i in range(len(prompts)) if i % apart]
    values: dict[str, list[float]] = {name: [] for names, _ in PLAN for name in names}
    scores: list[float] = []
    runs: list[list[float]] = []
    done = 0

    def batches(of: list[int]) -> Iterator[list[int]]:
        nonlocal done
        for start in range(0, len(of), BATCH):
            batch = of[start : start + BATCH]
            yield batch
            done += len(batch)
            if progress:
                progress(done, len(prompts))

    def look(batch: list[int], see: Callable[[Observation], None], calls: int | None = 1) -> None:
        read(pipe, [prompts[i] for i in batch], [seed + i for i in batch], see, calls, **setting)

    def fit(observation: Observation) -> None:
        for name, found in values.items():
            found.extend(BY_NAME[name].read(observation).tolist())

    def score(observation: Observation) -> None:
        scores.extend(judge(observation, cascade)[0].tolist())

    with quiet(pipe):
        for batch in batches(fitting):
            look(batch, fit)
        cascade = Cascade.fit(values)
        for batch in batches(scoring):
            look(batch, score)
        for start in range(0, min(SERIES_PROMPTS, len(scoring)), BATCH):
            norms: list[list[float]] = []
            look(scoring[start : start + BATCH], lambda observation, norms=norms: norms.append(guidance_norm(observation).tolist()), None)  # type: ignore[misc]
            runs.extend(map(list, zip(*norms, strict=True)))
    series = [(statistics.fmean(at), statistics.stdev(at)) for at in zip(*runs, strict=True)]
    print_ = fingerprint(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    ascending = {name: sorted(found) for name, found in values.items()}
    return Profile(print_, cascade, sorted(scores), ascending, series, document_frequency(prompts))


def cache_path(print_: dict[str, Any]) -> Path:
    """Where the user's profile of a configuration is cached."""
    root = Path(os.environ.get("SDGUARD_CACHE", Path.home() / ".cache" / "sdguard"))
    return root / "profiles" / (hashlib.sha256(json.dumps([FORMAT, print_], sort_keys=True).encode()).hexdigest()[:24] + ".json")


def model_folder(pipe: Any) -> Path | None:
    """The directory a pipeline was loaded from, if it was one."""
    source = getattr(pipe.config, "_name_or_path", None)
    return Path(source) if source and Path(source).is_dir() else None


def known_profile(pipe: Any, print_: dict[str, Any]) -> Profile | None:
    """The profile that came with the model, else the cached one, if either is of this very configuration."""
    folder = model_folder(pipe)
    for path in ([folder / PROFILE_FILE] if folder else []) + [cache_path(print_)]:
        if path.exists():
            profile = Profile.load(path)
            if profile.fingerprint == print_:
                return profile
    return None


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard."""
    folder = model_folder(pipe)
    if folder and (folder / PROMPTS_FILE).exists():
        text = (folder / PROMPTS_FILE).read_text()
    else:
        text = resources.files("sdguard").joinpath("ordinary_prompts.txt").read_text()
    return [line for line in text.splitlines() if line.strip()]
