"""What importing sdguard takes along."""

import json
import subprocess
import sys

import pytest

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
