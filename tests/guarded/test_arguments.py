"""Every argument of every supported pipeline's call is decided about, and calls are refused by what is decided."""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, ModularPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_sd3
from diffusers.models.unets import unet_2d_condition
from diffusers.utils import peft_utils
from families import PIPELINES, PROMPTS, build
from PIL import Image

import sdguard
from sdguard.denoiser.families import FAMILIES
from sdguard.guarded.arguments import ARGUMENTS, ENTRIES, by_name, check, check_inputs, limits, lora_scale, undecided

CLASSES = [cls for name in FAMILIES if not issubclass(cls := getattr(diffusers, name), ModularPipeline)]
ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


class NewPipeline(StableDiffusionPipeline):
    """As diffusers may have it tomorrow."""

    def __call__(self, prompt: Any = None, second_wind: Any = 0.5, places: Any = ("sky", 1), **kwargs: Any) -> None:
        """Makes nothing."""


def defaults(cls: type) -> dict[str, Any]:
    """A call's arguments as `inspect.BoundArguments` has them where nothing is given."""
    call = inspect.signature(cls.__call__).bind(None)
    call.apply_defaults()
    return call.arguments


def deprecated(cls: type) -> set[str]:
    """The arguments that a call takes out of its ``**kwargs``."""
    return set(re.findall(r" kwargs\.(?:pop|get)\(\s*[\"'](\w+)", inspect.getsource(cls.__call__)))


@each_class
def test_every_argument_is_decided_about(cls: type) -> None:
    assert undecided(cls) == []


@each_class
def test_every_deprecated_argument_is_decided_about(cls: type) -> None:
    assert deprecated(cls) <= set(by_name(ARGUMENTS))


def test_an_argument_that_is_new_is_found() -> None:
    assert undecided(NewPipeline) == ["second_wind", "places"]


def test_every_name_is_an_argument_of_a_supported_pipeline() -> None:
    assert set(by_name(ARGUMENTS)) <= {name for cls in CLASSES for name in {*defaults(cls), *deprecated(cls)}}


def test_every_entry_is_one_that_diffusers_knows() -> None:
    source = "".join(map(inspect.getsource, (attention_processor, transformer_sd3, unet_2d_condition, peft_utils)))
    assert [name for name in by_name(ENTRIES) if not re.search(rf"\"{name}\"|\b{name}:", source)] == []


@pytest.mark.parametrize("table", [ARGUMENTS, ENTRIES], ids=["arguments", "entries"])
def test_every_name_has_one_decision_and_every_decision_a_name(table: Any) -> None:
    assert len(by_name(table)) == sum(len(decision.names) for decision in table)
    assert all(decision.names for decision in table)


def test_every_reason_stands_once() -> None:
    reasons = [decision.reason for decision in (*ARGUMENTS, *ENTRIES)]
    assert len(set(reasons)) == len(reasons)


@each_class
def test_nothing_is_refused_at_defaults(cls: type) -> None:
    check(cls, defaults(cls))


@each_class
def test_no_limit_is_named_at_defaults(cls: type) -> None:
    assert limits(defaults(cls)) == []


@each_class
def test_what_is_ordinary_is_taken(cls: type) -> None:
    ordinary = {"prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 4, "generator": torch.Generator(), "height": 32}
    check(cls, {**defaults(cls), **ordinary})


REFUSED = [
    (StableDiffusionPipeline, {"cross_attention_kwargs": {"gligen": {"objs": torch.zeros(2)}}}, "cross_attention_kwargs['gligen']"),
    (StableDiffusionPipeline, {"cross_attention_kwargs": {"scale": 0.5, "edit": 1}}, "cross_attention_kwargs['edit']"),
    (StableDiffusion3Pipeline, {"joint_attention_kwargs": {"edit": torch.zeros(2)}}, "joint_attention_kwargs['edit']"),
    (StableDiffusionPipeline, {"kwargs": {"negativ_prompt": "a dog"}}, "negativ_prompt"),
    (StableDiffusionPipeline, {"negativ_prompt": "a dog"}, "negativ_prompt"),
    (FluxPipeline, {"second_wind": 0.7}, "second_wind"),
    (NewPipeline, {"second_wind": 0.7}, "second_wind"),
    (NewPipeline, {"second_wind": torch.full((2,), 0.5)}, "second_wind"),
    (NewPipeline, {"second_wind": np.full(2, 0.5)}, "second_wind"),
    (NewPipeline, {"places": ("sky", torch.ones(2))}, "places"),
    (NewPipeline, {"places": ("sky",)}, "places"),
    (NewPipeline, {"places": Image.new("RGB", (8, 8))}, "places"),
]


@pytest.mark.parametrize(("cls", "given", "name"), REFUSED)
def test_what_is_refused_is_named_in_one_sentence(cls: type, given: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f" does not take {name}: ")) as refused:
        check(cls, {**defaults(cls), **given})
    assert re.fullmatch(r"[^.]+\.", str(refused.value))


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("value", [0.5, 5, "scale", [1], {"scale": "half"}, {"scale": [0.5, 0.5]}, {"scale": 10**400}])
def test_an_argument_for_attention_that_cannot_be_read_is_refused_in_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}(\['scale'\])? is .{{1,110}}; it must be a (dictionary|number)\.$"):
        check(StableDiffusionPipeline, {**defaults(StableDiffusionPipeline), name: value})


