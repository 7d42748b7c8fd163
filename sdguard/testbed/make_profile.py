"""Calibrate the embedded model; ``python -m sdguard.testbed.make_profile`` writes the profile it ships with.

The decision rests on the calibration split's never-memorized captions alone, the order of the steering methods on the development
split's memorized ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer
from rich.progress import Progress

from sdguard import testbed
from sdguard.decision.calibration import calibrate
from sdguard.decision.model_folder import PROFILE_FILE, PROMPTS_FILE
from sdguard.files.atomic import write_text
from sdguard.steering.learning import learn_methods


def main(model: Annotated[Path, typer.Option(help="The pipeline directory.")] = Path(__file__).parent / "model") -> None:
    """Write the calibration captions and the profile measured on them into the pipeline directory."""
    rows = pq.read_table(model / "prompts.parquet").to_pylist()
    prompts = [row["text"] for row in rows if row["split"] == "calibration"]
    pipe = testbed.load()
    memorized = [row["text"] for row in rows if row["split"] == "development" and row["copy_rate"] >= 0.5]
    with Progress() as bar:
        task = bar.add_task("calibrating", total=len(prompts))
        profile = calibrate(pipe, prompts, progress=lambda done, _: bar.update(task, completed=done))
        order = bar.add_task("learning the order of methods", total=len(memorized))
        profile = learn_methods(pipe, profile, memorized, progress=lambda done, _: bar.update(order, completed=done))
    profile.save(model / PROFILE_FILE)
    write_text(model / PROMPTS_FILE, "\n".join(prompts) + "\n")
    for measured in profile.methods:
        typer.echo(f"{measured.method}: cured {measured.cured:.0%} at {measured.cost:.0f} evaluations, moved {measured.moved:.2f}")
    typer.echo(f"{model / PROFILE_FILE}: {profile.prompts} ordinary prompts, a score above {profile.threshold(0.01):.3f} is flagged at 1%")


if __name__ == "__main__":
    typer.run(main)
