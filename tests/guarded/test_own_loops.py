"""Pipelines with loops, callbacks and parts that diffusers does not have: guarded as they are, or refused or withheld with a reason."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from families import PROMPTS, SIZE, build, call, profile_for, reworded

import sdguard
from sdguard import GuardConfig
from sdguard.denoiser.calls import DenoiserCall, concat_calls
from sdguard.denoiser.families import TEXT, check_pipeline
from sdguard.guarded import pipeline as pipeline_module
from sdguard.guarded import run as run_module

NONE = profile_for(1e6)


@pytest.fixture(autouse=True)
def _given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles that are given are taken for any run."""
    monkeypatch.setattr(pipeline_module, "profile_of", lambda pipe, config, adapter_scale: config.profile)


@pytest.fixture
def pipe(embedded: Any) -> Any:
    return build("StableDiffusionPipeline", embedded.tokenizer)


def guarded(pipe: Any) -> Any:
    return sdguard.guard(pipe, GuardConfig("observe", profile=NONE))


def same(pipe: Any, **extra: Any) -> list[str]:
    """The verdicts of a guarded run that gives what the unguarded one gives, bit by bit."""
    plain, found = call(pipe, **extra), call(guarded(pipe), **extra)
    assert np.array_equal(np.asarray(plain.images), np.asarray(found.images))
    return [report.verdict for report in found.guard]


def test_a_loop_of_its_own_runs_once_and_draws_once(pipe: Any) -> None:
    runs = []

    class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            runs.append(torch.randn(1, generator=kwargs["generator"][0]))
            return super().__call__(*args, **kwargs)

    pipe.__class__ = StableDiffusionPipeline
    assert same(pipe) == ["clean"] * 3
    assert len(runs) == 2


def test_a_second_pass_of_more_steps_belongs_to_the_run(pipe: Any) -> None:
    class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            first = super().__call__(*args, **{**kwargs, "output_type": "latent", "num_inference_steps": 2}).images
            return super().__call__(*args, **{**kwargs, "latents": first, "num_inference_steps": 5})

    pipe.__class__ = StableDiffusionPipeline
    assert same(pipe) == ["clean"] * 3


class TextFirst(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """A loop of its own, in which the rows with text come before those without."""

    def halves(self, given: Any, timestep: Any, both: Any) -> Any:
        """What is predicted with text, and without."""
        return self.unet(torch.cat([given, given]), timestep, encoder_hidden_states=both).sample.chunk(2)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 4,
        guidance_scale: float = 4.0,
        generator: Any = None,
        num_images_per_prompt: int = 1,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:
        both = torch.cat(self.encode_prompt(prompt, "cpu", num_images_per_prompt, True))
        self._guidance_scale = guidance_scale
        self.scheduler.set_timesteps(num_inference_steps)
        side = self.unet.config.sample_size
        x = torch.cat([torch.randn(1, 4, side, side, generator=one) for one in generator]) * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps:
            with_text, without = self.halves(self.scheduler.scale_model_input(x, timestep), timestep, both)
            x = self.scheduler.step(without + guidance_scale * (with_text - without), timestep, x).prev_sample
        return StableDiffusionPipelineOutput(images=x, nsfw_content_detected=None)


def test_a_loop_that_puts_text_first_is_not_judged_and_so_not_clean(pipe: Any) -> None:
    first = TextFirst(**pipe.components, requires_safety_checker=False)
    seeds = [torch.Generator().manual_seed(i) for i in range(3)]
    output = sdguard.guard(first, GuardConfig(profile=NONE))(PROMPTS, generator=seeds)
    assert {report.verdict for report in output.guard} == {"withheld"}
    assert all("another order" in (report.error or "") for report in output.guard)
    assert not output.images.any()


class ByPlace(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """A loop as people write it: the text by place, and nothing said of guidance; its pictures in a form of their own."""

    form: Any = staticmethod(lambda images: images)

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 3, generator: Any = None) -> Any:
        text, null = self.encode_prompt(prompt, "cpu", 1, True)
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(4, 8, 8, generator=of) for of in generator])
        for timestep in self.scheduler.timesteps:
            eps_u, eps_c = self.unet(torch.cat([x, x]), timestep, torch.cat([null, text])).sample.chunk(2)
            x = self.scheduler.step(eps_u + 4.0 * (eps_c - eps_u), timestep, x).prev_sample
        images = self.image_processor.postprocess(self.vae.decode(x / self.vae.config.scaling_factor).sample)
        return type(self).form(images)


