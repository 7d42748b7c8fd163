"""The demo in a real browser: the app as a process of its own, Debian's chromium through Playwright. Nothing here is ever skipped."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SCREENSHOTS = ROOT / "build" / "screenshots"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
#: milliseconds a step may take where other work keeps both cores busy; on a quiet machine all are done within seconds.
PATIENCE = 300_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Server(NamedTuple):
    """Where the app listens, and its process."""

    address: str
    process: psutil.Process

    def busy(self, seconds: float = 2.0) -> float:
        """How many seconds of processor time the app takes in so many from now, a second's share."""
        before = self.process.cpu_times()
        time.sleep(seconds)
        after = self.process.cpu_times()
        return (after.user + after.system - before.user - before.system) / seconds


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``python app.py`` on the embedded model, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    cache = str(tmp_path_factory.mktemp("cache"))
    # as many threads as the tests, with whose number what a network computes rounds
    environment = {**os.environ, "SDGUARD_CACHE": cache, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        command = [sys.executable, "app.py", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3000):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            pytest.fail(f"the app did not answer within ten minutes: {log.read_text()}")
        yield Server(url, psutil.Process(process.pid))
        assert process.poll() is None, log.read_text()
        raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", log.read_text(), re.MULTILINE)
        assert [line for line in raised if "InvalidPathError" not in line] == []  # which is what an outsider's path should come to
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="session")
def address(server: Server) -> str:
    return server.address


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens the app in a session of its own. Whatever a page asks of another host, and every error of its scripts, fails the test."""
    contexts: list[Any] = []
    strange: list[str] = []

    def open_page(viewport: dict[str, int] = DESKTOP) -> Page:
        context = browser.new_context(viewport=viewport, reduced_motion="reduce")  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: strange.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None)
        page.on("pageerror", lambda error: strange.append(str(error)))
        page.goto(address)
        page.locator("#generate-run").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not strange


@pytest.fixture
def page(opened: Callable[..., Page]) -> Page:
    return opened()


@pytest.fixture
def shot() -> Callable[[Page, str], None]:
    """Keeps a picture of the whole page as an artefact."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def take(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    return take
