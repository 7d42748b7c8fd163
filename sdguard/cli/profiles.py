"""``sdguard profiles list``, ``show``, ``rm``, ``export``, ``import``: profiles in the user's cache, and those that came with a model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdguard.cli.console import say, say_line
from sdguard.cli.errors import one_sentence
from sdguard.files.inputs import BadInput

if TYPE_CHECKING:
    from sdguard.decision.profile import Profile

#: rates that ``show`` gives a threshold for.
RATES = (0.05, 0.01, 0.001)

app = typer.Typer(help="The profiles in your cache, and those that came with a model.", invoke_without_command=True)

Name = Annotated[str, typer.Argument(help="A name that 'sdguard profiles list' gives.", metavar="NAME")]
Model = Annotated[str | None, typer.Option(help="Those that came with this model as well: 'embedded', a pipeline directory, or a hub id.")]


@app.callback()
def main(context: typer.Context) -> None:
    """The profiles in your cache, and those that came with a model."""
    if context.invoked_subcommand is None:
        list_command()


@app.command("list")
def list_command(model: Model = None) -> None:
    """List profiles, the newest first."""
    from sdguard.decision.cache import cache_folder, cached_profiles
    from sdguard.decision.model_folder import profiles_in

    with one_sentence():
        came_along = profiles_in(folder_of(model)) if model else []
    kept = cached_profiles()
    console = Console(soft_wrap=True, highlight=False)
    for path in [*came_along, *kept]:
        name, about = described(path)
        console.print(f"[bold]{escape(name)}[/]\n  {escape(about)}")
    say_line(f"{len(kept)} in the cache, {cache_folder()}.")


def described(path: Path) -> tuple[str, str]:
    """A profile file's name, for a cached one the one it can be shown and removed by, and a line about it."""
    from sdguard.decision.cache import cache_folder, changed, name_of
    from sdguard.decision.known_profiles import read_profile
    from sdguard.decision.profile import ProfileError

    in_cache = path.parent == cache_folder()
    where = "in the cache" if in_cache else str(path)
    try:
        found = read_profile(path)
        size = f"{path.stat().st_size / 1000:.0f} kB"
    except (ProfileError, OSError) as error:
        return path.stem, str(error)
    about = f"{found.model.get('denoiser')}, {found.prompts} scores, made {day(changed(path))}, {size}, {where}"
    return path.stem if in_cache else name_of(found), about


def folder_of(model: str) -> Path:
    """The directory of a model's name, of a hub id its newest snapshot in the local cache; raises `BadInput` if there is none."""
    from huggingface_hub import try_to_load_from_cache

    from sdguard import testbed
    from sdguard.decision.model_folder import is_hub_id

    folder = testbed.path() if model == "embedded" else Path(model)
    if os.path.isdir(folder):  # a name may be too long for a path, which pathlib raises
        return folder
    index = try_to_load_from_cache(model, "model_index.json") if is_hub_id(model) else None
    if not isinstance(index, str):
        raise BadInput(f"There is no model at {model}: it is neither 'embedded', nor a directory, nor a hub id that was loaded before.")
    return Path(index).parent


def cached(name: str) -> Path:
    """The file of a cached profile; raises `BadInput` if no profile has this name."""
    from sdguard.decision.cache import cache_folder, cached_profiles

    found = {path.stem: path for path in cached_profiles()}
    if name.removesuffix(".json") not in found:
        raise BadInput(f"There is no profile {name!r} in {cache_folder()}: 'sdguard profiles list' shows those there are.")
    return found[name.removesuffix(".json")]


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="A name that 'sdguard profiles list' gives, or a file.", metavar="NAME")],
) -> None:
    """Show what a profile is of, and what it decides."""
    from sdguard.decision.known_profiles import read_profile

    with one_sentence():
        path = Path(name) if os.path.isfile(name) else cached(name)
        found = read_profile(path)
    table = Table(show_header=False, title=escape(path.stem))
    for what, value in facts(path, found).items():
        table.add_row(what, escape(value))
    Console().print(table)


