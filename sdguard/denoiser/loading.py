"""The pipeline that a name stands for, the setting it is meant for, and the prompts that its text encoder reads whole."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sdguard.choices import GUIDANCE_SCALE, STEPS, Precision
from sdguard.files.inputs import BadInput, first_line, shown

if TYPE_CHECKING:
    import torch


def load_pipeline(model: str) -> Any:
    """The pipeline of ``embedded``, a local directory or a hub id; raises `BadInput` otherwise."""
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline

    from sdguard import testbed

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    source = testbed.path() if model == "embedded" else Path(model)
    there = os.path.exists(source)  # also where the name is too long for a path
    if there:
        if not (source / "model_index.json").is_file():
            raise BadInput(f"{source} is no diffusers pipeline: it has no model_index.json.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise BadInput(f"There is no model at {model}: it is neither 'embedded', nor a directory, nor a hub id of the form owner/name.")
    try:
        named = source if there else model
        return DiffusionPipeline.from_pretrained(named, **absent_parts(DiffusionPipeline.load_config(named)))
    except Exception as error:  # whatever diffusers, transformers and safetensors say of a damaged file
        raise BadInput(f"The model {model} could not be loaded: {first_line(error)}.") from None


def load_for_runs(
    model: str,
    device: torch.device | str | None = None,
    dtype: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
) -> Any:
    """A pipeline (`load_pipeline`'s name) as runs use it: on a device, in a precision, with a LoRA (a file, folder or hub id).

    By default it is on this process's GPU where there is one, and in the weights' own precision. It makes no difference whether runs scale
    the LoRA by ``set_adapters`` or by their call.

    Raises:
        BadInput: one of these cannot be used; one sentence.
    """
    import torch

    from sdguard.files.processes import processes

    if dtype is not None and dtype not in get_args(Precision):
        raise BadInput(f"dtype is {shown(dtype)}; it must be one of {', '.join(get_args(Precision))}.")
    pipe, place = load_pipeline(model), processes().device if device is None else device
    if str(place).partition(":")[0] == "meta":
        raise BadInput("The model cannot be put on the device 'meta': nothing is computed there.")
    if lora is not None:
        try:
            pipe.load_lora_weights(lora)
            pipe.set_adapters(pipe.get_active_adapters(), lora_scale)
        except Exception as error:  # as in load_pipeline
            raise BadInput(f"The LoRA {lora} could not be loaded: {first_line(error)}.") from None
    try:
        return pipe.to(place, *([getattr(torch, dtype)] if dtype else []))
    except (RuntimeError, AssertionError) as error:  # torch's, of a device that is none, or is not there
        raise BadInput(f"The model cannot be put on the device {str(place)!r}: {first_line(error)}.") from None


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """The parts that a pipeline was saved without, such as Stable Diffusion 3's third text encoder: diffusers asks to be told."""
    return {name: None for name, value in index.items() if value == [None, None]}


def default_setting(model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps and guidance scale of a run, by default those the embedded model was made for, else Stable Diffusion's customary ones."""
    from sdguard import testbed

    defaults = (testbed.STEPS, testbed.GUIDANCE_SCALE) if model == "embedded" else (STEPS, GUIDANCE_SCALE)
    return {"num_inference_steps": steps or defaults[0], "guidance_scale": defaults[1] if guidance is None else guidance}


def check_prompts(prompts: list[str], tokenizer: Any, negative_prompt: str | None = None) -> None:
    """Raise `BadInput` for no prompt at all, an empty one, one that is no text, or one that the text encoder would cut.

    The negative prompt, where there is one, may be empty.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise BadInput("There is no prompt to generate from: give at least one, and none that is empty.")
    for prompt in prompts:
        check_text(prompt, tokenizer, "prompt")
    check_text(negative_prompt or "", tokenizer, "negative prompt")


def check_text(text: str, tokenizer: Any, what: str) -> None:
    """Raise `BadInput` for a prompt, or whatever it is called, that is no text or that the text encoder would cut."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # as Python reads bytes that are no UTF-8
        raise BadInput(f"The {what} holds half a character: its text is not valid Unicode.")
    ids = tokenizer(text, truncation=False).input_ids
    if len(ids) > tokenizer.model_max_length:
        cut = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()
        window = tokenizer.model_max_length
        raise BadInput(f"The {what} is {len(ids)} tokens long and the text encoder reads {window}: this part would be cut: {cut!r}.")


def are_truncated(prompts: list[str], tokenizer: Any) -> list[bool]:
    """Of each of the prompts whether it is longer than the text encoder reads."""
    return [len(ids) > tokenizer.model_max_length for ids in tokenizer(prompts, truncation=False).input_ids]
