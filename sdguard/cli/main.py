"""The command line: ``sdguard generate``, ``scan``, ``explain``, ``calibrate``, ``profiles``, ``audit``, ``demo``.

Exit codes: 0 all images delivered, steered ones included; 1 bad input, nothing written; 2 wrong usage; 3 at least one image withheld.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdguard.cli.audit import app as audit
from sdguard.cli.commands import BadInput, check_prompts, default_setting, load_pipeline, one_sentence, writable
from sdguard.guarded.config import GuardConfig

WITHHELD = 3
BATCH = 8
SHOWN = 20
COLOURS = {"clean": "green", "flagged": "yellow", "steered": "cyan", "withheld": "red"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Keep a text-to-image model from giving back training images.")
app.add_typer(audit, name="audit")


@app.callback()
def main() -> None:
    """Keep a text-to-image model from giving back training images."""


def generate_guarded(
    pipe: Any, prompts: list[str], seeds: list[int], compare: bool = False, **setting: Any
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Run a guarded pipeline over prompts x seeds: images, unguarded twins (empty unless ``compare``), report rows."""
    import torch

    from sdguard.guarded.pipeline import unguard

    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images: list[Any] = []
    twins: list[Any] = []
    rows: list[dict[str, Any]] = []
    for start in range(0, len(jobs), BATCH):
        some = jobs[start : start + BATCH]

        def call(target: Any, some: list[tuple[str, int]] = some) -> Any:
            generators = [torch.Generator().manual_seed(seed) for _, seed in some]
            return target([prompt for prompt, _ in some], generator=generators, **setting)

        output = call(pipe)
        images.extend(output.images)
        rows.extend({**asdict(report), "seed": seed} for report, (_, seed) in zip(output.guard, some, strict=True))
        if compare:
            twins.extend(call(unguard(pipe)).images)
    return images, twins, rows


def save_all(out: Path, images: dict[str, Any], report: Any, report_name: str = "report.json") -> None:
    """Write the images and the report as JSON, each whole or not at all."""
    for name, image in images.items():
        partial = out / f".{name}.partial"
        image.save(partial, format="PNG")
        partial.replace(out / name)
    partial = out / f".{report_name}.partial"
    partial.write_text(json.dumps(report, indent=1))
    partial.replace(out / report_name)


def verdict_table(rows: list[dict[str, Any]]) -> Table:
    """The reports as a table for people."""
    from sdguard.guarded.report import GuardReport

    table = Table("prompt", "seed", "verdict", "extra evaluations", "why", title="sdguard", show_lines=True)
    for row in rows:
        report = GuardReport.from_row(row)
        verdict = f"[{COLOURS[report.verdict]}]{report.verdict}[/]"
        table.add_row(escape(report.prompt or ""), str(row["seed"]), verdict, str(report.extra_evaluations), escape(report.reason))
    return table


