"""The guard as a guider of modular pipelines: the invariants of the guarded pipeline, and what is a guider's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from families import ADDED, LENIENT, PROMPTS, SIZED, controlnet, mask, modular, picture, profile_for, reworded, unet

import sdguard
from sdguard import GuardConfig, GuardReport, MemorizationError, Profile, calibrate
from sdguard.correction import Correction
from sdguard.decision import store as store_module
from sdguard.denoiser.families import denoiser_of, family_of
from sdguard.denoiser.probe import probe_run, quiet
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded import guider as guider_module
from sdguard.guarded import run as run_module
from sdguard.guarded.guider import GuardedGuidance
from sdguard.observation import Observation
from sdguard.steering import SteeringInput
from sdguard.steering.fallback import Outcome

SDXL, SD3 = "StableDiffusionXLModularPipeline", "StableDiffusion3ModularPipeline"
#: what the calls of a pipeline need beside prompts
INPUTS: dict[str, dict[str, Any]] = {SDXL: {}, SD3: {"negative_prompt": "", "max_sequence_length": 8}}


@pytest.fixture
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    return modular(getattr(request, "param", SDXL), embedded.tokenizer)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles that are given are taken for any run."""
    monkeypatch.setattr(guider_module, "profile_of", lambda pipe, config, adapter_scale: config.profile)


def call(pipe: Any, prompts: list[str] = PROMPTS, output_type: str = "np", **extra: Any) -> Any:
    """Pictures of a run of four steps, one seed a prompt."""
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    arguments = {"num_inference_steps": 4, "generator": generators, **SIZED, **INPUTS[type(pipe).__name__], **extra}
    with quiet(pipe):
        return pipe(prompt=prompts, output_type=output_type, output="images", **arguments)


def plainly(pipe: Any, prompts: list[str] = PROMPTS, guidance: dict[str, Any] | None = None, **extra: Any) -> Any:
    """The same under the library's own guider."""
    pipe.update_components(guider=ClassifierFreeGuidance(**{"guidance_scale": 4.0, **(guidance or {})}))
    return call(pipe, prompts, **extra)


def guarded(pipe: Any, config: GuardConfig | Profile, **guidance: Any) -> GuardedGuidance:
    """The pipeline's new guider, which has been told its prompts."""
    config = config if isinstance(config, GuardConfig) else GuardConfig(profile=config)
    guider = GuardedGuidance(pipe, guard=config, inputs=INPUTS[type(pipe).__name__], **{"guidance_scale": 4.0, **guidance})
    pipe.update_components(guider=guider)
    guider.prompts = PROMPTS
    return guider


def strongest(reports: list[GuardReport], step: int = 0) -> tuple[int, float]:
    """The row with the highest guidance norm at a call, and a bound between it and the others."""
    norms = [report.series["guidance_norm"][step] for report in reports]
    assert len(set(norms)) == 3
    return norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2


def with_rewritten(row: int) -> list[str]:
    return [prompt.split()[-1] if i == row else prompt for i, prompt in enumerate(PROMPTS)]


def clear(pipe: Any) -> bool:
    """Whether nothing is left on denoiser and scheduler."""
    return not {"forward", "_diffusers_hook"} & set(vars(denoiser_of(pipe))) and "step" not in vars(pipe.scheduler)


SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"]
CASES = [*((SDXL, name, {}) for name in SCHEDULERS), (SDXL, None, {"guidance_rescale": 0.7}), (SD3, None, {})]
CASES += [(SDXL, None, {"use_original_formulation": True}), (SDXL, None, {"stop": 0.6}), (SDXL, None, {"guidance_scale": 0.5})]


