"""The guard's invariants on a tiny pipeline and on the embedded model."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from families import build

import sdguard
from sdguard import GuardConfig, GuardedPipeline, MemorizationError, Profile, ProfileError, testbed
from sdguard.correction import Correction
from sdguard.decision.cascade import judge
from sdguard.decision.identity import identity
from sdguard.denoiser.hook import DenoiserHook
from sdguard.denoiser.probe import read_prompts
from sdguard.guarded import run as run_module
from sdguard.observation import denoised
from sdguard.steering import SteeringInput
from sdguard.steering.fallback import Outcome

PROMPTS = ["a cat", "a dog in forest", "a fox at belen sky, poster"]
SETTING: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
MakeProfile = Callable[..., Profile]


def call(pipe: Any, prompts: list[str] | None = PROMPTS, **extra: Any) -> Any:
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts or PROMPTS))]
    return pipe(prompts, generator=generators, **{**SETTING, **extra})


def norms(pipe: Any, profile_for: MakeProfile, prompts: list[str] = PROMPTS) -> list[float]:
    """The first-step guidance norms the guard reads for `call`."""
    guarded = sdguard.guard(pipe, GuardConfig(mode="observe", profile=profile_for(pipe, 1e6)))
    return [report.signals["guidance_norm"]["value"] for report in call(guarded, prompts).guard]


def flag_strongest(pipe: Any, profile_for: MakeProfile, agreement: float = 0.99) -> tuple[Profile, int]:
    """A profile under which only the image that pulls hardest is flagged, and that image's row."""
    found = norms(pipe, profile_for)
    ordered = sorted(found)
    return profile_for(pipe, (ordered[-1] + ordered[-2]) / 2, agreement), found.index(ordered[-1])


DETERMINISTIC = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
SCHEDULERS = [*DETERMINISTIC, EulerAncestralDiscreteScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_unflagged_images_are_bit_identical_and_free(scheduler: Any, tiny: Any, profile_for: MakeProfile) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    plain = call(tiny).images
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6))))
    assert np.array_equal(output.images, plain)
    assert [(report.verdict, report.extra_evaluations) for report in output.guard] == [("clean", 0)] * 3


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_steered_image_leaves_its_neighbours_bit_identical(
    scheduler: Any, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    profile, row = flag_strongest(tiny, profile_for)
    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    plain = call(tiny).images
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)))
    for i, report in enumerate(output.guard):
        assert np.array_equal(output.images[i], plain[i]) == (i != row)
        assert report.verdict == ("steered" if i == row else "clean")
        assert (report.extra_evaluations > 0) == (i == row)


def always_passes(flagged: SteeringInput, methods: Any, outcomes: Any = None) -> list[Outcome]:
    texts = [str(prompt).split()[0] for prompt in flagged.prompts]
    conditions = zip(flagged.encoder(texts), texts, strict=True)
    return [Outcome(Correction({}, condition=c), [{"method": "rewording", "wording": text}]) for c, text in conditions]


@pytest.mark.parametrize("mode", ["steer", "observe"])
def test_a_prompt_that_a_callback_brings_is_read_as_at_the_first_call(mode: Any, tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    condition, null = tiny.encode_prompt(PROMPTS, "cpu", 1, True)
    weak = condition[[min(i for i in range(3) if i != row)]].expand(3, -1, -1)

    def bring(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "prompt_embeds": torch.cat([null, condition])} if step == 0 else values

    given = {"prompt_embeds": weak, "negative_prompt_embeds": null}
    extra = {"callback_on_step_end": bring, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    guarded = sdguard.guard(tiny, GuardConfig(mode, profile=profile))
    plain, output = (call(pipe, None, **given, **extra) for pipe in (tiny, guarded))
    assert [report.flagged_at for report in output.guard] == [1 if i == row else None for i in range(3)]
    assert output.guard[row].verdict == ("withheld" if mode == "steer" else "flagged")
    assert all(np.array_equal(output.images[i], plain.images[i]) for i in range(3) if i != row)
    assert [report.extra_evaluations for report in output.guard] == [2] * 3


def test_nothing_is_called_steered_without_verification(tiny: Any, profile_for: MakeProfile) -> None:
    """An agreement limit no sample can meet: whatever descent did to the norm, the image is withheld and blank."""
    profile, row = flag_strongest(tiny, profile_for, agreement=-1.0)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)))
    assert output.guard[row].verdict == "withheld"
    assert output.images[row].max() == 0
    assert not output.guard[row].steering["passed"]


