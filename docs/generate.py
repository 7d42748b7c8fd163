"""The pages that are made at build time, from the source itself: reference, command line, and tables of what is supported."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sdguard
from sdguard.denoiser.families import REFUSED, TABLE
from sdguard.guarded.arguments import ARGUMENTS, ENTRIES, Decision
from sdguard.signals import SIGNALS
from sdguard.steering import METHODS

COMMANDS = "commands.md"
#: rooms that are applications: nobody imports them, and the command line has a page of its own.
APPLICATIONS = ("cli", "demo")


def rooms() -> dict[str, list[str]]:
    """The modules of each room of the package, by the room's name, in the order of names."""
    found: dict[str, list[str]] = {}
    for module in pkgutil.walk_packages(sdguard.__path__, "sdguard."):
        _, room, *inner = module.name.split(".")
        if room not in APPLICATIONS and "__main__" not in inner:
            found.setdefault(room, []).append(module.name)
    return found


def heading(text: str, line: str) -> str:
    """A heading of reStructuredText."""
    return f"{text}\n{line * len(text)}\n"


def module_pages() -> dict[str, str]:
    """The reference: what ``import sdguard`` gives, by its ``__all__``, and a page a room, of each module's own public names."""
    pages = {"sdguard.rst": f"{heading('sdguard', '=')}\n.. automodule:: sdguard\n   :members:\n   :imported-members:\n"}
    held = ", ".join(sdguard.__all__)
    for room, modules in rooms().items():
        parts = [heading(f"sdguard.{room}", "=")]
        for name in modules:
            title = [] if name == f"sdguard.{room}" else [heading(name.removeprefix(f"sdguard.{room}."), "-")]
            parts += [*title, f".. automodule:: {name}\n   :members:\n   :exclude-members: {held}\n"]
        pages[f"{room}.rst"] = "\n".join(parts)
    return pages


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of texts."""
    lines = [list(header), ["---" for _ in header], *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def first_sentence(thing: object) -> str:
    """The first sentence of a function's docstring."""
    function = thing.func if isinstance(thing, functools.partial) else thing
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".")


def called(thing: Any) -> str:
    """A function's name, and where some of its arguments are fixed, these too."""
    if not isinstance(thing, functools.partial):
        return str(thing.__name__)
    values = [getattr(value, "__name__", repr(value)) for value in (*thing.args, *thing.keywords.values())]
    fixed = [
        *values[: len(thing.args)],
        *(f"{name}={value}" for name, value in zip(thing.keywords, values[len(thing.args) :], strict=True)),
    ]
    return f"{thing.func.__name__}({', '.join(fixed)})"


def families() -> str:
    """A line a family of pipelines: its classes and its denoiser."""
    lines = [[first_sentence(family.encode), ", ".join(f"`{name}`" for name in family.classes), f"`{family.denoiser}`"] for family in TABLE]
    return table(["text encoders", "pipeline classes", "denoiser"], lines)


def refused() -> str:
    """A line for each kind of pipeline that is refused by name, and why."""
    return table(["in the name of the class", "why"], [[f"`{part}`", why] for part, why in REFUSED.items()])


def decisions(found: Iterable[Decision]) -> str:
    """A line for each decision about arguments: what they do to the judgement, and why."""
    lines = [[", ".join(f"`{name}`" for name in one.names), one.effect, one.reason] for one in found]
    return table(["argument", "effect", "why"], lines)


def signals() -> str:
    """A line a signal: its cost and what it is."""
    return table(
        ["signal", "what it is", "evaluations"], [[f"`{found.name}`", first_sentence(found.read), str(found.cost)] for found in SIGNALS]
    )


def methods() -> str:
    """A line a steering method: what it does and what it costs."""
    lines = [
        [f"`{name}`", first_sentence(found.correct), f"`{called(found.correct)}`", str(found.cost), str(found.step_cost)]
        for name, found in METHODS.items()
    ]
    return table(["method", "what it does", "function", "evaluations at most", "and at each step"], lines)


def commands() -> str:
    """The command line, as typer describes it."""
    words = [sys.executable, "-m", "typer", "sdguard.cli.main", "utils", "docs", "--name", "sdguard", "--title", "Command line"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def pages() -> Mapping[str, str]:
    """Every page that is made, by its path under ``docs/generated``."""
    return {
        **{f"reference/{name}": text for name, text in module_pages().items()},
        COMMANDS: commands(),
        "families.md": families(),
        "refused.md": refused(),
        "arguments.md": decisions(ARGUMENTS),
        "entries.md": decisions(ENTRIES),
        "signals.md": signals(),
        "methods.md": methods(),
    }


def write(folder: Path) -> list[str]:
    """Write the pages; those that are there already and have not changed are left alone, so that they are not built again.

    Returns the names of those that are parts of others, which include them.
    """
    found = pages()
    for name, text in found.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return [name for name in found if "/" not in name and name != COMMANDS]