class Named(NamedTuple):
    """An output of somebody's own."""

    images: Any
    seconds: float


@dataclass(frozen=True)
class Frozen:
    """Another, which is not written to."""

    images: Any


@dataclass(slots=True)
class Slotted:
    """Another, to which nothing is added."""

    images: Any


#: how pictures are handed back, and what they are then
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a list": (lambda images: images, lambda output: output),
    "an array": (lambda images: np.stack([np.asarray(of) for of in images]), lambda output: output),
    "arrays": (lambda images: [np.asarray(of) for of in images], lambda output: output),
    "a tuple": (lambda images: (images, 1.0), lambda output: output[0]),
    "a named tuple": (lambda images: Named(images, 1.0), lambda output: output.images),
    "a dictionary": (lambda images: {"images": images, "seconds": 1.0}, lambda output: output["images"]),
    "a frozen class": (Frozen, lambda output: output.images),
    "a class with slots": (Slotted, lambda output: output.images),
    "diffusers' own": (lambda images: StableDiffusionPipelineOutput(images, None), lambda output: output.images),
}


def run_by_place(pipe: Any, prompts: list[str] = PROMPTS) -> Any:
    return pipe(prompts, generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))])


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_as_people_write_it_is_judged_and_gives_what_it_gave(form: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, (made, images) = ByPlace(**pipe.components, requires_safety_checker=False), FORMS[form]
    monkeypatch.setattr(ByPlace, "form", staticmethod(made))
    plain, guard = run_by_place(own), sdguard.guard(own, GuardConfig("block", profile=profile_for(1e6)))
    output = run_by_place(guard)
    assert type(output) is type(plain)
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(images(output), images(plain), strict=True))
    assert [report.verdict for report in guard.guard_reports] == ["clean"] * 3
    norms = sorted(report.signals["guidance_norm"]["value"] for report in guard.guard_reports)
    block = sdguard.guard(own, GuardConfig("block", profile=profile_for(sum(norms[1:]) / 2)))
    output = run_by_place(block)
    assert type(output) is type(plain)
    withheld = [report.verdict == "withheld" for report in block.guard_reports]
    assert sum(withheld) == 1
    for one, other, gone in zip(images(output), images(plain), withheld, strict=True):
        assert not np.asarray(one).any() if gone else np.array_equal(np.asarray(one), np.asarray(other))


