"""Where profiles live: the one given, with the model, or in the user's cache; else one is made, once however many ask for it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download, try_to_load_from_cache
from tqdm.auto import tqdm

from sdguard.decision.background import in_background
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import differences, identity, same_model
from sdguard.decision.profile import FORMAT, Profile, ProfileError, digest_of
from sdguard.decision.transfer import CHECKED_PROMPTS, still_holds, without_extras
from sdguard.denoiser.families import denoiser_of
from sdguard.denoiser.install import lock_of
from sdguard.files.resumable import parts_folder

logger = logging.getLogger(__name__)

#: what may be done where no profile of a model is known.
OnUnknown = Literal["calibrate", "background", "first_call_only", "raise"]

#: what of a model's identity is compared.
View = Callable[[Mapping[str, Any]], dict[str, Any]]

#: ordinary prompts that a calibration on first use takes at most of those that come along.
FIRST_USE_PROMPTS = 214
#: profiles that the user's cache holds at most; those that were not used for longest go.
KEPT_PROFILES = 64
#: in a model's folder; beside the first file there may be others, of any name.
PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"

#: profiles that could not be written, for as long as the process lives.
_unsaved: dict[Path, Profile] = {}
#: profiles whose use this process has noted.
_marked: set[Path] = set()
#: whether a profile holds with other adapters or patches than it was made with, by its name and both identities.
_carried: dict[tuple[str, str], bool] = {}
#: for threads, also where the cache cannot hold a lock.
_locks: dict[Path, threading.Lock] = {}


# names


def name_of(profile: Profile) -> str:
    """A profile's name, made of what is in it, whatever its file is called."""
    return profile_name(profile.model, profile.prompts_digest, prompts_in(profile))


def profile_name(model: dict[str, Any], prompts_digest: str, count: int) -> str:
    """Denoiser, model and number of prompts; where those are of another list than sdguard's, of which."""
    denoiser = re.sub(r"\W", "", str(model.get("denoiser", ""))) or "model"  # it becomes a file's name, and may come from anywhere
    digest = hashlib.sha256(json.dumps([FORMAT, model], sort_keys=True).encode()).hexdigest()[:8]
    another = "" if not prompts_digest or is_shipped(prompts_digest, count) else f"-list-{prompts_digest[:6]}"
    return f"{denoiser}-{digest}-{count}{another}"


def prompts_in(profile: Profile) -> int:
    """How many prompts a profile was made of, those set aside included."""
    return profile.prompts + len(profile.values.get("guidance_norm", ())) + len(profile.set_aside)


def is_shipped(prompts_digest: str, count: int) -> bool:
    """Whether ``count`` prompts are those of sdguard's list, evenly spaced."""
    return prompts_digest == _shipped_digest(count)


@functools.cache
def _shipped_prompts() -> tuple[str, ...]:
    """The ordinary prompts that come with sdguard."""
    return tuple(_lines(resources.files("sdguard.decision").joinpath("ordinary_prompts.txt").read_text(encoding="utf-8")))


@functools.cache
def _shipped_digest(count: int) -> str:
    """What stands for ``count`` of them, evenly spaced."""
    return digest_of(evenly(_shipped_prompts(), count))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# files


def cache_folder() -> Path:
    """Where the user's profiles are cached."""
    return Path(os.environ.get("SDGUARD_CACHE", Path.home() / ".cache" / "sdguard")) / "profiles"


def cache_path(model: dict[str, Any], prompts: Sequence[str]) -> Path:
    """Where the user's profile of a model (`identity`) is cached that is made of ``prompts``."""
    return cache_folder() / f"{profile_name(model, digest_of(prompts), len(prompts))}.json"


def model_folders(pipe: Any) -> list[Path]:
    """The directories a pipeline was loaded from, if it was from any; of a hub id the snapshots in the local cache."""
    source = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    if source and Path(source).is_dir():
        return [Path(source)]
    found = []
    # the denoiser knows the very snapshot, of whatever revision and cache
    denoiser = getattr(getattr(denoiser_of(pipe), "config", None), "_name_or_path", None)
    if denoiser and (Path(denoiser).parent / "model_index.json").is_file():
        found.append(Path(denoiser).parent)
    if source and is_hub_id(str(source)):
        index = try_to_load_from_cache(str(source), "model_index.json")
        found += [Path(index).parent] if isinstance(index, str) else []
    return list(dict.fromkeys(found))


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a repository on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def profiles_in(folder: Path) -> list[Path]:
    """The files in a model's folder that may hold profiles, `PROFILE_FILE` first, then by name."""
    return sorted((folder / PROFILE_FILE).parent.glob("*.json"), key=lambda path: (path.name != Path(PROFILE_FILE).name, path.name))


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
    return cached if not path.exists() and path.name == str(name) and cached.exists() else path


