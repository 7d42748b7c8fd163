"""The noise level that an observation has is the one that is in the latents, whatever a scheduler rounds."""

from typing import Any

import diffusers
import pytest
import torch
from families import build

from sdguard.denoiser.probe import observe_calls
from sdguard.denoiser.schedulers import clone_scheduler, scale_input, scheduled_calls
from sdguard.observation import LEAST_SIGNAL, Observation, is_flow, noise_level

#: schedulers of the matrix, each with the spacings of sigmas that it has.
SIGMAS = {
    "DDIMScheduler": (),
    "PNDMScheduler": (),
    "DDPMScheduler": (),
    "LCMScheduler": (),
    "EulerAncestralDiscreteScheduler": (),
    "EulerDiscreteScheduler": ("karras", "exponential", "beta"),
    "HeunDiscreteScheduler": ("karras", "exponential", "beta"),
    "DPMSolverMultistepScheduler": ("karras", "exponential", "beta"),
    "DPMSolverSinglestepScheduler": ("karras", "exponential", "beta"),
    "UniPCMultistepScheduler": ("karras", "exponential", "beta"),
    "LMSDiscreteScheduler": ("karras", "exponential", "beta"),
    "FlowMatchEulerDiscreteScheduler": ("karras", "exponential", "beta"),
}
CASES = [(name, kind) for name, kinds in SIGMAS.items() for kind in (None, *kinds)]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(name: str, kind: str | None, **config: Any) -> Any:
    flags = {f"use_{kind}_sigmas": True} if kind else {}
    return getattr(diffusers, name).from_config({**(BETAS if not name.startswith("Flow") else {"shift": 3.0}), **flags, **config})


def shares(x: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor) -> list[float]:
    """How much of each of two pictures is in ``x``."""
    parts = torch.stack([clean.flatten(), noise.flatten()], dim=1).double()
    return torch.linalg.lstsq(parts, x.flatten().double().unsqueeze(1)).solution.flatten().tolist()


@pytest.mark.parametrize("steps", [6, 30])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_level_of_every_call_is_the_one_in_the_latents(name: str, kind: str | None, steps: int) -> None:
    """To four digits, which fp32 leaves of the smaller share."""
    scheduler = made(name, kind)
    scheduler.set_timesteps(steps)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    calls = scheduled_calls(scheduler, scheduler.timesteps)
    assert len(calls) == len(scheduler.timesteps)
    for place, call in enumerate(calls):
        seen = clone_scheduler(scheduler)
        if hasattr(seen, "set_begin_index"):
            seen.set_begin_index(place)
        if name.startswith("Flow"):
            x = seen.scale_noise(clean, call.timestep.reshape(1), noise)
        else:
            x = scale_input(seen, seen.add_noise(clean, noise, call.timestep.reshape(1)), call.timestep)
        a, s = shares(x, clean, noise)
        # noise alone counts as a trace of signal
        assert call.level == pytest.approx((max(a, LEAST_SIGNAL), min(s, 1 - LEAST_SIGNAL) if is_flow(scheduler) else s), rel=1e-4)


@pytest.mark.parametrize(("kind", "least"), [("karras", 0.03), ("exponential", 0.15)])
def test_rounded_timesteps_say_something_else(kind: str, least: float) -> None:
    """Which is why they are not asked."""
    scheduler = made("DPMSolverMultistepScheduler", kind)
    scheduler.set_timesteps(30)
    by_timestep = [noise_level(scheduler, float(timestep)).s for timestep in scheduler.timesteps]
    away = [abs(s / call.level.s - 1) for s, call in zip(by_timestep, scheduled_calls(scheduler, scheduler.timesteps), strict=True)]
    assert max(away) > least


@pytest.fixture(scope="module", params=["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    return build(request.param, embedded.tokenizer)


@pytest.mark.parametrize("kind", [None, "exponential"])
@pytest.mark.parametrize("name", [name for name in SIGMAS if not name.startswith("Flow")])
def test_an_observation_has_the_level_of_its_own_call(name: str, kind: str | None, pipe: Any) -> None:
    if kind and kind not in SIGMAS[name]:
        pytest.skip(f"{name} has no such sigmas")
    pipe.scheduler = made(name, kind)
    pictures = {"image": torch.rand(1, 3, 16, 16), "strength": 0.5} if "Img2Img" in type(pipe).__name__ else {}
    found: list[Observation] = []
    with observe_calls(pipe, {}, found.append):
        pipe("a cat", num_inference_steps=8, guidance_scale=4.0, output_type="latent", **pictures)
    calls = scheduled_calls(pipe.scheduler, pipe.scheduler.timesteps)[-len(found) :]
    assert len(found) == len(calls) if pictures else len(pipe.scheduler.timesteps)
    assert [observation.timestep for observation in found] == [float(call.timestep) for call in calls]
    assert [observation.level for observation in found] == [call.level for call in calls]
    assert [observation.level_at(observation.timestep) for observation in found[:2]] == [call.level for call in calls[:2]]