def test_so_is_one_that_gives_a_single_picture(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ByPlace(**pipe.components, requires_safety_checker=False)
    monkeypatch.setattr(ByPlace, "form", staticmethod(lambda images: images[0]))
    plain = run_by_place(own, ["a cat"])
    assert run_by_place(guarded(own), ["a cat"]) == plain
    withheld = run_by_place(sdguard.guard(own, GuardConfig("block", profile=profile_for(1e-9))), ["a cat"])
    assert withheld.size == plain.size
    assert not np.asarray(withheld).any()


def test_a_loop_whose_pictures_cannot_be_told_ends_in_one_sentence(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ByPlace(**pipe.components, requires_safety_checker=False)
    monkeypatch.setattr(ByPlace, "form", staticmethod(lambda images: 5))
    with pytest.raises(TypeError, match=r"^The pipeline's output, of class int, has no images that can be told by what was judged\.$"):
        run_by_place(guarded(own))


def test_more_by_place_than_is_known_ends_in_one_sentence(pipe: Any) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    own = ByPlace(**pipe.components, requires_safety_checker=False)
    own.unet = Wrapper(pipe.unet)
    with pytest.raises(ValueError, match=r"^A call of the denoiser gives 3 arguments by place, where it is known of 2 what they are"):
        run_by_place(guarded(own))


class OneByOne(TextFirst):
    """A loop of its own, which asks for the two halves one after the other."""

    def halves(self, given: Any, timestep: Any, both: Any) -> Any:
        return [self.unet(given, timestep, encoder_hidden_states=half).sample for half in both.chunk(2)]


class PromptByPrompt(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """A loop of its own, in which each prompt has a run."""

    def __call__(self, prompt: list[str], generator: Any = None, num_images_per_prompt: int = 1, return_dict: bool = True) -> Any:
        runs = zip(prompt, generator, strict=True)
        made = [super(PromptByPrompt, self).__call__(p, num_inference_steps=2, generator=g, output_type="np") for p, g in runs]
        return StableDiffusionPipelineOutput(images=np.concatenate([one.images for one in made]), nsfw_content_detected=None)


@pytest.mark.parametrize("kind", [OneByOne, PromptByPrompt])
def test_a_loop_of_other_calls_is_not_judged_and_so_not_clean(kind: Any, pipe: Any) -> None:
    own = kind(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)

    def run(pipe: Any) -> Any:
        return pipe(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(3)])

    looked_at = run(guarded(own))
    assert np.array_equal(looked_at.images, run(own).images)
    assert {report.verdict for report in looked_at.guard} == {"flagged"}
    output = run(sdguard.guard(own, GuardConfig(profile=NONE)))
    assert {report.verdict for report in output.guard} == {"withheld"}
    assert all("rows where 3 images with 2 branches were expected" in (report.error or "") for report in output.guard)
    assert not output.images.any()


@pytest.mark.parametrize("threshold", [1e6, 1e-9])
def test_a_callback_that_drops_images_is_one_sentence(threshold: float, pipe: Any) -> None:
    def drop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return {}
        null, text = values["prompt_embeds"].chunk(2)
        return {"latents": values["latents"][:2], "prompt_embeds": torch.cat([null[:2], text[:2]])}

    extra: dict[str, Any] = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    assert len(call(pipe, **extra).images) == 2
    with pytest.raises(RuntimeError, match=r"^2 images were made where 3 were judged"):
        call(sdguard.guard(pipe, GuardConfig(profile=profile_for(threshold), steering=["rewording"])), **extra)


def test_a_call_that_is_wrapped_runs_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the wrapper bears the name and the module of diffusers' own."""
    runs, inner = [], diffusers.StableDiffusionPipeline.__call__

    @functools.wraps(inner)
    def logged(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(torch.rand(1))
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", logged)
    assert same(pipe) == ["clean"] * 3
    assert len(runs) == 2


def test_a_check_of_somebodys_own_is_made_once(pipe: Any) -> None:
    checks, inner = list[int](), pipe.check_inputs

    def check(*args: Any, **kwargs: Any) -> None:
        checks.append(1)
        inner(*args, **kwargs)

    pipe.check_inputs = check
    assert same(pipe) == ["clean"] * 3
    assert len(checks) == 2


class Brief(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
    """A call that takes little."""

    def __call__(self, prompt: list[str], generator: Any = None) -> Any:
        return super().__call__(prompt, num_inference_steps=2, generator=generator, output_type="np")

    @torch.no_grad()
    def generate(self, prompt: list[str]) -> Any:
        """Another way to make pictures."""
        return self(prompt, generator=[torch.Generator().manual_seed(i) for i in range(3)])


def test_a_call_need_not_take_what_diffusers_calls_take(pipe: Any) -> None:
    own = Brief(**pipe.components, requires_safety_checker=False)
    one, other = own.generate(PROMPTS), guarded(own)(PROMPTS, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    assert np.array_equal(one.images, other.images)
    assert [report.verdict for report in other.guard] == ["clean"] * 3


def test_another_method_that_makes_pictures_comes_with_a_warning(pipe: Any) -> None:
    own = sdguard.guard(Brief(**pipe.components, requires_safety_checker=False), GuardConfig("block", profile=profile_for(1e-9)))
    with pytest.warns(UserWarning, match=r"^generate is no method of diffusers and holds the pipeline itself"):
        assert len(own.generate(PROMPTS).images) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.enable_attention_slicing()


def test_a_name_alone_makes_no_family(pipe: Any) -> None:
    kind = type("LatentConsistencyModelPipeline", (diffusers.DiffusionPipeline,), {"__call__": lambda self, prompt: None})
    with pytest.raises(TypeError, match=r"^sdguard does not support LatentConsistencyModelPipeline yet"):
        sdguard.guard(kind())


def test_a_scheduler_that_inverts_its_sigmas_is_refused(embedded: Any) -> None:
    pipe = build("StableDiffusion3Pipeline", embedded.tokenizer)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(TypeError, match=r"inverts its sigmas"):
        sdguard.guard(pipe)


@pytest.mark.parametrize("threshold", [1e6, 1e-9])
def test_one_second_prompt_may_go_for_all(threshold: float, embedded: Any) -> None:
    pipe = build("FluxPipeline", embedded.tokenizer)
    plain = call(pipe, prompt_2="a heron").images
    found = call(sdguard.guard(pipe, GuardConfig("observe", profile=profile_for(threshold))), prompt_2="a heron")
    assert np.array_equal(found.images, plain)
    assert [report.error for report in found.guard] == [None] * 3


def test_more_images_than_were_judged_are_not_delivered(pipe: Any) -> None:
    class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            output.images = np.concatenate([output.images] * 2)
            return output

    pipe.__class__ = StableDiffusionPipeline
    told: list[Any] = []
    with pytest.raises(RuntimeError, match="6 images were made where 3 were judged"):
        call(sdguard.guard(pipe, GuardConfig("observe", profile=NONE, on_verdict=told.append)))
    assert len(told) == 3


class Peek(PipelineCallback):  # type: ignore[misc]
    """A callback as diffusers documents it, that asks the denoiser about another text."""

    tensor_inputs = ("latents", "prompt_embeds")
    seen = 0

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        self.seen += 1
        with torch.no_grad():
            pipeline.unet(callback_kwargs["latents"][:1], timestep, callback_kwargs["prompt_embeds"][-1:])
        return callback_kwargs


@pytest.mark.parametrize("several", [False, True])
def test_what_a_callback_of_diffusers_documented_form_asks_is_none_of_the_run(several: bool, pipe: Any) -> None:
    peek = Peek()
    assert same(pipe, callback_on_step_end=MultiPipelineCallbacks([peek]) if several else peek) == ["clean"] * 3
    assert peek.seen == 8


def test_a_callback_may_wait_for_a_run_of_another_thread(pipe: Any) -> None:
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain, beside, made = call(pipe).images, call(other, num_inference_steps=2).images, list[Any]()

    def wait(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        thread = threading.Thread(target=lambda: made.append(call(guarded(other), num_inference_steps=2)), daemon=True)
        thread.start()
        thread.join(60)
        return {}

    found = call(guarded(pipe), callback_on_step_end=wait)
    assert np.array_equal(found.images, plain)
    assert len(made) == 4
    assert all(np.array_equal(output.images, beside) for output in made)
    assert {report.verdict for output in (found, *made) for report in output.guard} == {"clean"}


def test_who_is_shown_a_call_may_run_the_pipeline_itself(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of images, while one is steered."""
    made: list[Any] = []

    def show(observation: Any, reports: Any) -> None:
        if observation.step == 1 and not made:
            made.append(None)
            scheduler = copy.deepcopy(pipe.scheduler)
            made.append(target(["a cat"], num_inference_steps=4, output_type="np"))
            pipe.scheduler.__dict__.update(vars(scheduler))

    monkeypatch.setattr(run_module, "try_in_order", reworded)
    target = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e-9), on_call=show))
    output = call(target)
    assert len(made) == 2
    assert "steered" in {report.verdict for report in output.guard}
    assert not [report.error for report in output.guard if report.error]


def test_latents_need_no_vae(pipe: Any) -> None:
    pipe.vae = None
    assert same(pipe, output_type="latent") == ["clean"] * 3


def test_a_width_for_each_block_is_a_width(pipe: Any) -> None:
    width = pipe.unet.config.cross_attention_dim
    pipe.unet.register_to_config(cross_attention_dim=(width,) * len(pipe.unet.config.block_out_channels))
    assert same(pipe, height=SIZE + 8) == ["clean"] * 3


def test_a_model_that_names_no_size_is_refused_before_any_call(pipe: Any) -> None:
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(TypeError, match="has no sample_size"):
        sdguard.guard(pipe)
    with pytest.raises(TypeError, match="has no sample_size"):
        check_pipeline(pipe)


def test_a_scheduler_may_hold_what_cannot_be_copied(pipe: Any) -> None:
    pipe.scheduler.lock = threading.Lock()
    assert same(pipe) == ["clean"] * 3


def test_a_guiders_embeddings_of_two_lengths_are_one_sentence() -> None:
    null, text = (DenoiserCall({"hidden_states": torch.zeros(1), TEXT: torch.zeros(1, n, 4)}, torch.zeros(1)) for n in (8, 12))
    with pytest.raises(ValueError, match=r"has 12 tokens and the negative prompt's 8: .* with max_sequence_length=12\.$"):
        concat_calls(null, text, "hidden_states")
