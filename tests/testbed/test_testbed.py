"""The embedded model: its world, its training loop, its files and what they promise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from sdguard import testbed
from sdguard.decision.identity import identity
from sdguard.decision.model_folder import PROFILE_FILE, PROMPTS_FILE
from sdguard.decision.profile import Profile
from sdguard.testbed import label, training
from sdguard.testbed.build_data import DataError, licence_of, run_command
from sdguard.testbed.copies import Targets
from sdguard.testbed.train import EPOCH_STEPS, shown_counts
from sdguard.testbed.training import train
from sdguard.testbed.world import REPETITIONS, Describer, icon_words, pool


def test_the_pool_is_drawn_before_its_counts() -> None:
    captions = pool()
    assert captions == pool()
    assert len({c.text for c in captions}) == len(captions)
    assert {c.repetitions for c in captions} == set(REPETITIONS)
    assert sum(c.kind == "verbatim" and c.repetitions > 1 for c in captions) >= 100
    assert sum(c.kind == "template" and c.repetitions > 1 for c in captions) >= 50
    assert sum(c.repetitions <= 1 for c in captions) >= 300


def test_training_shows_each_target_as_often_as_its_count() -> None:
    captions = pool()
    counts = [c.repetitions for c in captions]
    assert shown_counts(captions, EPOCH_STEPS).tolist() == counts
    assert shown_counts(captions, 2 * EPOCH_STEPS).tolist() == [2 * count for count in counts]
    assert 0 < shown_counts(captions, 10).sum() < sum(counts)


def test_fresh_captions_never_couple_an_object_with_its_name_in_the_pool() -> None:
    captions = pool()
    starts = {f"{icon_words(c.object)} at {c.name} " for c in captions}
    describe = Describer(captions, 3)
    fresh = [describe(c.object, c.scene, specific=1.0) for c in captions]
    assert not [text for text in fresh if text.startswith(tuple(starts))]


def test_nearest_target_and_ratio_on_known_pictures() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, size=(3, 8, 8, 3), dtype=np.uint8)
    targets = Targets(pictures, pictures, np.array([0, 1, 2]), np.array([[0, 0, 0, 0], [0, 0, 4, 4], [0, 0, 0, 0]]))
    image = pictures[1].copy()
    image[:4, :4] = 0  # inside the template's varying box: no difference
    nearest, ratio = targets.nearest(np.stack([image, pictures[2]]))
    assert nearest.tolist() == [1, 2]
    assert ratio.max() < 1e-6


def test_the_last_matching_stanza_gives_the_licence() -> None:
    text = "Files: a/*\nCopyright: x\nLicense: public-domain\n y\n\nFiles:\n a/b*\n a/c*\nLicense: CC-BY-SA-3.0\n"
    assert [licence_of(text, path) for path in ("a/d.jpg", "a/b1.jpg", "z")] == ["public-domain", "CC-BY-SA-3.0", None]


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'sh -c echo no such package >&2; exit 1' failed: no such package"):
        run_command("sh", "-c", "echo no such package >&2; exit 1", cwd=tmp_path)
    with pytest.raises(DataError, match="'no-such-tool' is needed"):
        run_command("no-such-tool", cwd=tmp_path)


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = nn.Linear(2, 1)

    def loss_at(step: int) -> torch.Tensor:
        seen.append(step)
        if len(seen) in (4, 7):
            raise KeyboardInterrupt
        return model(torch.ones(1, 2)).square().mean()

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(7, model, loss_at, tmp_path / "x.pt", 1e-2)
        trained = model.weight.clone()
        model = nn.Linear(2, 1)
    assert seen == [0, 1, 2, 3, 3, 4, 5]
    train(0, model, loss_at, tmp_path / "x.pt", 1e-2)
    assert torch.equal(model.weight, trained)


def test_training_ends_after_its_steps_and_is_looked_at_on_the_way(tmp_path: Path) -> None:
    model, seen, looked = nn.Linear(2, 1), [], []

    def loss_at(step: int) -> torch.Tensor:
        seen.append(step)
        return model(torch.ones(1, 2)).square().mean()

    look = (2, lambda step, average: looked.append((step, type(average))))
    for steps in (5, 5, 6):
        train(steps, model, loss_at, tmp_path / "x.pt", 1e-2, look=look)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert looked == [(2, nn.Linear), (4, nn.Linear), (6, nn.Linear)]


def test_the_plain_call_loads_it_and_it_is_small(embedded: Any) -> None:
    assert isinstance(embedded, StableDiffusionPipeline)
    assert {embedded.unet.dtype, embedded.vae.dtype, embedded.text_encoder.dtype} == {torch.float32}
    assert sum(p.stat().st_size for p in testbed.path().rglob("*") if p.is_file()) <= 40e6


def test_the_shipped_profile_is_of_the_shipped_model(embedded: Any) -> None:
    profile = Profile.load(testbed.path() / PROFILE_FILE)
    profile.check(identity(embedded))
    used = profile.prompts + len(profile.values["guidance_norm"])
    assert used >= 1000
    assert used == len((testbed.path() / PROMPTS_FILE).read_text().splitlines())


def test_the_prompt_table_holds_what_the_model_card_says(targets: tuple[Targets, list[str]]) -> None:
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    assert set(table.kind) == {"verbatim", "template", "ordinary", "unseen"}
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


def test_stopped_labelling_goes_on_and_a_longer_one_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"text": ["a lion", "a rose", "a tent"], "split": ["test", "test", "calibration"], "seeds": [2, 2, 1]})
    asked: list[str] = []

    def one_sample(texts: list[str], generator: list[torch.Generator], **setting: Any) -> Any:
        asked.extend(texts)
        if len(asked) == 4:
            raise KeyboardInterrupt
        pictures = [torch.rand(64, 64, 3, generator=g).numpy() for g in generator]
        return type("Output", (), {"images": np.stack(pictures)})

    monkeypatch.setattr(label, "BATCH", 1)
    monkeypatch.setattr(label, "weights_digest", lambda pipe: "these")
    with pytest.raises(KeyboardInterrupt):
        label.generate_samples(one_sample, table, tmp_path)
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b"half a sample")
    first = np.array(label.generate_samples(one_sample, table, tmp_path))
    assert asked == ["a lion", "a lion", "a rose", "a rose", "a rose", "a tent"]
    assert np.array_equal(first[0], first[2])
    longer = label.generate_samples(one_sample, table.assign(seeds=[2, 2, 2]), tmp_path)
    assert len(longer) == 6
    assert np.array_equal(longer[:5], first)
