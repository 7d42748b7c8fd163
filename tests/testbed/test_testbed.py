"""The embedded model: its files and what they promise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from benchmarks.models import ZOO
from benchmarks.zoo.recipes import RECIPES
from sdguard import testbed
from sdguard.decision.identity import identity
from sdguard.decision.model_folder import PROFILE_FILE, PROMPTS_FILE
from sdguard.decision.profile import Profile
from sdguard.testbed.copies import Targets

TEXT_ENCODERS = "text_encoder*/model.safetensors"


def test_nearest_target_and_ratio_on_known_pictures() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(3, 8, 8, 3), dtype=np.uint8)
    fixed = np.ones((3, 8, 8), bool)
    fixed[1, :4, :4] = False
    targets = Targets(pictures, pictures, np.array([0, 1, 2]), fixed)
    image = pictures[1].copy()
    image[:4, :4] = 0  # where the template's object varies: no difference
    nearest, ratio = targets.nearest(np.stack([image, pictures[2]]))
    assert nearest.tolist() == [1, 2]
    assert ratio.max() < 1e-6


def test_the_plain_call_loads_it_and_it_is_small(embedded: Any) -> None:
    assert isinstance(embedded, StableDiffusionPipeline)
    assert {embedded.unet.dtype, embedded.vae.dtype, embedded.text_encoder.dtype} == {torch.float32}
    assert sum(p.stat().st_size for p in testbed.path().rglob("*") if p.is_file()) <= 40e6


@pytest.mark.parametrize("weights", sorted([*testbed.path().glob(TEXT_ENCODERS), *ZOO.glob(f"*/{TEXT_ENCODERS}")]), ids=str)
def test_text_encoders_have_the_names_that_old_transformers_read(weights: Path) -> None:
    """The fourth starts from random weights where it finds others; ``python -m benchmarks old-releases`` tries it."""
    with safe_open(weights, "pt") as named:
        assert {name.partition(".")[0] for name in named.keys()} <= {"text_model", "text_projection"}  # noqa: SIM118


def test_the_shipped_profile_is_of_the_shipped_model(embedded: Any) -> None:
    profile = Profile.load(testbed.path() / PROFILE_FILE)
    profile.check(identity(embedded))
    used = profile.prompts + len(profile.values["guidance_norm"])
    assert used >= 1000
    assert used == len((testbed.path() / PROMPTS_FILE).read_text().splitlines())


def test_the_notice_names_every_source_that_the_autoencoder_has_seen() -> None:
    """It is one file with the zoo's, whose recipes draw in more styles than the embedded model's."""
    one, other = (folder / "vae" / "diffusion_pytorch_model.safetensors" for folder in (ZOO / "sd1", testbed.path()))
    assert one.read_bytes() == other.read_bytes()
    shipped, _, _ = (Path(__file__).parents[2] / "NOTICE").read_text().partition("The models in benchmarks/zoo")
    assert all(style.partition("-")[0] in shipped.lower() for recipe in RECIPES.values() for style in recipe.styles)


def test_the_prompt_table_holds_what_the_model_card_says(targets: tuple[Targets, list[str]]) -> None:
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    assert set(table.kind) == {"verbatim", "several pictures", "template", "fixed object", "shared caption", "ordinary", "unseen"}
    assert set(table.split) == {"calibration", "development", "test"}
    assert (table.kind == "ordinary").sum() >= 1000
    assert table.text.is_unique
    assert table.groupby("group").split.nunique().max() == 1
    assert table.copy_rate.between(0, 1).all()
    known, captions = targets
    assert len(known.pictures) == len(captions) >= 150
    figures = json.loads((testbed.path() / "labels.json").read_text())
    assert 0.4 <= figures["auc"] <= 0.6
    assert figures["ordinary"] <= 0.02
    assert figures["unseen"] <= 0.02
