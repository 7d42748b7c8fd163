"""The demo's server, in this process on a tiny model: clients that leave, strange values for all that can be sent, calibrations."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import families
import httpx
import pytest
from gradio_client import Client

from sdguard.decision.identity import identity
from sdguard.demo import clients, page
from sdguard.demo.app import launch
from sdguard.demo.model import Model, embedded_examples
from sdguard.demo.streaming import stoppable
from sdguard.files.inputs import BadInput

LONG: dict[str, Any] = {"prompt": "a cat", "images": 4, "steps": 100}


class Served(NamedTuple):
    """The server's address, its page, when its denoiser was called, what is to be raised there, and a browser's connections."""

    address: str
    blocks: Any
    calls: list[float]
    raised: list[Exception]
    http: httpx.Client

    def join(self, function: Any, data: list[Any], session: str) -> httpx.Response:
        """Ask for an event, as a page does."""
        body = json.dumps({"data": data, "fn_index": function._id, "session_hash": session})
        return self.http.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})

    def answer(self, function: Any, data: list[Any], session: str = "session") -> dict[str, Any]:
        """The last message of an event asked for by a page."""
        joined = self.join(function, data, session)
        if joined.is_error:
            return {"success": False, "output": {"error": joined.text}}
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                if "process_completed" in line:
                    return json.loads(line.removeprefix("data: "))
        pytest.fail("the stream ended without an answer")


@pytest.fixture(scope="module")
def served(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("gradio")
    pipe = families.build("StableDiffusionPipeline", embedded.tokenizer)
    stoppable(pipe.unet)
    calls: list[float] = []
    raised: list[Exception] = []

    def called(part: Any, given: tuple[Any, ...]) -> None:
        calls.append(time.monotonic())
        if raised:
            raise raised[0]
        if len(given[0]) == 2 * LONG["images"]:
            time.sleep(0.1)  # so that a long run takes twenty seconds, and has not ended of itself

    pipe.unet.conv_in.register_forward_pre_hook(called)
    profile = replace(families.profile_for(1e6), model=identity(pipe))
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        for room in ("profiles", "generate_tab", "calibrate_tab"):
            patch.setattr(f"sdguard.demo.{room}.profile_known", lambda model, own: own or profile)
        model = Model("tiny", pipe, {"num_inference_steps": 3, "guidance_scale": 4.0}, examples=embedded_examples())
        blocks = launch(model, "127.0.0.1", port, wait=False)
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, timeout=60) as http:
            yield Served(address, blocks, calls, raised, http)
        blocks.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "GRACE", 1.0)


def generate_function(served: Served) -> Any:
    return next(function for function in served.blocks.fns.values() if function.api_name == "generate")


# what is on the page


def test_every_tab_begins_with_its_lesson_in_one_sentence(served: Served) -> None:
    config = served.blocks.config
    shown = {component["id"]: component for component in config["components"]}

    tabs = [node for node in walk(config["layout"]) if node["id"] in shown and shown[node["id"]]["type"] == "tabitem"]
    assert [shown[node["id"]]["props"]["label"] for node in tabs] == ["Generate", "Why", "Geometry", "Scan", "Calibrate"]
    for node in tabs:
        first = next(
            found for found in (shown[each["id"]] for each in walk(node)) if found["type"] not in ("tabitem", "row", "column", "state")
        )
        (text,) = re.findall(r'^<p class="sg-lesson">(.*)</p>$', first["props"]["value"])
        assert text.endswith(".")
        assert ". " not in text


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node of a page's layout and all below it, in the page's order."""
    yield node
    for child in node.get("children") or []:
        yield from walk(child)


# clients that leave


def begun(served: Served, before: int) -> None:
    """Wait until the denoiser is called for somebody."""
    for _ in range(2000):
        if len(served.calls) > before:
            return
        time.sleep(0.01)
    pytest.fail("nothing was run")


def ended(served: Served) -> bool:
    """Whether the denoiser stands still some seconds from now, for one second."""
    time.sleep(3)
    return not served.calls or time.monotonic() - served.calls[-1] > 1


def client_that_dies(address: str) -> subprocess.Popen[bytes]:
    script = f"from gradio_client import Client; Client({address!r}, verbose=False).predict(**{LONG!r}, api_name='/generate')"
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_ends_when_its_client_dies_without_a_word(served: Served) -> None:
    before = len(served.calls)
    process = client_that_dies(served.address)
    try:
        begun(served, before)
        time.sleep(2)
        assert time.monotonic() - served.calls[-1] < 1  # it goes on for as long as somebody listens
    finally:
        process.kill()
        process.wait()
    assert ended(served)


def test_a_run_ends_when_its_stream_is_closed(served: Served) -> None:
    before = len(served.calls)
    data = [LONG["prompt"], 0, 4, 100, 4.0, 0.01, "steer", None]
    event = httpx.post(f"{served.address}/gradio_api/call/generate", json={"data": data}).json()["event_id"]
    with httpx.stream("GET", f"{served.address}/gradio_api/call/generate/{event}"):
        begun(served, before)
        time.sleep(2)
        assert time.monotonic() - served.calls[-1] < 1
    assert ended(served)


@pytest.mark.parametrize("session", [None, "a-session-of-its-own"])
def test_a_run_that_nobody_ever_listened_to_ends(session: str | None, served: Served) -> None:
    before = len(served.calls)
    data = [LONG["prompt"], 0, 4, 100, 4.0, 0.01, "steer", None]
    httpx.post(f"{served.address}/gradio_api/call/generate", json={"data": data, "session_hash": session}).raise_for_status()
    begun(served, before)
    assert ended(served)


