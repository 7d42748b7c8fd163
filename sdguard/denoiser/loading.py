"""The pipeline that a name stands for, the setting it is meant for, and the prompts that its text encoder reads whole."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sdguard.files.inputs import BadInput


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
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"The model {model} could not be loaded: {first}") from None


def absent_parts(index: dict[str, Any]) -> dict[str, None]:
    """The parts that a pipeline was saved without, such as Stable Diffusion 3's third text encoder: diffusers asks to be told."""
    return {name: None for name, value in index.items() if value == [None, None]}


def default_setting(model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps and guidance scale of a run, by default those the embedded model was made for, else Stable Diffusion's customary ones."""
    from sdguard import testbed

    defaults = (testbed.STEPS, testbed.GUIDANCE_SCALE) if model == "embedded" else (50, 7.5)
    return {"num_inference_steps": steps or defaults[0], "guidance_scale": defaults[1] if guidance is None else guidance}


def check_prompts(prompts: list[str], tokenizer: Any) -> None:
    """Raise `BadInput` for no prompt at all, an empty one, one that is no text, or one that the text encoder would cut."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise BadInput("There is no prompt to generate from: give at least one, and none that is empty.")
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # as Python reads bytes that are no UTF-8
            raise BadInput("The prompt holds half a character: its text is not valid Unicode.")
        ids = tokenizer(prompt, truncation=False).input_ids
        if len(ids) > tokenizer.model_max_length:
            cut = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()
            window = tokenizer.model_max_length
            raise BadInput(f"The prompt is {len(ids)} tokens long and the text encoder reads {window}: this part would be cut: {cut!r}.")


def are_truncated(prompts: list[str], tokenizer: Any) -> list[bool]:
    """Of each of the prompts whether it is longer than the text encoder reads."""
    return [len(ids) > tokenizer.model_max_length for ids in tokenizer(prompts, truncation=False).input_ids]
