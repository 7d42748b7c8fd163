"""The command line: ``sdguard generate``, ``scan``, ``explain``, ``calibrate``, ``profiles``, ``audit``, ``demo``.

Its exit codes are `sdguard.cli.errors.Exit`. What takes long to import is imported by the command that needs it, so that help is quick.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdguard import __version__
from sdguard.choices import BATCH_SIZE, Engine, Mode, OnFailure
from sdguard.cli.audit import app as audit
from sdguard.cli.console import say, say_line
from sdguard.cli.errors import MEANING, Exit, one_sentence
from sdguard.cli.options import (
    Column,
    Device,
    Dtype,
    FalsePositiveRate,
    Guidance,
    Height,
    Model,
    NegativePrompt,
    ProfileFile,
    SkipEmpty,
    Steps,
    Width,
    refuse_given,
    run_setting,
)
from sdguard.cli.profiles import app as profiles
from sdguard.cli.progress import progress_bars
from sdguard.files.inputs import BadInput

SHOWN = 20

EXIT_CODES = "\n\n".join(["Exit codes:", *(f"{code.value}  {meaning}" for code, meaning in MEANING.items())])

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(audit, name="audit")
app.add_typer(profiles, name="profiles")


def show_version(asked: bool) -> None:
    """Print the version, and end."""
    if asked:
        typer.echo(f"sdguard {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def main(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Keep a text-to-image model from giving back training images."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported: what torchvision would add is of no use here


@app.command("generate")
def generate_command(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT...")],
    model: Model = "embedded",
    seed: Annotated[int, typer.Option(help="Seed of the first image of each prompt; the next ones count up.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images per prompt.")] = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="Where images and report.json go.")] = Path("out/generate"),
    compare: Annotated[bool, typer.Option("--compare", help="Add the unguarded twins and a side-by-side sheet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    mode: Annotated[Mode, typer.Option(help="What is done to a flagged image.")] = "steer",
    fpr: FalsePositiveRate = 0.01,
    on_failure: Annotated[OnFailure, typer.Option(help="What is done when steering does not pass verification.")] = "withhold",
    steering: Annotated[
        list[str] | None,
        typer.Option(help="A steering method; repeat for a sequence of your own.", show_default="the order of the profile"),
    ] = None,
    profile: ProfileFile = None,
) -> None:
    """Generate images under guard, print the verdicts, and write images and report.json."""
    from sdguard.denoiser.loading import check_prompts, load_for_runs
    from sdguard.files.outputs import ensure_writable, save_pictures
    from sdguard.guarded.config import GuardConfig
    from sdguard.guarded.generate import generate_guarded, picture_files, verdict_table
    from sdguard.guarded.pipeline import guard

    with one_sentence():
        config = GuardConfig(mode, fpr, on_failure, profile, steering=steering)
        pipe = guard(load_for_runs(model, device, dtype), config)
        check_prompts(prompts, pipe.tokenizer, negative_prompt)
        ensure_writable(out)
        seeds = list(range(seed, seed + n))
        setting = run_setting(model, steps, guidance, height, width, negative_prompt)
        images, twins, rows = generate_guarded(pipe, prompts, seeds, compare, **setting)
        files = picture_files(images, twins, rows)
        save_pictures(out, files, rows)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        Console().print(verdict_table(rows))
        say(f"{len(files)} picture{'s' * (len(files) != 1)} and report.json in {out}/")
    if any(row["verdict"] == "withheld" for row in rows):
        raise typer.Exit(Exit.WITHHELD)


@app.command("scan")
def scan_command(
    file: Annotated[Path, typer.Argument(help="Prompts: text, one a line, or CSV, JSON lines, parquet; .gz of text.", metavar="FILE")],
    column: Column = None,
    skip_empty: SkipEmpty = False,
    model: Model = "embedded",
    seeds: Annotated[int, typer.Option(min=1, help="Noises for each prompt.")] = 1,
    fdr: Annotated[float, typer.Option(help="Share of the discovered prompts that may be ordinary ones.")] = 0.05,
    fpr: FalsePositiveRate = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one denoiser batch.")] = BATCH_SIZE,
    out: Annotated[Path, typer.Option(help="Where the ranked table goes: .csv, .jsonl or .parquet.")] = Path("out/scan.csv"),
    engine: Annotated[Engine, typer.Option(help="This machine, or a Ray cluster ($RAY_ADDRESS, else one on this machine).")] = "local",
    profile: ProfileFile = None,
    device: Device = None,
    dtype: Dtype = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help=f"End with {Exit.DISCOVERED} where a prompt is discovered, or could not be judged.")
    ] = False,
) -> None:
    """Rank the prompts of a file by memorization p-value without making pictures; a killed scan goes on where it stopped.

    Under 'accelerate launch', processes share the work.
    """
    from sdguard.scan.scan import power_note
    from sdguard.scan.scan_file import scan_file

    with one_sentence(), progress_bars(Console(stderr=True)) as show:
        found = scan_file(
            file,
            out,
            model,
            column=column,
            seeds=seeds,
            fdr=fdr,
            false_positive_rate=fpr,
            batch_size=batch_size,
            engine=engine,
            profile=profile,
            progress=partial(show, "scanning"),
            shown=SHOWN,
            skip_empty=skip_empty,
            device=device,
            dtype=dtype,
        )
    if found is None:
        return
    about = found.summary
    Console().print(ranking(about))
    notes = [
        f"{about.discovered} of {about.prompts} prompts discovered at a false discovery rate of {fdr:g}; "
        f"{about.evaluations:.1f} denoiser evaluations a prompt; {out}",
        power_note(found.profile, seeds, about.judged, fdr),
        f"{about.truncated} prompts are longer than the {found.window} tokens that the text encoder reads; the rest of them was not read."
        if about.truncated
        else None,
        f"{about.failed} prompts could not be judged; the first of them, row {about.failed_row}: {about.failed_error}"
        if about.failed
        else None,
    ]
    for note in filter(None, notes):
        say(note)
    if exit_code and (about.discovered or about.failed):
        raise typer.Exit(Exit.DISCOVERED)


def ranking(found: Any) -> Table:
    """The first rows of a scan's `Summary`, for people."""
    shown = Table("rank", "row", "prompt", "score", "p", "q", title=f"the first {len(found.first)} of {found.prompts} prompts")
    for rank, row in enumerate(found.first.itertuples(), start=1):
        style = "red" if row.discovered else None
        shown.add_row(
            str(rank), str(row.row), escape(row.prompt), f"{row.score:+.2f}", f"{row.p_value:.3g}", f"{row.q_value:.3g}", style=style
        )
    return shown