def read_profile(path: Path) -> Profile:
    """`Profile.load`, which refuses an identity that is none as well."""
    profile = Profile.load(path)
    try:
        known = same_model(profile.model, profile.model)
    except (AttributeError, TypeError, KeyError):
        known = False
    if not known:
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
    for path, profile in list(_unsaved.items()):
        if same_model(view(profile.model), model) and digest in (None, profile.prompts_digest):
            yield path, profile


def known_profile(pipe: Any, model: dict[str, Any], prompts: Sequence[str] | None = None) -> Profile | None:
    """The first of `known_profiles`, whose use is noted; None where none is known."""
    for path, profile in known_profiles(pipe, model, prompts):
        mark_used(path)
        return profile
    return None


def save_profiles(pipe: Any, folder: Path) -> list[Path]:
    """Write all profiles known of a pipeline's model into a model's folder, each under its name; returns their files."""
    found = {name_of(profile): profile for _, profile in known_profiles(pipe, identity(pipe))}
    paths = {(folder / PROFILE_FILE).with_name(f"{name}.json"): profile for name, profile in found.items()}
    for path, profile in paths.items():
        profile.save(path)
    return list(paths)


# the cache's bound


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
        remove_cached(old)
    for left_behind in sorted(cache_folder().glob("*.parts"), key=changed, reverse=True)[KEPT_PROFILES:]:
        shutil.rmtree(left_behind, ignore_errors=True)


# finding and making


def profile_for(
    pipe: Any,
    *,
    given: Profile | Path | str | None = None,
    prompts: Sequence[str] | None = None,
    adapter_scale: float | None = None,
) -> Profile:
    """The profile of a pipeline's model: the one given, a known one, or one made now and cached.

    Args:
        given: a profile, the path of one, or the name of a cached one; it has to be of this model.
        prompts: the ordinary prompts it has to be made of; by default whichever it was made of, and `FIRST_USE_PROMPTS` of
            `ordinary_prompts` where it is made now.
        adapter_scale: what a call scales LoRA by, where it does.

    Cost: that of `calibrate` where none is known.

    Raises:
        ProfileError: the profile given cannot be read or is another model's.
    """
    found = profile_now(pipe, given=given, prompts=prompts, adapter_scale=adapter_scale)
    assert found is not None, "calibration gives one"
    return found


def profile_now(
    pipe: Any,
    *,
    given: Profile | Path | str | None = None,
    on_unknown: OnUnknown = "calibrate",
    prompts: Sequence[str] | None = None,
    adapter_scale: float | None = None,
) -> Profile | None:
    """The profile that a run goes by, as `profile_for` finds it; where none is known, ``on_unknown`` says what is done.

    ``"calibrate"`` makes one now; ``"background"`` makes it in a thread of its own, and gives None until it is there; None always with
    ``"first_call_only"``.

    Raises:
        ProfileError: as `profile_for`, or none is known with ``"raise"``.
    """
    model = identity(pipe, adapter_scale)
    if given is not None:
        profile = given if isinstance(given, Profile) else load_profile(profile_path(given))
        if carried := carried_over(pipe, model, [profile], adapter_scale):
            return carried
        profile.check(model)
        return profile
    if known := known_profile(pipe, model, prompts):
        return known
    base = [profile for _, profile in known_profiles(pipe, without_extras(model), prompts, without_extras)]
    if carried := carried_over(pipe, model, base, adapter_scale):
        return carried
    if on_unknown == "background":
        key = (cache_folder(), profile_name(model, digest_of(prompts or ()), len(prompts or ())))
        in_background(key, lambda stop: find_or_make(pipe, model, prompts, adapter_scale, stop))
        return None
    if on_unknown == "calibrate":
        return find_or_make(pipe, model, prompts, adapter_scale)
    fetch_profiles(pipe)
    known = known_profile(pipe, model, prompts)
    if known is None and on_unknown == "raise":
        raise ProfileError("No profile is known for this model, and on_unknown='raise' forbids making one: 'sdguard calibrate' does.")
    return known


def carried_over(pipe: Any, model: dict[str, Any], profiles: Iterable[Profile], adapter_scale: float | None) -> Profile | None:
    """The first of some profiles of this very model with other adapters or patches that still holds with these, with a note that it does.

    Cost: that of `still_holds` for each, once a process.
    """
    for profile in profiles:
        if same_model(profile.model, model) or not same_model(without_extras(profile.model), without_extras(model)):
            continue
        key = (name_of(profile), json.dumps([profile.model, model], sort_keys=True))
        if key not in _carried:
            _carried[key] = still_holds(pipe, profile, ordinary_prompts(pipe), adapter_scale)
            held = "still holds" if _carried[key] else "does not hold any more"
            logger.warning("sdguard: adapters or patches have changed; by %d ordinary prompts profile %s %s", CHECKED_PROMPTS, key[0], held)
        if _carried[key]:
            return replace(profile, note=f"made with other adapters or patches; {CHECKED_PROMPTS} ordinary prompts read alike with these")
    return None


