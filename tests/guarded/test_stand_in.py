"""A guarded pipeline as an object: what others ask of it, copy, store and make of it; and what a user may get wrong in guarding one."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import multiprocessing
import os
import pickle
import pydoc
import threading
import unittest.mock
import warnings
from pathlib import Path
from types import MethodType
from typing import Any

import diffusers
import gradio
import numpy as np
import pytest
import torch
from families import PIPELINES, PROMPTS, build, call, modular, profile_for
from torch import nn

import sdguard
from sdguard import GuardConfig, GuardedPipeline, MemorizationError
from sdguard.guarded.pipeline import FORWARDED, class_for

OBSERVE = GuardConfig("observe")


@pytest.fixture
def pipe(embedded: Any) -> Any:
    return build("StableDiffusionPipeline", embedded.tokenizer)


@pytest.fixture
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for."""
    monkeypatch.setattr(GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)


@pytest.mark.usefixtures("_given_profile")
def test_gradio_makes_a_page_of_a_guarded_pipeline(pipe: Any) -> None:
    page: Any = gradio.Interface.from_pipeline(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert [part.label for part in page.input_components][:2] == ["Prompt", "Negative prompt"]
    assert page.fn("a lion", "", 2, 4.0).size == (16, 16)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_call_says_what_it_takes(name: str, embedded: Any) -> None:
    """To servers that pass on what the signature knows, whichever way they ask for it."""
    plain = build(name, embedded.tokenizer)
    guarded = sdguard.guard(plain, OBSERVE)
    assert inspect.signature(guarded.__call__) == inspect.signature(plain.__call__)
    assert inspect.signature(type(guarded).__call__) == inspect.signature(type(plain).__call__)
    assert guarded.__call__.__doc__ == plain.__call__.__doc__
    assert "num_inference_steps" in pydoc.render_doc(guarded.__call__)


@pytest.mark.usefixtures("_given_profile")
def test_what_a_server_passes_on_arrives(pipe: Any) -> None:
    guarded = sdguard.guard(pipe, GuardConfig("observe", profile=profile_for(1e6)))
    request = {"num_inference_steps": 2, "height": 24, "queue": "fast"}
    known: dict[str, Any] = {name: value for name, value in request.items() if name in inspect.signature(guarded.__call__).parameters}
    output = call(guarded, **known)
    assert output.images.shape == call(pipe, **known).images.shape
    assert len(output.guard[0].series["guidance_norm"]) == 2


@pytest.mark.usefixtures("_given_profile")
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda guarded: pickle.loads(pickle.dumps(guarded))], ids=["copy", "deep", "pickle"]
)
def test_a_copy_is_guarded_alike(again: Any, pipe: Any) -> None:
    guarded = sdguard.guard(pipe, GuardConfig("observe", profile=profile_for(1e6)))
    made = again(guarded)
    assert isinstance(made, GuardedPipeline)
    assert made.guard_config == guarded.guard_config
    assert np.array_equal(call(made).images, call(pipe).images)


