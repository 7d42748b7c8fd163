"""``sdguard audit score``, ``density``, ``lid``, ``neighbours``: each writes a parquet table and a figure, goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdguard.cli.commands import BadInput, one_sentence, writable

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(help="Look at memorization from the training side: is it there, and is it overfitting or the data?")

Name = Annotated[
    str, typer.Argument(help="An example, or module:callable that makes what sdguard.audit.subjects describes.", metavar="SUBJECT")
]
Out = Annotated[Path, typer.Option(help="Where the table and the figure go, and what is done of long work.")]
BATCH = 64


def finish(out: Path, name: str, figure: Any, said: str, **tables: pd.DataFrame) -> None:
    """Write tables and figure, and say what was found; by the main process alone."""
    from rich.console import Console

    from sdguard.audit.figures import save
    from sdguard.files.processes import processes
    from sdguard.files.prompt_files import write_table

    if not processes().is_main_process:
        return
    for part, table in tables.items():
        write_table(table, out / f"{part}.parquet")
    save(figure, out / f"{name}.png")
    files = ", ".join([*(f"{part}.parquet" for part in tables), f"{name}.png"])
    Console().print(f"{said} {files} in {out}/", highlight=False)


@app.command()
def score(
    subject: Name = "digits-vae",
    folds: Annotated[int, typer.Option(min=2, help="Folds of each repeat.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, each with folds and trainings of its own.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of folds and trainings.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Memorization score of every training point (van den Burg & Williams 2021): by how much having seen it raises its likelihood.

    Under 'accelerate launch', processes share the trainings. More repeats go on from fewer.
    """
    from sdguard.audit.subjects import Trainable, load

    with one_sentence():
        from sdguard.audit.figures import draw_scores
        from sdguard.audit.memorization import memorization

        model = load(subject, Trainable)
        writable(out)
        table = memorization(model, folds, repeats, seed, out / "work", {"subject": subject, "folds": folds})
    sure = int((table.score > 2 * table.standard_error).sum())
    said = (
        f"{folds * repeats} trainings; mean score {table.score.mean():.2f} nats, which is the train-test gap, 95% under "
        f"{table.score.quantile(0.95):.2f}, highest {table.score.max():.2f} (point {table.point[table.score.idxmax()]}); {sure} of "
        f"{len(table)} points score over two standard errors;"
    )
    finish(out, "score", draw_scores(table), said, score=table)