def test_a_session_named_in_the_request_listens_by_its_event(served: Served) -> None:
    data = ["a cat", 0, 1, 3, 4.0, 0.01, "steer", None]
    asked = httpx.post(f"{served.address}/gradio_api/call/generate", json={"data": data, "session_hash": "named"}).json()
    answer = httpx.get(f"{served.address}/gradio_api/call/generate/{asked['event_id']}", timeout=60).text
    assert answer.startswith("event: complete") or "\nevent: complete" in answer


def test_the_next_request_does_not_wait_for_a_run_that_nobody_listens_to(served: Served) -> None:
    before = len(served.calls)
    data = [LONG["prompt"], 0, 4, 100, 4.0, 0.01, "steer", None]
    served.join(generate_function(served), data, "hasty")
    begun(served, before)
    found: Any = Client(served.address, verbose=False).predict("a dog", api_name="/generate")
    assert found["reports"][0]["prompt"] == "a dog"


# strange values

STRANGE: list[Any] = [
    None, True, 1.5, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "abc", "<b>\n", "x" * 10**6,
    [], ["abc", 1], [[]], {}, {"path": "x"},
]  # fmt: skip


def defaults_of(served: Served) -> dict[int, list[Any]]:
    """For every event with something to send: what is sent where nobody touches anything, by the page's components and the API's schema."""
    schema = served.blocks.get_api_info()["named_endpoints"]
    found = {}
    for number, function in served.blocks.fns.items():
        named = schema.get(f"/{function.api_name}")
        if named:
            found[number] = [parameter.get("parameter_default", "a cat") for parameter in named["parameters"]]
        elif function.inputs and function.fn:
            found[number] = [component.value for component in function.inputs]
    return found


def said(message: dict[str, Any]) -> list[str]:
    """Every sentence of an answer that says that something is wrong."""
    if not message["success"]:
        return [message["output"]["error"]]
    updates = json.dumps(message["output"]["data"], ensure_ascii=False)
    return [unescape(text) for text in re.findall(r'role=\\"alert\\"[^>]*><span>(.*?)</span>', updates)]


def is_one_sentence(text: Any) -> bool:
    """Nothing that Python says to programmers, no end of it, and not that the app itself is at fault."""
    raw = (
        "Traceback",
        "<class",
        " object at 0x",
        "Error:",
        "NoneType",
        "'str'",
        "'int'",
        "'float'",
        "'list'",
        "'dict'",
        "convert",
        "operand",
    )
    return (
        isinstance(text, str)
        and 10 < len(text) <= page.LONGEST_SENTENCE
        and "\n" not in text
        and text[-1] in ".…"
        and text != page.INTERNAL
        and not any(word in text for word in raw)
    )


def test_every_argument_of_everything_that_can_be_sent_takes_strange_values(served: Served) -> None:
    served.raised.append(BadInput("A run began."))  # what is taken costs nothing
    sent, refused, wrong = 0, 0, []
    for number, usual in defaults_of(served).items():
        function = served.blocks.fns[number]
        for position, component in enumerate(function.inputs):
            if component.stateful:
                continue
            for value in STRANGE:
                data = [*usual[:position], value, *usual[position + 1 :]]
                sentences = said(served.answer(function, data))
                sent, refused = sent + 1, refused + bool(sentences)
                wrong += [(function.name, position, repr(value)[:20], text) for text in sentences if not is_one_sentence(text)]
        for data in ([], usual[:-1]):
            wrong += [
                (function.name, len(data), "left out", text) for text in said(served.answer(function, data)) if not is_one_sentence(text)
            ]
    served.raised.clear()
    assert wrong == []
    assert refused > sent / 2  # most of these can be nothing
    found: Any = Client(served.address, verbose=False).predict("a dog", api_name="/generate")
    assert found["reports"][0]["verdict"] == "clean"


# calibrations


def test_an_address_calibrates_once_at_a_time(served: Served, tmp_path: Path) -> None:
    (calibrate,) = (f for f in served.blocks.fns.values() if f.name == "run" and any(c.elem_id == "calibrate-file" for c in f.inputs))
    file = tmp_path / "ordinary.txt"
    file.write_text("".join(f"a cat number {i}\n" for i in range(2000)))
    with file.open("rb") as opened:
        (path,) = httpx.post(f"{served.address}/gradio_api/upload", files={"files": opened}).json()
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, *(component.value for component in calibrate.inputs[1:])]
    before = len(served.calls)
    served.join(calibrate, data, "first")
    with httpx.stream("GET", f"{served.address}/gradio_api/queue/data", params={"session_hash": "first"}, timeout=60):
        begun(served, before)
        (sentence,) = said(served.answer(calibrate, data, "second"))
        assert sentence == "A calibration from your address is under way already: start the next one when it is done."
    assert ended(served)
    file.write_text("".join(f"a cat number {i}\n" for i in range(2251)))
    with file.open("rb") as opened:
        (data[0]["path"],) = httpx.post(f"{served.address}/gradio_api/upload", files={"files": opened}).json()
    (sentence,) = said(served.answer(calibrate, data, "third"))
    assert sentence == "ordinary.txt holds 2,251 prompts; 2,250 are taken at most."
