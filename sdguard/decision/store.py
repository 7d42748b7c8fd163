"""The profile that a run goes by: the one given or a known one, else one is made, once however many ask for it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sdguard.choices import OnUnknown
from sdguard.decision.background import in_background
from sdguard.decision.cache import (
    alone,
    cache_folder,
    cache_path,
    keep_in_cache,
    keep_in_memory,
    name_of,
    profile_name,
    profile_path,
    told_of_cache,
    why_unwritable,
)
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import differences, identity, same_model
from sdguard.decision.known_profiles import known_profile, known_profiles, load_profile
from sdguard.decision.model_folder import fetch_profiles
from sdguard.decision.ordinary_prompts import is_shipped, ordinary_prompts
from sdguard.decision.profile import Profile, ProfileError, digest_of
from sdguard.decision.transfer import CHECKED_PROMPTS, still_holds, without_extras
from sdguard.denoiser.families import denoiser_of
from sdguard.denoiser.install import lock_of
from sdguard.denoiser.reference_call import has_text_encoders
from sdguard.files.resumable import parts_folder

logger = logging.getLogger(__name__)

#: ordinary prompts that a calibration on first use takes at most of those that come along.
FIRST_USE_PROMPTS = 214

#: how the note of a profile begins that was carried over.
OTHER_ADAPTERS = "made with other adapters or patches"

#: whether a profile holds with other adapters or patches than it was made with, by its name and both identities.
_carried: dict[tuple[str, str], bool] = {}


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
        ProfileError: as `profile_for`, or none is known with ``"raise"``, or with the text encoders gone.
    """
    model = identity_now(pipe, adapter_scale)
    if given is not None:
        profile = given if isinstance(given, Profile) else load_profile(profile_path(given))
        if carried := carried_over(pipe, model, [profile], prompts, adapter_scale):
            return carried
        profile.check(model)
        return profile
    if known := known_profile(pipe, model, prompts):
        return known
    base = [profile for _, profile in known_profiles(pipe, without_extras(model), prompts, without_extras)]
    if carried := carried_over(pipe, model, base, prompts, adapter_scale):
        return carried
    can_make = has_text_encoders(pipe)
    if on_unknown == "background" and can_make:
        key = (cache_folder(), profile_name(model, digest_of(prompts or ()), len(prompts or ())))
        in_background(key, lambda stop: find_or_make(pipe, model, prompts, adapter_scale, stop))
        return None
    if on_unknown == "calibrate" and can_make:
        return find_or_make(pipe, model, prompts, adapter_scale)
    fetch_profiles(pipe)
    known = known_profile(pipe, model, prompts)
    if known is None and on_unknown == "raise":
        raise ProfileError("No profile is known for this model, and on_unknown='raise' forbids making one: 'sdguard calibrate' does.")
    if known is None and on_unknown != "first_call_only":
        raise ProfileError("No profile is known for this model, and none can be made without its text encoders: calibrate before they go.")
    return known


def identity_now(pipe: Any, adapter_scale: float | None) -> dict[str, Any]:
    """The `identity` of a pipeline's model, whatever runs of other threads are under way."""
    with lock_of(denoiser_of(pipe)):  # a run of another thread scales LoRA in place
        return identity(pipe, adapter_scale)


def carried_over(
    pipe: Any, model: dict[str, Any], profiles: Iterable[Profile], prompts: Sequence[str] | None, adapter_scale: float | None
) -> Profile | None:
    """The first of some profiles of this very model with other adapters or patches that still holds with these, with a note that it does.

    None can be asked without text encoders. Cost: that of `still_holds` for each, once a process.
    """
    for profile in profiles if has_text_encoders(pipe) else ():
        if same_model(profile.model, model) or not same_model(without_extras(profile.model), without_extras(model)):
            continue
        key = (name_of(profile), json.dumps([profile.model, model], sort_keys=True))
        if key not in _carried:
            _carried[key] = still_holds(pipe, profile, prompts or ordinary_prompts(pipe), adapter_scale)
            held = "is right for them too" if _carried[key] else "is not right for them"
            told = "sdguard: profile %s was made with other adapters or patches than are on the model now; by %d ordinary prompts it %s"
            logger.warning(told, key[0], CHECKED_PROMPTS, held)
        if _carried[key]:
            return replace(profile, note=f"{OTHER_ADAPTERS}; {CHECKED_PROMPTS} ordinary prompts read alike with these")
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
        ProfileError: the model was changed meanwhile, or the disk of the cache became full: what was measured before is kept.
        ValueError: as `calibrate`.
    """
    fetch_profiles(pipe)
    chosen = list(prompts) if prompts else evenly(ordinary_prompts(pipe), FIRST_USE_PROMPTS)
    path = cache_path(model, chosen)
    with alone(path):
        if known := known_profile(pipe, model, prompts):  # by whoever was waited for, or from the hub
            return known
        started = time.monotonic()
        whose = "of your own" if prompts else "of sdguard's list" if is_shipped(digest_of(chosen), len(chosen)) else "of the model's list"
        made = make(pipe, model, chosen, adapter_scale, path, whose, stop)
        keep(made, path, time.monotonic() - started)
        shutil.rmtree(parts_folder(path), ignore_errors=True)
    return made


def make(
    pipe: Any,
    model: dict[str, Any],
    prompts: list[str],
    adapter_scale: float | None,
    path: Path,
    whose: str,
    stop: Callable[[], None] | None,
) -> Profile:
    """`calibrate` ``model`` for the file ``path``, with a note of what goes on; ``whose`` says of which kind the prompts are.

    Raises:
        ProfileError, ValueError: as `find_or_make`.
    """
    if trouble := why_unwritable(path.parent):
        logger.warning(
            "sdguard: the cache %s cannot be written to (%s), so that the profile lasts as long as this process; "
            "SDGUARD_CACHE names another folder",
            path.parent, trouble,
        )  # fmt: skip
    logger.warning(
        "sdguard: calibrating %s on %d ordinary prompts %s, once; 'sdguard calibrate' does it ahead",
        type(denoiser_of(pipe)).__name__, len(prompts), whose,
    )  # fmt: skip
    work = None if trouble else parts_folder(path)
    with told_of_cache(), progress_bar(pipe, len(prompts), whose, stop) as progress:
        made = calibrate(pipe, prompts, adapter_scale=adapter_scale, progress=progress, work=work, keep_work=True)
    with lock_of(denoiser_of(pipe)):  # while a run of another thread's is on, its scale may be on the LoRA layers
        changes = differences(identity(pipe, adapter_scale), model)
    if changes:
        raise ProfileError(f"The model was changed while it was calibrated: {'; '.join(changes)}.")
    return made


def keep(made: Profile, path: Path, seconds: float) -> None:
    """Keep a profile that took some ``seconds`` in the cache, or in memory where nothing can be written; say which."""
    try:
        keep_in_cache(made, path)
        logger.warning("sdguard: calibrated in %.0f seconds; the profile is %s", seconds, path)
    except OSError as error:
        keep_in_memory(made, path)
        logger.warning("sdguard: the profile is kept in memory alone (%s); SDGUARD_CACHE names another folder", error.strerror)
    if made.set_aside:
        logger.warning("sdguard: %d of the prompts give one picture from any noise and were set aside as memorized", len(made.set_aside))


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
