"""Every family and scheduler through the invariants: unflagged rows untouched, a forced flag changes one row, nothing is left."""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from families import ADDED, DISTILLED, LENIENT, PIPELINES, PROMPTS, build, call, one_block, profile_for, reworded, unet
from peft import LoraConfig
from PIL import Image

import sdguard
from sdguard import GuardConfig, Profile
from sdguard.decision.cascade import BY_NAME, PLAN
from sdguard.denoiser.families import default_of, denoiser_of, family_of
from sdguard.denoiser.install import HOOK_NAME
from sdguard.denoiser.probe import probe_run, read_prompts
from sdguard.denoiser.reference_call import TOLERANCE, ReferenceCall
from sdguard.denoiser.schedulers import clone_scheduler, scale_input
from sdguard.denoiser.text_encoding import ENCODING, Encoder
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
#: whose runs begin with the reference call
PLAIN = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "ChromaPipeline", "Flux2KleinPipeline",
    "PixArtSigmaPipeline", "SanaPipeline",
)  # fmt: skip


@pytest.fixture
def given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)


@pytest.fixture
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    name, scheduler = request.param
    made = build(name, embedded.tokenizer)
    if scheduler:
        made.scheduler = getattr(diffusers, scheduler).from_config(made.scheduler.config)
    return made


def reading_cost(name: str) -> int:
    """Evaluations an image that the reading takes in `call`, whose guidance is no distilled model's own.

    None where the run begins with the reference call, else its two; and one for the unconditional branch that a run has not.
    """
    plain = name in PLAIN
    return 0 if plain else 2 + (name in DISTILLED)


@pytest.mark.parametrize("pipe", CASES, indirect=True, ids=str)
def test_the_guard_changes_the_flagged_row_and_nothing_else(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    plain = call(pipe).images
    denoiser = denoiser_of(pipe)
    before = [vars(denoiser).get(name) for name in ("forward", "_diffusers_hook")]
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    cost = reading_cost(type(pipe).__name__)
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
def test_an_unknown_model_of_every_family_is_calibrated(pipe: Any) -> None:
    """The whole way, nothing replaced: calibration on first use, judging, steering, verification."""
    prompts = [f"a cat {i}" for i in range(5)]
    guarded = sdguard.guard(pipe, GuardConfig(false_positive_rate=0.3, calibration_prompts=prompts))
    output = call(guarded)
    assert len(output.guard) == 3
    assert all(report.error is None and report.p_value is not None for report in output.guard)
    assert all(len(report.series["guidance_norm"]) >= 1 for report in output.guard)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("pipe", [(name, None) for name in PIPELINES if "ControlNet" not in name], indirect=True, ids=str)
def test_a_steered_row_is_what_its_new_prompt_makes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of a text stands beside its token embeddings goes with them."""
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    steered = call(sdguard.guard(pipe, GuardConfig(profile=flagged_all())))
    assert [report.verdict for report in steered.guard] == ["steered"] * 3
    made = call(pipe, [prompt.split()[-1] for prompt in PROMPTS]).images
    np.testing.assert_allclose(steered.images, made, atol=1e-4)
    assert not np.allclose(steered.images, call(pipe).images, atol=1e-4)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("FluxKontextPipeline", torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(3))),
        ("Flux2KleinPipeline", [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 96), "blue")]),
    ],
)
def test_pictures_of_other_sizes_behind_the_latents_stay_there(
    name: str, image: Any, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(name, embedded.tokenizer)
    given: dict[str, Any] = {"image": image}
    plain = call(pipe, **given).images
    assert not np.array_equal(plain, call(pipe, image=None).images)
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **given)
    assert np.array_equal(clean.images, plain)
    assert [report.verdict for report in clean.guard] == ["clean"] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))), **given).images
    assert [np.array_equal(steered[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    prompts = [prompt.split()[-1] if i == row else prompt for i, prompt in enumerate(PROMPTS)]
    np.testing.assert_allclose(steered, call(pipe, prompts, **given).images, atol=1e-4)

    def look(seen: Observation) -> None:
        torch.testing.assert_close(seen.both_branches(seen.x, seen.timestep)[0], seen.eps_c, rtol=1e-3, atol=1e-5)

    # to the end, where the network's output has a weight
    probe_run(pipe, PROMPTS, [0, 1, 2], look, None, **{**PIPELINES[name][1](), **given}, num_inference_steps=4, guidance_scale=4.0)


def embeddings(pipe: Any) -> dict[str, Any]:
    """What a call takes in place of `PROMPTS`, as far as the pipeline's class takes it."""
    family, encoder = family_of(pipe), Encoder(pipe, PIPELINES[type(pipe).__name__][1]())
    beside = "prompt_attention_mask" if family.masks else "pooled_prompt_embeds"
    names = ("prompt_embeds", beside, "negative_prompt_embeds", f"negative_{beside}")
    found = dict(zip(names, family.encode(pipe, PROMPTS, encoder.options), strict=True))
    taken = inspect.signature(type(pipe).__call__).parameters
    distilled = type(pipe).__name__ in DISTILLED
    texts = {name: None for name in ("prompt", "negative_prompt") if name in taken}
    return texts | {name: v for name, v in found.items() if name in taken and not (distilled and name.startswith("negative"))}


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("pipe", [(name, None) for name in PIPELINES], indirect=True, ids=str)
def test_embeddings_in_place_of_prompts_are_judged_and_steered_alike(pipe: Any) -> None:
    given, plain = embeddings(pipe), call(pipe).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **given)
    np.testing.assert_allclose(clean.images, plain, atol=1e-5)
    assert [(report.verdict, report.extra_evaluations) for report in clean.guard] == [("clean", reading_cost(type(pipe).__name__))] * 3
    config = GuardConfig(profile=flagged_all(), steering=["embedding descent"], on_failure="pass")
    steered = call(sdguard.guard(pipe, config), **given)
    assert [report.error for report in steered.guard] == [None] * 3
    assert not np.allclose(steered.images, plain, atol=1e-5)


