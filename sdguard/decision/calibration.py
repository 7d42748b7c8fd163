"""Calibration: ordinary prompts measured on a configuration, and where the profiles that come of it are kept."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import align_module_device, gather_object
from torch import Tensor, nn

from sdguard.decision.cascade import BY_NAME, LATER_CALLS, PLAN, Cascade, judge, judge_later
from sdguard.decision.profile import FORMAT, SERIES, Profile, ProfileError
from sdguard.denoiser.families import denoiser_of, parameters_of
from sdguard.denoiser.probe import read
from sdguard.files.journal import Journal
from sdguard.geometry.alignment import alignment
from sdguard.geometry.rollout import estimate
from sdguard.guarded.config import GuardConfig
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.words import document_frequency

logger = logging.getLogger(__name__)

PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"
BATCH = 8
#: ordinary prompts that fit the cascade, at most, and whose later steps are measured.
FITTING_PROMPTS, SERIES_PROMPTS = 200, 32
#: attributes by which peft's adapters, IP-Adapters and FreeU change what a module does, its parameters being the same.
SETTINGS = ("scaling", "_active_adapter", "_disable_adapters", "s1", "s2", "b1", "b2", "scale")


def fingerprint(
    pipe: Any, *, steps: int, guidance_scale: float, height: int, width: int, inputs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything about a run that moves the statistics of ordinary prompts; of its other ``inputs`` numbers and texts, not the pictures."""
    plain = {name: json.loads(json.dumps(value)) for name, value in (inputs or {}).items() if is_plain(value)}
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
        "dtype": str(next(denoiser_of(pipe).parameters()).dtype),
        **plain,
    }


def is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a list, tuple or dictionary of nothing else."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if isinstance(value, (list, tuple)) else isinstance(value, (int, float, str))


def settings_of(module: nn.Module) -> list[Any]:
    """What moves a module's output beside its parameters: an adapter's scale and whether it is on, FreeU's factors."""
    held = vars(module)
    names = SETTINGS if "IPAdapter" in type(module).__name__ else SETTINGS[:-1]
    return [[name, held[name]] for name in names if held.get(name) is not None]


