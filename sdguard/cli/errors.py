"""How a command ends where its input cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

BAD_INPUT, WITHHELD = 1, 3


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with what went wrong in one sentence; with ``SDGUARD_DEBUG`` set, with the traceback.

    The exit code is 3 where an image could not be delivered because it is memorized, else 1.
    """
    from sdguard.files.atomic import CannotWrite
    from sdguard.guarded.run import MemorizationError

    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, MemorizationError, CannotWrite) as error:
        if os.environ.get("SDGUARD_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise typer.Exit(WITHHELD if isinstance(error, MemorizationError) else BAD_INPUT) from None
