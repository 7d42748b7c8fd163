"""The guard on the model that ships: real memorization, a mixed batch, and the invariants in place."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sdguard
from sdguard import GuardConfig, testbed
from sdguard.denoiser.probe import probe_run
from sdguard.signals.agreement import agreement
from sdguard.testbed.copies import RATIO, Targets


def call(pipe: Any, prompts: list[str], seeds: list[int]) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, num_inference_steps=testbed.STEPS, guidance_scale=testbed.GUIDANCE_SCALE, output_type="np")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_parquet(testbed.path() / "prompts.parquet")


@pytest.fixture(scope="module")
def mixed(embedded: Any, memorized: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """A batch of a memorized caption between two ordinary ones of the nine in ten that stop at the free signals, plain and guarded."""
    ordinary = table[(table.kind == "ordinary") & (table.split == "development")].text.tolist()
    prompts, seeds = [ordinary[0], memorized["text"], ordinary[2]], [3, memorized["copied_seeds"][0], 2]
    return {"plain": call(embedded, prompts, seeds).images, "guarded": call(sdguard.guard(embedded), prompts, seeds)}


def test_a_memorized_prompt_is_caught_before_the_first_step(mixed: dict[str, Any]) -> None:
    assert [report.verdict for report in mixed["guarded"].guard][::2] == ["clean", "clean"]
    assert mixed["guarded"].guard[1].verdict in ("steered", "withheld")
    assert mixed["guarded"].guard[1].p_value <= 0.01


def test_what_was_a_copy_is_none_any_more(mixed: dict[str, Any], targets: tuple[Targets, list[str]]) -> None:
    ratios = [
        targets[0].nearest((images[1:2] * 255).round().astype(np.uint8))[1][0] for images in (mixed["plain"], mixed["guarded"].images)
    ]
    assert ratios[0] < RATIO < ratios[1]


def test_ordinary_neighbours_are_bit_identical_and_free(mixed: dict[str, Any]) -> None:
    assert np.array_equal(mixed["guarded"].images[::2], mixed["plain"][::2])
    assert [report.extra_evaluations for report in mixed["guarded"].guard][::2] == [0, 0]
    assert mixed["guarded"].guard[1].extra_evaluations > 0


def test_guidance_norm_separates_most_repeated_from_ordinary(embedded: Any, table: pd.DataFrame) -> None:
    profile = sdguard.Profile.load(testbed.path() / "sdguard" / "profile.json")
    most = table[(table.repetitions == table.repetitions.max()) & (table.split == "development")].text.tolist()[:8]
    ordinary = table[(table.kind == "ordinary") & (table.split == "development")].text.tolist()[:8]
    guarded = sdguard.guard(embedded, GuardConfig(mode="observe", profile=profile))
    reports = call(guarded, most + ordinary, list(range(16))).guard
    values = [report.series["guidance_norm"][0] for report in reports]
    assert np.mean([[m > o for o in values[8:]] for m in values[:8]]) > 0.85


def test_agreement_separates_what_is_always_copied_from_ordinary(embedded: Any, table: pd.DataFrame) -> None:
    most = table[(table.copy_rate == 1) & (table.split == "development")].text.tolist()[:4]
    ordinary = table[(table.kind == "ordinary") & (table.split == "development")].text.tolist()[:4]
    found: list[float] = []
    setting: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
    probe_run(embedded, most + ordinary, range(8), lambda observation: found.extend(agreement(observation).tolist()), **setting)
    assert min(found[:4]) > max(found[4:])
