"""The demo's server under load: ``python -m benchmarks load`` asks it as many clients at once would, and looks at its memory.

The app runs in a process of its own on the embedded model. *Mixed up?* Each of ``--clients`` clients, all at once, asks for prompts and
seeds of its own; every answer has to be what the same request gave alone. *Memory*: ``--requests`` requests in all; the app's resident
memory is read after each tenth of them. *Fair?* Latencies by client. Writes ``results/load.json``; ends with exit code 1 if an answer was
another's.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow.parquet as pq
import typer
from gradio_client import Client
from rich.progress import Progress

from benchmarks.running import resident, versions
from sdguard import testbed
from sdguard.files.atomic import write_text

NAME = "load"
#: different requests; each client asks for some of them in turn.
REQUESTS = 12
STEPS = 2
#: seconds that the app has to begin to answer.
PATIENCE = 600.0


class Request(NamedTuple):
    """What is asked of ``/generate``."""

    prompt: str
    seed: int

    def answer(self, client: Client) -> str:
        """What the app answers, its times and costs aside, as JSON."""
        found: Any = client.predict(prompt=self.prompt, seed=self.seed, steps=STEPS, api_name="/generate")
        reports = [{name: value for name, value in report.items() if name in ("prompt", "verdict", "score")} for report in found["reports"]]
        return json.dumps([reports, found["unguarded"], found["guarded"]])


def requests() -> list[Request]:
    """Ordinary and memorized prompts of the embedded model's development split, in turn, each with a seed of its own."""
    rows = [row for row in pq.read_table(testbed.path() / "prompts.parquet").to_pylist() if row["split"] == "development"]
    ordinary = [row["text"] for row in rows if row["copy_rate"] == 0]
    memorized = [row["text"] for row in rows if row["copy_rate"] > 0.9]
    texts = itertools.islice(itertools.chain.from_iterable(zip(ordinary, memorized, strict=False)), REQUESTS)
    return [Request(text, seed) for seed, text in enumerate(texts)]


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """The app's address, and the number of its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "SDGUARD_CACHE": cache, "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, "-m", "sdguard.cli", "demo", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address, began = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - began < PATIENCE:
                with suppress(OSError):
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                time.sleep(0.2)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(timeout=30)


def one_client(
    client: Client, number: int, count: int, asked: list[Request], alone: dict[Request, str], answered: Callable[[], None]
) -> tuple[list[float], int]:
    """Seconds that each of ``count`` requests of a client took, one after the other, and how many answers were not those given alone."""
    seconds, wrong = [], 0
    for turn in range(count):
        request, began = asked[(number + turn) % len(asked)], time.monotonic()
        wrong += request.answer(client) != alone[request]
        seconds.append(time.monotonic() - began)
        answered()
    return seconds, wrong


def measure(clients: int, count: int, bar: Progress) -> dict[str, Any]:
    """All that is measured of ``count`` requests by ``clients`` at once."""
    with served() as (address, pid):
        asked = requests()
        first = Client(address, verbose=False)
        alone = {request: request.answer(first) for request in asked}
        began = time.monotonic()
        for request in asked:
            request.answer(first)
        single = (time.monotonic() - began) / len(asked)
        many = [Client(address, verbose=False) for _ in range(clients)]
        shares = [count * (k + 1) // clients - count * k // clients for k in range(clients)]
        memory, done, counting = [resident(pid)], itertools.count(1), threading.Lock()
        task, began = bar.add_task("requests", total=count), time.monotonic()

        def answered() -> None:
            with counting:
                number = next(done)
                if 10 * number // count > 10 * (number - 1) // count:
                    memory.append(resident(pid))
                bar.update(task, completed=number)

        with ThreadPoolExecutor(clients) as pool:
            waiting = [pool.submit(one_client, client, k, shares[k], asked, alone, answered) for k, client in enumerate(many)]
            found = [client.result() for client in waiting]
        took = time.monotonic() - began
    seconds, wrong = [taken for taken, _ in found], sum(bad for _, bad in found)
    every = sorted(itertools.chain.from_iterable(seconds))
    by_client = [statistics.fmean(taken) for taken in seconds if taken]
    return {
        "clients": clients,
        "requests": len(every),
        "answers of another request": wrong,
        "seconds a request, alone": single,
        "seconds a request, median and 95%": [every[len(every) // 2], every[int(0.95 * len(every))]],
        "requests a second": len(every) / took,
        "slowest client over fastest, mean seconds": max(by_client) / min(by_client),
        "resident MB, before and after each tenth": [round(value) for value in memory],
    }


def main(
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 20,
    count: Annotated[int, typer.Option("--requests", min=10, help="Requests in all.")] = 500,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
) -> None:
    """Measure the demo's server under load."""
    with Progress() as bar:
        found = measure(clients, count, bar)
    write_text(out / f"{NAME}.json", json.dumps({**found, "steps": STEPS, **versions()}, indent=1))
    typer.echo(json.dumps(found, indent=1))
    if found["answers of another request"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