def sampled(parameter: Tensor) -> Tensor:
    """16 evenly spaced values of a parameter, or all if there are fewer; its shape if it cannot be read."""
    if parameter.is_meta:
        return torch.tensor(parameter.shape).float()
    count, flat = parameter.numel(), parameter if parameter.is_contiguous() else parameter.reshape(-1)
    return flat.as_strided((16,), (count // 16,)) if count >= 16 else flat.as_strided((count,), (1,))


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, as ``module.modules()`` has them, in less than half the time."""
    ahead = [module]
    while ahead:
        yield (part := ahead.pop())
        ahead += [child for child in reversed(part._modules.values()) if child is not None]


@torch.inference_mode()
def weights_digest(pipe: Any) -> str:
    """A hash over 16 evenly spaced values of every parameter of denoiser and text encoders, and `settings_of` their modules.

    Cheap, and moved by any fine-tune, LoRA or IP-Adapter and its scale. Accelerate's offloaded parameters are loaded for it, module by
    module; those that cannot be read even so count by their shapes.
    """
    digest, nothing = hashlib.sha256(), nullcontext()
    encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "controlnet"))
    for module in (denoiser_of(pipe), *encoders):
        values, settings = [], []
        # this is done at every guarded call, and is half of what the guard costs where nothing is flagged
        for part in parts(module) if module is not None else ():
            held = vars(part)
            if not held.keys().isdisjoint(SETTINGS):
                settings += settings_of(part)
            with align_module_device(part) if "_hf_hook" in held else nothing:
                values += [sampled(parameter) for parameter in held["_parameters"].values() if parameter is not None]
        for _, group in itertools.groupby(values, key=lambda value: value.device):
            digest.update(torch.cat(list(group)).float().cpu().numpy().tobytes())
        if settings:
            digest.update(json.dumps(settings).encode())
    return digest.hexdigest()[:16]


def split(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` prompts fit the cascade (every third, at most `FITTING_PROMPTS`, evenly spaced) and which are scored by it."""
    apart = math.ceil(count / max(2, min(FITTING_PROMPTS, count // 3)))
    return [i for i in range(count) if i % apart == 0], [i for i in range(count) if i % apart]


def evenly(items: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def call_setting(pipe: Any, steps: int, guidance_scale: float, height: int, width: int) -> dict[str, Any]:
    """The arguments of a pipeline's call that make a configuration; those it does not have are left out."""
    setting = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    return {name: value for name, value in setting.items() if name in parameters_of(pipe)}


def batched(positions: list[int]) -> list[list[int]]:
    """``positions`` in batches."""
    return [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]


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
    memorized: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    journal: Path | None = None,
    state: PartialState | None = None,
) -> Profile:
    """Measure ordinary prompts on a pipeline, one seed each, and return the `Profile`.

    A part of the prompts fits the cascade (see `split`), the others are scored by it. Cost: 2 denoiser evaluations a prompt for each of
    the first ``1 + LATER_CALLS`` calls; for the fitting ones every signal's and alignment's beside, for the others what the cascade buys;
    and `SERIES_PROMPTS` full runs.

    Args:
        inputs: what else the pipeline's call is given, such as the picture of an image-to-image run; the same for every prompt.
        memorized: prompts known to be memorized, where there are some: they fit the weights of the signals and nothing else.
        progress: called with prompts done and prompts in all.
        journal: a file that keeps what has been measured, so that a killed calibration goes on; removed at the end.
        state: accelerate's, where several processes share the work, each on its own pipeline; every one of them returns the profile.

    Raises:
        ValueError: fewer than 4 prompts.
    """
    if len(prompts) < 4:
        raise ValueError(f"Calibration needs at least 4 ordinary prompts; {len(prompts)} given.")
    setting = call_setting(pipe, steps, guidance_scale, height, width) | dict(inputs or {})
    print_ = fingerprint(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width, inputs=inputs)
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    digest = hashlib.sha256(json.dumps([list(prompts), list(memorized), seed, PLAN]).encode()).hexdigest()
    notes = Journal(journal and journal.with_suffix(f".{rank}.jsonl"), {"format": FORMAT, "fingerprint": print_, "prompts": digest})
    fitting, scoring = split(len(prompts))
    done = 0

    everything, total = [*prompts, *memorized], len(prompts) + len(memorized)

    def measure(what: str, positions: list[int], see: Callable[[Observation], Any], calls: int | None = 1) -> list[Any]:
        """What ``see`` makes of every observation of ``positions``, by batch and call; from the journal where it is known."""
        nonlocal done
        batches = batched(positions)
        for number, batch in list(enumerate(batches))[rank::processes]:
            if f"{what} {number}" not in notes.results:
                seen: list[Any] = []
                look = [everything[i] for i in batch], [seed + i for i in batch]
                read(pipe, *look, lambda observation, seen=seen: seen.append(see(observation)), calls, **setting)  # type: ignore[misc]
                notes.add(f"{what} {number}", seen)
            done += len(batch) * (what != "series")
            if progress:
                progress(min(total, done * processes), total)
        mine = {key: result for key, result in notes.results.items() if key.startswith(what)}
        everyone = gather_object([mine]) if processes > 1 else [mine]
        found = {key: result for part in everyone for key, result in part.items()}
        return [found[f"{what} {number}"] for number in range(len(batches))]

    names = [name for stage, _ in PLAN for name in stage]

    def first(observation: Observation) -> dict[str, list[float]]:
        values = {name: BY_NAME[name].read(observation).tolist() for name in names}
        return {**values, "alignment": alignment(observation, estimate(observation), observation.condition).tolist()}

    def fit(observation: Observation) -> dict[str, list[float]]:
        """Every signal of the plan and alignment at the first call, the guidance norm at the later ones."""
        return {"later": guidance_norm(observation).tolist()} if observation.step else first(observation)

    def score(observation: Observation) -> list[float]:
        if observation.step:
            return judge_later(guidance_norm(observation), observation.step, cascade).tolist()
        return judge(observation, cascade)[0].tolist()

    def whole(observation: Observation) -> list[list[float]]:
        return [[observation.timestep], *(BY_NAME[name].read(observation).tolist() for name in SERIES)]

    seen = measure("fit", fitting, fit, 1 + LATER_CALLS)
    values = {name: joined([calls[0][name] for calls in seen]) for name in seen[0][0]}
    later = [joined([call["later"] for call in calls]) for calls in list(zip(*seen, strict=True))[1:]]
    labelled: dict[str, list[float]] | None = None
    if memorized:
        known = measure("memorized", list(range(len(prompts), total)), first)
        labelled = {name: joined([call[name] for (call,) in known]) for name in names}
    cascade = Cascade.fit(values, labelled, later=later)
    scored = measure("score", scoring, score, 1 + LATER_CALLS)
    runs = measure("series", scoring[:SERIES_PROMPTS], whole, None)
    timesteps = [call[0][0] for call in runs[0]]
    series = {
        name: [(statistics.fmean(at), statistics.stdev(at)) for at in (joined([c[i] for c in call]) for call in zip(*runs, strict=True))]
        for i, name in enumerate(SERIES, start=1)
    }
    notes.close()
    scores = sorted(max(run) for calls in scored for run in zip(*calls, strict=True))
    clean = {name: sorted(found) for name, found in values.items()}
    return Profile(print_, cascade, scores, clean, series, timesteps, document_frequency(prompts))


def joined(lists: Iterable[Sequence[float]]) -> list[float]:
    """The values of all lists, in order."""
    return [value for values in lists for value in values]


def cache_folder() -> Path:
    """Where the user's profiles are cached."""
    return Path(os.environ.get("SDGUARD_CACHE", Path.home() / ".cache" / "sdguard")) / "profiles"


def cache_path(print_: dict[str, Any]) -> Path:
    """Where the user's profile of a configuration is cached."""
    return cache_folder() / (hashlib.sha256(json.dumps([FORMAT, print_], sort_keys=True).encode()).hexdigest()[:24] + ".json")


def model_folder(pipe: Any) -> Path | None:
    """The directory a pipeline was loaded from, if it was one."""
    source = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    return Path(source) if source and Path(source).is_dir() else None


def loaded(path: Path) -> Profile:
    """The profile in a file, read once as long as the file stays as it is: it is asked for at every guarded call."""
    status = path.stat() if path.exists() else None
    return _loaded(path, status and (status.st_mtime_ns, status.st_size, status.st_ino))


@functools.lru_cache(maxsize=16)
def _loaded(path: Path, version: Any) -> Profile:
    return Profile.load(path)


def known_profile(pipe: Any, print_: dict[str, Any]) -> Profile | None:
    """The profile that came with the model, else the cached one, if either is of this very configuration."""
    folder = model_folder(pipe)
    for path in ([folder / PROFILE_FILE] if folder else []) + [cache_path(print_)]:
        if path.exists():
            profile = loaded(path)
            if profile.fingerprint == print_:
                return profile
    return None


def profile_of(pipe: Any, config: GuardConfig, **setting: Any) -> Profile:
    """The profile of a configuration (`fingerprint`'s ``setting``): the one ``config`` gives, a known one, or one made now.

    Raises:
        ProfileError: the profile given is another configuration's, or calibration is forbidden and none is known.
    """
    print_ = fingerprint(pipe, **setting)
    if config.profile is not None:
        profile = config.profile if isinstance(config.profile, Profile) else loaded(Path(config.profile))
        profile.check(print_)
        return profile
    if known := known_profile(pipe, print_):
        return known
    if not config.calibrate:
        raise ProfileError("No profile is known for this configuration, and GuardConfig(calibrate=False) forbids to make one.")
    prompts = config.calibration_prompts or ordinary_prompts(pipe)
    logger.warning("sdguard: calibrating this configuration on %d ordinary prompts, once; 'sdguard calibrate' does it ahead", len(prompts))
    path, started = cache_path(print_), time.monotonic()
    made = calibrate(pipe, prompts, **setting, journal=path)
    made.save(path)
    logger.warning("sdguard: calibrated in %.0f seconds; the profile is %s", time.monotonic() - started, path)
    return made


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard."""
    folder = model_folder(pipe)
    if folder and (folder / PROMPTS_FILE).exists():
        text = (folder / PROMPTS_FILE).read_text()
    else:
        text = resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text()
    return [line for line in text.splitlines() if line.strip()]
