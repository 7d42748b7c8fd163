"""The profiles that are known of a model: those that came with it, those in the user's cache, and those that could not be written."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdguard.decision.cache import KEPT_PROFILES, cached_profiles, kept_in_memory, mark_used, name_of
from sdguard.decision.identity import identity, is_identity, same_model
from sdguard.decision.model_folder import PROFILE_FILE, model_folders, profiles_in
from sdguard.decision.profile import Profile, ProfileError, digest_of

logger = logging.getLogger(__name__)

#: what of a model's identity is compared.
View = Callable[[Mapping[str, Any]], dict[str, Any]]


def read_profile(path: Path) -> Profile:
    """`Profile.load`, which refuses an identity that is none as well."""
    profile = Profile.load(path)
    if not is_identity(profile.model):
        raise ProfileError(f"{path} is not a profile of sdguard, or it is damaged.")
    return profile


def load_profile(path: Path) -> Profile:
    """The profile in a file, read once as long as the file stays as it is: it is asked for at every guarded call."""
    return _load_version(path, _version(path))


def _version(path: Path) -> Any:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=16)
def _load_version(path: Path, version: Any) -> Profile:
    return read_profile(path)


@functools.lru_cache(maxsize=4 * KEPT_PROFILES)
def _about(path: Path, version: Any) -> tuple[dict[str, Any], str] | None:
    """Model and prompts of the profile in a file, which is all that is kept of those that are not used; None if it holds none."""
    try:
        profile = read_profile(path)
    except ProfileError as error:  # nobody named this file: it is as if there were none
        logger.warning("sdguard: passed over: %s", error)
        return None
    return profile.model, profile.prompts_digest


def matching(
    paths: Iterable[Path], model: dict[str, Any], prompts: Sequence[str] | None = None, view: View = dict
) -> Iterator[tuple[Path, Profile]]:
    """Those of some files, in their order, that hold a profile of a model, and of ``prompts`` if given; the profile with each."""
    digest = digest_of(prompts) if prompts else None
    for path in paths:
        about = _about(path, _version(path))
        if about and same_model(view(about[0]), model) and digest in (None, about[1]):
            with suppress(ProfileError):  # gone since
                yield path, load_profile(path)


def known_profiles(
    pipe: Any, model: dict[str, Any], prompts: Sequence[str] | None = None, view: View = dict
) -> Iterator[tuple[Path, Profile]]:
    """The profiles known of a pipeline's model, and of ``prompts`` if given, and where they are or would be.

    ``view`` is what of a profile's model has to be ``model``: all of it, where nothing else is said. First those that came with the model,
    then the user's cache from the newest on, then those that could not be written.
    """
    own = [path for folder in model_folders(pipe) for path in profiles_in(folder)]
    yield from matching([*own, *cached_profiles()], model, prompts, view)
    digest = digest_of(prompts) if prompts else None
    for path, profile in kept_in_memory():
        if same_model(view(profile.model), model) and digest in (None, profile.prompts_digest):
            yield path, profile


def known_profile(pipe: Any, model: dict[str, Any], prompts: Sequence[str] | None = None) -> Profile | None:
    """The first of `known_profiles`, whose use is noted; None where none is known."""
    for path, profile in known_profiles(pipe, model, prompts):
        mark_used(path)
        return profile
    return None


def save_profiles(pipe: Any, folder: Path) -> list[Path]:
    """Write all profiles known of a pipeline's model into a model's folder; returns their files.

    The one that the guard takes becomes `PROFILE_FILE`, so that it is taken there as well; the others are written under their names.
    """
    found = {name_of(profile): profile for _, profile in known_profiles(pipe, identity(pipe))}
    first = folder / PROFILE_FILE
    paths = [first if place == 0 else first.with_name(f"{name}.json") for place, name in enumerate(found)]
    for path, profile in zip(paths, found.values(), strict=True):
        profile.save(path)
    return paths
