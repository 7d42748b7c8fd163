"""Work that streams what it sees to a page, and can be stopped."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import nn

Emit = Callable[[Any], None]


class Stopped(BaseException):
    """Ends work that nobody waits for any more; no `Exception`, so that nothing on the way takes it for a signal that failed."""


#: ``over`` says whether the work of this thread is to end, where it is `streamed`.
_here = threading.local()
#: how long `streamed` waits for news, in seconds, before it gives way with None: so soon it can be closed, whatever the work is at.
PATIENCE = 0.25


def streamed(work: Callable[[Emit], None], stop: threading.Event | None = None) -> Generator[Any, None, None]:
    """What ``work(emit)`` emits, as it comes, from a thread of its own, and None while there is no news; then raises what it raised.

    Where the reader is slower than the work, only the newest of several events of one type is given. Setting ``stop`` ends the iterator
    within `PATIENCE`. That, or closing the iterator, ends the work at its next ``emit``, and a denoiser call that is under way in it
    (`stoppable`) before its next layer.
    """
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    closed = threading.Event()  # not ``stop``, which tells whoever set it from work that ended of itself

    def over() -> bool:
        return closed.is_set() or (stop is not None and stop.is_set())

    def emit(event: Any) -> None:
        if over():
            raise Stopped
        found.put(("event", event))
        time.sleep(0.002)  # so that whoever reads comes to the end of what there is, and takes the newest

    def run() -> None:
        _here.over = over
        try:
            work(emit)
            found.put(("end", None))
        except Stopped:
            found.put(("end", None))
        except BaseException as error:
            found.put(("error", error))

    threading.Thread(target=run, daemon=True).start()
    held: list[Any] = []
    try:
        while not over():
            try:
                kind, value = found.get(timeout=0 if held else PATIENCE)
            except queue.Empty:
                yield held.pop() if held else None
                continue
            if held and not (kind == "event" and type(value) is type(held[0])):
                yield held.pop()
            if kind == "error":
                raise value
            if kind == "end":
                return
            held[:] = [value]
    finally:
        closed.set()


def end_if_over(*_: Any) -> None:
    """Raise `Stopped` where this thread's work is `streamed` and nobody waits for it any more."""
    over = getattr(_here, "over", None)
    if over and over():
        raise Stopped


def stoppable(denoiser: nn.Module) -> None:
    """Let `streamed` work be ended within a call of ``denoiser``, steering's own among them; hangs a hook on its parts for good."""
    for part in denoiser.children():
        part.register_forward_pre_hook(end_if_over)


@dataclass(frozen=True)
class Progress:
    """How far a long work is: ``done`` of ``total``, and what is being done, in words.

    ``rests``: it holds nothing of the model while it says so, so that others may have a turn before it goes on.
    """

    doing: str
    done: int
    total: int
    rests: bool = False
