"""What the first use of an unknown model costs: ``python -m benchmarks first-use`` counts the denoiser evaluations of its calibration.

The embedded model and those of `benchmarks.models.development_models` are calibrated as `sdguard.decision.store` does it, on the ordinary
prompts it would take, without a look at profiles that are known. An evaluation is one row of a denoiser call. Writes
``results/first-use.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.documents import markdown
from benchmarks.models import development_models, embedded_model, read_model
from benchmarks.running import versions
from sdguard.cli.errors import one_sentence
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.store import FIRST_USE_PROMPTS
from sdguard.denoiser.families import denoiser_of, family_of
from sdguard.files.atomic import write_text

NAME = "first-use"
#: steps of a picture that the cost is told in, each of two evaluations.
PICTURE_STEPS = 50


def calibration_cost(pipe: Any, prompts: list[str]) -> int:
    """Evaluations that a calibration of ``pipe`` on ``prompts`` takes."""
    denoiser, sample, taken = denoiser_of(pipe), family_of(pipe).sample, 0

    def count(_: Any, places: tuple[Any, ...], names: dict[str, Any]) -> None:
        nonlocal taken
        taken += len(names[sample] if sample in names else places[0])

    handle = denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        calibrate(pipe, prompts)
    finally:
        handle.remove()
    return taken


def main(out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results") -> None:
    """Count what the first use of each model costs."""
    with one_sentence():
        models = [*(read_model(folder) for folder in development_models()), embedded_model()]
        rows: list[dict[str, Any]] = []
        for model in models:
            prompts = evenly(ordinary_prompts(model.pipe), FIRST_USE_PROMPTS)
            rows.append({"model": model.name, "prompts": len(prompts), "evaluations": calibration_cost(model.pipe, prompts)})
            typer.echo(f"{model.name}: {rows[-1]['evaluations']:,} evaluations")
    write_text(out / f"{NAME}.json", json.dumps({"rows": rows, **versions()}, indent=1))
    pictures = 2 * PICTURE_STEPS
    cells = [[r["model"], str(r["prompts"]), f"{r['evaluations']:,}", f"{r['evaluations'] / pictures:.0f}"] for r in rows]
    typer.echo(markdown(["model", "prompts", "evaluations", f"pictures of {PICTURE_STEPS} steps"], cells))


if __name__ == "__main__":
    typer.run(main)