def facts(path: Path, profile: Profile) -> dict[str, str]:
    """What there is to say of a profile, by what it is."""
    from sdguard.decision.cache import last_used, name_of, prompts_in
    from sdguard.decision.ordinary_prompts import is_shipped

    model = profile.model
    whose = "of sdguard's list" if is_shipped(profile.prompts_digest, prompts_in(profile)) else "of another list"
    thresholds = {f"threshold at {rate:g}": threshold(profile, rate) for rate in RATES}
    return {
        "name": name_of(profile),
        "file": str(path),
        "denoiser": f"{model.get('denoiser')}, {model.get('prediction')}, {model.get('size')} pixels",
        "weights": lines_of({part: ", ".join(f"{p} {digest[:8]}" for p, digest in of.items()) for part, of in model["weights"].items()}),
        "adapters": lines_of({part: f"{len(of)}, scaled by {scales(of)}" for part, of in model.get("adapters", {}).items()}) or "none",
        "patches": "\n".join(model.get("patches", [])) or "none",
        "prompts": f"{prompts_in(profile)} {whose}",
        "scored": str(profile.prompts),
        "set aside": f"{len(profile.set_aside)} as memorized",
        **thresholds,
        "order of methods": ", ".join(method.method for method in profile.methods) or "not learnt",
        "last used": day(last_used(path)),
    }


def day(moment: float) -> str:
    """A moment's day."""
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def lines_of(named: dict[str, str]) -> str:
    """A line for each entry."""
    return "\n".join(f"{name}: {value}" for name, value in named.items())


def scales(adapters: list[dict[str, Any]]) -> str:
    """What adapters are scaled by."""
    return ", ".join(f"{adapter.get('scale', 1):g}" for adapter in adapters)


def threshold(profile: Profile, rate: float) -> str:
    """The threshold at a rate, and where the realised rate lies; or that there is none."""
    from sdguard.decision.profile import ProfileError

    try:
        low, high = profile.false_positive_interval(rate)
        return f"{profile.threshold(rate):.3f}, realised rate {low:.2%} to {high:.2%} (95%)"
    except ProfileError:
        return "too few prompts"


@app.command("rm")
def rm_command(names: Annotated[list[str], typer.Argument(help="Names that 'sdguard profiles list' gives.", metavar="NAME...")]) -> None:
    """Remove profiles from your cache; where any of the names is unknown, none."""
    from sdguard.decision.cache import remove_cached

    with one_sentence():
        paths = [cached(name) for name in names]
        for path in paths:
            try:
                remove_cached(path)
            except OSError as error:
                raise BadInput(f"{path} cannot be removed: {error.strerror}.") from None
    say(f"{len(paths)} removed.")


@app.command("export")
def export_command(name: Name, file: Annotated[Path, typer.Argument(help="Where it goes.", metavar="FILE")]) -> None:
    """Write a cached profile into a file, which goes into a model's folder under sdguard/, or to 'sdguard profiles import' elsewhere."""
    from sdguard.decision.known_profiles import read_profile
    from sdguard.files.outputs import check_file, ensure_writable

    with one_sentence():
        profile = read_profile(cached(name))
        check_file(file)
        ensure_writable(file.parent)
        profile.save(file)
    say_line(f"{file}")


@app.command("import")
def import_command(file: Annotated[Path, typer.Argument(help="A profile.", metavar="FILE")]) -> None:
    """Take a profile into your cache, where the guard finds it for its model; a damaged one is refused."""
    from sdguard.decision.cache import cache_folder, cannot_be_written, keep_in_cache, name_of, told_of_cache, why_unwritable
    from sdguard.decision.known_profiles import read_profile

    with one_sentence(), told_of_cache():
        profile = read_profile(file)
        if trouble := why_unwritable(cache_folder()):
            raise BadInput(cannot_be_written(trouble))
        keep_in_cache(profile, cache_folder() / f"{name_of(profile)}.json")
    say_line(name_of(profile))