@app.command()
def density(
    subject: Name = "digits-decoder",
    lanczos: Annotated[int, typer.Option(min=0, help="Lanczos iterations, for large latents; 0 for the exact volume.")] = 0,
    probes: Annotated[int, typer.Option(min=1, help="Probes of Lanczos.")] = 4,
    resolution: Annotated[float, typer.Option(min=0, help="Outputs nearer than this count as one.")] = 0.0,
    times: Annotated[int, typer.Option(min=3, help="Times on each path between two latents.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the probes.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Output density of a generator (Feiszli 2017): the volume element at its latents, and the metric along paths between them."""
    import torch

    from sdguard.audit.subjects import Generator, load

    with one_sentence():
        import pandas as pd

        from sdguard.audit.density import log_volume, log_volume_lanczos, speed
        from sdguard.audit.figures import draw_density
        from sdguard.audit.likelihood import gaussian, signs
        from sdguard.files.measuring import measured

        g, latents = load(subject, Generator)
        writable(out)

        def measure(rows: pd.DataFrame) -> pd.DataFrame:
            z = latents[rows.latent.tolist()]
            error = torch.zeros(len(z))
            if lanczos:
                draws = torch.Generator().manual_seed(seed + int(rows.latent.iloc[0]))
                volume, error = log_volume_lanczos(g, z, signs(z, probes, draws), lanczos, resolution)
            else:
                volume = log_volume(g, z, resolution)
            found = {"log_volume": volume.numpy(), "standard_error": error.numpy(), "log_density": (gaussian(z) - volume).numpy()}
            return rows.assign(**found)

        rows = pd.DataFrame({"latent": range(len(latents))})
        about = {"subject": subject, "lanczos": lanczos, "probes": probes, "resolution": resolution, "seed": seed}
        table = measured("density", rows, measure, out / "work", about, BATCH).drop(columns=[*about])
        paths = speed(g, latents[:8], latents[1:9], times).numpy()
    low, middle, high = table.log_volume.quantile([0.05, 0.5, 0.95])
    said = f"log volume element: median {middle:.2f} nats, 90% of latents within [{low:.2f}, {high:.2f}];"
    finish(out, "density", draw_density(table, paths), said, density=table)


@app.command()
def lid(
    subject: Name = "manifolds",
    neighbours: Annotated[int, typer.Option(min=4, help="Nearest data points that the data's dimension is estimated from.")] = 50,
    probes: Annotated[int, typer.Option(min=0, help="Probes of the model's trace, for many dimensions; 0 for the exact one.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the probes.")] = 0,
    out: Out = Path("out/audit"),
) -> None:
    """Local intrinsic dimension of the model against the data's (Ross et al. 2024): overfitting (OD-Mem), the data (DD-Mem), or neither."""
    import torch

    from sdguard.audit.subjects import Diffusion, load

    with one_sentence():
        import pandas as pd

        from sdguard.audit.dimension import below, classify, data_dimension, deficit, model_dimension
        from sdguard.audit.figures import draw_dimensions
        from sdguard.audit.likelihood import signs

        found = load(subject, Diffusion)
        writable(out)
        x = found.points
        own = data_dimension(x.flatten(1).numpy(), found.data.flatten(1).numpy(), neighbours)
        draws = torch.Generator().manual_seed(seed)
        model = model_dimension(found.noise, x, found.level, signs(x, probes, draws) if probes else None)
        table = pd.DataFrame(
            {
                "point": range(len(x)),
                "model": model.value,
                "model_error": model.standard_error,
                "data": own.value,
                "data_error": own.standard_error,
                "deficit": deficit(model, own),
                "verdict": classify(model, own, below(own, found.simple)),
            }
        )
    counts = table.verdict.value_counts()
    finish(out, "lid", draw_dimensions(table), f"{', '.join(f'{n} {verdict}' for verdict, n in counts.items())};", lid=table)


@app.command()
def neighbours(
    subject: Name = "digits-samples",
    embedding: Annotated[str, typer.Option(help="pixels, or sscd for pictures.")] = "pixels",
    out: Out = Path("out/audit"),
) -> None:
    """Nearest-neighbour tests, the baseline: is a generated point a copy, and does the model draw nearer than unseen data come?"""
    from sdguard.audit.subjects import Samples, load

    with one_sentence():
        import pandas as pd

        from sdguard.audit.figures import draw_neighbours
        from sdguard.audit.neighbours import pixels, sample_ratio, second_ratio
        from sdguard.testbed.copies import RATIO, SSCD

        if embedding not in ("pixels", "sscd"):
            raise BadInput(f"--embedding is {embedding!r}; it must be 'pixels' or 'sscd'.")
        samples = load(subject, Samples)
        if embedding == "sscd" and (samples.generated.dtype != "uint8" or samples.generated.ndim != 4):
            raise BadInput(f"SSCD looks at pictures, uint8 of [n, H, W, 3], and {subject!r} has {samples.generated.dtype} points.")
        embed = SSCD() if embedding == "sscd" else pixels
        writable(out)
        generated = pd.DataFrame({"second_ratio": second_ratio(samples.generated, samples.training, embed)})
        training = pd.DataFrame({"sample_ratio": sample_ratio(samples.training, samples.held_out, samples.generated, embed)})
    said = (
        f"{(generated.second_ratio < RATIO).mean():.1%} of {len(generated)} generated points lie within a third of the second nearest's "
        f"distance; the model draws nearer than unseen data to {(training.sample_ratio > 1).mean():.1%} of {len(training)} training points;"
    )
    tables = {"neighbours-generated": generated, "neighbours-training": training}
    finish(out, "neighbours", draw_neighbours(generated, training), said, **tables)