@app.command("explain")
def explain_command(
    prompt: Annotated[str, typer.Argument(help="The prompt to explain.")],
    model: Model = "embedded",
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    negative_prompt: NegativePrompt = None,
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, typer.Option(help="Where explain.png and explain.json go.")] = Path("out/explain"),
) -> None:
    """Show which words make a prompt pull, and where in the picture: unguarded picture and heat map go to explain.png."""
    from sdguard.denoiser.families import check_pipeline
    from sdguard.denoiser.loading import check_prompts, load_for_runs
    from sdguard.explain.explanation import explain, explanation_sheet, unguarded_picture
    from sdguard.files.outputs import ensure_writable, save_pictures

    with one_sentence():
        pipe = load_for_runs(model, device, dtype)
        check_pipeline(pipe)
        check_prompts([prompt], pipe.tokenizer, negative_prompt)
        ensure_writable(out)
        setting = run_setting(model, steps, guidance, height, width, negative_prompt)
        found = explain(pipe, prompt, seed, **setting)
        picture = unguarded_picture(pipe, prompt, seed, **setting)
        save_pictures(out, {"explain.png": explanation_sheet(picture, found)}, asdict(found), "explain.json")
    table = Table(
        "word",
        "norm that goes without it",
        "share of the gradient",
        title=f"guidance norm {found.guidance_norm:.3g}: how hard the prompt pulls at the first step",
    )
    strongest = max(1e-9, *found.left_out)
    for word, fall, share in zip(found.words, found.left_out, found.gradient, strict=True):
        red = round(255 * max(0.0, fall) / strongest)
        table.add_row(f"[bold rgb({max(90, red)},90,90)]{escape(word)}[/]", f"{fall:+.1%}", f"{share:.1%}")
    Console().print(table)
    say(f"rank agreement of the two: {found.agreement:+.2f}; explain.png and explain.json in {out}/")