def find_or_make(
    pipe: Any,
    model: dict[str, Any],
    prompts: Sequence[str] | None,
    adapter_scale: float | None,
    stop: Callable[[], None] | None = None,
) -> Profile:
    """A profile of a pipeline's ``model``, of ``prompts`` if given: found, or made by the first of all threads and processes that ask.

    ``stop`` is called after each batch, and ends the work by raising; what was measured stays for the next time. With it there is no bar.

    Raises:
        ProfileError: the model was changed meanwhile.
        ValueError: as `calibrate`.
    """
    fetch_profiles(pipe)
    chosen = list(prompts) if prompts else evenly(ordinary_prompts(pipe), FIRST_USE_PROMPTS)
    path = cache_path(model, chosen)
    with alone(path):
        if known := known_profile(pipe, model, prompts):  # by whoever was waited for, or from the hub
            return known
        started, trouble = time.monotonic(), why_unwritable(path.parent)
        if trouble:
            logger.warning(
                "sdguard: the cache %s cannot be written to (%s), so that the profile lasts as long as this process; "
                "SDGUARD_CACHE names another folder",
                path.parent, trouble,
            )  # fmt: skip
        whose = "of your own" if prompts else "that come along"
        logger.warning(
            "sdguard: calibrating %s on %d ordinary prompts %s, once; 'sdguard calibrate' does it ahead",
            type(denoiser_of(pipe)).__name__, len(chosen), whose,
        )  # fmt: skip
        with progress_bar(pipe, len(chosen), whose, stop) as progress:
            made = calibrate(
                pipe, chosen, adapter_scale=adapter_scale, progress=progress, work=None if trouble else parts_folder(path)
            )  # fmt: skip
        with lock_of(denoiser_of(pipe)):  # while a run of another thread's is on, its scale may be on the LoRA layers
            changes = differences(identity(pipe, adapter_scale), model)
        if changes:
            raise ProfileError(f"The model was changed while it was calibrated: {'; '.join(changes)}.")
        try:
            keep_in_cache(made, path)
            logger.warning("sdguard: calibrated in %.0f seconds; the profile is %s", time.monotonic() - started, path)
        except OSError as error:
            _unsaved[path] = made
            logger.warning("sdguard: the profile is kept in memory alone (%s); SDGUARD_CACHE names another folder", error.strerror)
        if made.set_aside:
            logger.warning(
                "sdguard: %d of the prompts give one picture from any noise and were set aside as memorized", len(made.set_aside)
            )
    return made


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


@contextmanager
def progress_bar(pipe: Any, count: int, whose: str, stop: Callable[[], None] | None) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time that is left, where the pipeline shows bars and nothing has to ``stop``."""
    hidden = stop is not None or getattr(pipe, "_progress_bar_config", {}).get("disable", False)
    with tqdm(total=count, desc=f"calibrating on {count} ordinary prompts {whose}", unit="prompt", disable=hidden) as bar:

        def advance(done: int, total: int) -> None:
            bar.update(done - bar.n)
            if stop:
                stop()

        yield advance


def fetch_profiles(pipe: Any) -> None:
    """Have the profiles of a hub id's repository in the snapshot that the pipeline came from: diffusers leaves them on the hub.

    Asked once a process for each snapshot, and without the network where the hub is set offline.
    """
    source = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    if source and is_hub_id(str(source)) and not Path(source).is_dir():
        for folder in model_folders(pipe):
            if folder.parent.name == "snapshots" and folder.parents[1].name == f"models--{str(source).replace('/', '--')}":
                _fetch(str(source), folder)


@functools.cache
def _fetch(repository: str, snapshot: Path) -> None:
    try:
        snapshot_download(
            repository, revision=snapshot.name, cache_dir=snapshot.parents[2], allow_patterns=f"{Path(PROFILE_FILE).parent}/*"
        )
    except Exception as error:  # whatever keeps it from us, a profile can be made
        logger.info("sdguard: profiles of %s could not be fetched: %s", repository, error)


def ordinary_prompts(pipe: Any) -> list[str]:
    """The ordinary prompts that come with the model, else those that come with sdguard."""
    for folder in model_folders(pipe):
        if (folder / PROMPTS_FILE).exists():
            return _lines((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
    return list(_shipped_prompts())
