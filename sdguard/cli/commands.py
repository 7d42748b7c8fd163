"""What commands and the demo's page share: the model, the usual setting, and what is asked of input, in one sentence where it fails."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

BAD_INPUT = 1


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with what went wrong in one sentence and exit code 1; with ``SDGUARD_DEBUG`` set, with the traceback."""
    from sdguard.guarded.run import MemorizationError

    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, MemorizationError) as error:
        if os.environ.get("SDGUARD_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise typer.Exit(BAD_INPUT) from None


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
    if source.exists():
        if not (source / "model_index.json").is_file():
            raise BadInput(f"{source} is no diffusers pipeline: it has no model_index.json.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise BadInput(f"There is no model at {model}: it is neither 'embedded', nor a directory, nor a hub id of the form owner/name.")
    try:
        return DiffusionPipeline.from_pretrained(source if source.exists() else model)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"The model {model} could not be loaded: {first}") from None


def check_prompts(prompts: list[str], tokenizer: Any) -> None:
    """Raise `BadInput` for no prompt at all, an empty one, or one that the text encoder would cut."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise BadInput("There is no prompt to generate from: give at least one, and none that is empty.")
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False).input_ids
        if len(ids) > tokenizer.model_max_length:
            cut = tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()
            window = tokenizer.model_max_length
            raise BadInput(f"The prompt is {len(ids)} tokens long and the text encoder reads {window}: this part would be cut: {cut!r}.")


def writable(folder: Path) -> None:
    """Create ``folder``; raises `BadInput` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"The output directory {folder} cannot be written to: {error.strerror}.") from None


def default_setting(model: str, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps and guidance scale of a run, by default those the embedded model was made for, else Stable Diffusion's usual ones."""
    from sdguard import testbed

    usual = (testbed.STEPS, testbed.GUIDANCE_SCALE) if model == "embedded" else (50, 7.5)
    return {"num_inference_steps": steps or usual[0], "guidance_scale": usual[1] if guidance is None else guidance}
