"""Turns at the model: who waits is served before anybody else is served twice, in the order itself and among threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdguard.demo.streaming import Emit, Progress, streamed
from sdguard.demo.turns import Client, Line, Place, Turns
from sdguard.files.inputs import BadInput

GREEDY, MODEST = Client("a", "greedy"), Client("b", "modest")

clients = st.builds(Client, st.sampled_from("ab"), st.sampled_from("xyz"))


@given(st.lists(st.none() | clients, max_size=60))
def test_whoever_waits_is_served_before_another_is_served_twice(steps: list[Client | None]) -> None:
    """A step is a client's coming, or, None, a turn."""
    line = Line()
    passed: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}  # by key that waits: who was served since it came or was last served
    for step in steps:
        if step is not None:
            line.join(Place(step))
            for key in step.keys:
                passed.setdefault(key, Counter())
        elif (served := line.take()) is not None:
            waiting = {key for place in line.waiting for key in place.client.keys}
            for key, counts in passed.items():
                if len(key) == 1:
                    counts[served.client.keys[0]] += 1
                elif key[0] == served.client.address:  # a session's turns are counted among those of its own address
                    counts[served.client.keys[1]] += 1
            passed = {key: Counter() if key in served.client.keys else counts for key, counts in passed.items() if key in waiting}
            assert all(count <= 1 for counts in passed.values() for count in counts.values())


@given(st.lists(clients, max_size=30))
def test_everybody_is_served_and_a_session_in_its_own_order(comers: list[Client]) -> None:
    line, places = Line(), [Place(client) for client in comers]
    for place in places:
        line.join(place)
    served = [taken for _ in comers if (taken := line.take())]
    assert line.take() is None
    for client in set(comers):
        assert [place for place in served if place.client == client] == [place for place in places if place.client == client]


def test_who_leaves_is_not_waited_for() -> None:
    line, gone, stays = Line(), Place(GREEDY), Place(MODEST)
    line.join(gone)
    line.join(stays)
    line.leave(gone)
    assert line.take() is stays
    assert line.take() is None


def waited_for(turns: Turns, count: int) -> None:
    """Wait until so many wait."""
    for _ in range(1000):
        if len(turns._line.waiting) == count:
            return
        threading.Event().wait(0.005)
    pytest.fail(f"{len(turns._line.waiting)} wait, not {count}")


def started(turns: Turns, client: Client, work: Callable[[Emit], None]) -> Iterator[object]:
    """Work begun in a thread of its own, up to where it waits or runs."""
    events = streamed(turns.taken(client, work))
    next(events)  # None, or its first event
    return events


def waits_for(go: threading.Event) -> Callable[[Emit], None]:
    """Work that lasts until it is told to go."""

    def work(emit: Emit) -> None:
        go.wait(20)

    return work


def test_a_client_with_many_requests_does_not_starve_another() -> None:
    turns, order, go = Turns(), [], threading.Event()

    def noted(name: str) -> Callable[[Emit], None]:
        return lambda emit: order.append(name)

    running = [started(turns, GREEDY, waits_for(go))]
    for number in range(5):
        running.append(started(turns, GREEDY, noted(f"greedy {number}")))
        waited_for(turns, number + 1)
    running.append(started(turns, MODEST, noted("modest")))
    waited_for(turns, 6)
    go.set()
    for events in running:
        list(events)
    assert order == ["greedy 0", "modest", "greedy 1", "greedy 2", "greedy 3", "greedy 4"]


def test_long_work_rests_for_those_who_wait() -> None:
    turns, order, go = Turns(), [], threading.Event()

    def long(emit: Emit) -> None:
        go.wait(20)
        for done in range(3):
            order.append(f"part {done}")
            emit(Progress("At it", done, 3, rests=done < 2))

    running = [started(turns, GREEDY, long)]
    running += [started(turns, MODEST, lambda emit: order.append("short"))]
    waited_for(turns, 1)
    go.set()
    for events in running:
        list(events)
    assert order == ["part 0", "short", "part 1", "part 2"]


def test_work_that_is_stopped_while_it_waits_leaves_the_line() -> None:
    turns, go = Turns(), threading.Event()
    running = started(turns, GREEDY, waits_for(go))
    waits = started(turns, MODEST, lambda emit: pytest.fail("nobody waits for it"))
    waited_for(turns, 1)
    waits.close()  # type: ignore[attr-defined]
    waited_for(turns, 0)
    go.set()
    list(running)
    assert list(streamed(turns.taken(MODEST, lambda emit: emit("in turn"))))[-1] == "in turn"


def test_an_address_has_so_many_requests_at_once_and_no_more() -> None:
    turns, go = Turns(most=2), threading.Event()
    wait = waits_for(go)
    running = [started(turns, Client("a", "one"), wait), started(turns, Client("a", "two"), wait)]
    with pytest.raises(BadInput, match="2 requests from your address are under way already"):
        list(streamed(turns.taken(Client("a", "three"), wait)))
    running.append(started(turns, MODEST, wait))
    go.set()
    for events in running:
        list(events)
    assert list(streamed(turns.taken(Client("a", "three"), lambda emit: emit("in turn"))))[-1] == "in turn"
