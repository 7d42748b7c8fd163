"""What the first use of an unknown model costs: ``python -m benchmarks first-use`` counts the denoiser evaluations of its calibration.

The embedded model and those of `benchmarks.models.development_models` are calibrated as `sdguard.decision.store` does it, on the ordinary
prompts it would take, without a look at profiles that are known. An evaluation is one row of a denoiser call. Writes
``results/first-use.json``, the documentation's table, and the README's sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import typer
from torch import Tensor

from benchmarks.documents import ROOT, markdown, put
from benchmarks.models import development_models, embedded_model, read_model
from benchmarks.running import versions
from sdguard.cli.errors import one_sentence
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.store import FIRST_USE_PROMPTS
from sdguard.denoiser import reference_call
from sdguard.denoiser.families import Family
from sdguard.files.atomic import write_text

NAME = "first-use"
#: steps of a picture that the cost is told in, each of two evaluations, and seconds that such a picture may take.
PICTURE_STEPS, SECONDS = 50, 4


def calibration_cost(pipe: Any, prompts: list[str]) -> int:
    """Evaluations that a calibration of ``pipe`` on ``prompts`` takes."""
    taken, evaluated = 0, reference_call.evaluated

    def counted(forward: Callable[..., Any], family: Family, kwargs: dict[str, Any]) -> Tensor:
        nonlocal taken
        taken += len(kwargs[family.sample])
        return evaluated(forward, family, kwargs)

    with mock.patch.object(reference_call, "evaluated", counted):
        calibrate(pipe, prompts)
    return taken


def pictures(row: Mapping[str, Any]) -> int:
    """How many pictures of `PICTURE_STEPS` steps, each of two evaluations, cost what a calibration does."""
    return round(row["evaluations"] / (2 * PICTURE_STEPS))


def brief_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The documentation's table: a row a model."""
    cells = [[row["model"], str(row["prompts"]), f"{row['evaluations']:,}", str(pictures(row))] for row in rows]
    return markdown(["model", "prompts", "evaluations", f"pictures of {PICTURE_STEPS} steps"], cells)


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the README says of first use: in pictures, and in minutes where a picture takes a time that is easily counted with."""
    most = {name: max(row[name] for row in rows) for name in ("prompts", "evaluations")}
    least, longest = min(map(pictures, rows)), max(map(pictures, rows))
    cost = f"{least} to {longest}" if least < longest else f"{least}"
    return (
        f"**First use of a model** calibrates it once, on {most['prompts']} ordinary prompts. That costs what {cost} pictures of "
        f"{PICTURE_STEPS} steps cost: where a picture takes {SECONDS} seconds, {longest * SECONDS / 60:.1f} minutes."
    )


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, which are written to.")] = ROOT,
) -> None:
    """Count what the first use of each model costs."""
    with one_sentence():
        models = [*(read_model(folder) for folder in development_models()), embedded_model()]
        rows: list[dict[str, Any]] = []
        for model in models:
            prompts = evenly(ordinary_prompts(model.pipe), FIRST_USE_PROMPTS)
            rows.append({"model": model.name, "prompts": len(prompts), "evaluations": calibration_cost(model.pipe, prompts)})
            typer.echo(f"{model.name}: {rows[-1]['evaluations']:,} evaluations")
    write_text(out / f"{NAME}.json", json.dumps({"rows": rows, **versions()}, indent=1))
    typer.echo(brief_table(rows))
    put(NAME, brief_table(rows), root)
    put(f"{NAME}-cost", sentence(rows), root)


if __name__ == "__main__":
    typer.run(main)
