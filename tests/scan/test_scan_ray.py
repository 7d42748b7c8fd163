"""The Ray engine on a local cluster of two workers, one of which is lost on the way."""

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdguard import Profile, testbed
from sdguard.scan.ranking import rank_prompts
from sdguard.scan.ray_engine import connect, scan_pieces_with_ray
from sdguard.scan.scan import piece_name, scan

# not imported here: the engine sets what Ray reads when it is
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'ray' is not installed")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two CPUs on the loopback interface."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else whatever runs beside them starves the workers
    ray = connect()
    yield ray
    ray.shutdown()


def test_a_lost_worker_costs_no_row_and_no_row_comes_twice(cluster: Any, embedded: Any, tmp_path: Path) -> None:
    profile = Profile.load(testbed.path() / "sdguard" / "profile.json")
    captions = (
        pd.read_parquet(testbed.path() / "prompts.parquet").text[:96].tolist()
    )  # enough that the other worker cannot have done them all before the lost one is replaced
    prompts = dict(enumerate(captions))
    workers = tmp_path / "workers"
    workers.mkdir()

    def load() -> Any:
        (workers / str(os.getpid())).touch()
        return testbed.load()

    options: dict[str, Any] = {"batch_size": 1, "work": tmp_path / "work"}
    pieces = [dict(list(prompts.items())[start : start + 64]) for start in (0, 64)]
    left = {piece_name(piece): len(piece) for piece in pieces}
    done, first = 0, list[int]()

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done == 3:
            first.extend(sorted(int(path.name) for path in workers.iterdir()))
            os.kill(first[0], signal.SIGKILL)

    whole = dict(scan_pieces_with_ray(load, profile, lambda: pieces, left, advance, **options))
    assert {name: len(rows) for name, rows in whole.items()} == left
    rows = [row for rows in whole.values() for row in rows]
    assert {node["NodeManagerAddress"] for node in cluster.nodes()} == {"127.0.0.1"}
    assert len(list(workers.iterdir())) > len(first)  # one was started in the place of the lost one
    assert sorted(row["row"] for row in rows) == list(prompts)

    here = [row for batch in scan(embedded, profile, prompts, batch_size=8) for row in batch]
    tables = [rank_prompts(some, 0.05) for some in (rows, here)]
    coarse = [name for name in tables[0] if name.startswith("lid_noisy")]  # a difference of two finite differences
    pd.testing.assert_frame_equal(*(table.drop(columns=coarse) for table in tables), rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(*(table[coarse] for table in tables), rtol=1e-3, atol=1e-2)

    known = [row for piece in pieces for row in next(scan(embedded, profile, piece, **options))]  # what is kept serves the other engine
    assert sorted(row["row"] for row in known) == list(prompts)