@app.command("calibrate")
def calibrate_command(
    context: typer.Context,
    model: Model = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="File of ordinary prompts, in place of those that come along.")] = None,
    memorized: Annotated[
        Path | None,
        typer.Option(help="File of prompts known to be memorized: the order of the steering methods is learnt from them."),
    ] = None,
    column: Column = None,
    skip_empty: SkipEmpty = False,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=4, help="Use so many of the prompts, evenly spaced.", show_default="all")
    ] = None,
    fpr: Annotated[float, typer.Option(help="The false-positive rate the profile has to support.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise; the next ones count up.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes.", show_default="your cache")] = None,
    dtype: Dtype = None,
    device: Device = None,
    lora: Annotated[str | None, typer.Option(help="A LoRA that the runs use: a file, a directory or a hub id.")] = None,
    lora_scale: Annotated[float, typer.Option(help="What they scale it by.")] = 1.0,
    from_log: Annotated[
        Path | None, typer.Option(help="Rest the threshold on the scores of real traffic, a log of GuardConfig(score_log=...).")
    ] = None,
    memorized_share: Annotated[float, typer.Option(help="Of the logged pictures that may be memorized, at most.")] = 0.01,
) -> None:
    """Read ordinary prompts on a model and keep the profile, which serves all its runs.

    Under 'accelerate launch', processes share the work.
    """
    from sdguard.guarded.calibrate_model import Calibrated, calibrate_from_log, calibrate_model

    with one_sentence(), progress_bars() as show:
        made: Calibrated | None
        of_prompts = ("prompts", "memorized", "column", "skip_empty", "n", "seed")
        refuse_given(context, of_prompts if from_log else (), "with --from-log")
        refuse_given(context, () if from_log else ("memorized_share",), "without --from-log")
        refuse_given(context, () if lora else ("lora_scale",), "without --lora")
        if from_log:
            made = calibrate_from_log(
                model,
                from_log,
                memorized_share=memorized_share,
                false_positive_rate=fpr,
                out=out,
                dtype=dtype,
                device=device,
                lora=lora,
                lora_scale=lora_scale,
            )
        else:
            made = calibrate_model(
                model,
                prompts=prompts,
                memorized=memorized,
                column=column,
                count=n,
                false_positive_rate=fpr,
                seed=seed,
                out=out,
                progress=show,
                dtype=dtype,
                device=device,
                lora=lora,
                lora_scale=lora_scale,
                skip_empty=skip_empty,
            )
    if made is None:
        return
    profile = made.profile
    low, high = profile.false_positive_interval(fpr)
    say(
        f"{made.path}: {profile.prompts} scores of ordinary prompts; at a false-positive rate of {fpr:g} a score above "
        f"{profile.threshold(fpr):.3f} is flagged, and the realised rate lies between {low:.2%} and {high:.2%} (95%)."
    )
    if not made.found:
        name = str(made.path) if out else made.path.stem
        say_line(f"The guard does not take it by itself. It does with --profile {name}, or GuardConfig(profile={name!r}).")


@app.command("demo")
def demo_command(
    model: Model = "embedded",
    host: Annotated[str, typer.Option(help="The address it listens at; by default nobody but this machine can reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port it listens at.")] = 7860,
) -> None:
    """Open the demo in a browser: generate under guard, see why, look at the density, scan and calibrate."""
    with one_sentence():
        try:
            from sdguard.demo.app import serve
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "gradio":
                raise
            raise BadInput("The demo needs Gradio: pip install 'sdguard[demo]'.") from None
        serve(model, host, port)
