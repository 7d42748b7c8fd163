"""The documentation's table of what is supported, from the results of the tests.

``python -m benchmarks matrix`` runs ``tests/denoiser/test_families.py`` and puts between the documentation's markers, for each pipeline and
scheduler, whether the invariants hold.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from benchmarks.documents import ROOT, put

TEST = "test_the_guard_changes_the_flagged_row_and_nothing_else"


def results(report: Path) -> pd.DataFrame:
    """One row a case of `TEST` in a JUnit report: pipeline, scheduler, passed."""
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        if found := re.fullmatch(rf"{TEST}\[\('(\w+)', (?:'(\w+)'|None)\)\]", case.get("name", "")):
            passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
            rows.append({"pipeline": found[1], "scheduler": found[2] or "its own", "passed": passed})
    return pd.DataFrame(rows)


def table(found: pd.DataFrame) -> str:
    """A Markdown table: a line a pipeline, with the schedulers it passed and failed under."""
    lines = ["| pipeline | invariants hold under | fail under |", "|---|---|---|"]
    for pipeline, cases in found.groupby("pipeline", sort=False):
        passed, failed = (", ".join(cases.scheduler[cases.passed == good].str.removesuffix("Scheduler")) for good in (True, False))
        lines.append(f"| `{pipeline}` | {passed or '-'} | {failed or '-'} |")
    return "\n".join(lines)


def main() -> None:
    """Run the tests and rewrite the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = str(ROOT / "tests" / "denoiser" / "test_families.py")
        subprocess.run([sys.executable, "-m", "pytest", "-q", tests, "-k", TEST, f"--junitxml={report}"], check=False)
        found = results(report)
    put("matrix", table(found))
    print(table(found))
