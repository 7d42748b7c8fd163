"""The folder that a model was loaded from: the profiles and ordinary prompts that came with it, or lie on the hub."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache

from sdguard.denoiser.families import denoiser_of

logger = logging.getLogger(__name__)

#: in a model's folder; beside the first file there may be others, of any name.
PROFILE_FILE, PROMPTS_FILE = "sdguard/profile.json", "sdguard/ordinary_prompts.txt"


def source_of(pipe: Any) -> str | None:
    """What a pipeline was loaded from, a directory or a hub id; None or empty if it is not known."""
    source = getattr(pipe, "_pretrained_model_name_or_path", None) or getattr(pipe.config, "_name_or_path", None)
    return None if source is None else str(source)


def model_folders(pipe: Any) -> list[Path]:
    """The directories a pipeline was loaded from, if it was from any; of a hub id the snapshots in the local cache."""
    source = source_of(pipe)
    if source and Path(source).is_dir():
        return [Path(source)]
    found = []
    # the denoiser knows the very snapshot, of whatever revision and cache
    denoiser = getattr(getattr(denoiser_of(pipe), "config", None), "_name_or_path", None)
    if denoiser and (Path(denoiser).parent / "model_index.json").is_file():
        found.append(Path(denoiser).parent)
    if source and is_hub_id(source):
        index = try_to_load_from_cache(source, "model_index.json")
        found += [Path(index).parent] if isinstance(index, str) else []
    return list(dict.fromkeys(found))


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a repository on the hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def profiles_in(folder: Path) -> list[Path]:
    """The files in a model's folder that may hold profiles, `PROFILE_FILE` first, then by name."""
    return sorted((folder / PROFILE_FILE).parent.glob("*.json"), key=lambda path: (path.name != Path(PROFILE_FILE).name, path.name))


def fetch_profiles(pipe: Any) -> None:
    """Have the profiles of a hub id's repository in the snapshot that the pipeline came from: diffusers leaves them on the hub.

    Asked once a process for each snapshot, and without the network where the hub is set offline.
    """
    source = source_of(pipe)
    if source and is_hub_id(source) and not Path(source).is_dir():
        for folder in model_folders(pipe):
            if folder.parent.name == "snapshots" and folder.parents[1].name == f"models--{source.replace('/', '--')}":
                _fetch(source, folder)


@functools.cache
def _fetch(repository: str, snapshot: Path) -> None:
    try:
        snapshot_download(
            repository, revision=snapshot.name, cache_dir=snapshot.parents[2], allow_patterns=f"{Path(PROFILE_FILE).parent}/*"
        )
    except Exception as error:  # whatever keeps it from us, a profile can be made
        logger.info("sdguard: profiles of %s could not be fetched: %s", repository, error)
