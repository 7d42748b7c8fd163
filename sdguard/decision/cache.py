"""The user's cache of profiles: their names, its folder and bound, and who may make which."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from sdguard.decision.ordinary_prompts import is_shipped
from sdguard.decision.profile import FORMAT, Profile, ProfileError, digest_of
from sdguard.files.atomic import CannotWrite

logger = logging.getLogger(__name__)

#: profiles that the user's cache holds at most; those that were not used for longest go.
KEPT_PROFILES = 64

#: profiles that could not be written, for as long as the process lives.
_unsaved: dict[Path, Profile] = {}

#: profiles whose use this process has noted.
_marked: set[Path] = set()

#: for threads, also where the cache cannot hold a lock.
_locks: dict[Path, threading.Lock] = {}


# names


def name_of(profile: Profile) -> str:
    """A profile's name, made of what is in it, whatever its file is called."""
    return profile_name(profile.model, profile.prompts_digest, prompts_in(profile))


def model_name(model: dict[str, Any]) -> str:
    """A name for a model's `identity`: its denoiser, and a hash of the whole."""
    denoiser = re.sub(r"\W", "", str(model.get("denoiser", ""))) or "model"  # it becomes a file's name, and may come from anywhere
    digest = hashlib.sha256(json.dumps([FORMAT, model], sort_keys=True).encode()).hexdigest()[:8]
    return f"{denoiser}-{digest}"


def profile_name(model: dict[str, Any], prompts_digest: str, count: int) -> str:
    """The model's name and the number of prompts; where those are of another list than sdguard's, of which."""
    another = "" if not prompts_digest or is_shipped(prompts_digest, count) else f"-list-{prompts_digest[:6]}"
    return f"{model_name(model)}-{count}{another}"


def prompts_in(profile: Profile) -> int:
    """How many prompts a profile was made of, those set aside included."""
    return profile.prompts + len(profile.values.get("guidance_norm", ())) + len(profile.set_aside)


# files


def cache_folder() -> Path:
    """Where the user's profiles are cached."""
    named = os.environ.get("SDGUARD_CACHE")  # asked first: there may be no home
    return (Path(named) if named else Path.home() / ".cache" / "sdguard") / "profiles"


def cache_path(model: dict[str, Any], prompts: Sequence[str]) -> Path:
    """Where the user's profile of a model (`identity`) is cached that is made of ``prompts``."""
    return cache_folder() / f"{profile_name(model, digest_of(prompts), len(prompts))}.json"


def cached_profiles() -> list[Path]:
    """The files in the user's cache that may hold profiles, the newest first."""
    return sorted(cache_folder().glob("*.json"), key=changed, reverse=True)


def changed(path: Path) -> float:
    """When a file was changed; 0 if it is gone, since other processes remove files too."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def profile_path(name: Path | str) -> Path:
    """The file that a name stands for: a path, or the name of a cached profile."""
    path = Path(name)
    cached = cache_folder() / f"{path.name}.json"
    return cached if not os.path.exists(path) and path.name == str(name) and os.path.exists(cached) else path


# the bound


def mark_of(path: Path) -> Path:
    """The file whose date says when a cached profile was used last; its own says when it was made."""
    return path.with_suffix(".used")


def mark_used(path: Path) -> None:
    """Note that a cached profile is used, once a process."""
    if path.parent == cache_folder() and path not in _marked:
        _marked.add(path)
        with suppress(OSError):  # a cache that cannot be written to has no bound to keep either
            mark_of(path).touch()


def last_used(path: Path) -> float:
    """When a cached profile was used last, or made."""
    return max(changed(path), changed(mark_of(path)))


def remove_cached(path: Path) -> None:
    """Remove a cached profile, or what is left of one."""
    path.unlink(missing_ok=True)
    mark_of(path).unlink(missing_ok=True)


def keep_in_cache(profile: Profile, path: Path) -> None:
    """Write a profile into the user's cache, and remove what is beyond its bound; raises `OSError` where it cannot be written."""
    profile.save(path)
    _unsaved.pop(path, None)
    for old in sorted(cache_folder().glob("*.json"), key=last_used, reverse=True)[KEPT_PROFILES:]:
        with suppress(OSError):  # the bound is no reason to lose the new one
            remove_cached(old)
    for left_behind in sorted(cache_folder().glob("*.parts"), key=changed, reverse=True)[KEPT_PROFILES:]:
        shutil.rmtree(left_behind, ignore_errors=True)


def keep_in_memory(profile: Profile, path: Path) -> None:
    """Keep a profile that could not be written for as long as the process lives."""
    _unsaved[path] = profile


def kept_in_memory() -> list[tuple[Path, Profile]]:
    """The profiles that could not be written, and where they would be."""
    return list(_unsaved.items())


# locks


@contextmanager
def told_of_cache() -> Iterator[None]:
    """Within the block what cannot be written into the user's cache raises `ProfileError`, which says how to have another cache."""
    try:
        yield
    except CannotWrite as error:
        if cache_folder() in Path(error.filename).parents:
            raise ProfileError(cannot_be_written(error.strerror)) from None
        raise


def cannot_be_written(why: str | None) -> str:
    """The sentence about a cache that cannot be written to."""
    return f"The cache {cache_folder()} cannot be written to ({why}): make room, or let SDGUARD_CACHE name another folder."


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the block nobody else, thread or process, makes the file ``path``; others that want to wait here."""
    with ExitStack() as held:
        held.enter_context(_locks.setdefault(path, threading.Lock()))
        # a cache that nothing can be written to cannot be shared either
        with suppress(OSError):
            lock = FileLock(lock_file(path))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                logger.warning("sdguard: another process makes %s; waiting for it", path)
                lock.acquire()
            held.callback(lock.release)
        yield


@contextmanager
def main_process_alone(path: Path, state: PartialState) -> Iterator[None]:
    """`alone` for the main one of several processes that share the work; the others begin when it does."""
    with alone(path) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        yield


def lock_file(path: Path) -> Path:
    """The file whose lock stands for the making of another, in a folder that is there; it stays, since others may wait for it."""
    folder = cache_folder().with_name("locks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.lock"


def why_unwritable(folder: Path) -> str | None:
    """Why a folder cannot be written to; None if it can, and it is there then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