def flagged_all() -> Profile:
    return replace(
        profile_for(1e-9),
        values={**LENIENT, "guidance_norm": [1e-9] * 100},
    )


@pytest.mark.parametrize("method", ["embedding descent", "rewording", "SAIL", "attractive-repulsive guidance", "guidance delay"])
@pytest.mark.parametrize("pipe", [(name, None) for name in PLAIN if name != "StableDiffusionPipeline"], indirect=True, ids=str)
def test_methods_steer_families_with_a_pooled_embedding_or_a_mask(pipe: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    profile = flagged_all() if method in ("embedding descent", "guidance delay", "SAIL") else profile_for(1e-9)
    profile = replace(profile, values={**profile.values, "guidance_norm": [1e-9] * 99 + [1e9], "reference_agreement": [2.0] * 100})
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
@pytest.mark.parametrize("name", PLAIN)
def test_a_run_without_guidance_pays_one_evaluation_where_the_guard_reads(
    name: str, guidance_scale: float, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(name, embedded.tokenizer)
    arguments = {"num_inference_steps": 4, "output_type": "np", **PIPELINES[name][1](), "guidance_scale": guidance_scale}

    def free(target: Any) -> Any:
        return target(prompt=PROMPTS, generator=[torch.Generator().manual_seed(7 + i) for i in range(3)], **arguments)

    plain = free(pipe).images
    clean = free(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    assert [report.extra_evaluations for report in clean.guard] == [1] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = free(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound))))
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]


def readings_of(pipe: Any, **extra: Any) -> list[Observation]:
    """What the guard reads at the first call of `call`."""
    found: list[Observation] = []
    config = GuardConfig(profile=profile_for(1e6), on_call=lambda seen, reports: found.append(seen.at_reference) if not seen.step else None)
    call(sdguard.guard(pipe, config), **extra)
    return found