@pytest.mark.parametrize(
    "given",
    [
        {"second_wind": 0.5},
        {"second_wind": np.float64(0.5)},
        {"places": ["sky", 1]},
        {"places": ("sky", np.int64(1))},
        {"kwargs": {"steps_back": None}},
    ],
)
def test_an_undecided_argument_at_its_default_is_taken(given: dict[str, Any]) -> None:
    check(NewPipeline, given)


def test_a_pipeline_is_checked_as_its_class_is(tiny: Any) -> None:
    check(tiny, defaults(StableDiffusionPipeline))
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not take second_wind"):
        check(tiny, {"second_wind": 0.7})


def test_tensors_are_taken_wherever_they_are_known() -> None:
    tensors = {"latents": torch.rand(1, 4, 8, 8), "prompt_embeds": torch.rand(1, 8, 4), "timesteps": torch.tensor([900, 100])}
    check(StableDiffusionPipeline, {**defaults(StableDiffusionPipeline), **tensors, "sigmas": np.ones(2), "guidance_scale": np.float32(4)})


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"image": torch.rand(1, 3, 8, 8), "strength": 0.5}, ["image"]),
        ({"image": [Image.new("RGB", (8, 8))], "mask_image": np.ones((8, 8))}, ["image", "mask_image"]),
        ({"ip_adapter_image_embeds": [torch.rand(2, 1, 4)], "latents": torch.rand(1, 4, 8, 8)}, ["ip_adapter_image_embeds", "latents"]),
        ({"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1)]}}, ["cross_attention_kwargs['ip_adapter_masks']"]),
        ({"callback_on_step_end": print}, ["callback_on_step_end"]),
        ({"kwargs": {"callback": print, "callback_steps": 1}}, ["callback"]),
        ({"prompt": "a cat", "negative_prompt": "a dog", "cross_attention_kwargs": {"scale": 0.5}, "unheard_of": 1}, []),
    ],
)
def test_limits_are_what_the_reading_does_not_see(given: dict[str, Any], names: list[str]) -> None:
    assert limits(given) == names


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("kind", [float, np.float32, np.float64, partial(torch.tensor, dtype=torch.float64), np.array])
def test_the_scale_of_lora_is_a_number(name: str, kind: Any) -> None:
    found = lora_scale({"cross_attention_kwargs": None, name: {"scale": kind(0.5), "ip_adapter_masks": torch.ones(1, 8, 8)}})
    assert (type(found), found) == (float, 0.5)


@pytest.mark.parametrize("given", [{}, {"cross_attention_kwargs": None}, {"cross_attention_kwargs": {}}, {ATTENTION[1]: {"scale": None}}])
def test_a_call_may_say_nothing_of_the_scale_of_lora(given: dict[str, Any]) -> None:
    assert lora_scale(given) is None


def test_a_scale_that_the_pipeline_does_not_hear_does_not_count() -> None:
    assert lora_scale({"cross_attention_kwargs": None, "kwargs": {"joint_attention_kwargs": {"scale": 0.5}}}) is None


@pytest.mark.parametrize("name", PIPELINES)
def test_a_call_is_checked_by_the_pipeline_itself_before_anything_is_done(
    name: str, embedded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says is its own; nothing is calibrated, encoded, drawn or changed by then."""
    pipe = build(name, embedded.tokenizer)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    ran: list[Any] = []
    for part in modules:
        part.register_forward_pre_hook(lambda module, given: ran.append(module))
    before, state, given = dict(vars(pipe)), torch.get_rng_state(), {"prompt": PROMPTS, **PIPELINES[name][1]()}
    check_inputs(pipe, (), given)
    with pytest.raises(ValueError, match="has to be of type") as plain:
        pipe(**{**given, "prompt": 3})
    with pytest.raises(ValueError, match="has to be of type") as guarded:
        sdguard.guard(pipe)(**{**given, "prompt": 3})
    assert str(guarded.value) == str(plain.value)
    assert not ran
    assert vars(pipe) == before
    assert torch.equal(torch.get_rng_state(), state)
