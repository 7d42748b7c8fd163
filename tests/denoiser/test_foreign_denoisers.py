"""Denoisers as other people have them: wrapped, cached, compiled. What ran without the guard runs the same with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import build, call, profile_for, reworded
from torch import Tensor, nn

import sdguard
from sdguard import GuardConfig
from sdguard.guarded import run as run_module


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for; what is flagged is reworded."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)


def is_left_alone_but_for_the_flagged_row(pipe: Any, **extra: Any) -> None:
    """Clean images are those of the unguarded pipeline; where one is flagged, it alone is another."""
    plain = call(pipe, **extra).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **extra)
    assert np.array_equal(clean.images, plain)
    assert [report.error for report in clean.guard] == [None] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))), **extra)
    assert [(report.verdict, report.error) for report in steered.guard] == [("steered" if i == row else "clean", None) for i in range(3)]
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    assert np.array_equal(call(pipe, **extra).images, plain)


class Exported(nn.Module):
    """A denoiser with names of its own for what it is called with, and with no parameters to be seen."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.inner, self.config, self.dtype, self.device = (unet,), unet.config, unet.dtype, unet.device

    def forward(self, latent_model_input: Tensor, t: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        return (self.inner[0](latent_model_input, t, encoder_hidden_states).sample,)


def test_a_denoiser_may_name_its_arguments_otherwise(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.unet = Exported(pipe.unet)
    is_left_alone_but_for_the_flagged_row(pipe)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"])
def test_a_timestep_is_found_at_its_place_and_is_one_number(name: str, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    seen, inner = [], pipe.unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[1].item())
        return inner(*args, **kwargs)

    pipe.unet.forward = forward
    is_left_alone_but_for_the_flagged_row(pipe)
    assert {*pipe.scheduler.timesteps.tolist()} <= {*seen}
