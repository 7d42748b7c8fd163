"""What importing sdguard takes along."""

import subprocess
import sys


def test_tables_in_files_are_imported_only_where_they_are_used() -> None:
    """pandas and pyarrow belong to an extra: importing, guarding and calibrating do without."""
    script = "import sys, sdguard, sdguard.steering.learning; print([name for name in ('pandas', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr[-2000:]
