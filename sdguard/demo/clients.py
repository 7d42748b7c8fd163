"""Who asks the server, and whether anybody still listens to the answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterator, MutableMapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from gradio.context import LocalContext

from sdguard.demo.turns import Client
from sdguard.files.inputs import BadInput

#: seconds that work goes on, or waits, with nobody listening: a client asks first and listens then, in two requests.
GRACE = 5.0

#: how many streams of answers are open, by the session or the request that they are of.
_open: Counter[str] = Counter()
#: what is under way `alone`, by what it is and whose.
_alone: set[tuple[str, str]] = set()
_lock = threading.Lock()


class Left(Exception):
    """Nobody listens to the answer."""


class Listeners:
    """ASGI middleware: notes who listens, for as long as the connection stands. That is all that tells of a client that died.

    Gradio itself ends a generator whose stream was closed, at its next value; a function that gives one answer it runs to the end, and
    so either where nobody ever opened the stream.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        name = stream_of(scope)
        if name is None:
            await self.app(scope, receive, send)
            return
        _open[name] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            _open[name] -= 1
            if not _open[name]:
                del _open[name]


def stream_of(scope: MutableMapping[str, Any]) -> str | None:
    """The session, or the request, whose answers an HTTP request listens to; None of any other."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    *before, last = scope["path"].rstrip("/").split("/")
    if before[-1:] == ["queue"] and last == "data":
        return next(iter(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])), None)
    return last if "call" in before[-3:-1] else None


def client_of(request: gr.Request) -> Client:
    """Who asks."""
    return Client(str(getattr(request.client, "host", "")), request.session_hash or "")


def heard(request: gr.Request, events: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The events for as long as somebody listens, which is looked at whenever one comes, None among them; closes them at the end.

    Raises `Left` where nobody has listened for `GRACE`.
    """
    names = (request.session_hash, LocalContext.event_id.get(None))
    last = time.monotonic()
    with closing(events):
        for event in events:
            now = time.monotonic()
            if any(name in _open for name in names):
                last = now
            elif now - last > GRACE:
                raise Left("Nobody listens to the answer any more: the run was ended.")
            yield event


@contextmanager
def alone(what: str, client: Client) -> Iterator[None]:
    """Within the block ``what`` is under way once at the client's address; raises `BadInput` where it was so before."""
    mark = (what, client.address)
    with _lock:
        if mark in _alone:
            raise BadInput(f"{what} from your address is under way already: start the next one when it is done.")
        _alone.add(mark)
    try:
        yield
    finally:
        _alone.discard(mark)
