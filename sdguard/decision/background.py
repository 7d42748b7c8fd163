"""Work that is done once beside everything else, in a thread that the end of the process does not wait for."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

logger = logging.getLogger(__name__)

#: seconds that the end of the process waits for a thread to come to a stop.
PATIENCE = 5.0


class Stopped(Exception):
    """The process ends."""


_threads: dict[Hashable, threading.Thread] = {}
_lock = threading.Lock()
_ending = threading.Event()


def in_background(key: Hashable, work: Callable[[Callable[[], None]], Any]) -> None:
    """Do ``work`` in a thread, unless work of this ``key`` was begun before: what failed is logged, and not tried again.

    ``work`` is given what it has to call now and then, which raises once the process ends.
    """

    def run() -> None:
        try:
            work(stop_if_ending)
        except Stopped:
            pass
        except Exception:
            logger.exception("sdguard: work in the background failed and is not tried again in this process")

    with _lock:
        if key not in _threads:
            _threads[key] = threading.Thread(target=run, name="sdguard", daemon=True)
            _threads[key].start()


def stop_if_ending() -> None:
    """Raise `Stopped` once the process ends."""
    if _ending.is_set():
        raise Stopped


@atexit.register
def end() -> None:
    """Have the threads stop: one that were still in torch when the interpreter goes could abort the process."""
    _ending.set()
    for thread in _threads.values():
        thread.join(PATIENCE)
