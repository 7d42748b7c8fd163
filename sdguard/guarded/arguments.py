"""What each argument of a pipeline's call means to the guard: a table of decisions with their reasons, and the check of a call by it.

A prompt is judged by a reference call of the denoiser, built from scratch: the text condition of the run's first call beside the model's
empty prompt, at the model's own size and a fixed timestep, without pictures. So most arguments do not move the judgement, each for a reason
that stands here. An argument that has none is refused, since one that is passed over could let a memorized picture through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from sdguard.denoiser.families import default_of, parameters_of_call, signatures_of_call
from sdguard.denoiser.foreign import is_foreign, layers
from sdguard.files.inputs import shown

#: what an argument does to the judgement of a call: nothing; nothing, though it moves the picture in ways that a report has to name; it is
#: part of the text condition that is judged; it moves the model that judges; or the call is refused.
Effect = Literal["inert", "limit", "text", "counts", "refused"]


class Decision(NamedTuple):
    """What is decided about some arguments, for one reason.

    Attributes:
        effect: what they do to the judgement.
        reason: why; of what is refused, also what to do instead, as the rest of a sentence.
        names: the arguments.
    """

    effect: Effect
    reason: str
    names: tuple[str, ...]


#: of the arguments of the pipelines' calls.
ARGUMENTS = (
    Decision(
        "text",
        "it is in the text condition, which is taken from the run's first call of the denoiser, whatever encoded it",
        (
            "prompt", "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask", "clip_skip",
            "max_sequence_length", "clean_caption", "complex_human_instruction", "text_encoder_out_layers",
        ),
    ),
    Decision(
        "counts",
        "its scale is that of LoRA, and LoRA is part of the model; see ENTRIES for all that may be in it",
        ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"),
    ),
    Decision(
        "inert",
        "the reading has its own null branch, the model's empty prompt, and its own guidance",
        (
            "guidance_scale", "guidance_rescale", "true_cfg_scale",
            "negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
            "negative_prompt_attention_mask",
        ),
    ),
    Decision(
        "inert",
        "the reading is at a timestep of its own, and the run's steps and sampler come after it; a run that ends early begins as any other "
        "does, so that a flagged image of it can be started again",
        ("num_inference_steps", "original_inference_steps", "timesteps", "sigmas", "mu", "eta", "denoising_end"),
    ),
    Decision("inert", "one noise is as good as another to the reading", ("generator",)),
    Decision(
        "inert",
        "the reading is at the model's own size, with the size ids and the aesthetic score that go with it",
        (
            "height", "width", "original_size", "target_size", "crops_coords_top_left", "aesthetic_score",
            "negative_original_size", "negative_target_size", "negative_crops_coords_top_left", "negative_aesthetic_score",
            "use_resolution_binning", "max_area", "_auto_resize",
        ),
    ),
    Decision("inert", "it says how many pictures are made of a condition, or how they are handed back", (
        "num_images_per_prompt", "output_type", "return_dict",
    )),
    Decision(
        "limit",
        "the reading is of the text alone: what a picture, a mask or a ControlNet adds is not judged; a ControlNet hears the prompt as it "
        "is given, for steered images too",
        (
            "image", "image_reference", "mask_image", "masked_image_latents", "control_image", "controlnet_pooled_projections",
            "ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds",
        ),
    ),
    Decision("limit", "the reading is of the text alone: what comes in with latents, as a picture half made, is not judged", ("latents",)),
    Decision(
        "limit",
        "the reading comes before the first step, and again where the text condition changes: what else the caller's code does between "
        "steps is not in it",
        ("callback_on_step_end", "callback"),
    ),
    Decision(
        "inert",
        "it says how, how far or when a picture or a ControlNet acts, and a report names the picture; a ControlNet that acts on one branch "
        "alone does so for steered images too",
        (
            "strength", "padding_mask_crop", "controlnet_conditioning_scale", "control_mode", "control_guidance_start",
            "control_guidance_end", "guess_mode", "noise_level",
        ),
    ),
    Decision("inert", "it says what a callback is shown, or how often, and a report names the callback", (
        "callback_on_step_end_tensor_inputs", "callback_steps",
    )),
    Decision(
        "inert",
        "it adds a third branch to the guidance, and the reading has its own guidance; of a steered image that branch hears what its text "
        "branch hears, and steps that are gone through again for it go without",
        ("skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop"),
    ),
    Decision(
        "limit",
        "the text is judged as ever; the picture comes in half made, as a rule of the very prompt that is flagged, so that it is not "
        "steered but withheld",
        ("denoising_start",),
    ),
)  # fmt: skip

#: of what may be in the arguments for attention, the ones that count.
ENTRIES = (
    Decision("counts", "it scales LoRA", ("scale",)),
    Decision(
        "limit",
        "it is of an IP-Adapter's pictures, and the reading is of the text alone",
        ("ip_adapter_masks", "ip_adapter_image_embeds"),
    ),
    Decision("refused", "its phrases are text that the judgement does not have; leave it out and say them in the prompt", ("gligen",)),
)


def by_name(table: tuple[Decision, ...]) -> dict[str, Decision]:
    """Each name's decision."""
    return {name: decision for decision in table for name in decision.names}


DECISIONS, ENTRY_DECISIONS = by_name(ARGUMENTS), by_name(ENTRIES)