def same_reading(one: Observation, other: Observation) -> None:
    """Both readings are the same, but for the noise level, in which a run's own first call may be a little off."""
    assert abs(one.level.log_snr - other.level.log_snr) <= TOLERANCE
    for seen, there in ((one, other), (other, other)):
        torch.testing.assert_close(seen.guidance_norm, there.at(seen.x, seen.timestep).guidance_norm, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("pipe", [(name, None) for name in PIPELINES], indirect=True, ids=str)
def test_a_run_reads_what_calibration_reads_of_the_same_noise(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every family, whatever the pipeline is given beside prompts."""
    (seen,) = readings_of(pipe)
    inputs = PIPELINES[type(pipe).__name__][1]()
    condition, null = Encoder(pipe, inputs).both(PROMPTS)
    with torch.no_grad():
        alone = ReferenceCall.of(pipe, condition).observation(seen.x, condition, null, torch.zeros(3, dtype=torch.long))
    same_reading(seen, alone)
    assert seen.x.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("name", [*PLAIN, "FluxPipeline"])
def test_a_run_from_noise_reads_what_calibration_reads_of_its_seeds(name: str, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    defaults = {name: default for name in ENCODING if (default := default_of(pipe, name)) is not None}
    (seen,) = readings_of(pipe, **defaults)
    read = read_prompts(pipe, PROMPTS, [7, 8, 9])
    torch.testing.assert_close(seen.x, read.x)
    same_reading(seen, read)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("name", [name for name in PIPELINES if {"image", "control_image"} & {*PIPELINES[name][1]()}])
def test_no_picture_reaches_the_reading(name: str, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    inputs = PIPELINES[name][1]()
    others = {given: 1 - value for given, value in inputs.items() if given in ("image", "control_image")}
    (one,), (other,) = readings_of(pipe), readings_of(pipe, **others)
    torch.testing.assert_close(one.x, other.x, rtol=1e-3, atol=1e-3)
    same_reading(one, other)


SETTINGS: dict[str, dict[str, Any]] = {
    "negative prompt": {"negative_prompt": ["dark forest"] * 3},
    "the prompts as negative prompts": {"negative_prompt": PROMPTS},
    "guidance": {"guidance_scale": 9.0},
    "no guidance": {"guidance_scale": 1.0},
    "steps": {"num_inference_steps": 7},
    "size": {"height": 24, "width": 32},
    "guidance rescale": {"guidance_rescale": 0.7},
    "eta": {"eta": 1.0},
    "size ids": {"original_size": (64, 64), "crops_coords_top_left": (2, 1)},
    "true guidance": {"negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0},
    "parts of runs": {"denoising_end": 0.5},
}


#: of pipelines that do not take every size
SIZES = {"SanaPipeline": {"height": 64, "width": 32}}


def setting_cases() -> list[Any]:
    return [
        pytest.param(name, SIZES.get(name, extra) if what == "size" else extra, id=f"{name}, {what}")
        for name in [*PLAIN, "LatentConsistencyModelPipeline", "FluxPipeline"]
        for what, extra in SETTINGS.items()
        if extra.keys() <= {*inspect.signature(getattr(diffusers, name).__call__).parameters}
    ]


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize(("name", "extra"), setting_cases())
def test_an_argument_of_the_call_moves_nothing_of_the_reading(name: str, extra: dict[str, Any], embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    (one,), (other,) = readings_of(pipe), readings_of(pipe, **extra)
    same_reading(one, other)
    torch.testing.assert_close(one.null_condition, other.null_condition, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("scheduler", UNET_SCHEDULERS)
def test_no_sampler_moves_the_reading(scheduler: str, embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    (one,) = readings_of(pipe)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    (other,) = readings_of(pipe)
    same_reading(one, other)


@pytest.mark.usefixtures("given_profile")
def test_no_guidance_of_the_caller_reaches_a_signal_of_the_cascade(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    (one,), (other,) = readings_of(pipe), readings_of(pipe, guidance_scale=9.0)
    for name in (name for stage in PLAN for name in stage.signals):
        torch.testing.assert_close(BY_NAME[name].read(one), BY_NAME[name].read(other), rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize(
    ("name", "extra", "cost"),
    [
        ("StableDiffusionPipeline", {}, 0),
        ("StableDiffusionPipeline", {"negative_prompt": ""}, 0),
        ("StableDiffusionPipeline", {"negative_prompt": "a cow"}, 1),
        ("StableDiffusionPipeline", {"guidance_scale": 1.0}, 1),
        ("StableDiffusionPipeline", {"height": 24, "width": 24}, 2),
        ("StableDiffusionXLPipeline", {"negative_prompt": ["a cow"] * 3}, 1),
        ("StableDiffusion3Pipeline", {"negative_prompt": ["a cow"] * 3}, 1),
        ("FluxPipeline", {"guidance_scale": 3.5}, 1),
        ("FluxPipeline", {"guidance_scale": 3.5, "negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0}, 1),
        ("FluxPipeline", {"guidance_scale": 3.5, "negative_prompt": [""] * 3, "true_cfg_scale": 3.0}, 0),
        ("FluxKontextPipeline", {"image": None, "guidance_scale": 3.5}, 1),
        ("PixArtSigmaPipeline", {"negative_prompt": ["a cow"] * 3}, 1),
        ("SanaPipeline", {"guidance_scale": 1.0}, 1),
        ("ChromaPipeline", {"negative_prompt": ["a cow"] * 3}, 1),
        ("LatentConsistencyModelPipeline", {"guidance_scale": 8.5}, 1),
    ],
    ids=str,
)
def test_the_reading_costs_what_of_it_the_run_has_not(name: str, extra: dict[str, Any], cost: int, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer)
    if isinstance(extra.get("negative_prompt"), str):
        extra = {**extra, "negative_prompt": [extra["negative_prompt"]] * 3}
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **extra)
    assert [report.extra_evaluations for report in output.guard] == [cost] * 3


@pytest.mark.parametrize(
    "names", [[name for name in sorted(DISTILLED) if name.startswith(prefix)] for prefix in ("Flux", "LatentConsistency")]
)
def test_pipelines_of_one_model_tell_it_one_guidance(names: list[str], embedded: Any) -> None:
    """Their calls' own defaults differ, and the model's profile is the same."""
    x, found = torch.zeros(1, 4, 8, 8), []
    for name in names:
        pipe = build(name, embedded.tokenizer)
        plain = family_of(pipe).plain(pipe, x)
        found.append(next(plain[argument] for argument in ("guidance", "timestep_cond") if argument in plain))
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.usefixtures("given_profile")
def test_no_ip_adapter_of_flux_reaches_the_reading(embedded: Any) -> None:
    pipe = build("FluxPipeline", embedded.tokenizer)
    (plain,) = readings_of(pipe)
    width = 32
    projection = {"proj.weight": torch.randn(4 * width, 12), "proj.bias": torch.randn(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    keys = {f"0.to_{kind}_ip.{part}": torch.randn(width, *[width] * (part == "weight")) for kind in "kv" for part in ("weight", "bias")}
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    pictures = [torch.randn(1, 1, 12)]
    (seen,) = readings_of(pipe, ip_adapter_image_embeds=pictures, negative_ip_adapter_image_embeds=pictures)
    same_reading(plain, seen)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("aesthetics", [False, True])
def test_a_refiner_judges_by_the_text_and_steers_nothing(aesthetics: bool, embedded: Any) -> None:
    """What it is handed over is half made by a run of the same prompt."""
    base = build("StableDiffusionXLPipeline", embedded.tokenizer)
    half_made = call(base, denoising_end=0.5, output_type="latent").images
    widths = {"projection_class_embeddings_input_dim": 16 + (5 if aesthetics else 6) * 8}
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet(cross_attention_dim=16, **{**ADDED, **widths}),
        scheduler=base.scheduler,
        requires_aesthetics_score=aesthetics,
    )
    refiner.set_progress_bar_config(disable=True)

    def refine(pipe: Any, image: Any = half_made) -> Any:
        return call(pipe, image=image, denoising_start=0.5)

    plain = refine(refiner)
    clean = refine(sdguard.guard(refiner, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain.images)
    assert [(report.verdict, report.extra_evaluations) for report in clean.guard] == [("clean", 2)] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    output = refine(sdguard.guard(refiner, GuardConfig(profile=profile_for(bound))))
    assert [report.verdict for report in output.guard] == ["withheld" if i == row else "clean" for i in range(3)]
    assert output.guard[row].steering is None
    assert all(np.array_equal(output.images[i], plain.images[i]) for i in range(3) if i != row)


@pytest.mark.usefixtures("given_profile")
def test_latents_of_a_later_level_are_judged_and_not_steered(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    given: dict[str, Any] = {"latents": torch.randn(3, 4, 8, 8), "generator": None, "sigmas": [2.0, 1.0, 0.5]}
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e-9))), **given)
    assert [(report.verdict, report.steering, report.error) for report in output.guard] == [("withheld", None, None)] * 3


def adapt_encoder(pipe: Any) -> None:
    """A LoRA on the text encoder alone."""
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("extra", [{}, {"negative_prompt": ["a cow"] * 3}])
def test_another_state_of_the_text_encoder_has_another_empty_prompt(extra: dict[str, Any], embedded: Any) -> None:
    """Read anew, as calibration reads it; and found again, where the encoders are gone."""
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    readings_of(pipe, **extra)
    adapt_encoder(pipe)
    (seen,) = readings_of(pipe, **extra)
    torch.testing.assert_close(seen.null_condition[:1], Encoder(pipe).both([""])[1], rtol=1e-3, atol=1e-5)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPTS, "cpu", 1, True), strict=True))
    pipe.text_encoder = None
    (gone,) = readings_of(pipe, prompt=None, **embeds)
    same_reading(seen, gone)


@pytest.mark.usefixtures("given_profile")
def test_without_text_encoders_from_the_start_no_image_passes(embedded: Any) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(PROMPTS, "cpu", 1, True), strict=True))
    pipe.text_encoder = None
    output = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), prompt=None, **embeds)
    assert [report.verdict for report in output.guard] == ["withheld"] * 3
    assert all("no text encoder left" in str(report.error) for report in output.guard)


@pytest.mark.usefixtures("given_profile")
@pytest.mark.parametrize("name", ["ChromaPipeline", "Flux2KleinPipeline", "PixArtSigmaPipeline", "SanaPipeline"])
def test_text_encoders_may_be_dropped_once_the_guarded_pipeline_has_encoded(name: str, embedded: Any) -> None:
    whole, pipe = build(name, embedded.tokenizer), build(name, embedded.tokenizer)
    (seen,), given = readings_of(whole), embeddings(whole)
    guarded: Any = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))
    guarded.encode_prompt(PROMPTS, max_sequence_length=PIPELINES[name][1]()["max_sequence_length"])
    guarded.text_encoder = None
    (gone,) = readings_of(pipe, **given)
    same_reading(seen, gone)
    torch.testing.assert_close(seen.null_condition, gone.null_condition, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_branches_that_are_two_calls_are_recognised(name: str, embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flux under true guidance: rows that are left alone keep their bits, a steered one goes the way of its new prompt."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    pipe = build(name, embedded.tokenizer)
    true: dict[str, Any] = {"negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0}
    cost = 1 if name == "FluxPipeline" else 2
    true["guidance_scale"] = 3.5  # the one that it is told in plain text-to-image
    plain = call(pipe, **true).images
    assert not np.array_equal(plain, call(pipe, guidance_scale=3.5).images)
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), **true)
    assert np.array_equal(clean.images, plain)
    assert [report.extra_evaluations for report in clean.guard] == [cost] * 3
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
    # a tokenizer each: transformers' fast ones keep how they pad from one call to the next, and mix threads without a guard too
    pipes = [build(name, copy.deepcopy(embedded.tokenizer)) for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline")]
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
        other.tokenizer = copy.deepcopy(first.tokenizer)
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
@pytest.mark.parametrize("name", [*PLAIN, "StableDiffusionUpscalePipeline", *(name for name in PIPELINES if name.startswith("Flux"))])
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
