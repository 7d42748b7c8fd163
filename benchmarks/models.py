"""Models that memorize, in one form: what to ask of each, what it has memorized, and what its own ordinary captions are.

A model directory is a pipeline directory with three more files, and a fourth where it is not drawn with 20 steps at guidance 7.5:

| file | content |
|---|---|
| ``cases.json`` | a list of cases: ``caption``, ``group``, ``reps`` (how often it was shown), ``target`` (index of its picture, or null) |
| ``targets.pt`` | latents of the memorized pictures, ``[n, C, h, w]``, scaled as the denoiser sees them |
| ``ordinary.txt`` | captions of its own world, none of them a case: what someone who fine-tuned it would calibrate on |
| ``setting.json`` | ``num_inference_steps`` and ``guidance_scale`` of its pipeline's call |

The embedded model is brought into the same form. What a group of cases is good for follows from its name and its counts (`roles`), so that
a directory of another make needs no code.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from sdguard import testbed
from sdguard.denoiser.loading import load_pipeline
from sdguard.files.inputs import BadInput
from sdguard.files.prompt_files import read_lines
from sdguard.files.resumable import measured
from sdguard.testbed.copies import RATIO

#: two models that this project did not make, where they lie, and the zoo.
SHARED, ZOO = Path(__file__).parents[2] / "shared" / "models", Path(__file__).parent / "zoo" / "models"
EMBEDDED = "embedded"
SETTING_FILE = "setting.json"
BATCH = 24
#: seeds a caption, and of an ordinary one.
SEEDS, ORDINARY_SEEDS = 4, 2
#: which of the embedded model's captions take part: every second, as many as the other models have.
EVERY = 2
#: channel-centred correlation with a memorized picture over which a sample is one, whatever its caption.
SAME_PICTURE = 0.95

#: what a case is for. Captions of a template that was not shown are in none: their photograph comes back whatever the object.
Role = Literal["memorized", "too rarely seen", "never seen", "ordinary", "none"]


@dataclass(frozen=True)
class Model:
    """A model that memorizes.

    Attributes:
        name: for people.
        folder: its pipeline directory.
        cases: a row a case: ``caption``, ``group``, ``reps``, ``target`` (-1: none) and ``role``.
        targets: latents of the memorized pictures, ``[n, C, h, w]``, fp32, scaled.
        families: ``[n]``: targets of one family, such as the compositions of one template, are no second nearest of each other.
        ordinary: captions of its own world to calibrate on.
        steps, guidance_scale: the setting it is drawn at.
    """

    name: str
    folder: Path
    cases: pd.DataFrame
    targets: Tensor
    families: np.ndarray
    ordinary: list[str]
    steps: int = 20
    guidance_scale: float = 7.5

    @cached_property
    def pipe(self) -> Any:
        """The pipeline in fp32, loaded when it is first asked for: text encoders otherwise keep the precision of their file."""
        pipe = load_pipeline(str(self.folder)).to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def setting(self) -> dict[str, Any]:
        """The arguments of its pipeline's call."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}

    @cached_property
    def about(self) -> dict[str, Any]:
        """What every measurement on it hangs on."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*/*.safetensors")):
            digest.update(path.read_bytes())
        return {"model": self.name, "weights": digest.hexdigest()[:12], **self.setting}

    @property
    def samples(self) -> pd.DataFrame:
        """A row a sample of every case that has a role: ``case``, ``caption``, ``role``, ``group``, ``reps``, ``seed``.

        Seeds are those of the models' own runner, 1000 + 17 i + s for seed s of case i, so that labels can be compared.
        """
        rows = [
            {"case": i, **{name: row[name] for name in ("caption", "role", "group", "reps")}, "seed": 1000 + 17 * i + s}
            for i, row in self.cases.iterrows()
            if row.role != "none"
            for s in range(ORDINARY_SEEDS if row.role == "ordinary" else SEEDS)
        ]
        return pd.DataFrame(rows)


def roles(cases: pd.DataFrame) -> list[Role]:
    """What each case is for, told by its group's name and its counts.

    Ordinary: the group of that name. Never seen: shown 0 times. Too rarely seen: shown once, or of the lowest count above 0, where there
    are several counts. Memorized: the rest with a target. A template's captions are no negatives: the photograph they share has been
    memorized.
    """
    template = cases.group.str.startswith("template")
    counts = cases.reps[~template & (cases.reps > 0)]
    lowest = counts.min() if counts.nunique() > 1 else 1

    def role(group: str, reps: int, target: int, of_template: bool) -> Role:
        if group == "ordinary":
            return "ordinary"
        if not of_template and reps == 0:
            return "never seen"
        if not of_template and reps == lowest:
            return "too rarely seen"
        return "memorized" if reps and target >= 0 else "none"

    return [role(*row) for row in zip(cases.group, cases.reps, cases.target, template, strict=True)]


def development_models() -> list[Path]:
    """The directories of every model there is to develop on but the embedded one."""
    return sorted((path.parent for root in (SHARED, ZOO) for path in root.glob("*/model_index.json")), key=lambda folder: folder.name)


def read_model(folder: Path) -> Model:
    """The model in a directory; raises `BadInput` in one sentence where it cannot be used."""
    if not (folder / "model_index.json").is_file():
        raise BadInput(f"{folder} is no directory of a pipeline: it has no model_index.json.")
    if missing := [name for name in ("cases.json", "targets.pt", "ordinary.txt") if not (folder / name).is_file()]:
        raise BadInput(f"{folder} has no {' and no '.join(missing)}.")
    targets = read_targets(folder / "targets.pt")
    cases = read_cases(folder / "cases.json", len(targets))
    try:
        ordinary = [line for line in read_lines(folder / "ordinary.txt").values() if line.strip()]
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / 'ordinary.txt'} cannot be read: {error}.") from None
    if not ordinary:
        raise BadInput(f"{folder / 'ordinary.txt'} holds no caption.")
    return Model(folder.resolve().name, folder, cases, targets, np.arange(len(targets)), ordinary, *read_setting(folder / SETTING_FILE))


def read_setting(path: Path) -> tuple[int, float]:
    """Steps and guidance scale in a file, the usual ones where there is none; raises `BadInput`."""
    if not path.exists():
        return Model.steps, Model.guidance_scale
    try:
        found = json.loads(path.read_text())
        steps, scale = found["num_inference_steps"], float(found["guidance_scale"])
    except (OSError, ValueError, TypeError, KeyError):
        steps, scale = 0, 0.0
    if type(steps) is not int or steps < 1 or not 0 < scale < math.inf:
        raise BadInput(f"{path} has to hold num_inference_steps, a whole number from 1, and guidance_scale, a number over 0.")
    return steps, scale


def read_targets(path: Path) -> Tensor:
    """The latents of memorized pictures in a file, ``[n, C, h, w]``, fp32; raises `BadInput`."""
    try:
        targets = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        raise BadInput(f"{path} is no file of latents that torch can load.") from None
    if not isinstance(targets, Tensor) or targets.ndim != 4 or len(targets) < 2:
        raise BadInput(f"{path} has to hold one tensor of at least two latents, [n, C, h, w].")
    return targets.float()


def read_cases(path: Path, targets: int) -> pd.DataFrame:
    """The cases in a file, with their `roles`, for a model of so many ``targets``; raises `BadInput`."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {str(error).splitlines()[0].rstrip('.')}.") from None
    if not isinstance(found, list) or not found:
        raise BadInput(f"{path} has to hold a list of cases.")
    for i, case in enumerate(found):
        if not isinstance(case, dict) or not {"caption", "group", "reps", "target"} <= set(case):
            raise BadInput(f"{path}: case {i} has to have caption, group, reps and target.")
        texts, reps, target = (case["caption"], case["group"]), case["reps"], case["target"]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise BadInput(f"{path}: caption and group of case {i} have to be text.")
        if type(reps) is not int or reps < 0:
            raise BadInput(f"{path}: reps of case {i} has to be a whole number from 0, not {reps!r}.")
        if target is not None and (type(target) is not int or not 0 <= target < targets):
            raise BadInput(f"{path}: target of case {i} has to be null or one of the {targets} targets by its index, not {target!r}.")
    cases = pd.DataFrame([{**case, "target": -1 if case["target"] is None else case["target"]} for case in found])
    cases = cases[["caption", "group", "reps", "target"]].assign(role=roles(cases))
    if not set(cases.role) & {"memorized", "too rarely seen"}:
        raise BadInput(f"{path} has no case that was shown in training and has a target.")
    return cases