#: parameters of a call that no argument is named after: the pipeline, and deprecated arguments.
NO_ARGUMENTS = ("self", "kwargs")


def arguments_of(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's call by name, at its defaults where nothing is given; what is named nowhere is in ``kwargs``.

    Raises `TypeError` for arguments that it cannot have.
    """
    cls: type = type(pipe)
    own = signatures_of_call(cls)[0]
    call = own.bind(pipe, *args, **kwargs)
    call.apply_defaults()
    found = dict(call.arguments)
    opened = [name for name, part in own.parameters.items() if part.kind is part.VAR_KEYWORD]
    rest = {entry: value for name in opened for entry, value in found.pop(name).items()}
    handed_on = {name: rest.pop(name, default_of(pipe, name)) for name in parameters_of_call(cls) if name not in found}
    return {**found, **handed_on, "kwargs": rest}


class Given(NamedTuple):
    """Something a call was given: its name, in words for an entry of an argument, its value, and what is decided about it, if anything."""

    name: str
    value: Any
    decision: Decision | None


def arguments_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, as `inspect.BoundArguments` has them, with those that landed in ``**kwargs`` among them."""
    return {name: value for name, value in given.items() if name not in NO_ARGUMENTS} | dict(given.get("kwargs", {}))


def entries_in(given: Mapping[str, Any]) -> Iterator[Given]:
    """What is in a call's arguments for attention, where it is not None, which switches each entry off.

    In ``**kwargs`` they are not looked for: a pipeline that has them there passes them on to nothing.
    """
    for name, value in given.items():
        if value is not None and name in DECISIONS and DECISIONS[name].effect == "counts":
            for entry, part in dict(value).items():
                if part is not None:
                    yield Given(f"{name}[{entry!r}]", part, ENTRY_DECISIONS.get(entry))


def is_same(value: Any, default: Any) -> bool:
    """Whether a value is surely an argument's default; tensors, arrays and pictures are only ever the same as themselves."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return len(value) == len(default) and all(map(is_same, value, default))
    return value is default or (isinstance(value, (str, int, float)) and isinstance(default, (str, int, float)) and value == default)


def undecided(cls: type) -> list[str]:
    """Arguments of a pipeline class's call that nothing is decided about."""
    return [name for name in parameters_of_call(cls) if name not in NO_ARGUMENTS and name not in DECISIONS]


def check(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse a call that cannot be guarded.

    Args:
        pipe: a pipeline, or its class.
        given: its call's arguments by name; those at their defaults may be left out.

    Raises:
        ValueError: an argument that is not at its default, or an entry of one for attention, is refused, or nothing is decided about it;
            the message is one sentence that names it.
        TypeError: an argument for attention is no dictionary, or the scale in it no number; likewise.
    """
    check_attention(given)
    cls = pipe if isinstance(pipe, type) else type(pipe)
    parameters = parameters_of_call(cls)
    found = [
        Given(name, value, DECISIONS.get(name))
        for name, value in arguments_in(given).items()
        if not is_same(value, parameters[name].default if name in parameters else None)
    ]
    for name, _, decision in (*found, *entries_in(given)):
        if decision is None:
            raise ValueError(
                f"A guarded call of {cls.__name__} does not take {name}: sdguard does not know what it does to a picture; leave it out, or "
                "call the pipeline unguarded."
            )
        if decision.effect == "refused":
            raise ValueError(f"A guarded call of {cls.__name__} does not take {name}: {decision.reason}.")


def check_attention(given: Mapping[str, Any]) -> None:
    """Raise `TypeError`, in one sentence, for an argument for attention of which it cannot be told what is in it."""
    for name, value in given.items():
        if value is not None and name in DECISIONS and DECISIONS[name].effect == "counts" and not isinstance(value, Mapping):
            raise TypeError(f"{name} is {shown(value)}; it must be a dictionary.")
    for name, value, decision in entries_in(given):
        if decision and decision.effect == "counts":
            try:
                float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise TypeError(f"{name} is {shown(value)}; it must be a number.") from None


class _Checked(BaseException):
    """Ends a call once the pipeline has checked it."""


def check_inputs(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have a pipeline check a call as it does itself before all else; raises what it raises. Nothing is evaluated, drawn or changed.

    A call, or a check, of somebody's own may do anything beside: it checks when it is called.
    """
    if any(map(is_foreign, (*layers(type(pipe).__call__), *layers(pipe.check_inputs)))):
        return

    def checked(*args: Any, **kwargs: Any) -> None:
        pipe.check_inputs(*args, **kwargs)
        raise _Checked

    twin = object.__new__(type(pipe))  # and no copy, of which a class may have a way of its own
    vars(twin).update(vars(pipe), check_inputs=checked)
    with contextlib.suppress(_Checked):
        twin(*args, **kwargs)


def limits(given: Mapping[str, Any]) -> list[str]:
    """Names of what a call was given that moves its pictures and that their judgement does not see: pictures, masks, latents, callbacks."""
    found = [Given(name, value, DECISIONS.get(name)) for name, value in arguments_in(given).items() if value is not None]
    return [name for name, _, decision in (*found, *entries_in(given)) if decision and decision.effect == "limit"]


def lora_scale(given: Mapping[str, Any]) -> float | None:
    """What a call multiplies the scales of LoRA with, a number of any kind; None where it says nothing of them."""
    return next((float(value) for _, value, decision in entries_in(given) if decision and decision.effect == "counts"), None)
