"""Every family and scheduler through the invariants: unflagged rows untouched, a forced flag changes one row, nothing is left."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import DISTILLED, PIPELINES, PROMPTS, build, call, one_block, profile_for, reworded

import sdguard
from sdguard import GuardConfig, Profile
from sdguard.denoiser.families import denoiser_of
from sdguard.denoiser.install import HOOK_NAME
from sdguard.denoiser.probe import probe_run
from sdguard.denoiser.schedulers import clone_scheduler, scale_input
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded import run as run_module
from sdguard.observation import LEAST_SIGNAL, NoiseLevel, Observation, denoised, from_noise, noise_level, to_noise

UNET_SCHEDULERS = [
    "DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler", "LCMScheduler",
]  # fmt: skip
CASES = [
    *((name, scheduler) for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline") for scheduler in UNET_SCHEDULERS),
    *((name, None) for name in PIPELINES),
]


@pytest.fixture
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    name, scheduler = request.param
    made = build(name, embedded.tokenizer)
    if scheduler:
        made.scheduler = getattr(diffusers, scheduler).from_config(made.scheduler.config)
    return made


@pytest.mark.parametrize("pipe", CASES, indirect=True, ids=str)
def test_the_guard_changes_the_flagged_row_and_nothing_else(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    plain = call(pipe).images
    denoiser = denoiser_of(pipe)
    before = [vars(denoiser).get(name) for name in ("forward", "_diffusers_hook")]
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    cost = int(type(pipe).__name__ in DISTILLED)
    assert [(report.verdict, report.extra_evaluations) for report in clean.guard] == [("clean", cost)] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    assert len(set(norms)) == 3
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))))
    assert [report.verdict == "steered" for report in steered.guard] == [i == row for i in range(3)]
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    assert [report.extra_evaluations > cost for report in steered.guard] == [i == row for i in range(3)]
    after = [vars(denoiser).get(name) for name in ("forward", "_diffusers_hook")]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert after[1] is None or HOOK_NAME not in after[1].hooks  # Flux's own pipeline puts a registry there
    assert not {"step", "add_noise", "scale_noise"} & set(vars(pipe.scheduler))
    assert np.array_equal(call(pipe).images, plain)


@pytest.mark.parametrize("pipe", [(name, None) for name in PIPELINES], indirect=True, ids=str)
def test_an_unknown_configuration_of_every_family_is_calibrated(pipe: Any) -> None:
    """The whole way, nothing replaced: calibration on first use with the call's own picture, judging, steering, verification."""
    prompts = [f"a cat {i}" for i in range(5)]
    guarded = sdguard.guard(pipe, GuardConfig(false_positive_rate=0.3, calibration_prompts=prompts))
    output = call(guarded)
    assert len(output.guard) == 3
    assert all(report.error is None and report.p_value is not None for report in output.guard)
    assert all(len(report.series["guidance_norm"]) >= 1 for report in output.guard)


def flagged_all() -> Profile:
    return replace(profile_for(1e-9), values={"guidance_norm": [1e-9] * 100, "agreement": [2.0] * 100, "alignment": [-1e9] * 100})


@pytest.mark.parametrize("method", ["embedding descent", "rewording", "SAIL", "attractive-repulsive guidance", "guidance delay"])
@pytest.mark.parametrize("pipe", [("StableDiffusionXLPipeline", None), ("StableDiffusion3Pipeline", None)], indirect=True, ids=str)
def test_methods_steer_families_with_a_pooled_embedding(pipe: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    profile = flagged_all() if method in ("embedding descent", "guidance delay", "SAIL") else profile_for(1e-9)
    profile = replace(profile, values={**profile.values, "guidance_norm": [1e-9] * 99 + [1e9], "agreement": [2.0] * 100})
    if method in ("rewording", "attractive-repulsive guidance"):
        profile = replace(profile, values={**profile.values, "guidance_norm": [1e9] * 100})
    plain = call(pipe).images
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile, steering=[method], on_failure="pass")))
    assert [report.error for report in output.guard] == [None] * 3
    assert all(report.steering["attempts"] for report in output.guard if report.prompt != "a cat")
    assert not np.array_equal(output.images[1], plain[1])