@pytest.mark.parametrize(("limit", "verdict"), [(-1.0, "withheld"), (1.0, "steered")])
def test_steering_is_withdrawn_where_the_run_comes_back(
    limit: float, verdict: str, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified ahead or not: what the run itself makes is held against what the text draws by itself."""
    profile, row = flag_strongest(tiny, profile_for, agreement=limit)
    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)))
    report = output.guard[row]
    assert report.verdict == verdict
    assert -1 <= report.steering["resemblance_on_the_run"] <= 1
    assert (output.images[row].max() == 0) == (verdict == "withheld")
    assert report.flagged_at == (0 if verdict == "steered" else 2)  # at the third of three steps there is more signal than noise
    assert bool(report.steering["passed"]) == (verdict == "steered")


@pytest.mark.parametrize("extra", [{"guidance_scale": 1.0}, {"num_inference_steps": 1}, {"height": 24, "width": 16}], ids=str)
def test_steering_is_withdrawn_in_runs_of_any_kind(
    extra: dict[str, Any], tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without guidance no later call is seen, of one step there is none, and of another size the picture is brought to the reference's."""
    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e-6, agreement=-1.0))), **extra)
    assert {report.verdict for report in output.guard} == {"withheld"}
    assert all("resemblance_on_the_run" in report.steering for report in output.guard)
    assert output.images.max() == 0


def words_in_turn(flagged: SteeringInput, methods: Any, outcomes: Any = None) -> list[Outcome]:
    """Steering that passes with each prompt's first word, and when it is asked again with its second."""
    texts = [str(prompt).split()[1 if outcomes else 0] for prompt in flagged.prompts]
    before = [outcome.attempts for outcome in outcomes or [Outcome()] * len(texts)]
    return [
        Outcome(Correction({}, condition=condition), [*tried, {"method": "rewording", "wording": text}])
        for condition, text, tried in zip(flagged.encoder(texts), texts, before, strict=True)
    ]


@pytest.mark.parametrize("scheduler", DETERMINISTIC, ids=lambda cls: cls.__name__)
def test_what_the_run_refutes_is_corrected_again_from_the_beginning(
    scheduler: Any, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture is the one that the second correction makes from the start, and neighbours keep theirs."""
    tiny.scheduler = scheduler.from_config(tiny.scheduler.config)
    profile, row = flag_strongest(tiny, profile_for)
    verdicts = iter([1e9])  # the first look finds a memorized picture, no other does
    monkeypatch.setattr(run_module, "recurrence", lambda here, pictures, timestep: torch.full((len(pictures),), next(verdicts, 0.0)))
    monkeypatch.setattr(run_module, "try_in_order", words_in_turn)
    reworded = [prompt.split()[1] if i == row else prompt for i, prompt in enumerate(PROMPTS)]
    plain, expected = call(tiny).images, call(tiny, reworded).images
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)))
    assert output.guard[row].verdict == "steered"
    assert output.guard[row].steering["passed"]["wording"] == PROMPTS[row].split()[1]
    assert output.guard[row].steering["attempts"][0]["recurrence_on_the_run"] == 1e9
    assert output.guard[row].steering["recurrence_on_the_run"] == 0.0
    assert output.guard[row].flagged_at == 0
    np.testing.assert_allclose(output.images[row], expected[row], atol=2e-3)
    assert all(np.array_equal(output.images[i], plain[i]) for i in range(3) if i != row)


def test_a_finished_picture_that_comes_back_from_noise_is_withheld(
    tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    seen: list[torch.Tensor] = []

    def at_the_end(here: Any, pictures: torch.Tensor, timestep: float) -> torch.Tensor:
        seen.append(pictures)
        here.count_nfe(1)
        return torch.full((len(pictures),), 1e9 if len(seen) > looks else 0.0)

    looks = len(run_module.LOOKS_LOG_SNR)
    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    monkeypatch.setattr(run_module, "recurrence", at_the_end)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)), num_inference_steps=8, output_type="latent")
    report = output.guard[row]
    assert (report.verdict, report.steering["passed"]) == ("withheld", None)
    assert len(seen) == looks + 1
    assert output.images[row].abs().max() == 0


@pytest.mark.parametrize(("last", "value", "verdict"), [(1, 0.0, "withheld"), (6, 0.0, "steered"), (6, 1e9, "withheld")])
def test_a_run_that_is_interrupted_is_steered_only_if_its_last_estimate_says_so(
    last: int, value: float, verdict: str, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight steps, ended before there is an outline to ask of, or with one; its picture is never made by the scheduler's last step."""
    profile, row = flag_strongest(tiny, profile_for, agreement=2.0)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= last
        return values

    calls: list[int] = []

    def late(here: Any, pictures: torch.Tensor, timestep: float) -> torch.Tensor:
        calls.append(len(pictures))
        return torch.full((len(pictures),), value if len(calls) > len(run_module.LOOKS_LOG_SNR) else 0.0)

    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    monkeypatch.setattr(run_module, "recurrence", late)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)), num_inference_steps=8, callback_on_step_end=stop)
    assert output.guard[row].verdict == verdict
    assert (output.images[row].max() == 0) == (verdict == "withheld")


