"""How a command ends: its exit codes, and what it says where its input cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer
from rich.console import Console
from rich.markup import escape


class Exit(IntEnum):
    """The exit codes of ``sdguard``; what each means is `MEANING`."""

    DONE = 0
    BAD_INPUT = 1
    USAGE = 2
    WITHHELD = 3
    DISCOVERED = 4


#: what a command's exit code says, wherever it is documented.
MEANING: dict[Exit, str] = {
    Exit.DONE: "done; images were delivered, steered ones included",
    Exit.BAD_INPUT: "something given cannot be used, or a file cannot be written: one sentence says what, and nothing half written is left",
    Exit.USAGE: "wrong usage: an unknown command or option, or a value that an option does not take",
    Exit.WITHHELD: "generate: at least one image was withheld, or with --on-failure raise none was delivered because of one",
    Exit.DISCOVERED: "scan --exit-code: a prompt was discovered, or could not be judged",
}


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with what went wrong in one sentence; with ``SDGUARD_DEBUG`` set, with the traceback.

    The exit code is that of a withheld image where an image could not be delivered because it is memorized.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    from sdguard.files.atomic import CannotWrite
    from sdguard.guarded.run import MemorizationError

    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError, MemorizationError, CannotWrite) as error:
        if os.environ.get("SDGUARD_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise typer.Exit(Exit.WITHHELD if isinstance(error, MemorizationError) else Exit.BAD_INPUT) from None
    except (RuntimeError, MemoryError) as error:
        if os.environ.get("SDGUARD_DEBUG") or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        Console(stderr=True).print("[red]There is not enough memory: smaller batches or pictures, or --dtype float16, take less.[/]")
        raise typer.Exit(Exit.BAD_INPUT) from None
