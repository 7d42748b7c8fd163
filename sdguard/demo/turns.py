"""Whose turn it is at the model: one piece of work at a time, clients by turns, however much each of them asks for."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdguard.demo.streaming import PATIENCE, Emit, Progress, end_if_over
from sdguard.files.inputs import BadInput

#: pieces of work of one address, waiting and under way; the server has room for twice as many.
MOST_AT_ONCE = 32


class Client(NamedTuple):
    """Who asks: an address, and a session there. A program that opens no session has a new one for every request."""

    address: str
    session: str

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """What it takes its turns as: as its address among the addresses, as itself among that address's sessions."""
        return (self.address,), (self.address, self.session)


@dataclass(eq=False)
class Place:
    """A piece of work that waits, or is under way."""

    client: Client


class Line:
    """Places in the order of their turns: addresses by turns, an address's sessions by turns, a session's places as they came.

    Whoever waits is served before anybody else is served twice: an address among the addresses, a session among those of its address.
    Whoever comes, or has been served and waits with more, stands behind all who wait.
    """

    def __init__(self) -> None:
        self.waiting: list[Place] = []
        self._since: dict[tuple[str, ...], int] = {}  # by key of whoever waits: when it came, or was last served
        self._clock = itertools.count()

    def join(self, place: Place) -> None:
        """Let a place wait."""
        self.waiting.append(place)
        for key in place.client.keys:
            self._since.setdefault(key, next(self._clock))

    def leave(self, place: Place) -> None:
        """Let a place wait no more."""
        self.waiting.remove(place)
        here = {key for other in self.waiting for key in other.client.keys}
        self._since = {key: when for key, when in self._since.items() if key in here}

    def take(self) -> Place | None:
        """The place whose turn it is, which leaves; None where nobody waits."""
        if not self.waiting:
            return None
        place = min(self.waiting, key=lambda place: [self._since[key] for key in place.client.keys])
        self.leave(place)
        self._since |= {key: next(self._clock) for key in place.client.keys if key in self._since}
        return place


class Turns:
    """The turns of threads: each waits in a `Line` until the one before it is done, or rests."""

    def __init__(self, most: int = MOST_AT_ONCE) -> None:
        self.most = most
        self._line = Line()
        self._running: Place | None = None
        self._changed = threading.Condition()

    def taken(self, client: Client, work: Callable[[Emit], None]) -> Callable[[Emit], None]:
        """The same work in its client's turn; where it emits a `Progress` that rests, all others who wait have a turn before it goes on.

        Raises `BadInput` where too much of its address waits already, and `Stopped` where it is ended while it waits.
        """

        def in_turn(emit: Emit) -> None:
            with self._turn(client) as rest:

                def resting(event: Any) -> None:
                    emit(event)
                    if isinstance(event, Progress) and event.rests:
                        rest()

                work(resting)

        return in_turn

    @contextmanager
    def _turn(self, client: Client) -> Iterator[Callable[[], None]]:
        """A turn from when it comes to the end of the block, which is given what lets others go before."""
        place = Place(client)

        def rest() -> None:
            with self._changed:
                if self._line.waiting:
                    self._running = None
                    self._wait(place)

        with self._changed:
            here = [*self._line.waiting, *([self._running] if self._running else [])]
            if sum(other.client.address == client.address for other in here) >= self.most:
                raise BadInput(f"{self.most} requests from your address are under way already: ask again when one of them is done.")
            self._wait(place)
        try:
            yield rest
        finally:
            with self._changed:
                self._end(place)

    def _wait(self, place: Place) -> None:
        self._line.join(place)
        self._call()
        try:
            while self._running is not place:
                self._changed.wait(PATIENCE)
                end_if_over()
        except BaseException:
            self._end(place)
            raise

    def _call(self) -> None:
        """Let the next one go, where none is under way."""
        if self._running is None:
            self._running = self._line.take()
            self._changed.notify_all()

    def _end(self, place: Place) -> None:
        if self._running is place:
            self._running = None
            self._call()
        elif place in self._line.waiting:
            self._line.leave(place)
