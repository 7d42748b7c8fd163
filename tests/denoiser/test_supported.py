"""Every pipeline class of diffusers is supported, or refused in one sentence, for a reason of its own where one is known."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ModularPipeline, StableDiffusionPAGPipeline, StableDiffusionPipeline
from families import PIPELINES, PROMPTS, build, profile_for

import sdguard
from sdguard import GuardConfig
from sdguard.denoiser.families import FAMILIES, REFUSED, family_of_class

CLASSES: dict[str, type] = {
    name: found for name in dir(diffusers) if name.endswith("Pipeline") and isinstance(found := getattr(diffusers, name), type)
}


class Ours(StableDiffusionPipeline):
    """As people make their own."""


class OursOfRefused(StableDiffusionPAGPipeline):
    """As people make their own of what is refused."""


def refusal(cls: type) -> str | None:
    """Why a class is refused, None where it is supported."""
    try:
        family_of_class(cls)
    except TypeError as error:
        return str(error)
    return None


def test_the_supported_classes_of_diffusers_are_those_of_the_table() -> None:
    assert {name for name, cls in CLASSES.items() if refusal(cls) is None} == set(FAMILIES)


def test_every_supported_class_has_a_tiny_pipeline_that_the_invariants_are_tried_on() -> None:
    assert {name for name in FAMILIES if not issubclass(CLASSES[name], ModularPipeline)} == set(PIPELINES)


def test_every_other_class_is_refused_in_one_sentence_that_names_it() -> None:
    for name, cls in CLASSES.items():
        if (sentence := refusal(cls)) is not None:
            assert re.fullmatch(rf"sdguard does not support {name}\b(?!.*\. ).*\.", sentence)


@pytest.mark.parametrize("part", REFUSED)
def test_every_reason_is_of_classes_that_diffusers_has(part: str) -> None:
    named = {name for name in CLASSES if part in name} - set(FAMILIES)
    assert named
    for name in named:  # of which some have several reasons
        reasons = [f"sdguard does not support {name}: {why}." for part, why in REFUSED.items() if part in name]
        assert refusal(CLASSES[name]) == reasons[0]


@pytest.mark.parametrize("cls", [StableDiffusionPAGPipeline, diffusers.StableDiffusionInstructPix2PixPipeline, diffusers.ZImagePipeline])
def test_guarding_says_why(cls: Any) -> None:
    with pytest.raises(TypeError, match=rf"^sdguard does not support {cls.__name__}: .*\.$"):
        sdguard.guard(cls.__new__(cls))


def test_what_is_made_of_a_refused_class_is_refused_as_that() -> None:
    assert refusal(OursOfRefused) == f"sdguard does not support OursOfRefused: {REFUSED['PAG']}."


class HandsOn(diffusers.StableDiffusionPipeline):
    """One that takes whatever its base takes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Renames(diffusers.StableDiffusionPipeline):
    """One that names some arguments and an own one, and hands on the others."""

    def __call__(self, prompt: Any, negative_prompt: Any = "a cow", style: float = 0.5, **rest: Any) -> Any:
        return super().__call__(prompt, negative_prompt=[negative_prompt] * len(prompt), **rest)


@pytest.mark.parametrize("kind", [HandsOn, Renames])
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_call_that_hands_on_its_arguments_is_read_by_the_call_it_hands_them_to(
    kind: Any, return_dict: bool, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    pipe = kind(**build("StableDiffusionPipeline", embedded.tokenizer).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    guarded = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    each: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "return_dict": return_dict, "num_images_per_prompt": 2}
    plain, output = (of(PROMPTS, **each, generator=torch.Generator().manual_seed(7))[0] for of in (pipe, guarded))
    assert np.array_equal(output, plain)
    assert [report.prompt for report in guarded.guard_reports] == [prompt for prompt in PROMPTS for _ in range(2)]
    for unknown in ("stile", *(["style"] if kind is Renames else [])):
        with pytest.raises(ValueError, match=f"does not take {unknown}: "):
            guarded(PROMPTS, **each, **{unknown: 0.7})


def test_what_is_made_of_a_supported_class_is_guarded_as_that(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    whole = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe = Ours(**whole.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def run(pipe: Any) -> Any:
        return pipe(PROMPTS, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(7))

    plain, guarded = run(pipe).images, run(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(guarded.images, plain)
    assert [report.verdict for report in guarded.guard] == ["clean"] * 3
