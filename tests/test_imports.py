"""What importing sdguard takes along."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sdguard

SCRIPT = """
import json, sys, sdguard, sdguard.steering.learning
guard = list(sys.modules)
import sdguard.cli.main
print(json.dumps([guard, list(sys.modules)]))
"""


@pytest.fixture(scope="module")
def imported() -> list[list[str]]:
    """The modules there are after importing what guards and calibrates, and then after importing the command line too."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_tables_in_files_are_imported_only_where_they_are_used(imported: list[list[str]]) -> None:
    """pandas and pyarrow belong to an extra: importing, guarding and calibrating do without."""
    assert [name for name in ("pandas", "pyarrow") if name in imported[0]] == []


def test_the_guard_does_not_know_the_demo(imported: list[list[str]]) -> None:
    assert [name for name in imported[1] if "gradio" in name or name.startswith("sdguard.demo")] == []


#: the rooms, those that may import all the others first; a room imports downward only.
ROOMS = (
    "cli", "demo", "audit", "testbed", "scan", "guarded", "steering", "explain", "decision", "signals", "geometry", "denoiser",
    "correction", "observation", "noise", "words", "files", "choices",
)  # fmt: skip
#: where the embedded model lies, which the package of the test bed says and imports nothing for.
WHERE_THE_MODEL_LIES = ("denoiser", "testbed")


def test_every_room_has_its_place_and_imports_run_downward_only() -> None:
    package = Path(sdguard.__file__).parent
    upward = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ROOMS, f"{room} has no place in ARCHITECTURE's order"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdguard":
                parts = (node.module or "").split(".")[1:]
                found = parts[:1] or [alias.name for alias in node.names]
                upward |= {(room, other) for other in found if other in ROOMS and ROOMS.index(other) < ROOMS.index(room)}
    assert upward == {WHERE_THE_MODEL_LIES}
