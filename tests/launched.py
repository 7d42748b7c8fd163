"""Program of the `launch` fixture: each process that ``accelerate launch`` starts runs the programs that come, one after the other.

A folder is how they come and go: the test writes ``N.json``, and each process answers with ``N-RANK.json``; an empty program is the end.
"""

import contextlib
import io
import itertools
import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def run(program: list[str], arguments: list[str]) -> None:
    """As ``python PROGRAM ARGUMENTS`` would, where a program is a file, or ``-m`` and a module."""
    sys.argv = [program[-1], *arguments]
    if program[0] == "-m":
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What the program printed, and how it ended: empty, or its traceback or exit code."""
    os.environ.clear()
    os.environ.update(asked["environment"])
    failed = ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            run(asked["program"], asked["arguments"])
        except SystemExit as end:
            failed = f"exit code {end.code}" if end.code else ""
        except BaseException:
            failed = traceback.format_exc()
    return {"printed": printed.getvalue(), "failed": failed}


def main(folder: Path) -> None:
    sys.path[0] = os.getcwd()  # in place of this file's folder, as for a module
    own = dict(os.environ)
    for number in itertools.count():
        path = folder / f"{number}.json"
        while not path.exists():
            time.sleep(0.02)
        asked = json.loads(path.read_text())
        if not asked["program"]:
            return
        asked["environment"] = {**own, **asked["environment"]}
        written = folder / f"{number}-{own['RANK']}.part"
        written.write_text(json.dumps(answer(asked)))
        written.rename(written.with_suffix(".json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
