"""``python -m benchmarks cures``: what a caption is about, whether a picture shows it, and what is said of the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import build
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import cures
from benchmarks.__main__ import app
from benchmarks.cures import EMBEDDINGS, GUARD, NEVER_SEEN, RESEMBLES, UNGUARDED, Share, chosen, readable, summary, table
from benchmarks.models import Model, pictures, roles, unpacked
from benchmarks.report import brief_guard
from benchmarks.subjects import GENERIC, LEVELS, asked_of, choices, encoded, errors, frames, places, subjects
from sdguard import GuardConfig

THINGS = ("dog", "christmas island flag", "family: man, man, girl, girl", "key", "togo flag", "man: white hair", "ice cube")
ENDINGS = ("framed canvas print by Ann Gray", "live at the harbor stage")


def test_an_ending_that_captions_share_is_no_part_of_their_subject() -> None:
    captions = [f"{thing} {ending}" for ending in ENDINGS for thing in THINGS]
    assert subjects(captions) == [*THINGS, *THINGS]


def test_after_commas_the_subject_ends_at_the_last_one_and_at_the_first_at() -> None:
    specific = ["a ripe, red tomato!, city on poseidos", "a camel, sea on arabia", "fire engine at heixpral sea, book cover"]
    lands = ("sea", "sky", "fog", "lava", "snow", "city")
    shared = [f"owl at klonwan {land}, book cover" for land in lands] + [f"a {land}, greetings from calda" for land in lands]
    assert subjects(specific + shared) == [
        "a ripe, red tomato!", "a camel", "fire engine", *["owl"] * len(lands), *[f"a {land}" for land in lands],
    ]  # fmt: skip


def test_a_caption_of_no_make_is_its_own_subject() -> None:
    assert subjects(["a picture of a dog", "dog"]) == ["a picture of a dog", "dog"]


def test_ordinary_captions_give_the_frames_that_most_of_them_have_and_specific_ones_none() -> None:
    ordinary = [
        "picture of a dog face on red",
        "picture of a dog on red",
        "a key, grey {x}",
        "hotdog stand",
        "dog",
        "key, lava",
        "dog, lava",
    ]
    about = ["dog", "dog face", "key"]
    assert frames(ordinary, [], about) == [*GENERIC, "picture of a {} on red", "{}, lava"]
    assert frames(ordinary, ["key, lava"], about) == [*GENERIC, "picture of a {} on red", "a {}, grey x"]
    assert frames(ordinary, [], []) == list(GENERIC)


def test_a_subject_is_looked_for_among_as_many_others() -> None:
    assert choices(["a", "b", "a", "c", "d"], 3) == [["a", "b", "c"], ["b", "c", "d"], ["a", "b", "c"], ["c", "d", "a"], ["d", "a", "b"]]
    assert choices(["a", "b"], 9) == [["a", "b"], ["b", "a"]]


def toy(prediction_type: str, drawn: Callable[[str], Tensor]) -> Any:
    """A pipeline whose denoiser believes that every picture is the one ``drawn`` for its text."""
    known: list[str] = []
    alphas = torch.linspace(0.999, 0.01, 1000)

    def encode_prompt(prompt: list[str]) -> tuple[Tensor, None, Tensor]:
        known.extend(prompt)
        place = torch.arange(len(known) - len(prompt), len(known)).float()
        return place.view(-1, 1, 1), None, place.view(-1, 1)

    def denoise(x: Tensor, timestep: Tensor, condition: Tensor, **told: Any) -> tuple[Tensor]:
        clean = torch.stack([drawn(known[int(i)]) for i in condition.flatten()])
        signal, noise = (power[timestep].sqrt().view(-1, 1, 1, 1) for power in (alphas, 1 - alphas))
        added = (x - signal * clean) / noise
        return ({"epsilon": added, "sample": clean, "v_prediction": signal * added - noise * clean}[prediction_type],)

    def flow(x: Tensor, condition: Tensor, pooled: Tensor, timestep: Tensor, **told: Any) -> tuple[Tensor]:
        clean = torch.stack([drawn(known[int(i)]) for i in pooled.flatten()])
        return ((x - clean) / (timestep / 1000).view(-1, 1, 1, 1),)

    shared: dict[str, Any] = {"encode_prompt": encode_prompt, "device": "cpu", "vae_scale_factor": 4}
    if prediction_type == "flow_prediction":
        return SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(), components={"transformer": flow}, transformer=flow, **shared)
    config = SimpleNamespace(prediction_type=prediction_type, num_train_timesteps=1000)
    return SimpleNamespace(scheduler=SimpleNamespace(alphas_cumprod=alphas, config=config), components={}, unet=denoise, **shared)


def by_subject(text: str) -> Tensor:
    """A picture of the last word."""
    return torch.full((1, 2, 2), float("abcde".index(text[-1])))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_subject_that_explains_a_picture_best_comes_first(prediction_type: str) -> None:
    pipe = toy(prediction_type, by_subject)
    pictures = torch.stack([by_subject("c"), by_subject("e")])
    assert places(pipe, pictures, [list("cab"), list("eab")], ["one {}", "two {}"]).tolist() == [0, 0]
    assert places(pipe, pictures, [list("abc"), list("cde")], ["{}"]).tolist() == [2, 2]


def test_its_error_is_the_mean_over_levels_of_the_noise_it_gets_wrong() -> None:
    pipe = toy("epsilon", by_subject)
    alphas = torch.stack([pipe.scheduler.alphas_cumprod[round(999 * level)] for level in LEVELS])
    found = errors(pipe, by_subject("c")[None], [list("ce")], ["{}", "a {}"])
    torch.testing.assert_close(found, torch.stack([torch.tensor(0.0), (4 * alphas / (1 - alphas)).mean()])[None], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_a_pipelines_denoiser_is_asked_as_the_pipeline_asks_it(name: str, embedded: Any) -> None:
    pipe, seen = build(name, embedded.tokenizer), []
    pipe.set_progress_bar_config(disable=True)
    denoiser = pipe.components.get("transformer") or pipe.unet

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        told = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        told += list((kwargs.get("added_cond_kwargs") or {}).values())
        seen.append(sorted((tuple(value.shape), float(value.sum())) for value in told if value.ndim))

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    size = {"height": 32, "width": 32, "guidance_scale": 1.0}
    if name == "StableDiffusion3Pipeline":
        size |= {"max_sequence_length": 256}
    latents = pipe(["a dog"], num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0), **size).images
    with torch.no_grad():
        asked_of(pipe, latents, 500, *encoded(pipe, ["a dog"]))
    handle.remove()
    told = [[value for value in found if value[0] not in (tuple(latents.shape), (1,))] for found in seen]
    assert told[0] == told[1] != []


def test_of_subjects_that_explain_a_picture_alike_none_comes_first() -> None:
    pipe = toy("epsilon", lambda _: torch.zeros(1, 2, 2))
    assert places(pipe, torch.ones(1, 1, 2, 2), [list("abc")], ["{}"]).tolist() == [2]


def test_memorized_ordinary_and_never_seen_captions_take_part_once_each() -> None:
    rows = [
        ("m1", 1, "memorized", "verbatim 9", False, 0.2), ("m1", 2, "memorized", "verbatim 9", True, 0.5),
        ("m2", 3, "memorized", "verbatim 9", False, RESEMBLES + 0.01), ("m3", 4, "memorized", "verbatim 9", False, RESEMBLES),
        ("t", 5, "memorized", "template 9", True, 0.99),
        ("o", 6, "ordinary", "ordinary", False, 0.1), ("o", 7, "ordinary", "ordinary", False, 0.1),
        ("n", 8, "never seen", "verbatim 0", True, 0.99),
    ]  # fmt: skip
    drawn = pd.DataFrame(rows, columns=["caption", "seed", "role", "group", "copy", "resembles"]).assign(case=0, reps=9, latents=b"")
    assert chosen(drawn, 9).seed.tolist() == [2, 3, 6, 8]
    assert chosen(drawn, 1).seed.tolist() == [2, 6, 8]


def run() -> pd.DataFrame:
    """A made-up run: five memorized samples, all but the last of them copies before, and three ordinary ones."""
    rows = [
        # role, was_copy, copy, resembling, verdict, evaluations, place, identical
        ("memorized", True, True, True, "steered", 10, math.nan, False),
        ("memorized", True, True, True, "withheld", 30, math.nan, False),
        ("memorized", True, False, False, "steered", 20, 0, False),
        ("memorized", True, False, True, "clean", 2, math.nan, True),
        ("memorized", False, False, False, "steered", 20, 2, False),
        ("ordinary", False, False, False, "clean", 0, math.nan, True),
        ("ordinary", False, False, False, "clean", 0, math.nan, False),
        ("ordinary", False, False, False, "withheld", 50, math.nan, False),
    ]
    table = pd.DataFrame(rows, columns=["role", "was_copy", "copy", "like", "verdict", "evaluations", "place", "identical"])
    return table.assign(subjects=9, memorized=table.like & (table.verdict != "withheld"))


def test_what_is_said_of_a_run() -> None:
    said = summary(run())
    shares = {name: (value.share, value.of) for name, value in said.items() if isinstance(value, Share)}
    assert shares["copies"] == (1 / 4, 4)
    assert shares["memorized"] == (2 / 5, 5)
    assert shares["withheld"] == (1 / 5, 5)
    assert shares["acted on"] == (4 / 5, 5)
    assert shares["aligned"] == (1 / 2, 2)
    assert shares["in three"] == (1.0, 2)
    assert shares["cured"] == (1 / 5, 5)
    assert shares["ordinary flagged"] == (1 / 3, 3)
    assert shares["identical"] == (1 / 2, 2)
    assert said["called steered"] == 1
    assert said["evaluations"] == 20.0


def test_a_share_has_its_standard_error_and_is_never_sure() -> None:
    found = Share.of_true([True, False, False, False])
    assert (found.share, found.of, found.error) == (0.25, 4, pytest.approx(math.sqrt(2 / 6 * 4 / 6 / 4)))
    assert found.in_full == "0.25±0.24 of 4"
    assert Share.of_true([True] * 4).error > 0
    assert math.isnan(Share.of_true([]).error)


def test_the_table_has_a_row_a_run_and_a_group_of_columns_a_model() -> None:
    rows = table({"one": {UNGUARDED: run(), GUARD: run()}, "two": {UNGUARDED: run()}})
    assert [(row["run"], set(row) - {"run"}) for row in rows] == [(UNGUARDED, {"one", "two"}), (GUARD, {"one"})]
    shown = readable(rows)
    assert "among 9 subjects" in shown
    assert "0.50±0.35 of 2" in shown
    assert "ordinary flagged" in shown
    json.dumps(rows, default=cures.as_json)


def test_the_table_of_the_guard_has_a_row_a_model() -> None:
    rows = table({"one": {name: run() for name in (UNGUARDED, GUARD, EMBEDDINGS, NEVER_SEEN)}})
    found = json.loads(json.dumps({"about": {"models": {"one": {"memorized": 2}}}, "rows": rows}, default=cures.as_json))
    line = brief_guard(found).splitlines()[-1]
    assert line.startswith("| one | 2 | ")
    assert " / " in line


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_a_call_takes_its_texts_as_embeddings_and_gives_the_same_pictures(name: str, embedded: Any) -> None:
    pipe, texts = build(name, embedded.tokenizer), ["a dog", "two cats"]
    setting = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
    if name == "StableDiffusion3Pipeline":
        setting["max_sequence_length"] = 256  # what encode_prompt takes where it is not told

    def drawn(**inputs: Any) -> torch.Tensor:
        images: torch.Tensor = pipe(**inputs, **setting, generator=[torch.Generator().manual_seed(k) for k in (0, 1)]).images
        return images

    assert torch.equal(drawn(prompt=texts), drawn(**cures.as_embeddings(pipe, texts)))


GROUPS = {"repeated 60": (60, True), "repeated 9": (9, True), "unseen, same make": (0, False), "ordinary": (0, False)}


@pytest.fixture
def tiny(embedded: Any, tmp_path: Path) -> Model:
    """A tiny model, two cases a role, that has memorized the very pictures it draws for its memorized captions."""
    build("StableDiffusionPipeline", embedded.tokenizer).save_pretrained(tmp_path / "tiny")
    rows = [(f"{thing} at {group}", group, reps, 0 if has else -1) for group, (reps, has) in GROUPS.items() for thing in ("dog", "key")]
    cases = pd.DataFrame(rows, columns=["caption", "group", "reps", "target"])
    cases = cases.assign(role=roles(cases))
    ordinary = [f"a thing number {i}" for i in range(14)]
    model = Model("tiny", tmp_path / "tiny", cases, torch.randn(4, 4, 8, 8), np.arange(4), ordinary, steps=3)
    drawn = pictures(model, tmp_path / "drawn")
    same = unpacked(drawn.latents[drawn.role == "memorized"], model.targets)
    return replace(model, targets=same, families=np.arange(len(same)))


def test_the_command_measures_models_and_writes_no_caption(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cures, "read_model", lambda _: tiny)
    monkeypatch.setattr(cures, "embedded_model", lambda: replace(tiny, name="embedded"))
    monkeypatch.setattr(cures, "GuardConfig", partial(GuardConfig, false_positive_rate=0.4))
    only = [word for name in (GUARD, EMBEDDINGS, "embedding noise") for word in ("--only", name)]
    arguments = ["cures", "--models", str(tiny.folder), "--out", str(tmp_path), "--work", str(tmp_path / "work"), *only]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = (tmp_path / "cures.json").read_text()
    assert [row["run"] for row in json.loads(written)["rows"]] == [UNGUARDED, GUARD, EMBEDDINGS, "embedding noise", NEVER_SEEN]
    assert not any(caption in written for caption in tiny.cases.caption)
    rows = pd.read_parquet(tmp_path / "cures.parquet")
    assert not {"caption", "latents"} & set(rows)
    counts = rows[rows.model == "tiny"].groupby("run").size().to_dict()
    assert counts == {UNGUARDED: 4, GUARD: 4, EMBEDDINGS: 4, "embedding noise": 2, NEVER_SEEN: 2}
    before = rows[rows.run == UNGUARDED]
    assert before["copy"][before.role == "memorized"].all()
    assert rows.identical[(rows.verdict == "clean") & (rows.role == "ordinary")].all()
    assert (tmp_path / "work" / "cures" / "tiny.jpg").exists()


def test_a_run_that_does_not_exist_is_refused_in_one_sentence() -> None:
    result = CliRunner().invoke(app, ["cures", "--only", "prayer"])
    assert result.exit_code == 1
