"""Does the embedded model load with old releases: ``python -m benchmarks old-releases`` tries it with some.

Packages of each release are installed by pip beside those of this environment, in a temporary folder that comes first on the path; torch
stays the one that is installed. A process of its own loads the model by ``StableDiffusionPipeline.from_pretrained(path)``, and its
text embeddings, one call of its denoiser and one decoded picture, of the same inputs, are compared with today's. Exit code 1 where it
does not load or differs by more than `TOLERANCE`. Writes ``results/old-releases.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.documents import markdown
from benchmarks.running import versions
from sdguard.cli.errors import one_sentence
from sdguard.files.atomic import write_text
from sdguard.files.inputs import BadInput
from sdguard.testbed import path

NAME = "old-releases"
#: what pip installs for each, without their requirements: the oldest that is promised, and the last before transformers 5.
RELEASES = (
    ("diffusers==0.18.2", "transformers==4.30.2", "tokenizers==0.13.3", "huggingface_hub==0.16.4", "safetensors==0.3.3", "numpy==1.26.4"),
    ("diffusers==0.35.2", "transformers==4.57.6", "tokenizers==0.22.1", "huggingface_hub==0.36.0"),
)
#: largest difference of a number, of numbers of about 1.
TOLERANCE = 1e-4
#: run by a process of each release: the folder of the model, the file that its results go to.
PROGRAM = """
import sys
import numpy, torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
tokens = pipe.tokenizer("a panda", padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
latents = torch.from_numpy(numpy.random.default_rng(0).standard_normal((1, 4, 16, 16), dtype=numpy.float32))
with torch.no_grad():
    embeddings = pipe.text_encoder(tokens)[0]
    prediction = pipe.unet(latents, 500, embeddings).sample
    picture = pipe.vae.decode(latents).sample
numpy.savez(sys.argv[2], embeddings=embeddings, prediction=prediction, picture=picture)
"""


def run(model: Path, out: Path, packages: Path | None) -> dict[str, np.ndarray]:
    """What a process with ``packages`` first on its path makes of ``model``; raises `BadInput` with its last line where it cannot."""
    environment = {**os.environ, "PYTHONPATH": str(packages)} if packages else None
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(model), str(out)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"{packages or 'Today'}: {done.stderr.strip().splitlines()[-1]}")
    with np.load(out) as found:
        return dict(found)


def differences(model: Path, release: tuple[str, ...], today: dict[str, np.ndarray], work: Path) -> dict[str, float]:
    """The largest difference of each result from ``today``'s."""
    packages = work / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(packages)]
    subprocess.run([*install, *release], check=True, stderr=subprocess.DEVNULL)
    found = run(model, work / "found.npz", packages)
    return {name: float(np.abs(found[name] - today[name]).max()) for name in today}


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model.", show_default="the embedded model")] = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
) -> None:
    """Load the embedded model with old releases of diffusers and transformers."""
    rows: list[dict[str, Any]] = []
    with one_sentence(), tempfile.TemporaryDirectory() as folder:
        model = model or path()
        today = run(model, Path(folder, "today.npz"), None)
        for i, release in enumerate(RELEASES):
            work = Path(folder, str(i))
            work.mkdir()
            rows.append({"release": release, **differences(model, release, today, work)})
    write_text(out / f"{NAME}.json", json.dumps({"rows": rows, **versions()}, indent=1))
    cells = [[" ".join(row["release"][:2]), *(f"{row[name]:.1e}" for name in today)] for row in rows]
    typer.echo(markdown(["release", *today], cells))
    if any(row[name] > TOLERANCE for row in rows for name in today):
        raise typer.Exit(1)
