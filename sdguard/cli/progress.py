"""Progress of long work, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """What is called with (what is being done, done, total): a bar for each kind of work once it has begun, by the main process alone."""
    from rich.progress import Progress, TaskID

    from sdguard.files.processes import processes

    bars, tasks = Progress(console=console), dict[str, TaskID]()

    def show(doing: str, done: int, total: int) -> None:
        if processes().is_main_process:
            bars.start()
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing)
            bars.update(tasks[doing], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