def test_another_text_does_not_make_clean_what_another_noise_has_steered(
    tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steered by a noise, then given an ordinary prompt by a callback: it stays watched, and what comes back is withheld."""
    profile, row = flag_strongest(tiny, profile_for, agreement=-1.0)
    condition, null = tiny.encode_prompt(PROMPTS, "cpu", 1, True)
    weak = condition[[min(i for i in range(3) if i != row)]].expand(3, -1, -1)

    def bring(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "prompt_embeds": torch.cat([null, weak])} if step == 1 else values

    def own_noise(flagged: SteeringInput, methods: Any, outcomes: Any = None) -> list[Outcome]:
        return [Outcome(Correction({}, x=x), [{"method": "SAIL"}]) for x in flagged.observation.x]

    monkeypatch.setattr(run_module, "try_in_order", own_noise)
    extra: dict[str, Any] = {"callback_on_step_end": bring, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile)), **extra)
    assert output.guard[row].verdict == "withheld"


@pytest.mark.parametrize("value", [float("nan"), RuntimeError("no luck")], ids=str)
def test_a_picture_of_which_that_cannot_be_asked_is_withheld(
    value: Any, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, row = flag_strongest(tiny, profile_for)

    def unreadable(here: Any, pictures: torch.Tensor, timestep: float) -> torch.Tensor:
        if isinstance(value, Exception):
            raise value
        return torch.full((len(pictures),), value)

    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    monkeypatch.setattr(run_module, "recurrence", unreadable)
    plain, output = call(tiny).images, call(sdguard.guard(tiny, GuardConfig(profile=profile)))
    assert output.guard[row].verdict == "withheld"
    assert output.images[row].max() == 0
    assert all(np.array_equal(output.images[i], plain[i]) for i in range(3) if i != row)


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_a_prompt_that_a_callback_writes_in_place_is_read(in_inference_mode: bool, tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    with torch.no_grad():
        condition, null = tiny.encode_prompt(PROMPTS, "cpu", 1, True)
    weak = condition[[min(i for i in range(3) if i != row)]].expand(3, -1, -1).clone()

    def write(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            values["prompt_embeds"][3:].copy_(condition)
        return values

    extra = {"callback_on_step_end": write, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with torch.inference_mode(in_inference_mode):
        guarded = sdguard.guard(tiny, GuardConfig("block", profile=profile))
        output = call(guarded, None, prompt_embeds=weak, negative_prompt_embeds=null, **extra)
    assert [report.flagged_at for report in output.guard] == [1 if i == row else None for i in range(3)]
    assert output.guard[row].verdict == "withheld"


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_embeddings_whose_encoders_are_gone_are_not_clean_and_raise_nothing(
    guidance: float, embedded: Any, profile_for: MakeProfile
) -> None:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    with torch.no_grad():
        condition, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    profile = profile_for(pipe, 1e6)
    pipe.text_encoder = None
    guarded = sdguard.guard(pipe, GuardConfig("observe", profile=profile))
    output = call(guarded, None, prompt_embeds=condition, negative_prompt_embeds=null, guidance_scale=guidance)
    assert {report.verdict for report in output.guard} == {"flagged"}
    assert all("has no text encoder left" in str(report.error) for report in output.guard)


def test_an_error_in_mid_run_leaves_no_clean_report(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    monkeypatch.setattr(DenoiserHook, "begin_step", None)
    with pytest.raises(TypeError):
        call(guarded)
    assert {report.verdict for report in guarded.guard_reports} == {"flagged"}
    assert all("TypeError" in str(report.error) for report in guarded.guard_reports)


def test_latents_that_are_no_noise_are_read_from_noise_of_the_guards_own(tiny: Any, profile_for: MakeProfile) -> None:
    """Three times as loud they would drown what the text says; the reading is of independent noise, and what is flagged is not steered."""
    loud = 3 * torch.randn(3, 4, 8, 8)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e-6))), latents=loud)
    assert {(report.verdict, report.extra_evaluations, report.steering) for report in output.guard} == {("withheld", 2, None)}


@pytest.mark.parametrize("method", ["embedding descent", "LID ascent", "SAIL"])
def test_descents_work_in_inference_mode(method: str, tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile, steering=[method], on_failure="pass"))
    outside = call(guarded)
    with torch.inference_mode():
        inside = call(guarded)
    assert [attempt.get("error") for attempt in inside.guard[row].steering["attempts"]] == [None]
    assert np.array_equal(inside.images, outside.images)


def test_on_failure_pass_lets_the_unsteered_image_through(tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for, agreement=-1.0)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile, on_failure="pass")))
    assert output.guard[row].verdict == "flagged"
    assert np.array_equal(output.images, call(tiny).images)


def test_on_failure_raise_raises_and_leaves_the_pipeline_usable(tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for, agreement=-1.0)
    plain = call(tiny).images
    with pytest.raises(MemorizationError, match=f"Image {row}") as raised:
        call(sdguard.guard(tiny, GuardConfig(profile=profile, on_failure="raise")))
    assert np.array_equal(call(tiny).images, plain)
    assert [report.row for report in raised.value.reports] == [0, 1, 2]


def test_observe_changes_nothing(tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    output = call(sdguard.guard(tiny, GuardConfig(mode="observe", profile=profile)))
    assert output.guard[row].verdict == "flagged"
    assert np.array_equal(output.images, call(tiny).images)


def test_block_withholds_only_the_flagged_image(tiny: Any, profile_for: MakeProfile) -> None:
    profile, row = flag_strongest(tiny, profile_for)
    output = call(sdguard.guard(tiny, GuardConfig(mode="block", profile=profile)))
    assert [report.verdict == "withheld" for report in output.guard] == [i == row for i in range(3)]
    assert all((image.max() == 0) == (i == row) for i, image in enumerate(output.images))


@pytest.mark.parametrize("on_failure", ["withhold", "pass"])
def test_an_error_inside_a_signal_reaches_the_report(
    on_failure: Any, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(observation: Any, cascade: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(run_module, "judge", broken)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6), on_failure=on_failure)))
    assert all(report.error == "RuntimeError: no luck" for report in output.guard)
    assert all(report.verdict == ("withheld" if on_failure == "withhold" else "flagged") for report in output.guard)
    assert "no luck" in caplog.text


@pytest.mark.parametrize("mode", ["steer", "observe", "block"])
@pytest.mark.parametrize("on_failure", ["withhold", "pass", "raise"])
@pytest.mark.parametrize(
    "trouble", [torch.OutOfMemoryError("CUDA out of memory."), ValueError("no luck"), float("nan")], ids=["memory", "error", "nan"]
)
def test_a_row_that_cannot_be_judged_is_the_policys_and_its_neighbours_are_as_ever(
    trouble: Any,
    on_failure: Any,
    mode: Any,
    tiny: Any,
    profile_for: MakeProfile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def troubled(observation: Any, cascade: Any) -> Any:
        if 1 in observation.rows.tolist() and isinstance(trouble, Exception):
            raise trouble
        scores, values = judge(observation, cascade)
        return torch.where(observation.rows == 1, math.nan, scores), values

    plain = call(tiny).images
    expected = call(sdguard.guard(tiny, GuardConfig(mode, profile=profile_for(tiny, 1e6)))).guard
    monkeypatch.setattr(run_module, "judge", troubled)
    guarded = sdguard.guard(tiny, GuardConfig(mode, profile=profile_for(tiny, 1e6), on_failure=on_failure))
    says = f"{type(trouble).__name__}: {trouble}" if isinstance(trouble, Exception) else "ArithmeticError: the score is nan"
    if on_failure == "raise" and mode != "observe":
        with pytest.raises(MemorizationError, match=f"Image 1: {says}"):
            call(guarded)
    else:
        output = call(guarded)
        blanked = mode == "block" or (mode == "steer" and on_failure == "withhold")
        assert (output.images[1].max() == 0) == blanked
        assert all(np.array_equal(output.images[i], plain[i]) for i in range(3) if i != 1 or not blanked)
    reports = guarded.guard_reports
    assert [report.error for report in reports] == [None, says, None]
    assert [report.verdict == "clean" for report in reports] == [True, False, True]
    assert [reports[i].score for i in (0, 2)] == pytest.approx([expected[i].score for i in (0, 2)], rel=1e-4)
    assert says in caplog.text


@pytest.mark.parametrize("on_failure", ["withhold", "pass"])
def test_a_denoiser_that_gives_no_numbers_is_never_clean(on_failure: Any, tiny: Any, profile_for: MakeProfile) -> None:
    profile = profile_for(tiny, 1e6)
    with torch.no_grad():
        tiny.unet.conv_out.bias.fill_(math.nan)
    own = replace(profile, model=identity(tiny))
    output = call(sdguard.guard(tiny, GuardConfig(profile=own, on_failure=on_failure)))
    assert {report.error for report in output.guard} == {"ArithmeticError: the score is nan"}
    assert {report.verdict for report in output.guard} == {"withheld" if on_failure == "withhold" else "flagged"}
    if on_failure == "withhold":
        assert output.images.max() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_trace(fails: bool, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: dict(vars(part)) for name, part in tiny.components.items() if part is not None}
    attributes = dict(vars(tiny))
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e-6, -1.0), on_failure="raise" if fails else "withhold"))
    if fails:
        with pytest.raises(MemorizationError):
            call(guarded)
    else:
        call(guarded)
    assert sdguard.unguard(guarded) is tiny
    assert "forward" not in vars(tiny.unet)
    assert not hasattr(tiny.unet, "_diffusers_hook")
    assert {name: list(vars(part)) for name, part in tiny.components.items() if part is not None} == {k: list(v) for k, v in before.items()}
    assert all(vars(tiny)[name] is value for name, value in attributes.items() if not name.startswith("_"))


def test_the_stand_in_is_the_pipeline_to_everyone(tiny: Any) -> None:
    guarded = sdguard.guard(tiny)
    assert isinstance(guarded, StableDiffusionPipeline)
    assert guarded.unet is tiny.unet
    assert guarded.to("cpu") is guarded
    guarded.scheduler = DDIMScheduler()
    assert tiny.scheduler is guarded.scheduler
    assert sdguard.unguard(tiny) is tiny
    assert sdguard.unguard(sdguard.guard(guarded)) is tiny


def test_a_tuple_stays_a_tuple(tiny: Any, profile_for: MakeProfile) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    images, flags = call(guarded, return_dict=False)
    assert len(images) == len(guarded.guard_reports) == 3
    assert flags is None


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_withheld_images_are_blank_in_every_form(output_type: str, tiny: Any, profile_for: MakeProfile) -> None:
    output = call(sdguard.guard(tiny, GuardConfig(mode="block", profile=profile_for(tiny, 1e-6))), output_type=output_type)
    assert all(np.asarray(image).max() == 0 for image in output.images)


def test_images_per_prompt_get_a_report_each(tiny: Any, profile_for: MakeProfile) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    output = guarded(["a cat", "a dog"], num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **SETTING)
    assert [report.prompt for report in output.guard] == ["a cat", "a cat", "a dog", "a dog"]
    assert all(len(report.series["guidance_norm"]) == 3 for report in output.guard)


def test_prompt_embeds_are_guarded_too(tiny: Any, profile_for: MakeProfile) -> None:
    embeds, negative = tiny.encode_prompt("a cat", "cpu", 1, True)
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e-6), mode="observe"))
    output = guarded(prompt_embeds=embeds, negative_prompt_embeds=negative, **SETTING)
    assert (output.guard[0].prompt, output.guard[0].verdict) == (None, "flagged")


def test_a_rows_norm_does_not_depend_on_batch_or_place(tiny: Any, profile_for: MakeProfile) -> None:
    together = norms(tiny, profile_for)
    guarded = sdguard.guard(tiny, GuardConfig(mode="observe", profile=profile_for(tiny, 1e6)))
    for i, prompt in enumerate(PROMPTS):
        alone = guarded(prompt, generator=torch.Generator().manual_seed(7 + i), **SETTING).guard[0]
        assert alone.signals["guidance_norm"]["value"] == pytest.approx(together[i], rel=1e-5)


def test_an_unsupported_pipeline_is_refused_by_name(tiny: Any) -> None:
    with pytest.raises(TypeError, match="does not support DDIMPipeline"):
        sdguard.guard(DDIMPipeline(tiny.unet, tiny.scheduler))


def test_a_profile_of_another_model_is_refused_by_name(tiny: Any, profile_for: MakeProfile) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1.0)))
    next(tiny.unet.parameters()).data.mul_(1.1)
    with pytest.raises(ProfileError, match="another model's: weights of unet"):
        call(guarded)


def test_an_unknown_model_is_calibrated_once_and_cached(tiny: Any, calibrations: list[Profile]) -> None:
    config = GuardConfig(false_positive_rate=0.2, calibration_prompts=[f"a cat {i}" for i in range(8)])
    for _ in range(2):
        assert len(call(sdguard.guard(tiny, config)).guard) == 3
    assert len(calibrations) == 1


def test_calibration_can_be_forbidden(tiny: Any) -> None:
    with pytest.raises(ProfileError, match="No profile is known"):
        call(sdguard.guard(tiny, GuardConfig(on_unknown="raise")))


def test_a_run_that_begins_far_from_the_reference_level_is_read_apart(tiny: Any, profile_for: MakeProfile) -> None:
    """Three steps of leading spacing begin at two thirds of the noise: the guard reads its own call, from the same noise."""
    tiny.scheduler = DDIMScheduler.from_config(tiny.scheduler.config, timestep_spacing="leading")
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6))))
    assert np.array_equal(output.images, call(tiny).images)
    assert [report.extra_evaluations for report in output.guard] == [2] * 3
    alone = read_prompts(tiny, PROMPTS, range(7, 10)).guidance_norm.tolist()
    assert [report.signals["guidance_norm"]["value"] for report in output.guard] == pytest.approx(alone, rel=1e-5)


def test_a_run_whose_denoiser_is_never_seen_is_not_clean(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    monkeypatch.setattr(DenoiserHook, "is_foreign", True)
    output = call(guarded)
    assert {(report.verdict, report.error) for report in output.guard} == {
        ("withheld", "RuntimeError: the guard saw no call of the denoiser")
    }
    assert output.images.max() == 0


def test_a_run_of_no_step_shows_nothing_and_is_not_clean(tiny: Any, profile_for: MakeProfile) -> None:
    """A picture that is not to be changed at all, of which diffusers makes no image."""
    plain = StableDiffusionImg2ImgPipeline.from_pipe(tiny)
    options = {"image": torch.zeros(1, 3, 16, 16), "strength": 0.6, "num_inference_steps": 1, "output_type": "latent"}
    output = sdguard.guard(plain, GuardConfig(profile=profile_for(plain, 1e6)))("a cat", **options)
    assert len(output.images) == len(plain("a cat", **options).images) == 0
    assert [report.verdict for report in output.guard] == ["withheld"]


@pytest.mark.parametrize("count", ["2", 1.5, None, [1]])
def test_a_count_of_images_that_is_none_is_one_sentence(count: Any, tiny: Any, profile_for: MakeProfile) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    with pytest.raises(TypeError, match=r"^num_images_per_prompt is .*; it must be a whole number\.$"):
        guarded("a cat", num_images_per_prompt=count, **SETTING)


def test_a_report_names_what_was_given_and_not_judged(tiny: Any, profile_for: MakeProfile) -> None:
    latents = torch.randn(3, 4, 8, 8)
    output = call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6))), latents=latents)
    assert [report.limits for report in output.guard] == [["latents"]] * 3


def test_a_rate_per_prompt_is_shared_by_its_pictures(tiny: Any, profile_for: MakeProfile) -> None:
    """At 2% of a prompt, each of its four pictures is judged at half a percent; the picture of another prompt at 2%."""
    profile = profile_for(tiny, 1e6)
    guarded = sdguard.guard(tiny, GuardConfig("observe", 0.02, profile=profile, rate_per="prompt"))
    reports = call(guarded, ["a cat"] * 4 + ["a dog"]).guard
    assert [report.threshold for report in reports] == [profile.threshold(0.005)] * 4 + [profile.threshold(0.02)]
    with pytest.raises(ProfileError, match="needs at least 399 scored"):
        call(sdguard.guard(tiny, GuardConfig("observe", 0.01, profile=profile, rate_per="prompt")), ["a cat"] * 4)


@pytest.mark.parametrize(
    "field",
    [
        {"mode": "watch"},
        {"rate_per": "day"},
        {"on_failure": "shrug"},
        {"false_positive_rate": 0},
        {"steering": ["prayer"]},
        {"steering": []},
    ],
)
def test_a_config_that_cannot_be_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        GuardConfig(**field)


def test_from_pretrained_takes_the_pipelines_arguments(embedded: Any) -> None:
    guarded = GuardedPipeline.from_pretrained(testbed.path(), guard=GuardConfig(mode="observe"))
    assert isinstance(guarded, StableDiffusionPipeline)


@pytest.mark.parametrize("rule", [False, True])
def test_on_call_is_shown_every_call_and_moves_nothing(
    rule: bool, tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, row = flag_strongest(tiny, profile_for)

    def steer(flagged: SteeringInput, methods: Any) -> list[Outcome]:
        condition = flagged.observation.null_condition[0]
        correction = Correction({"method": "m"}, None if rule else condition, rule=(lambda here: here.eps_u) if rule else None)
        return [Outcome(correction, [{"method": "m"}]) for _ in flagged.prompts]

    monkeypatch.setattr(run_module, "try_in_order", steer)
    unwatched = call(sdguard.guard(tiny, GuardConfig(profile=profile)), output_type="latent")
    steps, verdicts = [], []
    last: list[torch.Tensor] = []

    def watch(observation: Any, reports: Any) -> None:
        steps.append(observation.step)
        verdicts.append([report.verdict for report in reports])
        observation.count_nfe(5)
        last[:] = [denoised(observation.x, observation.prediction, observation.level)]

    watched = call(sdguard.guard(tiny, GuardConfig(profile=profile, on_call=watch)), output_type="latent")
    assert torch.equal(watched.images, unwatched.images)
    assert watched.guard == unwatched.guard
    assert steps == [0, 1, 2]
    assert {tuple(found) for found in verdicts} == {tuple("steered" if i == row else "clean" for i in range(3))}
    assert torch.allclose(last[0], watched.images, atol=0.05)  # the last estimate is where the run ends, the steered row's too


def test_what_on_call_raises_ends_the_run_and_leaves_no_trace(tiny: Any, profile_for: MakeProfile) -> None:
    seen = []

    def stop(observation: Any, reports: Any) -> None:
        seen.append(observation.step)
        if observation.step == 1:
            raise KeyboardInterrupt

    before = call(tiny).images
    with pytest.raises(KeyboardInterrupt):
        call(sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6), on_call=stop)))
    assert seen == [0, 1]
    assert "_diffusers_hook" not in vars(tiny.unet)
    assert np.array_equal(call(tiny).images, before)


def test_threads_may_share_a_guarded_pipeline_and_nothing_is_mixed(tiny: Any, profile_for: MakeProfile) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(profile=profile_for(tiny, 1e6)))
    prompts = [f"a cat number {i}" for i in range(8)]

    def generate(pipe: Any, number: int) -> Any:
        return pipe(prompts[number], generator=torch.Generator().manual_seed(number), **SETTING)

    plain = [generate(tiny, number).images for number in range(len(prompts))]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(partial(generate, guarded), range(len(prompts))))
    assert [[report.prompt for report in output.guard] for output in outputs] == [[prompt] for prompt in prompts]
    assert all(np.array_equal(output.images, images) for output, images in zip(outputs, plain, strict=True))
