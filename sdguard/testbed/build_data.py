"""Fetch the pictures of the embedded model's world from package registries and prepare them.

``python -m sdguard.testbed.build_data`` downloads three pinned packages (two npm icon sets, one Debian data package), keeps what
`NOTICE` lists, and writes ``world.npz``: cut-out objects as RGBA and photographs as RGB.
"""

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
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from sdguard.testbed.world import OBJECTS, SCENES, STYLES

ICON_PACKAGES = {"noto": "1.2.9", "fluent-emoji-flat": "1.2.6"}
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


def objects(folder: Path) -> np.ndarray:
    """All objects in all styles, uint8 ``[style, object, OBJECT_SIZE, OBJECT_SIZE, 4]``."""
    drawn = []
    for style in STYLES:
        with tarfile.open(pack(f"@iconify-json/{style}", ICON_PACKAGES[style], folder)) as archive:
            member = archive.extractfile("package/icons.json")
            icons = json.load(member) if member else {"icons": {}}
        if missing := [name for name in OBJECTS if name not in icons["icons"]]:
            raise DataError(f"@iconify-json/{style} lacks the icons {', '.join(missing)}.")
        drawn.append([rasterise(icons, name) for name in track(OBJECTS, f"drawing {style}")])
    return np.asarray(drawn)


def licence_of(copyright_file: str, path: str) -> str | None:
    """The licence a Debian machine-readable copyright file gives ``path``: that of the last stanza that matches it."""
    licence = None
    for stanza in re.split(r"\n\s*\n", copyright_file):
        files = re.search(r"^Files:(.*?)(?=^\S|\Z)", stanza, re.S | re.M)
        given = re.search(r"^License:\s*(\S+)", stanza, re.M)
        if files and given and any(fnmatch.fnmatch(path, pattern) for pattern in files[1].split()):
            licence = given[1]
    return licence


def photographs(folder: Path) -> tuple[np.ndarray, list[str], list[str]]:
    """The public-domain photographs as uint8 ``[n, height, width, 3]``, their scene words and file names."""
    run_command("apt-get", "download", f"{PHOTO_PACKAGE}={PHOTO_VERSION}", cwd=folder)
    deb = next(folder.glob(f"{PHOTO_PACKAGE}_*.deb"))
    run_command("dpkg-deb", "-x", str(deb), "photos", cwd=folder)
    root = folder / "photos/usr/share"
    copyright_file = (root / f"doc/{PHOTO_PACKAGE}/copyright").read_text()
    pictures, scenes, files = [], [], []
    for path in sorted((root / "games/endless-sky/images/land").glob("*.jpg")):
        stem = re.match("[a-z]+", path.name)
        scene = next((s for s, stems in SCENES.items() if stem and stem[0] in stems), None)
        if scene and licence_of(copyright_file, f"images/land/{path.name}") == "public-domain":
            pictures.append(np.asarray(Image.open(path).convert("RGB").resize(PHOTO_SIZE, Image.Resampling.LANCZOS)))
            scenes.append(scene)
            files.append(path.name)
    if not pictures:
        raise DataError(f"{PHOTO_PACKAGE} {PHOTO_VERSION} holds none of the expected photographs.")
    return np.asarray(pictures), scenes, files


def main(
    out: Annotated[Path, typer.Option(help="Where world.npz is written.")] = Path("build/testbed"),
) -> None:
    """Fetch and prepare the data; nothing is written unless all of it is there."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            cutouts = objects(Path(folder))
            photos, scenes, files = photographs(Path(folder))
    except DataError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "world.npz", objects=cutouts, photos=photos, scenes=scenes, files=files)
    typer.echo(
        f"{out / 'world.npz'}: {len(OBJECTS)} objects in {len(STYLES)} styles, {len(photos)} photographs of {len(set(scenes))} scenes"
    )


if __name__ == "__main__":
    typer.run(main)
