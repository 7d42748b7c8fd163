"""``sdguard audit score``, ``density``, ``lid``, ``neighbours``: each writes a parquet table and a figure, goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sdguard.cli.console import say
from sdguard.cli.errors import one_sentence

app = typer.Typer(help="Look at memorization from the training side: is it there, and is it overfitting or the data?")

Name = Annotated[
    str, typer.Argument(help="An example, or module:callable that makes what sdguard.audit.subjects describes.", metavar="SUBJECT")
]
Out = Annotated[Path, typer.Option(help="Where the table and the figure go, and what is done of long work.")]


def run_audit(audit: str, *options: Any, out: Path) -> None:
    """One audit of `sdguard.audit.findings`: its files, and what was found, by the main process alone."""
    from sdguard.files.processes import processes
    from sdguard.files.prompt_files import import_pandas

    with one_sentence():
        import_pandas()
        from sdguard.audit import findings

        found = getattr(findings, audit)(*options, out)
        files = ", ".join(found.write(out)) if processes().is_main_process else ""
    if files:
        say(f"{found.sentence} {files} in {out}/")


@app.command("score")
def score_command(
    subject: Name = "digits-vae",
    folds: Annotated[int, typer.Option(min=2, help="Folds of each repeat.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, each with folds and trainings of its own.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds and trainings.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Memorization score of every training point (van den Burg & Williams 2021): by how much having seen it raises its likelihood.

    Under 'accelerate launch', processes share the trainings. More repeats go on from fewer.
    """
    run_audit("audit_score", subject, folds, repeats, seed, out=out)


@app.command("density")
def density_command(
    subject: Name = "digits-decoder",
    lanczos: Annotated[int, typer.Option(min=0, help="Lanczos iterations, for large latents; 0 for the exact volume.")] = 0,
    probes: Annotated[int, typer.Option(min=1, help="Probes of Lanczos.")] = 4,
    resolution: Annotated[float, typer.Option(min=0, help="Outputs nearer than this count as one.")] = 0.0,
    times: Annotated[int, typer.Option(min=3, help="Times on each path between two latents.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the probes.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Output density of a generator (Feiszli 2017): the volume element at its latents, and the metric along paths between them."""
    run_audit("audit_density", subject, lanczos, probes, resolution, times, seed, out=out)


@app.command("lid")
def lid_command(
    subject: Name = "manifolds",
    neighbours: Annotated[int, typer.Option(min=4, help="Nearest data points that the data's dimension is estimated from.")] = 50,
    probes: Annotated[int, typer.Option(min=0, help="Probes of the model's trace, for many dimensions; 0 for the exact one.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the probes.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Local intrinsic dimension of the model against the data's (Ross et al. 2024): overfitting (OD-Mem), the data (DD-Mem), or neither."""
    run_audit("audit_lid", subject, neighbours, probes, seed, out=out)


@app.command("neighbours")
def neighbours_command(
    subject: Name = "digits-samples",
    embedding: Annotated[str, typer.Option(help="pixels, or sscd for pictures.")] = "pixels",
    out: Out = Path("out/audit"),
) -> None:
    """Nearest-neighbour tests, the baseline: is a generated point a copy, and does the model draw nearer than unseen data come?"""
    run_audit("audit_neighbours", subject, embedding, out=out)
