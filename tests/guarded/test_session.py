"""A session as people have it in a web interface: everything is turned, and the model is calibrated once."""

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from families import build, lora

import sdguard
from sdguard import GuardConfig, Profile
from sdguard.decision import store

THINGS, PLACES = ("cat", "dog", "fox", "boat", "zebra"), ("snow", "fog", "forest", "sky", "canyon")
PROMPTS = [f"a {thing} in {place}" for thing in THINGS for place in PLACES]


def test_eighteen_generations_cost_one_calibration(embedded: Any, calibrations: list[Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ordinary_prompts", lambda pipe: PROMPTS)
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    guarded = sdguard.guard(pipe, GuardConfig("observe", 0.1))
    config = pipe.scheduler.config

    def generate(scheduler: Any = None, **setting: Any) -> list[Any]:
        if scheduler:
            pipe.scheduler = scheduler.from_config(config)
        call = {"num_inference_steps": 3, "guidance_scale": 7.0, "output_type": "np", **setting}
        return guarded("a cat in snow", generator=torch.Generator().manual_seed(1), **call).guard

    reports = [
        generate(),
        generate(negative_prompt="blurry"),
        generate(negative_prompt="blurry, lowres"),
        generate(negative_prompt="blurry, lowres, bad hands"),
        generate(negative_prompt=""),
        generate(height=24, width=16),
        generate(height=16, width=24),
        generate(guidance_scale=9.0),
        generate(guidance_scale=5.0),
        generate(EulerDiscreteScheduler),
        generate(EulerAncestralDiscreteScheduler),
        generate(DPMSolverMultistepScheduler, num_inference_steps=4),
        generate(UniPCMultistepScheduler, num_inference_steps=5),
        generate(num_images_per_prompt=2),
        generate(eta=0.5),  # clip_skip fails in diffusers itself under transformers 5
    ]
    weights = {name: value * 0.03 for name, value in lora(pipe).items()}  # of a LoRA that changes little
    pipe.load_lora_weights(weights, adapter_name="style")
    reports += [generate(), generate(cross_attention_kwargs={"scale": 0.8})]
    pipe.disable_lora()
    reports.append(generate())
    assert len(reports) == 18
    assert len(calibrations) == 1
    assert all(report.error is None and report.score is not None for row in reports for report in row)
    with_lora = [row[0].judged_by for row in reports[15:17]]
    assert all("made with other adapters or patches; 24 ordinary prompts read alike with these" in found for found in with_lora)
    assert reports[17][0].judged_by == reports[0][0].judged_by