def embedded_model() -> Model:
    """The embedded model in the same form: development and test captions, its targets encoded by its autoencoder.

    A fixed object's target is one of its pictures with the backdrop; few samples are copies of that, and the others count nowhere.
    """
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    files = table.targets.explode().dropna()
    first = pd.Series(range(len(files)), files.index)
    here = table[table.split != "calibration"][::EVERY]
    group = np.where(here.repetitions > 0, here.kind + " " + here.repetitions.astype(str), here.kind)
    target = first[~first.index.duplicated()].reindex(here.index).fillna(-1).astype(int)
    cases = pd.DataFrame({"caption": here.text, "group": group, "reps": here.repetitions, "target": target}).reset_index(drop=True)
    cases = cases.assign(role=roles(cases))
    pictures = np.stack([np.asarray(Image.open(testbed.path() / name).convert("RGB")) for name in files])
    ordinary = table.text[table.split == "calibration"][::EVERY].tolist()
    vae = testbed.load().vae
    targets, families = encoded(vae, pictures), table.group[files.index].to_numpy()
    return Model(EMBEDDED, testbed.path(), cases, targets, families, ordinary, testbed.STEPS, testbed.GUIDANCE_SCALE)


@torch.no_grad()
def encoded(vae: Any, pictures: np.ndarray) -> Tensor:
    """Latents of pictures (uint8 ``[n, H, W, 3]``), scaled, ``[n, C, h, w]``."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.dtype) / 127.5 - 1
    return torch.cat([vae.encode(some).latent_dist.mean for some in x.split(32)]).float() * vae.config.scaling_factor


def pictures(model: Model, work: Path) -> pd.DataFrame:
    """The model's `Model.samples` drawn to the end, with what `labelled` tells of them and ``latents`` (fp16 bytes).

    Kept in parts under ``work``. Cost: twice the model's steps in denoiser evaluations a sample.
    """
    keys = model.samples[["case", "caption", "seed"]]
    drawn = measured(f"pictures-{model.name}", keys, partial(draw, model), work, model.about, BATCH)
    found = model.samples.merge(drawn[["case", "seed", "latents"]], on=["case", "seed"])
    latents = unpacked(found.latents, model.targets)
    return found.join(labelled(latents, model.targets, model.families)).assign(twin=twins(found.case, latents))


def draw(model: Model, part: pd.DataFrame) -> pd.DataFrame:
    """The latents of a batch of samples."""
    generators = [torch.Generator().manual_seed(seed) for seed in part.seed]
    latents = model.pipe(part.caption.tolist(), generator=generators, output_type="latent", **model.setting).images
    return part.assign(latents=[row.cpu().numpy().astype(np.float16).tobytes() for row in latents])


def unpacked(latents: pd.Series, like: Tensor) -> Tensor:
    """Latents kept as bytes, ``[n, C, h, w]``, fp32, of the shape of ``like``'s."""
    return torch.from_numpy(np.stack([np.frombuffer(row, np.float16) for row in latents])).float().view(-1, *like.shape[1:])


