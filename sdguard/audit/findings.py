"""The four audits as functions: from a subject to tables, a figure and a sentence; what ``sdguard audit`` and scripts call."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

from sdguard.audit.density import log_volume_element, log_volume_element_lanczos, speed
from sdguard.audit.dimension import below, classify, data_dimension, deficit, model_dimension
from sdguard.audit.figures import draw_density, draw_dimensions, draw_neighbours, draw_scores, save
from sdguard.audit.likelihood import gaussian, signs
from sdguard.audit.memorization import memorization
from sdguard.audit.neighbours import pixels, sample_ratio, second_ratio
from sdguard.audit.subjects import Diffusion, Generator, Samples, Trainable, load_subject
from sdguard.files.inputs import BadInput
from sdguard.files.outputs import ensure_writable
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured
from sdguard.testbed.copies import RATIO, SSCD

BATCH = 64


class Findings(NamedTuple):
    """What an audit found.

    Attributes:
        name: of the figure's file.
        tables: by the name of their files.
        figure: of them.
        sentence: what they come to.
    """

    name: str
    tables: dict[str, pd.DataFrame]
    figure: Figure
    sentence: str

    def write(self, out: Path) -> list[str]:
        """Write tables and figure into ``out``, each whole or not at all; returns their names."""
        for name, table in self.tables.items():
            write_table(table, out / f"{name}.parquet")
        save(self.figure, out / f"{self.name}.png")
        return [*(f"{name}.parquet" for name in self.tables), f"{self.name}.png"]


def audit_score(subject: str, folds: int, repeats: int, seed: int, out: Path) -> Findings:
    """The memorization score of every training point of a `Trainable`.

    Trainings are kept in ``out``, so that a stopped audit goes on, and more repeats go on from fewer.

    Raises:
        ValueError: there is no such subject, it has fewer points than folds, or ``out`` cannot be written to; one sentence.
    """
    model = load_subject(subject, Trainable)
    ensure_writable(out)
    table = memorization(model, folds, repeats, seed, out / "work", {"subject": subject, "folds": folds})
    sure = int((table.score > 2 * table.standard_error).sum())
    sentence = (
        f"{folds * repeats} trainings; mean score {table.score.mean():.2f} nats, which is the train-test gap, 95% under "
        f"{table.score.quantile(0.95):.2f}, highest {table.score.max():.2f} (point {table.point[table.score.idxmax()]}); {sure} of "
        f"{len(table)} points score over two standard errors;"
    )
    return Findings("score", {"score": table}, draw_scores(table), sentence)


def audit_density(subject: str, lanczos: int, probes: int, resolution: float, times: int, seed: int, out: Path) -> Findings:
    """The volume element of a `Generator` at its latents, by ``lanczos`` iterations (0: exactly), and the metric along paths between them.

    Raises:
        ValueError: there is no such subject, or ``out`` cannot be written to; one sentence.
    """
    g, latents = load_subject(subject, Generator)
    ensure_writable(out)

    def measure(rows: pd.DataFrame) -> pd.DataFrame:
        z = latents[rows.latent.tolist()]
        error = torch.zeros(len(z))
        if lanczos:
            draws = torch.Generator().manual_seed(seed + int(rows.latent.iloc[0]))
            volume, error = log_volume_element_lanczos(g, z, signs(z, probes, draws), lanczos, resolution)
        else:
            volume = log_volume_element(g, z, resolution)
        found = {"log_volume": volume.numpy(), "standard_error": error.numpy(), "log_density": (gaussian(z) - volume).numpy()}
        return rows.assign(**found)

    rows = pd.DataFrame({"latent": range(len(latents))})
    about = {"subject": subject, "lanczos": lanczos, "probes": probes, "resolution": resolution, "seed": seed}
    table = measured("density", rows, measure, out / "work", about, BATCH).drop(columns=[*about])
    paths = speed(g, latents[:8], latents[1:9], times).numpy()
    low, middle, high = table.log_volume.quantile([0.05, 0.5, 0.95])
    sentence = f"log volume element: median {middle:.2f} nats, 90% of latents within [{low:.2f}, {high:.2f}];"
    return Findings("density", {"density": table}, draw_density(table, paths), sentence)


def audit_lid(subject: str, neighbours: int, probes: int, seed: int, out: Path) -> Findings:
    """The local intrinsic dimension of a `Diffusion` model, by ``probes`` of its trace (0: exactly), against its data's.

    Raises:
        ModuleNotFoundError: scikit-dimension is not installed; the message says which extra has it.
        ValueError: there is no such subject, it has fewer data than ``neighbours``, or ``out`` cannot be written to; one sentence.
    """
    found = load_subject(subject, Diffusion)
    ensure_writable(out)
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
    sentence = f"{', '.join(f'{n} {verdict}' for verdict, n in table.verdict.value_counts().items())};"
    return Findings("lid", {"lid": table}, draw_dimensions(table), sentence)


def audit_neighbours(subject: str, embedding: str, out: Path) -> Findings:
    """The nearest-neighbour tests on `Samples`, in ``pixels`` or, for pictures, in ``sscd``.

    Raises:
        ModuleNotFoundError: SSCD's weights are not installed; the message says how to get them.
        ValueError: there is no such embedding or subject, they do not fit each other, or ``out`` cannot be written to; one sentence.
    """
    if embedding not in ("pixels", "sscd"):
        raise BadInput(f"--embedding is {embedding!r}; it must be 'pixels' or 'sscd'.")
    samples = load_subject(subject, Samples)
    if embedding == "sscd" and (samples.generated.dtype != "uint8" or samples.generated.ndim != 4):
        raise BadInput(f"SSCD looks at pictures, uint8 of [n, H, W, 3], and {subject!r} has {samples.generated.dtype} points.")
    embed = SSCD() if embedding == "sscd" else pixels
    ensure_writable(out)
    generated = pd.DataFrame({"second_ratio": second_ratio(samples.generated, samples.training, embed)})
    training = pd.DataFrame({"sample_ratio": sample_ratio(samples.training, samples.held_out, samples.generated, embed)})
    sentence = (
        f"{(generated.second_ratio < RATIO).mean():.1%} of {len(generated)} generated points lie within a third of the second nearest's "
        f"distance; the model draws nearer than unseen data to {(training.sample_ratio > 1).mean():.1%} of {len(training)} training points;"
    )
    tables = {"neighbours-generated": generated, "neighbours-training": training}
    return Findings("neighbours", tables, draw_neighbours(generated, training), sentence)