def side_by_side(twins: list[Any], images: list[Any]) -> Any:
    """Unguarded pictures above, guarded below."""
    from PIL import Image

    width, height = images[0].size
    canvas = Image.new("RGB", (width * len(images), 2 * height))
    for i, (twin, image) in enumerate(zip(twins, images, strict=True)):
        canvas.paste(twin, (i * width, 0))
        canvas.paste(image, (i * width, height))
    return canvas


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT...")],
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    seed: Annotated[int, typer.Option(help="Seed of the first image of each prompt; the next ones count up.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Images per prompt.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 10 embedded, 50 else]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: 2.5 embedded, 7.5 else]")] = None,
    out: Annotated[Path, typer.Option(help="Where images and report.json go.")] = Path("out"),
    compare: Annotated[bool, typer.Option("--compare", help="Add the unguarded twins and a side-by-side sheet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    mode: Annotated[str, typer.Option(help="steer, observe or block.")] = "steer",
    fpr: Annotated[float, typer.Option(help="Share of ordinary prompts that may be flagged.")] = 0.01,
    on_failure: Annotated[str, typer.Option(help="withhold, pass or raise, when steering does not pass verification.")] = "withhold",
    steering: Annotated[
        list[str] | None, typer.Option(help="A steering method; repeat for a ladder of your own. [default: the profile's]")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="A profile file, in place of the one that is found or made.")] = None,
) -> None:
    """Generate images under guard, print the verdicts, and write images and report.json."""
    from sdguard.guarded.pipeline import guard

    with one_sentence():
        config = GuardConfig(mode, fpr, on_failure, profile, steering=steering)  # type: ignore[arg-type]
        pipe = guard(load_pipeline(model), config)
        check_prompts(prompts, pipe.tokenizer)
        writable(out)
        images, twins, rows = generate_guarded(
            pipe,
            prompts,
            list(range(seed, seed + n)),
            compare,
            **default_setting(model, steps, guidance),
        )
    files = {f"{i:02d}.png": image for i, image in enumerate(images)}
    files.update({f"{i:02d}-unguarded.png": image for i, image in enumerate(twins)})
    if compare:
        files["compare.png"] = side_by_side(twins, images)
    save_all(out, files, rows)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        Console().print(verdict_table(rows))
        Console().print(f"{len(files)} pictures and report.json in {out}/")
    if any(row["verdict"] == "withheld" for row in rows):
        raise typer.Exit(WITHHELD)


@app.command()
def scan(
    file: Annotated[Path, typer.Argument(help="Prompts: text, one a line, or CSV, JSON lines, parquet.", metavar="FILE")],
    column: Annotated[
        str | None, typer.Option(help="The column that holds the prompts. [default: prompt, caption or text, else the only one of text]")
    ] = None,
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    seeds: Annotated[int, typer.Option(min=1, help="Noises for each prompt.")] = 1,
    fdr: Annotated[float, typer.Option(help="Share of the discovered prompts that may be ordinary ones.")] = 0.05,
    fpr: Annotated[float, typer.Option(help="Share of ordinary prompts that may be flagged, as for a guarded run.")] = 0.01,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 10 embedded, 50 else]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: 2.5 embedded, 7.5 else]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one denoiser batch.")] = BATCH,
    out: Annotated[Path, typer.Option(help="Where the ranked table goes: .csv, .jsonl or .parquet.")] = Path("out/scan.csv"),
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster ($RAY_ADDRESS, else this machine).")] = "local",
    profile: Annotated[Path | None, typer.Option(help="A profile file, in place of the one that is found or made.")] = None,
) -> None:
    """Rank the prompts of a file by memorization p-value without making pictures; a killed scan goes on where it stopped.

    Under 'accelerate launch', processes share the work.
    """
    from accelerate.utils import broadcast_object_list, gather_object
    from rich.progress import Progress

    from sdguard.files.processes import processes
    from sdguard.files.prompt_files import check_writable, read_prompts, write_table
    from sdguard.scan import scan as scanning

    with one_sentence():
        if not 0 < fdr < 1:
            raise BadInput(f"--fdr is {fdr:g}; it must lie between 0 and 1.")
        if engine not in ("local", "ray"):
            raise BadInput(f"--engine is {engine!r}; it must be 'local' or 'ray'.")
        config = GuardConfig("observe", fpr, "pass", profile)
        prompts = read_prompts(file, column).to_dict()
        check_writable(out)
        state = processes()
        if engine == "ray" and state.num_processes > 1:
            raise BadInput("--engine ray shares the work itself: run it without 'accelerate launch'.")
        pipe = load_pipeline(model).to(state.device)
        setting = default_setting(model, steps, guidance)
        found = broadcast_object_list([scanning.guarded_profile(pipe, config, setting) if state.is_main_process else None])[0]
        writable(out.parent)
        options = {"seeds": seeds, "false_positive_rate": fpr, "batch_size": batch_size, "journal": out, **setting}
        if engine == "ray":
            from sdguard.scan.ray_engine import scan_with_ray

            batches = scan_with_ray(partial(load_pipeline, model), found, prompts, **options)
        else:
            batches = scanning.scan(pipe, found, prompts, state=state, **options)
        rows: list[dict[str, Any]] = []
        with Progress(disable=not state.is_main_process, console=Console(stderr=True)) as bar:
            task = bar.add_task("scanning", total=len(prompts))
            for batch in batches:
                rows += batch
                bar.update(task, completed=min(len(prompts), len(rows) * state.num_processes))
        rows = gather_object(rows) if state.num_processes > 1 else rows
        if state.is_main_process:
            table = scanning.ranked(rows, prompts, fdr)
            write_table(table, out)
        state.wait_for_everyone()
        for path in scanning.journals(out, state.process_index, state.num_processes):
            path.unlink(missing_ok=True)
        if not state.is_main_process:
            return
    window = pipe.tokenizer.model_max_length
    cut = sum(len(ids) > window for ids in pipe.tokenizer(list(prompts.values()), truncation=False).input_ids)
    failed = table[table.error != ""]
    Console().print(ranking(table))
    notes = [
        f"{int(table.discovered.sum())} of {len(table)} prompts discovered at a false discovery rate of {fdr:g}; "
        f"{table.evaluations.mean():.1f} denoiser evaluations a prompt; {out}",
        scanning.power_note(found, seeds, int(table.p_value.notna().sum()), fdr),
        f"{cut} prompts are longer than the {window} tokens that the text encoder reads; the rest of them was not read." if cut else None,
        f"{len(failed)} prompts could not be judged; the first of them, row {failed.row.iloc[0]}: {failed.error.iloc[0]}"
        if len(failed)
        else None,
    ]
    for note in filter(None, notes):
        Console().print(escape(note), highlight=False)