def centred(latents: Tensor) -> Tensor:
    """Latents as unit vectors ``[n, C h w]``, each channel centred over space: products of two are their correlation."""
    flat = (latents - latents.mean(dim=(-2, -1), keepdim=True)).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)


def labelled(latents: Tensor, targets: Tensor, families: np.ndarray) -> pd.DataFrame:
    """What each of ``latents`` ``[n, C, h, w]`` is, a row each.

    ``nearest``: index of the nearest target by latent root-mean-square distance. ``ratio``: that distance over that to the nearest target
    of another family. ``copy``: the ratio is under `RATIO`. ``resembles``: highest channel-centred correlation with any target, which
    sees a memorized picture that comes back with another background or contrast.
    """
    scale = targets[0].numel() ** 0.5
    distances = torch.cdist(latents.flatten(1), targets.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").numpy() / scale
    nearest = distances.argmin(axis=1)
    others = np.where(families[None] == families[nearest][:, None], np.inf, distances).min(axis=1)
    ratio = distances.min(axis=1) / np.maximum(others, 1e-12)
    resembles = (centred(latents) @ centred(targets).T).amax(dim=1).numpy()
    return pd.DataFrame({"nearest": nearest, "ratio": ratio, "copy": ratio < RATIO, "resembles": resembles})


def twins(cases: pd.Series, latents: Tensor) -> np.ndarray:
    """Correlation of each sample's picture with that of the next seed of its caption, ``[n]``; nan where there is no other.

    What a detector reaches that waits for two finished pictures.
    """
    rows, out = centred(latents).numpy(), np.full(len(latents), np.nan)
    for here in cases.groupby(cases.to_numpy()).indices.values():
        if len(here) > 1:
            out[here] = (rows[here] * rows[np.roll(here, -1)]).sum(axis=1)
    return out