@pytest.mark.parametrize("pipe", [(name, None) for name in PIPELINES], indirect=True, ids=str)
def test_a_captured_call_is_evaluated_again_as_it_was(pipe: Any) -> None:
    """Every argument that has an entry a row goes with its row: the replay of any rows gives what the pipeline's own call gave."""
    found: list[Observation] = []

    def look(observation: Observation) -> None:
        some = observation.select(torch.tensor([2, 0]))
        eps_c, eps_u = some.both_branches(some.x, some.timestep)
        torch.testing.assert_close(eps_c, some.eps_c, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(eps_u, some.eps_u, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(Encoder(pipe, inputs)(PROMPTS), observation.condition, rtol=1e-3, atol=1e-5)
        found.append(observation)

    inputs = PIPELINES[type(pipe).__name__][1]()
    probe_run(pipe, PROMPTS, [0, 1, 2], look, num_inference_steps=4, guidance_scale=4.0, **inputs)
    assert found[0].origin is None or found[0].origin.shape == found[0].x.shape
    assert (found[0].origin is not None) == (inputs.get("strength", 1.0) < 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_a_run_without_guidance_pays_one_evaluation_where_the_guard_reads(
    name: str, guidance_scale: float, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(name, embedded.tokenizer)
    arguments = {"num_inference_steps": 4, "output_type": "np", **PIPELINES[name][1](), "guidance_scale": guidance_scale}

    def free(target: Any) -> Any:
        return target(PROMPTS, generator=[torch.Generator().manual_seed(7 + i) for i in range(3)], **arguments)

    plain = free(pipe).images
    clean = free(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    assert [report.extra_evaluations for report in clean.guard] == [1] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = free(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))))
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]


def test_another_negative_prompt_is_another_configuration(embedded: Any, tmp_path: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    guarded = sdguard.guard(pipe, GuardConfig(false_positive_rate=0.3, calibration_prompts=[f"a cat {i}" for i in range(5)]))
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 16, "width": 16}
    profiles = [guarded.profile({**given, "negative_prompt": negative}) for negative in (None, "", "a cow", ["a cow"] * 3)]
    assert profiles[0] == profiles[1]
    assert profiles[2] == profiles[3]
    assert profiles[0].scores != profiles[2].scores
    with pytest.raises(sdguard.ProfileError, match="negative_prompt is None, the profile's is 'a cow'"):
        profiles[2].check(profiles[0].fingerprint)
    with pytest.raises(ValueError, match="one negative prompt"):
        guarded.profile({**given, "negative_prompt": ["a cow", "a dog"]})


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_branches_that_are_two_calls_are_recognised(name: str, embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux under true guidance: nothing is paid, rows that are left alone keep their bits, a steered one goes the way of its new prompt."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(name, embedded.tokenizer)
    true: dict[str, Any] = {"negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0}
    plain = call(pipe, **true).images
    assert not np.array_equal(plain, call(pipe).images)
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **true)
    assert np.array_equal(clean.images, plain)
    assert [report.extra_evaluations for report in clean.guard] == [0] * 3
    assert len(clean.guard[0].series["guidance_norm"]) == pipe.num_timesteps
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))), **true).images
    assert [np.array_equal(steered[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    prompts = [prompt.split()[-1] if i == row else prompt for i, prompt in enumerate(PROMPTS)]
    np.testing.assert_allclose(steered, call(pipe, prompts, **true).images, atol=1e-4)


def in_threads(*jobs: Any) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def test_two_threads_with_a_pipeline_each_do_not_mix(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    pipes = [build(name, embedded.tokenizer) for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")]
    guarded = [sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))) for pipe in pipes]
    alone = [call(pipe).images for pipe in pipes]
    together = in_threads(*(lambda pipe=pipe: call(pipe) for pipe in guarded))  # type: ignore[misc]
    for output, images in zip(together, alone, strict=True):
        np.testing.assert_allclose(output.images, images, atol=1e-5)
        assert len(output.guard[0].series["guidance_norm"]) == 4


def test_two_guarded_pipelines_and_a_plain_one_may_share_a_denoiser(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    first = build("StableDiffusionPipeline", embedded.tokenizer)
    others = [diffusers.StableDiffusionPipeline(**first.components, requires_safety_checker=False) for _ in range(2)]
    for other in others:
        other.scheduler = copy.deepcopy(first.scheduler)
        other.set_progress_bar_config(disable=True)
    plain = call(first).images
    guarded = [sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))) for pipe in (first, others[0])]
    outputs = in_threads(*(lambda pipe=pipe: call(pipe) for pipe in (*guarded, others[1])))  # type: ignore[misc]
    for output in outputs:
        np.testing.assert_allclose(output.images, plain, atol=1e-5)
    assert [len(output.guard[0].series["guidance_norm"]) for output in outputs[:2]] == [4, 4]
    assert "forward" not in vars(first.unet)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", UNET_SCHEDULERS)
