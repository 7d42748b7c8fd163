"""Where profiles live: the one given, with the model, or in the user's cache; else one is made."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.fingerprint import fingerprint
from sdguard.decision.profile import FORMAT, Profile, ProfileError, digest_of
from sdguard.files.resumable import parts_folder

logger = logging.getLogger(__name__)

#: ordinary prompts that a calibration on first use takes at most of those that come along.
FIRST_USE_PROMPTS = 450
#: in a model's folder.
PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"


def cache_folder() -> Path:
    """Where the user's profiles are cached."""
    return Path(os.environ.get("SDGUARD_CACHE", Path.home() / ".cache" / "sdguard")) / "profiles"


def cache_path(configuration: dict[str, Any], prompts: Sequence[str] | None = None) -> Path:
    """Where the user's profile of a configuration, as `fingerprint` gives it, is cached; of ``prompts``, where they are the user's own."""
    key = [FORMAT, configuration, digest_of(prompts) if prompts else None]
    return cache_folder() / (hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json")


def model_folder(pipe: Any) -> Path | None:
    """The directory a pipeline was loaded from, if it was one."""
    source = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    return Path(source) if source and Path(source).is_dir() else None


def load_profile(path: Path) -> Profile:
    """The profile in a file, read once as long as the file stays as it is: it is asked for at every guarded call."""
    status = path.stat() if path.exists() else None
    return _load_version(path, status and (status.st_mtime_ns, status.st_size, status.st_ino))


@functools.lru_cache(maxsize=16)
def _load_version(path: Path, version: Any) -> Profile:
    return Profile.load(path)


def known_profile(pipe: Any, configuration: dict[str, Any], prompts: Sequence[str] | None = None) -> Profile | None:
    """The profile that came with the model, else the cached one, if either is of this very configuration, and of ``prompts`` if given."""
    folder = model_folder(pipe)
    own = [folder / PROFILE_FILE] if folder else []
    for path in dict.fromkeys([*own, cache_path(configuration), cache_path(configuration, prompts)]):
        if path.exists():
            try:
                profile = load_profile(path)
            except ProfileError as error:  # nobody named this file: it is as if there were none
                logger.warning("sdguard: passed over: %s", error)
                continue
            if profile.fingerprint == configuration and (not prompts or profile.prompts_digest == digest_of(prompts)):
                return profile
    return None


def profile_for(
    pipe: Any,
    *,
    given: Profile | Path | str | None = None,
    may_calibrate: bool = True,
    prompts: Sequence[str] | None = None,
    **setting: Any,
) -> Profile:
    """The profile of a configuration (`fingerprint`'s ``setting``): the one given, a known one, or one made now and cached.

    Args:
        given: a profile or the path of one; it has to be of this configuration.
        may_calibrate: whether one may be made where none is known.
        prompts: the ordinary prompts it has to be made of; by default whichever it was made of, and `FIRST_USE_PROMPTS` of
            `ordinary_prompts` where it is made now.
            Cost: that of `calibrate`.

    Raises:
        ProfileError: the profile given is another configuration's, or calibration is forbidden and none is known.
    """
    configuration = fingerprint(pipe, **setting)
    if given is not None:
        profile = given if isinstance(given, Profile) else load_profile(Path(given))
        profile.check(configuration)
        return profile
    if known := known_profile(pipe, configuration, prompts):
        return known
    if not may_calibrate:
        raise ProfileError("No profile is known for this configuration, and GuardConfig(calibrate=False) forbids to make one.")
    path, started = cache_path(configuration, prompts), time.monotonic()
    prompts = prompts or evenly(ordinary_prompts(pipe), FIRST_USE_PROMPTS)
    logger.warning("sdguard: calibrating this configuration on %d ordinary prompts, once; 'sdguard calibrate' does it ahead", len(prompts))
    made = calibrate(pipe, prompts, **setting, work=parts_folder(path))
    made.save(path)
    logger.warning("sdguard: calibrated in %.0f seconds; the profile is %s", time.monotonic() - started, path)
    if made.set_aside:
        logger.warning("sdguard: %d of the prompts give one picture from any noise and were set aside as memorized", len(made.set_aside))
    return made


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard."""
    folder = model_folder(pipe)
    if folder and (folder / PROMPTS_FILE).exists():
        text = (folder / PROMPTS_FILE).read_text(encoding="utf-8")
    else:
        text = resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]
