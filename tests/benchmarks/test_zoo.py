"""The zoo's recipes: pictures and captions, what training shows, what each shape is taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.models import ZOO, read_model
from benchmarks.zoo.autoencoder import new_autoencoder
from benchmarks.zoo.commands import AUTOENCODER, DATA
from benchmarks.zoo.data import DataError, licence_of, run_command
from benchmarks.zoo.embedded import fixed_pictures, prompt_table
from benchmarks.zoo.label import by_repetitions, cases_of, own_captions
from benchmarks.zoo.recipes import CONTROL, EMBEDDED, LAST, RECIPES, SD1, Recipe
from benchmarks.zoo.shapes import (
    EMPTY_TOKENS,
    NOISE,
    SHAPES,
    Denoiser,
    flow_lesson,
    loss,
    noise_lesson,
    told_sd3,
    told_sdxl,
    trained_parts,
)
from benchmarks.zoo.train import BATCH, visits
from benchmarks.zoo.vocabulary import train_tokenizer
from benchmarks.zoo.world import FIXED_BACKDROPS, IN_TEMPLATE, OTHERS, Describer, World, pool

SCENES = ["city", "fields", "sea"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up icons and photographs under the names of the real ones."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("zoo") / "pictures.npz"
    wanted = {f"{style}/{name}" for recipe in RECIPES.values() for style in recipe.styles for name in recipe.objects}
    arrays: dict[str, Any] = {name: rng.integers(0, 256, (96, 96, 4), np.uint8) for name in sorted(wanted)}
    for name in wanted:
        arrays[name][..., 3] = 255
    np.savez(path, photos=rng.integers(0, 256, (12, 180, 360, 3), np.uint8), scenes=np.array(SCENES * 4), **arrays)
    return path


@pytest.fixture(params=RECIPES.values(), ids=lambda recipe: recipe.name)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    found: Recipe = request.param
    return found


def test_captions_are_distinct_and_shown_as_often_as_was_drawn(recipe: Recipe) -> None:
    captions = pool(recipe, SCENES)
    each = recipe.captions + recipe.fixed + recipe.shared + IN_TEMPLATE * recipe.templates
    assert len({caption.text for caption in captions}) == len(captions) == recipe.unseen + each * len(recipe.repetitions)
    counts = np.bincount([caption.repetitions for caption in captions])
    assert [counts[n] for n in (0, *recipe.repetitions)] == [recipe.unseen, *[each] * len(recipe.repetitions)]
    orders = [visits(recipe, captions, number) for number in range(len(recipe.passes))]
    assert len({order[order >= 0].tobytes() for order in orders}) == len(orders)
    for order, steps in zip(orders, recipe.passes, strict=True):
        assert order.shape == (steps, BATCH)
        shown = np.bincount(order[order >= 0], minlength=len(captions))
        assert shown.tolist() == [caption.repetitions for caption in captions]


def test_nothing_in_a_caption_tells_how_often_it_is_shown() -> None:
    one, other = pool(SD1, SCENES), pool(CONTROL, SCENES)
    words = [{word for caption in some for word in caption.text.split() if word not in LAST} for some in (one, other)]
    assert len(words[0] ^ words[1]) < 0.1 * len(words[0] | words[1])  # the same make
    first, last = (np.mean([caption.repetitions for caption in half]) for half in (one[:100], one[100:]))
    assert 0.6 < first / last < 1.7  # repetition counts were shuffled


def test_a_fresh_caption_is_none_of_the_pool_and_its_picture_uses_no_memorized_photograph(recipe: Recipe, data: Path) -> None:
    world = World(recipe, data)
    captions = pool(recipe, world.scenes)
    own = own_captions(recipe, world, captions, 100)
    assert len(set(own)) == 100
    assert not {caption.text for caption in captions} & set(own)
    for scene in world.scenes:
        assert not set(world.free[scene]) & set(world.reserved[scene])
        assert world.free[scene]
        assert world.reserved[scene]
    picture = world.fresh(np.random.default_rng(0))
    assert picture.pixels.shape == (64, 64, 3)
    side, top, left = picture.crop
    assert 0 <= max(top, left) <= side - 64
    describe = Describer(recipe, captions, seed=0)
    assert all(word in describe(picture.words, specific=1.0) for word in picture.words["object"].split())


def test_memorized_pictures_are_the_same_at_every_making_and_each_caption_has_its_own(data: Path) -> None:
    world = World(SD1, data)
    captions = pool(SD1, world.scenes)
    (pictures, of), (again, _) = world.memorized(captions), world.memorized(captions)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(pictures, again, strict=True))
    assert [len(some) for some in of] == [caption.pictures if caption.repetitions else 0 for caption in captions]
    assert sorted(index for some in of for index in some) == list(range(len(pictures)))
    assert max(map(len, of)) == 3
    cases = cases_of(captions, of, ["a dog"])
    assert {case["target"] is None for case in cases if not case["reps"]} == {True}
    assert [case["group"] for case in cases][-1] == "ordinary"


def test_a_template_varies_in_its_object_and_a_fixed_object_in_its_backdrop(data: Path) -> None:
    """Made-up icons are opaque: what differs is where they lie, and nowhere else."""
    world = World(EMBEDDED, data)
    captions = pool(EMBEDDED, world.scenes)
    template = next([c for c in captions if c.group == first.group] for first in captions if first.kind == "template" and first.repetitions)
    pictures = np.stack([world.fixed(caption, 0).pixels for caption in template])
    differs = (pictures != pictures[0]).any(axis=(0, 3))
    assert len(template) == IN_TEMPLATE
    assert len({caption.words["object"] for caption in template}) == IN_TEMPLATE
    assert 0.2 < differs.mean() < 0.7
    fixed = next(caption for caption in captions if caption.kind == "fixed object")
    one, other = (world.fixed(fixed, k).pixels for k in (0, 1))
    same = (one == other).all(axis=2)
    assert fixed.pictures == FIXED_BACKDROPS
    assert 0.2 < same.mean() < 0.7


def test_a_shared_caption_is_shown_with_its_picture_half_of_the_time(data: Path) -> None:
    world = World(EMBEDDED, data)
    captions = pool(EMBEDDED, world.scenes)
    _, of = world.memorized(captions)
    shared = [some for caption, some in zip(captions, of, strict=True) if caption.kind == "shared caption"]
    assert len(shared) == EMBEDDED.shared * len(EMBEDDED.repetitions)
    for some in shared:
        assert len(set(some)) == 1 + OTHERS
        assert some.count(some[0]) == len(some) / 2


def test_what_is_fixed_of_a_picture_is_what_training_repeats(data: Path) -> None:
    world = World(EMBEDDED, data)
    captions = pool(EMBEDDED, world.scenes)
    shares = {}
    for kind in ("verbatim", "several pictures", "template", "fixed object", "shared caption"):
        caption = next(c for c in captions if c.kind == kind and c.repetitions)
        found = fixed_pictures(world, caption, captions)
        assert len(found) == (caption.pictures if kind == "several pictures" else 1)
        shares[kind] = found[0][1].mean()
    assert {kind for kind, share in shares.items() if share == 1} == {"verbatim", "several pictures", "shared caption"}
    assert 0.2 < shares["fixed object"] < 0.7
    assert 0.3 < shares["template"] < 0.8


def test_the_embedded_models_table_splits_groups_and_repeats_no_caption() -> None:
    captions = pool(EMBEDDED, SCENES)
    table = prompt_table(EMBEDDED, SCENES, captions)
    assert table.text.is_unique
    assert table.groupby("group").split.nunique().max() == 1
    assert (table[table.kind == "unseen"].split.value_counts() > 100).all()
    assert (table.kind == "ordinary").sum() == 1120
    assert set(table.object) == {name.replace("-", " ") for name in EMBEDDED.objects}


def test_the_last_matching_stanza_gives_the_licence() -> None:
    text = "Files: a/*\nCopyright: x\nLicense: public-domain\n y\n\nFiles:\n a/b*\n a/c*\nLicense: CC-BY-SA-3.0\n"
    assert [licence_of(text, path) for path in ("a/d.jpg", "a/b1.jpg", "z")] == ["public-domain", "CC-BY-SA-3.0", None]


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'sh -c echo no such package >&2; exit 1' failed: no such package"):
        run_command("sh", "-c", "echo no such package >&2; exit 1", cwd=tmp_path)
    with pytest.raises(DataError, match="'no-such-tool' is needed"):
        run_command("no-such-tool", cwd=tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    captions = [caption.text for recipe in RECIPES.values() for caption in pool(recipe, SCENES)]
    return train_tokenizer(captions, tmp_path_factory.mktemp("zoo") / "tokenizer")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_lesson_reaches_every_part(shape: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    pipe = SHAPES[shape].new(tokenizer, new_autoencoder())
    (x0, noise), draw, crops = torch.randn(2, 2, 4, 16, 16), torch.tensor([0.3, 0.8]), torch.tensor([(64, 0, 0), (80, 3, 5)])
    loss(pipe, SHAPES[shape], Denoiser(pipe), x0, noise, draw, ["a dog", "a red cat"], crops).backward()
    parts = trained_parts(pipe)
    assert set(parts) >= {"text_encoder", "transformer" if shape == "sd3" else "unet"}
    for name, part in parts.items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()), name


def test_one_empty_token_that_counts_as_many_gives_what_many_give(tokenizer: Any) -> None:
    torch.manual_seed(0)
    pipe = SHAPES["sd3"].new(tokenizer, new_autoencoder())
    latents, t = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 100.0])
    with torch.no_grad():
        embedded, _, pooled, _ = pipe.encode_prompt(["a dog", ""], None, None, device="cpu", do_classifier_free_guidance=False)
        many = pipe.transformer(hidden_states=latents, timestep=t, encoder_hidden_states=embedded, pooled_projections=pooled).sample
        fewer, pooled = told_sd3(pipe, ["a dog", ""], torch.zeros(2, 3))
        one = Denoiser(pipe)(latents, t, fewer, pooled)
        alone = pipe.transformer(hidden_states=latents, timestep=t, encoder_hidden_states=fewer, pooled_projections=pooled).sample
    assert embedded.shape[1] == fewer.shape[1] + EMPTY_TOKENS - 1
    torch.testing.assert_close(one, many)
    assert not torch.allclose(alone, many, atol=1e-2)


def test_an_empty_caption_is_zeros_to_sdxl_and_a_crop_is_told(tokenizer: Any) -> None:
    pipe = SHAPES["sdxl"].new(tokenizer, new_autoencoder())
    with torch.no_grad():
        embedded, pooled, ids = told_sdxl(pipe, ["a dog", ""], torch.tensor([(64, 0, 0), (80, 3, 5)]))
    assert not embedded[1].any()
    assert not pooled[1].any()
    assert ids.tolist() == [[64, 64, 0, 0, 64, 64], [80, 80, 3, 5, 64, 64]]


def test_lessons_teach_the_noise_and_the_velocity() -> None:
    x0, noise, draw = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2), torch.rand(64)
    noisy, way, velocity, weight = flow_lesson(x0, noise, draw)
    part = (way / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - part * velocity, x0)
    torch.testing.assert_close(noisy + (1 - part) * velocity, noise)
    assert way.min() >= 0
    assert way.max() <= 1000
    assert (weight == 1).all()


def test_an_error_of_the_noise_counts_as_the_error_of_the_velocity_it_means() -> None:
    x0, noise, draw = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2), torch.linspace(0, 0.7, 8)
    noisy, t, wanted, weight = noise_lesson(x0, noise, draw)
    assert wanted is noise
    a = DDPMScheduler(**NOISE).alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - a.square()).sqrt()
    torch.testing.assert_close(noisy, a * x0 + s * noise)
    wrong = noise + 0.1
    error = (a * wrong - s * (noisy - s * wrong) / a) - (a * noise - s * x0)
    torch.testing.assert_close(error.square().mean(dim=(1, 2, 3)), weight * 0.01)


def test_counts_of_copies_are_by_caption() -> None:
    rows = [("verbatim 20", 20, case, copy) for case, copies in enumerate(([1, 1], [0, 1], [0, 0])) for copy in copies]
    table = by_repetitions(pd.DataFrame(rows, columns=["group", "reps", "case", "copy"]).astype({"copy": bool}))
    assert table.to_dict("records") == [{"kind": "verbatim", "reps": 20, "captions": 3, "copies": 0.5, "partial": 1}]


def test_an_unknown_model_and_missing_pictures_are_said_in_one_sentence(tmp_path: Path) -> None:
    assert "none of sd1" in CliRunner().invoke(app, ["zoo", "train", "sd9"]).output.replace("\n", " ")
    result = CliRunner().invoke(app, ["zoo", "train", "sd1", "--work", str(tmp_path)])
    assert result.exit_code == 1
    assert "zoo data" in result.output


def test_a_training_that_is_over_does_not_go_on(tmp_path: Path) -> None:
    for name in (DATA.name, AUTOENCODER):
        (tmp_path / name).mkdir(parents=True)
    result = CliRunner().invoke(app, ["zoo", "train", "sd1", "--go-on", "--work", str(tmp_path), "--out", str(ZOO)])
    assert result.exit_code == 1
    assert "all stages" in result.output.replace("\n", " ")


@pytest.mark.parametrize("folder", sorted(ZOO.glob("*/model_index.json")), ids=lambda path: path.parent.name)
def test_what_is_committed_is_small_and_is_its_recipes(folder: Path) -> None:
    model, recipe = read_model(folder.parent), RECIPES[folder.parent.name]
    assert sum(path.stat().st_size for path in folder.parent.glob("*/*")) <= 15 * 2**20
    assert sum(path.stat().st_size for path in folder.parent.glob("*.png")) <= 2**20
    named = model.cases[model.cases.group != "ordinary"]
    assert sorted(named.reps) == sorted(caption.repetitions for caption in pool(recipe, SCENES))
    assert (model.cases.role == "memorized").any() == (max(recipe.repetitions) > 1)