def test_noise_levels_recover_a_known_picture(name: str, spacing: str, zero_snr: bool) -> None:
    """A latent noised by the scheduler itself, seen as the denoiser sees it: the true noise prediction gives the picture back."""
    config = {"beta_schedule": "scaled_linear", "timestep_spacing": spacing, "prediction_type": "v_prediction"}
    made = getattr(diffusers, name).from_config({**config, **({"rescale_betas_zero_snr": True} if zero_snr else {})})
    if zero_snr and not made.config.get("rescale_betas_zero_snr"):
        pytest.skip(f"{name} has no zero terminal SNR")
    made.set_timesteps(7)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for timestep in made.timesteps[1:-1:2]:
        seen = clone_scheduler(made)
        latents = seen.add_noise(clean, noise, timestep.reshape(1))
        x, level = scale_input(seen, latents, timestep), noise_level(made, float(timestep))
        torch.testing.assert_close(denoised(x, noise, level), clean, rtol=2e-2, atol=2e-2)


def test_noise_levels_of_flow_matching_recover_a_known_picture() -> None:
    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(7)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for timestep in made.timesteps[1:]:
        level = noise_level(made, float(timestep))
        x = made.scale_noise(clean, timestep.reshape(1), noise)
        eps = to_noise(noise - clean, x, level, "flow_prediction")
        torch.testing.assert_close(eps, noise, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(denoised(x, eps, level), clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_without_any_signal_the_network_is_still_heard(prediction_type: str) -> None:
    """At the first step of zero terminal SNR or flow matching the two branches differ, and what they say of the picture survives."""
    level = NoiseLevel(LEAST_SIGNAL, 1 - LEAST_SIGNAL if prediction_type == "flow_prediction" else (1 - LEAST_SIGNAL**2) ** 0.5)
    x, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    eps = to_noise(output, x, level, prediction_type)
    picture = x - output if prediction_type == "flow_prediction" else -output
    torch.testing.assert_close(denoised(x, eps, level), picture, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(from_noise(eps, x, level, prediction_type), output, rtol=1e-2, atol=1e-3)


def test_a_compiled_denoiser_is_guarded(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.unet = torch.compile(one_block(), backend="eager")
    plain = call(pipe).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))))
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    assert np.array_equal(call(pipe).images, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_half_precision(name: str, dtype: torch.dtype, embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    pipe = build(name, embedded.tokenizer).to(dtype)
    plain = call(pipe).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    output = call(sdguard.guard(pipe, GuardConfig(profile=flagged_all(), steering=["embedding descent", "rewording"], on_failure="pass")))
    assert [report.error for report in output.guard] == [None] * 3


def test_a_scheduler_changed_and_a_denoiser_swapped_after_guarding_are_those_that_run(
    embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    before = call(guarded).images
    guarded.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(5)
    guarded.unet = build("StableDiffusionPipeline", embedded.tokenizer).unet
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(1.1)
    after = call(guarded)
    assert np.array_equal(after.images, call(pipe).images)
    assert not np.array_equal(after.images, before)
    assert len(after.guard[0].series["guidance_norm"]) == 4


def test_the_callback_of_the_user_sees_the_guarded_latents(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    pipe = build("StableDiffusionXLPipeline", embedded.tokenizer)
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(tensors["latents"]))
        return tensors

    call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), callback_on_step_end=callback)
    assert seen == [3] * 4
