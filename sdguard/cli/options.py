"""Options that several commands have: each is declared here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sdguard import testbed
from sdguard.choices import GUIDANCE_SCALE, STEPS, Precision
from sdguard.files.inputs import BadInput

# the model

Model = Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="What it runs on, as torch names it.", show_default="the GPU where there is one, else the CPU")
]
Dtype = Annotated[Precision | None, typer.Option(help="The precision it runs in.", show_default="that of the weights")]
ProfileFile = Annotated[
    Path | None, typer.Option(help="A profile file, in place of the one of the model.", show_default="the one that is found, or made")
]
FalsePositiveRate = Annotated[float, typer.Option(help="Share of ordinary prompts that may be flagged.")]

# a run

Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default=f"{testbed.STEPS} embedded, {STEPS} else")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale.", show_default=f"{testbed.GUIDANCE_SCALE} embedded, {GUIDANCE_SCALE} else")
]
Height = Annotated[int | None, typer.Option(min=8, max=8192, help="Of the picture, in pixels.", show_default="the model's own")]
Width = Annotated[int | None, typer.Option(min=8, max=8192, help="Of the picture, in pixels.", show_default="the model's own")]
NegativePrompt = Annotated[str | None, typer.Option(help="What the picture is guided away from.", show_default="the empty prompt")]

# files of prompts

Column = Annotated[
    str | None, typer.Option(help="The column that holds the prompts.", show_default="prompt, caption or text, else the only one of text")
]
SkipEmpty = Annotated[bool, typer.Option("--skip-empty", help="Leave out rows without text, and say how many.")]


def refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise `BadInput` where one of the options of these names is on the command line, which moves nothing there; ``why`` says where."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise BadInput(f"--{name.replace('_', '-')} moves nothing {why}: leave it out.")


def run_setting(
    model: str, steps: int | None, guidance: float | None, height: int | None, width: int | None, negative_prompt: str | None
) -> dict[str, Any]:
    """What a pipeline's call is given of the options of a run; of those that were left out, what the pipeline itself takes."""
    from sdguard.denoiser.loading import default_setting

    given = {"height": height, "width": width, "negative_prompt": negative_prompt}
    return {**default_setting(model, steps, guidance), **{name: value for name, value in given.items() if value is not None}}