def ranking(table: Any) -> Table:
    """The first rows of a scan's table, for people."""
    shown = Table("rank", "row", "prompt", "score", "p", "q", title=f"the first {min(SHOWN, len(table))} of {len(table)} prompts")
    for rank, row in enumerate(table.head(SHOWN).itertuples(), start=1):
        style = "red" if row.discovered else None
        shown.add_row(
            str(rank), str(row.row), escape(row.prompt), f"{row.score:+.2f}", f"{row.p_value:.3g}", f"{row.q_value:.3g}", style=style
        )
    return shown


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="The prompt to explain.")],
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    seed: Annotated[int, typer.Option(help="Seed of the starting noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 10 embedded, 50 else]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: 2.5 embedded, 7.5 else]")] = None,
    out: Annotated[Path, typer.Option(help="Where explain.png and explain.json go.")] = Path("out"),
) -> None:
    """Show which words make a prompt pull, and where in the picture: unguarded picture and heat map go to explain.png."""
    import torch
    from PIL import Image

    from sdguard.explain.explanation import explain, heat

    with one_sentence():
        pipe = load_pipeline(model)
        check_prompts([prompt], pipe.tokenizer)
        writable(out)
        setting = default_setting(model, steps, guidance)
        found = explain(pipe, prompt, seed, **setting)
        picture = pipe(prompt, generator=torch.Generator().manual_seed(seed), **setting).images[0]
    sheet = Image.new("RGB", (2 * picture.width, picture.height))
    sheet.paste(picture, (0, 0))
    sheet.paste(heat(picture, found.pull), (picture.width, 0))
    save_all(out, {"explain.png": sheet}, asdict(found), "explain.json")
    table = Table("word", "norm that goes without it", "share of the gradient", title=f"guidance norm {found.guidance_norm:.3g}")
    strongest = max(1e-9, *found.left_out)
    for word, fall, share in zip(found.words, found.left_out, found.gradient, strict=True):
        red = round(255 * max(0.0, fall) / strongest)
        table.add_row(f"[bold rgb({max(90, red)},90,90)]{escape(word)}[/]", f"{fall:+.1%}", f"{share:.1%}")
    Console().print(table)
    Console().print(f"rank agreement of the two: {found.agreement:+.2f}; explain.png and explain.json in {out}/")


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
    prompts: Annotated[Path | None, typer.Option(help="File of ordinary prompts, in place of those that come along.")] = None,
    memorized: Annotated[
        Path | None, typer.Option(help="File of prompts known to be memorized: they fit the signals' weights and the ladder's order.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", min=4, help="Use so many of the prompts, evenly spaced.")] = None,
    fpr: Annotated[float, typer.Option(help="The false-positive rate the profile has to support.")] = 0.01,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. [default: 10 embedded, 50 else]")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. [default: 2.5 embedded, 7.5 else]")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. [default: the model's]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise; the next ones count up.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes. [default: the user's cache, where the guard finds it]")] = None,
) -> None:
    """Measure ordinary prompts on a configuration and keep the profile; run under 'accelerate launch', processes share the work."""
    from rich.progress import Progress

    from sdguard.decision import calibration
    from sdguard.decision.profile import scores_needed
    from sdguard.denoiser.families import default_size
    from sdguard.files.processes import processes
    from sdguard.files.prompt_files import read_prompts
    from sdguard.steering.learning import learn_ladder

    with one_sentence():
        GuardConfig(false_positive_rate=fpr)  # refuses a rate that cannot be
        state = processes()
        pipe = load_pipeline(model).to(state.device)
        chosen = read_prompts(prompts).tolist() if prompts else calibration.ordinary_prompts(pipe)
        if n is not None:
            if n > len(chosen):
                raise BadInput(f"--n asks for {n} prompts, and there are {len(chosen)}.")
            chosen = calibration.evenly(chosen, n)
        scored = len(calibration.split(len(chosen))[1])
        if scored < (needed := scores_needed(fpr)):
            raise BadInput(
                f"A false-positive rate of {fpr:g} needs {needed} prompts to score; of {len(chosen)} prompts {scored} are scored."
            )
        known = read_prompts(memorized).tolist() if memorized else []
        usual = default_setting(model, steps, guidance)
        size = default_size(pipe)
        setting = {
            "steps": usual["num_inference_steps"],
            "guidance_scale": usual["guidance_scale"],
            "height": height or size,
            "width": width or size,
        }
        path = out or calibration.cache_path(calibration.fingerprint(pipe, **setting))
        writable(path.parent)
        with Progress(disable=not state.is_main_process) as bar:
            task = bar.add_task("calibrating")
            profile = calibration.calibrate(
                pipe,
                chosen,
                **setting,
                seed=seed,
                memorized=known,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                journal=path,
                state=state,
            )
        if not state.is_main_process:
            return
        if known:
            with Progress() as bar:
                task = bar.add_task("learning the ladder", total=len(known))
                profile = learn_ladder(
                    pipe, profile, known, seed=seed, progress=lambda done, _: bar.update(task, completed=done), **setting
                )
        profile.save(path)
    low, high = profile.false_positive_interval(fpr)
    Console().print(
        f"{path}: {profile.prompts} scores of ordinary prompts; at a false-positive rate of {fpr:g} a score above "
        f"{profile.threshold(fpr):.3f} is flagged, and the realised rate lies between {low:.2%} and {high:.2%} (95%).",
        highlight=False,
    )


@app.command()
def profiles() -> None:
    """List the profiles in the user's cache."""
    from sdguard.decision import calibration
    from sdguard.decision.profile import Profile, ProfileError

    table = Table("pipeline", "scheduler", "steps", "guidance", "size", "dtype", "scores", "file", title=f"{calibration.cache_folder()}")
    for path in sorted(calibration.cache_folder().glob("*.json")):
        try:
            found = Profile.load(path)
        except ProfileError as error:
            table.add_row(f"[red]{escape(str(error))}[/]")
            continue
        about = found.fingerprint
        size = f"{about['width']}x{about['height']}"
        row = (about["pipeline"], about["scheduler"], str(about["steps"]), f"{about['guidance_scale']:g}", size, about["dtype"])
        table.add_row(*row, str(found.prompts), path.name)
    Console().print(table)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="'embedded', a pipeline directory, or a hub id.")] = "embedded",
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
