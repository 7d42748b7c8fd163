"""What ordinary prompts look like on one configuration, and the threshold that follows from it."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from sdguard.hook import family_of
from sdguard.observation import Observation
from sdguard.reading import read
from sdguard.signals.agreement import agreement
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.words import document_frequency

FORMAT = 2
PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"
BATCH = 8
#: ordinary prompts whose look-ahead and whose later steps are measured.
VERIFICATION_PROMPTS, SERIES_PROMPTS = 200, 32


class ProfileError(ValueError):
    """A profile is missing, damaged, made for another configuration, or too small for the rate asked of it."""


@dataclass(frozen=True)
class Profile:
    """Ordinary prompts on one model, scheduler, step count, guidance scale, size and precision.

    Attributes:
        fingerprint: everything that moves the statistics; a profile is refused where one entry differs.
        guidance_norm: first-step guidance norm of every ordinary prompt, ascending.
        series: ``(mean, standard deviation)`` of the guidance norm at every step.
        agreement: agreement between noises of a part of the prompts, ascending.
        words: how many of the prompts hold each word.
        format: version of the file format.
    """

    fingerprint: dict[str, Any]
    guidance_norm: list[float]
    series: list[tuple[float, float]]
    agreement: list[float]
    words: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def prompts(self) -> int:
        """How many ordinary prompts stand behind the threshold."""
        return len(self.guidance_norm)

    def score(self, norm: float) -> float:
        """A first-step guidance norm in standard deviations of ordinary prompts, on a log scale."""
        logs = [math.log(v) for v in self.guidance_norm]
        return (math.log(max(norm, 1e-12)) - statistics.fmean(logs)) / statistics.stdev(logs)

    def p_value(self, norm: float) -> float:
        """Conformal p-value: the share of ordinary prompts, the new one counted in, that pull at least as hard.

        Under exchangeability P(p <= alpha) <= alpha for an ordinary prompt (Vovk et al. 2005, ch. 2).
        """
        at_least = self.prompts - bisect.bisect_left(self.guidance_norm, norm)
        return (1 + at_least) / (1 + self.prompts)

    def threshold(self, false_positive_rate: float) -> float:
        """The smallest calibrated guidance norm above which ``p_value <= false_positive_rate``.

        Raises:
            ProfileError: the prompts are too few for this rate; the message says how many are needed.
        """
        allowed = math.floor(false_positive_rate * (1 + self.prompts)) - 1
        if allowed < 0:
            needed = math.ceil(1 / false_positive_rate) - 1
            have = f"this profile has {self.prompts}"
            raise ProfileError(f"A false-positive rate of {false_positive_rate:g} needs at least {needed} ordinary prompts; {have}.")
        return self.guidance_norm[self.prompts - 1 - allowed]

    def agreement_limit(self, quantile: float = 0.95) -> float:
        """The agreement that ``quantile`` of ordinary prompts stay under: what a steered sample must reach."""
        return self.agreement[min(len(self.agreement) - 1, math.ceil(quantile * (len(self.agreement) + 1)) - 1)]

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Raise `ProfileError` naming what differs, if this profile was not made for ``fingerprint``."""
        if differing := [name for name in fingerprint if self.fingerprint.get(name) != fingerprint[name]]:
            what = "; ".join(f"{name} is {fingerprint[name]!r}, the profile's is {self.fingerprint.get(name)!r}" for name in differing)
            raise ProfileError(f"The profile does not match this run: {what}.")

    def save(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; raises `ProfileError` in one sentence if the file is missing, damaged or of another format."""
        try:
            fields = json.loads(path.read_text())
            profile = cls(**{**fields, "series": [(float(mean), float(std)) for mean, std in fields["series"]]})
        except OSError as error:
            raise ProfileError(f"The profile {path} cannot be read: {error.strerror}.") from None
        except (ValueError, TypeError, KeyError):
            raise ProfileError(f"{path} is not a profile of sdguard, or it is damaged.") from None
        values = [*profile.guidance_norm, *profile.agreement, *(v for pair in profile.series for v in pair)]
        if profile.format != FORMAT or len(profile.guidance_norm) < 2 or not profile.agreement or not all(map(math.isfinite, values)):
            raise ProfileError(f"{path} is not a profile of sdguard, or it is damaged.")
        return profile


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

    ``progress`` is called with prompts done and prompts in all. Cost: 2 denoiser evaluations a prompt; for the first
    `VERIFICATION_PROMPTS` of them the look-ahead's 18 beside, and `SERIES_PROMPTS` full runs.

    Raises:
        ValueError: fewer than 2 prompts, or no unconditional branch to compare with (``guidance_scale <= 1``).
    """
    if len(prompts) < 2:
        raise ValueError(f"Calibration needs at least 2 ordinary prompts; {len(prompts)} given.")
    setting: dict[str, Any] = {"guidance_scale": guidance_scale, "height": height, "width": width}
    norms: list[float] = []
    agreements: list[float] = []
    runs: list[list[float]] = []
    with quiet(pipe):
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            whole, verify = start < SERIES_PROMPTS, start < VERIFICATION_PROMPTS
            calls: list[list[float]] = []

            def look(observation: Observation, calls: list[list[float]] = calls, verify: bool = verify) -> None:
                calls.append(guidance_norm(observation).tolist())
                if verify and observation.step == 0:
                    agreements.extend(agreement(observation).tolist())

            seeds = range(seed + start, seed + start + len(batch))
            read(pipe, batch, seeds, look, calls=None if whole else 1, num_inference_steps=steps, **setting)
            norms.extend(calls[0])
            if whole:
                runs.extend(map(list, zip(*calls, strict=True)))
            if progress:
                progress(start + len(batch), len(prompts))
    series = [(statistics.fmean(at), statistics.stdev(at)) for at in zip(*runs, strict=True)]
    print_ = fingerprint(pipe, steps=steps, **setting)
    return Profile(print_, sorted(norms), series, sorted(agreements), document_frequency(prompts))


def cache_path(print_: dict[str, Any]) -> Path:
    """Where the user's profile of a configuration is cached."""
    root = Path(os.environ.get("SDGUARD_CACHE", Path.home() / ".cache" / "sdguard"))
    return root / "profiles" / (hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:24] + ".json")


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