@pytest.mark.parametrize(("pipe", "scheduler", "guidance"), CASES, indirect=["pipe"], ids=str)
def test_a_flagged_row_goes_the_way_of_its_new_prompt_and_no_other_row_changes(
    pipe: Any, scheduler: str | None, guidance: dict[str, Any], given: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    plain, asked = plainly(pipe, guidance=guidance), [plainly(pipe, with_rewritten(row), guidance) for row in range(3)]
    guider = guarded(pipe, profile_for(1e6), **guidance)
    assert np.array_equal(call(pipe), plain)
    assert [(report.verdict, report.extra_evaluations, report.prompt) for report in guider.reports] == [("clean", 0, p) for p in PROMPTS]
    row, bound = strongest(guider.reports)
    guider = guarded(pipe, profile_for(bound), **guidance)
    steered = call(pipe)
    assert [report.verdict == "steered" for report in guider.reports] == [i == row for i in range(3)]
    assert [report.extra_evaluations > 0 for report in guider.reports] == [i == row for i in range(3)]
    assert [np.array_equal(steered[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    np.testing.assert_allclose(steered[row], asked[row][row], atol=1e-4)
    assert clear(pipe)
    assert np.array_equal(plainly(pipe, guidance=guidance), plain)


class BringsAnother(GuardedGuidance):
    """What a block of the user's own may do: from the third step on the denoiser is given other embeddings."""

    brought: ClassVar[dict[str, Any]] = {}

    def prepare_inputs(self, data: dict[str, tuple[Any, Any]]) -> Any:
        if self._step >= 2:
            data = {**data, **self.brought}
        return super().prepare_inputs(data)


def test_a_text_that_comes_in_mid_run_is_read_and_its_row_withheld(pipe: Any, given: None, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prompts = 1, PROMPTS[:1] * 3
    text, pooled, null, null_pooled = family_of(pipe).encode(pipe, prompts, {})
    text[row] = 3 * torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(0))
    brought = {"prompt_embeds": (text, null), "text_embeds": (pooled, null_pooled)}
    monkeypatch.setattr(BringsAnother, "brought", brought)
    latents, threshold = [], 1e6
    for _ in range(2):
        pipe.update_components(guider=BringsAnother(pipe, guard=GuardConfig(profile=profile_for(threshold)), guidance_scale=4.0))
        latents.append(call(pipe, prompts, output_type="latent"))
        scores = [report.score for report in pipe.guider.reports]
        threshold = sum(sorted(scores)[-2:]) / 2
    assert scores[row] == max(scores) > 1.02 * pipe.guider.reports[row].series["guidance_norm"][0]
    assert [report.flagged_at for report in pipe.guider.reports] == [2 if i == row else None for i in range(3)]
    assert [report.verdict for report in pipe.guider.reports] == ["withheld" if i == row else "clean" for i in range(3)]
    assert [report.extra_evaluations for report in pipe.guider.reports] == [2] * 3
    assert not latents[1][row].any()
    assert all(torch.equal(latents[1][i], latents[0][i]) for i in range(3) if i != row)
    assert clear(pipe)


def always(make: Callable[[SteeringInput], list[Correction]]) -> Callable[..., list[Outcome]]:
    return lambda flagged, methods: [Outcome(correction, [{"method": "..."}]) for correction in make(flagged)]


def test_a_row_may_start_from_another_noise(pipe: Any, given: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.randn(4, 8, 8)
    monkeypatch.setattr(run_module, "try_in_order", always(lambda flagged: [Correction({}, x=noise)]))
    guider = guarded(pipe, profile_for(1e6))
    plain = call(pipe)
    row, bound = strongest(guider.reports)
    guarded(pipe, profile_for(bound))
    steered = call(pipe)
    assert [np.array_equal(steered[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    np.testing.assert_allclose(steered[row], plainly(pipe, latents=torch.stack([noise] * 3))[row], atol=1e-4)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_rule_stands_in_guidances_place(pipe: Any, rescale: float, given: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule "as the text alone has it" gives the run without guidance, also where guidance is rescaled."""
    monkeypatch.setattr(
        run_module, "try_in_order", always(lambda flagged: [Correction({}, rule=lambda here: here.eps_c)] * len(flagged.prompts))
    )
    guider = guarded(pipe, profile_for(1e-9), guidance_rescale=rescale)
    steered = call(pipe)
    assert [report.verdict for report in guider.reports] == ["steered"] * 3
    np.testing.assert_allclose(steered, plainly(pipe, guidance={"guidance_scale": 1.0}), atol=1e-4)


@pytest.mark.parametrize(
    ("pipe", "guidance"), [(SDXL, {"guidance_scale": 1.0}), (SD3, {"guidance_scale": 1.0}), (SD3, {"enabled": False})], indirect=["pipe"]
)
def test_a_run_without_guidance_pays_one_evaluation_where_the_guard_reads(
    pipe: Any, guidance: dict[str, Any], given: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    plain = plainly(pipe, guidance=guidance)
    guider = guarded(pipe, profile_for(1e6), **guidance)
    assert np.array_equal(call(pipe), plain)
    assert [report.extra_evaluations for report in guider.reports] == [1] * 3
    row, bound = strongest(guider.reports)
    guarded(pipe, profile_for(bound), **guidance)
    steered = call(pipe)
    assert [np.array_equal(steered[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
    np.testing.assert_allclose(steered[row], plainly(pipe, with_rewritten(row), guidance)[row], atol=1e-4)


@pytest.mark.parametrize("pipe", [SDXL, SD3], indirect=True)
def test_an_unknown_model_is_calibrated_inside_the_first_run_and_does_not_disturb_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Profile:
        made.append(kwargs["adapter_scale"])
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(store_module, "calibrate", counted)
    if type(pipe).__name__ == SDXL:  # one that remembers earlier steps
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    plain = plainly(pipe)
    config = GuardConfig("observe", false_positive_rate=0.3, calibration_prompts=[f"a cat {i}" for i in range(5)])
    guider, scheduler = guarded(pipe, config), pipe.scheduler
    for _ in range(2):
        assert np.array_equal(call(pipe), plain)
        assert all(report.error is None and report.p_value is not None for report in guider.reports)
        assert len(guider.reports[0].series["guidance_norm"]) == 4
    assert len(made) == 1
    assert pipe.guider is guider
    assert pipe.scheduler is scheduler
    pipe.update_components(guider=guider.new(guidance_rescale=0.5, start=0.3))
    call(pipe)
    assert made == [None]  # the model is known, and no setting is part of it


def test_a_calibration_that_fails_leaves_the_pipeline_as_it_was(pipe: Any) -> None:
    guider, scheduler = guarded(pipe, GuardConfig(calibration_prompts=["a cat"])), pipe.scheduler
    with pytest.raises(ValueError, match="at least 4"):
        call(pipe)

    def look(observation: Observation) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe_run(pipe, PROMPTS, [0, 1, 2], look, num_inference_steps=4, **SIZED)
    assert (pipe.guider, pipe.scheduler) == (guider, scheduler)
    assert clear(pipe)


def test_an_error_in_mid_run_leaves_nothing_and_the_next_run_is_right(pipe: Any, given: None) -> None:
    plain = plainly(pipe)
    guider = guarded(pipe, profile_for(1e6))
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError

    handle = pipe.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        call(pipe)
    handle.remove()
    assert clear(pipe)
    assert np.array_equal(call(pipe), plain)
    assert [len(report.series["guidance_norm"]) for report in guider.reports] == [4] * 3


@pytest.mark.parametrize("pipe", [SDXL, SD3], indirect=True)
def test_what_is_withheld_has_no_latents(pipe: Any, given: None) -> None:
    """Its picture is what the decoder makes of zeros; its neighbours' are untouched."""
    plain = plainly(pipe, output_type="latent")
    guider = guarded(pipe, profile_for(1e6))
    call(pipe)
    row, bound = strongest(guider.reports)
    guider = guarded(pipe, GuardConfig("block", profile=profile_for(bound)))
    latents = call(pipe, output_type="latent")
    assert [report.verdict == "withheld" for report in guider.reports] == [i == row for i in range(3)]
    assert not latents[row].any()
    assert all(torch.equal(latents[i], plain[i]) for i in range(3) if i != row)
    pictures = call(pipe)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    nothing = pipe.vae.decode(torch.full_like(latents[:1], shift), return_dict=False)[0]
    np.testing.assert_allclose(pictures[row], pipe.image_processor.postprocess(nothing.detach(), output_type="np")[0], atol=1e-5)


def test_on_failure_raise(pipe: Any, given: None) -> None:
    guider = guarded(pipe, GuardConfig(profile=profile_for(1e-9), steering=["norm clamp"], on_failure="raise"))
    with pytest.raises(MemorizationError):
        call(pipe)
    assert [report.prompt for report in guider.reports] == PROMPTS
    assert clear(pipe)


@pytest.mark.parametrize("method", ["embedding descent", "rewording", "SAIL", "attractive-repulsive guidance", "attention attenuation"])
def test_methods_steer_with_and_without_prompts(pipe: Any, method: str, given: None) -> None:
    """Without prompts what needs none still steers, and rewording does not apply."""
    values = {**LENIENT, "guidance_norm": [1e9] * 100}
    config = GuardConfig(profile=replace(profile_for(1e-9), values=values), steering=[method], on_failure="pass")
    for prompts in (PROMPTS, None):
        guider = guarded(pipe, config)
        guider.prompts = prompts
        call(pipe)
        assert [report.error for report in guider.reports] == [None] * 3
        needs_prompts = method in ("rewording", "attractive-repulsive guidance")
        assert any((report.steering or {}).get("attempts") for report in guider.reports) == (prompts is not None or not needs_prompts)


def test_prompts_are_told_for_one_run_and_have_to_be_its_own(pipe: Any, given: None) -> None:
    guider = guarded(pipe, profile_for(1e6))
    call(pipe)
    call(pipe)
    assert [report.prompt for report in guider.reports] == [None] * 3
    guider.prompts = "a cat"
    call(pipe, ["a cat"], num_images_per_prompt=2, generator=torch.Generator().manual_seed(7))
    assert [report.prompt for report in guider.reports] == ["a cat"] * 2
    for prompts, match in ((PROMPTS[:2], "told 2 prompts, and this run makes 3 images"), ("a cat", "not those of this run")):
        guider.prompts = prompts
        with pytest.raises(ValueError, match=match):
            call(pipe)


@pytest.mark.parametrize("negative", [["a cow"] * 3, PROMPTS], ids=["another", "the prompts themselves"])
@pytest.mark.parametrize("pipe", [SDXL, SD3], indirect=True)
def test_a_negative_prompt_moves_nothing_of_the_reading(pipe: Any, negative: list[str], given: None) -> None:
    """Nor need the guider be told of it. Cost: the empty prompt beside it, an evaluation an image."""
    guider = guarded(pipe, profile_for(1e6))
    call(pipe)
    plain = [report.signals["guidance_norm"]["value"] for report in guider.reports]
    call(pipe, negative_prompt=negative)
    assert [report.signals["guidance_norm"]["value"] for report in guider.reports] == pytest.approx(plain, rel=1e-3)
    assert [report.extra_evaluations for report in guider.reports] == [1] * 3


@pytest.mark.parametrize("pipe", [SDXL, SD3], indirect=True)
def test_a_captured_call_is_evaluated_again_as_it_was(pipe: Any) -> None:
    def look(observation: Observation) -> None:
        some = observation.select(torch.tensor([2, 0]))
        eps_c, eps_u = some.both_branches(some.x, some.timestep)
        torch.testing.assert_close(eps_c, some.eps_c, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(eps_u, some.eps_u, rtol=1e-3, atol=1e-5)
        text, null = Encoder(pipe, INPUTS[type(pipe).__name__]).both(PROMPTS)
        torch.testing.assert_close(text, observation.condition, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(null, observation.null_condition, rtol=1e-3, atol=1e-5)
        seen.append(observation.guidance_scale)

    seen: list[float] = []
    probe_run(pipe, PROMPTS, [0, 1, 2], look, 2, num_inference_steps=4, guidance_scale=4.0, **SIZED, **INPUTS[type(pipe).__name__])
    assert seen == [4.0, 4.0]


@pytest.mark.parametrize("pipe", [SDXL, SD3], indirect=True)
def test_runs_from_a_picture_are_refused(pipe: Any, given: None) -> None:
    guarded(pipe, profile_for(1e6))
    with pytest.raises(ValueError, match="this one does not go through its whole schedule"):
        call(pipe, image=picture().repeat(3, 1, 1, 1), strength=0.5)
    assert clear(pipe)
    call(pipe)


def test_runs_with_a_mask_or_a_controlnet_and_parts_of_runs_are_refused(pipe: Any, given: None) -> None:
    guarded(pipe, profile_for(1e6))
    with pytest.raises(ValueError, match="does not go through its whole schedule"):
        call(pipe, denoising_end=0.5)
    pipe.update_components(controlnet=controlnet(32, **ADDED))
    with pytest.raises(ValueError, match="this one has a ControlNet"):
        call(pipe, control_image=picture())
    pipe.update_components(unet=unet(9, 32, **ADDED))
    with pytest.raises(ValueError, match="fills in a mask"):
        call(pipe, image=picture(), mask_image=mask(), strength=1.0)


def test_other_timesteps_move_nothing_of_the_reading(pipe: Any, given: None) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    guider, found = guarded(pipe, profile_for(1e6)), []
    settings: list[dict[str, Any]] = [{}, {"timesteps": [900, 500, 300, 100]}, {"timesteps": [700, 200]}]
    for extra in settings:
        call(pipe, **extra)
        found.append([report.signals["guidance_norm"]["value"] for report in guider.reports])
        assert [(report.error, report.extra_evaluations) for report in guider.reports] == [(None, 2)] * 3
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)


def test_a_guider_belongs_to_one_pipeline(pipe: Any, embedded: Any) -> None:
    guarded(pipe, profile_for(1e6))
    other = modular(SDXL, embedded.tokenizer)
    other.update_components(guider=pipe.guider)
    with pytest.raises(ValueError, match="another pipeline"):
        call(other)


def test_pipelines_that_are_not_modular_or_not_known_are_refused(pipe: Any, tiny: Any) -> None:
    with pytest.raises(TypeError, match=rf"{SDXL} is a modular pipeline: .* sdguard\.guarded\.guider\.GuardedGuidance"):
        sdguard.guard(pipe)
    with pytest.raises(TypeError, match="StableDiffusionPipeline is no modular pipeline"):
        GuardedGuidance(tiny)
    with pytest.raises(TypeError, match="does not support FluxModularPipeline yet"):
        GuardedGuidance(diffusers.FluxModularPipeline())


def test_the_config_has_neither_pipeline_nor_guard(pipe: Any) -> None:
    config = guarded(pipe, profile_for(1e6), guidance_rescale=0.2).config
    assert (config["guidance_scale"], config["guidance_rescale"]) == (4.0, 0.2)
    assert not {"pipe", "guard", "inputs"} & set(config)