def test_a_pipeline_that_a_guarded_one_makes_is_guarded(pipe: Any) -> None:
    guarded: Any = sdguard.guard(pipe, OBSERVE)
    other: Any = sdguard.guard(build("StableDiffusionImg2ImgPipeline", pipe.tokenizer), GuardConfig("block"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made = {
            "of its class": GuardedPipeline.from_pipe(guarded),
            "of a plain one": GuardedPipeline.from_pipe(pipe, guard=GuardConfig("block")),
            "on another": other.from_pipe(guarded),
        }
    assert all(isinstance(one, GuardedPipeline) for one in made.values())
    assert [one.guard_config.mode for one in made.values()] == ["observe", "block", "observe"]
    assert isinstance(made["on another"], diffusers.StableDiffusionImg2ImgPipeline)
    assert isinstance(made["of its class"], diffusers.StableDiffusionPipeline)
    assert all(one.unet is pipe.unet for one in made.values())


def test_a_class_of_guarded_pipelines_makes_its_own(pipe: Any) -> None:
    class Mine(GuardedPipeline):
        pass

    assert type(Mine.from_pipe(pipe)) is Mine


@pytest.mark.parametrize("kind", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.AutoPipelineForImage2Image])
def test_a_pipeline_that_diffusers_makes_of_a_guarded_one_comes_with_a_warning(kind: Any, pipe: Any) -> None:
    guarded = sdguard.guard(pipe, OBSERVE)
    with pytest.warns(UserWarning, match="is not guarded"):
        made = kind.from_pipe(guarded)
    assert not isinstance(made, GuardedPipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kind.from_pipe(sdguard.unguard(guarded))


def test_a_single_file_is_guarded_where_a_pipeline_says_what_it_is_of(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: Any = sdguard.guard(pipe, OBSERVE)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", classmethod(lambda cls, path, **kwargs: pipe))
    made = guarded.from_single_file("model.safetensors", guard=GuardConfig("block"))
    assert isinstance(made, GuardedPipeline)
    assert made.guard_config.mode == "block"
    with pytest.raises(TypeError, match=r"sdguard.guard\(StableDiffusionPipeline.from_single_file"):
        GuardedPipeline.from_single_file("model.safetensors")


def class_methods(kind: type) -> set[str]:
    """The public methods of a class that need no instance."""
    held = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    return {name for name, value in held.items() if isinstance(value, (classmethod, staticmethod)) and not name.startswith("_")}


@pytest.mark.parametrize("name", ["DiffusionPipeline", *PIPELINES])
def test_every_class_method_of_a_pipeline_is_decided_about(name: str) -> None:
    """What makes a pipeline makes a guarded one, all else is that of the pipeline's class; neither is left to chance."""
    kind = getattr(diffusers, name)
    known = GuardedPipeline if name == "DiffusionPipeline" else class_for(kind)
    makers = {method for method in class_methods(kind) if method.startswith("from_")}
    assert makers <= {method for method, value in vars(GuardedPipeline).items() if isinstance(value, classmethod)}
    assert class_methods(kind) == makers | {method for method in FORWARDED if hasattr(kind, method)}
    for method in class_methods(kind) - makers:
        assert getattr(known, method) == getattr(kind, method)


def test_a_class_method_that_makes_no_pipeline_is_that_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    guarded: Any = sdguard.guard(pipe, OBSERVE)
    guarded.save_pretrained(tmp_path)
    whatever: Any = GuardedPipeline
    assert whatever.load_config(tmp_path) == type(guarded).load_config(tmp_path) == type(pipe).load_config(tmp_path)
    assert guarded.load_config(tmp_path) == pipe.load_config(tmp_path)
    assert guarded.numpy_to_pil(np.zeros((1, 2, 2, 3)))[0].size == (2, 2)
    state, _ = type(guarded).lora_state_dict({"unet.down.lora_A.weight": torch.zeros(1)}, return_alphas=True)
    assert list(state) == ["unet.down.lora_A.weight"]


def test_a_pipeline_of_a_configuration_is_guarded(pipe: Any) -> None:
    guarded: Any = sdguard.guard(pipe, OBSERVE)
    made = guarded.from_config(dict(sdguard.unguard(guarded).config), guard=GuardConfig("block"), **pipe.components)
    assert isinstance(made, GuardedPipeline)
    assert made.guard_config.mode == "block"
    assert made.unet is pipe.unet


@pytest.mark.parametrize("config", ["observe", {"mode": "observe"}, GuardConfig, 0.01])
def test_what_is_no_configuration_is_refused_at_once(config: Any, pipe: Any) -> None:
    for make in (
        lambda: sdguard.guard(pipe, config),
        lambda: GuardedPipeline(pipe, config),
        lambda: GuardedPipeline.from_pretrained("nowhere", guard=config),
        lambda: sdguard.GuardedGuidance(modular("StableDiffusionXLModularPipeline", pipe.tokenizer), config),
    ):
        with pytest.raises(TypeError, match="is configured by a GuardConfig"):
            make()


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler"]
)
def test_a_scheduler_whose_noise_levels_are_unknown_is_refused_before_any_run(name: str, pipe: Any) -> None:
    guarded, known = sdguard.guard(pipe), pipe.scheduler
    pipe.scheduler = getattr(diffusers, name)()
    for refuse in (lambda: sdguard.guard(pipe), lambda: call(guarded)):
        with pytest.raises(TypeError, match=f"{name} has no alphas_cumprod"):
            refuse()
    pipe.scheduler = type(known).from_config(known.config, prediction_type="score")
    with pytest.raises(TypeError, match="prediction type 'score' is not known"):
        sdguard.guard(pipe)


def test_a_denoiser_that_is_no_module_is_refused(pipe: Any) -> None:
    unet = pipe.unet
    pipe.unet = lambda *args, **kwargs: unet(*args, **kwargs)
    with pytest.raises(TypeError, match="is a function and no torch module"):
        sdguard.guard(pipe)


class Traced(nn.Module):
    """What stands in for a denoiser that was traced or exported: there is a call, and no weights."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.call, self.config, self.dtype, self.device = unet.__call__, unet.config, unet.dtype, unet.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def test_a_denoiser_whose_weights_cannot_be_seen_is_refused_before_any_run(pipe: Any) -> None:
    guarded: Any = sdguard.guard(pipe, OBSERVE)
    guarded.unet = Traced(pipe.unet)
    assert call(pipe).images.shape == (3, 16, 16, 3)
    for refuse in (lambda: sdguard.guard(pipe), lambda: call(guarded)):
        with pytest.raises(TypeError, match=r"^The denoiser's weights cannot be seen, [^.]*\.$"):
            refuse()


@pytest.mark.parametrize(
    "field", [{"steering": "rewording"}, {"profile": 3}, {"rewriter": "gpt"}, {"on_call": [1]}, {"false_positive_rate": "0.01"}], ids=str
)
def test_a_field_of_another_kind_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(field))} is "):
        GuardConfig(**field)


def test_a_call_chooses_no_guard(pipe: Any) -> None:
    with pytest.raises(TypeError, match="A call takes no guard"):
        call(sdguard.guard(pipe), guard=OBSERVE)


@pytest.mark.usefixtures("_given_profile")
def test_what_is_blocked_can_be_raised(pipe: Any) -> None:
    guarded = sdguard.guard(pipe, GuardConfig("block", on_failure="raise", profile=profile_for(1e-9)))
    with pytest.raises(MemorizationError, match=r"^Image 0: predicted to be memorized\.$"):
        call(guarded)


def test_a_profile_may_be_given_by_its_path() -> None:
    assert GuardConfig(profile=Path("profile.json")).profile == Path("profile.json")


UNJUDGED = {
    "the call of the pipeline's class": lambda guarded: type(sdguard.unguard(guarded)).__call__,
    "what the guarded call is wrapped around": lambda guarded: guarded.__call__.__wrapped__,
    "what it is wrapped around in the end": lambda guarded: inspect.unwrap(guarded.__call__),
}


@pytest.mark.usefixtures("_given_profile")
@pytest.mark.parametrize("way", UNJUDGED)
def test_who_goes_past_the_guarded_call_is_warned_and_has_what_the_pipeline_makes(way: str, pipe: Any) -> None:
    guarded, plain = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), call(pipe, output_type="latent").images

    class Past:
        """Called as the pipeline is."""

        def __call__(self, **given: Any) -> Any:
            return UNJUDGED[way](guarded)(guarded, **given)

    seeds = [torch.Generator().manual_seed(7 + i) for i in range(3)]
    with torch.no_grad(), pytest.warns(UserWarning, match="^A loop of steps that is no call of the guarded pipeline is not guarded"):
        found = Past()(prompt=PROMPTS, num_inference_steps=4, guidance_scale=4.0, output_type="latent", generator=seeds)
    assert torch.equal(found.images, plain)
    assert inspect.signature(guarded.__call__) == inspect.signature(pipe.__call__)


class Maker:
    """Holds a pipeline and makes pictures with it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **kwargs)

    def make(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **kwargs)


OWN_WAYS = {
    "a method": lambda pipe: MethodType(lambda self, *args, **kwargs: self(*args, **kwargs), pipe),
    "a closure": lambda pipe: lambda *args, **kwargs: pipe(*args, **kwargs),
    "a decorated closure": lambda pipe: torch.no_grad()(lambda *args, **kwargs: pipe(*args, **kwargs)),
    "a partial": lambda pipe: functools.partial(lambda of, *args, **kwargs: of(*args, **kwargs), pipe),
    "an object": Maker,
    "another's method": lambda pipe: Maker(pipe).make,
}


@pytest.mark.parametrize("way", OWN_WAYS)
def test_what_makes_pictures_in_a_way_of_its_own_comes_with_a_warning(way: str, pipe: Any) -> None:
    pipe.make = OWN_WAYS[way](pipe)
    with pytest.warns(UserWarning, match="^make is no method of diffusers and holds the pipeline itself"):
        assert callable(sdguard.guard(pipe, OBSERVE).make)


def test_so_does_a_method_that_was_put_on_the_guarded_pipeline(pipe: Any) -> None:
    guarded = sdguard.guard(pipe, OBSERVE)
    guarded.make = MethodType(lambda self: self, guarded)
    with pytest.warns(UserWarning, match="^make is no method of diffusers"):
        assert callable(guarded.make)


def test_other_functions_on_a_pipeline_come_without(pipe: Any) -> None:
    guarded = sdguard.guard(pipe, OBSERVE)
    pipe.count, pipe.helper = (lambda: 1), functools.partial(int, "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (guarded.count(), guarded.helper()) == (1, 3)
        assert callable(guarded.check_inputs)


def test_what_answers_to_every_name_is_looked_up(pipe: Any) -> None:
    pipe.remote = unittest.mock.call
    assert sdguard.guard(pipe, OBSERVE).remote is unittest.mock.call


@pytest.mark.parametrize("name", PIPELINES)
def test_what_diffusers_pipelines_have_comes_without_a_warning(name: str, embedded: Any) -> None:
    guarded = sdguard.guard(build(name, embedded.tokenizer), OBSERVE)
    for attribute in dir(guarded):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with contextlib.suppress(AttributeError):  # of what a run sets
                getattr(guarded, attribute)
        assert attribute in ("components", "progress_bar") or not [of for of in said if "guard" in str(of.message)]


@pytest.mark.usefixtures("_given_profile")
@pytest.mark.parametrize("of", [type, lambda guarded: guarded.__class__], ids=["type", "__class__"])
def test_a_guarded_pipeline_may_be_given_a_class_made_of_its_own(of: Any, pipe: Any) -> None:
    """As offloaders do."""
    guarded, plain = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), call(pipe).images
    guarded.__class__ = type(type(pipe).__name__, (of(guarded),), {"is_managed": True})
    output = call(guarded)
    assert guarded.is_managed
    assert np.array_equal(output.images, plain)
    assert [report.verdict for report in output.guard] == ["clean"] * 3


@pytest.mark.usefixtures("_given_profile")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_in_mid_run_may_make_runs_of_its_own(pipe: Any) -> None:
    guarded, begun = sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), threading.Event()
    forked, context, parent = threading.Event(), multiprocessing.get_context("fork"), os.getpid()
    queue = context.Queue()

    def wait(module: Any, given: Any) -> None:
        begun.set()
        if os.getpid() == parent:
            forked.wait(30)

    def child() -> None:
        try:
            queue.put([report.verdict for report in call(guarded).guard])
        except BaseException as error:
            queue.put(repr(error))

    pipe.unet.mid_block.register_forward_pre_hook(wait)
    run = threading.Thread(target=lambda: call(guarded), daemon=True)
    run.start()
    begun.wait(30)
    process = context.Process(target=child, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of threads
        process.start()
    forked.set()
    assert queue.get(timeout=60) == ["clean"] * 3
    run.join(60)
    process.join(60)
