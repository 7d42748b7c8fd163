"""The ranking of a scan's rows against scipy and pandas, whatever the rows and the tables they come in."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from sdguard.files.atomic import CannotWrite
from sdguard.scan import ranking
from sdguard.scan.ranking import rank_prompts, ranked

#: p-values with ties, and none where a prompt could not be judged.
p_values = st.integers(1, 7).map(lambda k: k / 7) | st.floats(0, 1) | st.just(math.nan)
rows_of_a_scan = st.lists(st.tuples(p_values, st.integers(-3, 3)), min_size=1, max_size=30)


def rows_of(found: list[tuple[float, int]]) -> list[dict[str, Any]]:
    """Rows as a scan makes them, with these p-values and scores."""
    return [
        {
            "row": 3 * i,
            "prompt": f"prompt {i}",
            "score": math.nan if math.isnan(p_value) else score / 3,
            "p_value": p_value,
            "evaluations": i % 5,
            "error": "ArithmeticError: no luck" if math.isnan(p_value) else "",
            "truncated": i % 3 == 0,
            "seed_0": (1 << 32) - 1 - i,
            "guidance_norm_0": score / 7,
        }
        for i, (p_value, score) in enumerate(found)
    ]


@settings(max_examples=40, deadline=None)
@given(rows_of_a_scan, st.integers(1, 30), st.sampled_from([0.01, 0.05, 0.5]))
def test_rows_are_ranked_as_by_pandas_with_the_false_discovery_rates_of_scipy(found: list[tuple[float, int]], cut: int, fdr: float) -> None:
    rows = rows_of(found)
    expected = pd.DataFrame(rows).sort_values(["p_value", "score", "row"], ascending=[True, False, True], ignore_index=True)
    expected["q_value"] = np.nan
    judged = expected.p_value.notna()
    if judged.any():
        expected.loc[judged, "q_value"] = false_discovery_control(expected.p_value[judged])
    expected["discovered"] = expected.q_value <= fdr
    tables = [pd.DataFrame(rows[start : start + cut]) for start in range(0, len(rows), cut)]
    with TemporaryDirectory() as folder:
        with ranked(tables, fdr, Path(folder)) as ranking:
            table, summary = pd.concat(ranking.tables(), ignore_index=True), ranking.summary(3)
        assert not list(Path(folder).iterdir())
    first = ["row", "prompt", "score", "p_value", "q_value", "discovered", "evaluations", "error"]
    assert list(table) == [*first, "seed_0", "guidance_norm_0"]
    pd.testing.assert_frame_equal(table, expected[list(table)], rtol=1e-14, atol=0)
    pd.testing.assert_frame_equal(summary.first, table.head(3))
    failed = expected[expected.error != ""]
    assert (summary.prompts, summary.judged, summary.failed) == (len(rows), int(judged.sum()), len(failed))
    assert (summary.discovered, summary.truncated) == (int(expected.discovered.sum()), int(expected.truncated.sum()))
    assert summary.evaluations == pytest.approx(expected.evaluations.mean())
    assert (summary.failed_row, summary.failed_error) == ((failed.row.iloc[0], failed.error.iloc[0]) if len(failed) else (None, None))


def test_more_rows_than_the_memory_holds_are_sorted_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ranking, "MEMORY", "160MB")
    monkeypatch.setattr(ranking, "THREADS", 1)
    size, rng = 20_000, np.random.default_rng(0)
    prompts = [f"{i:0800d}" for i in range(size)]

    def tables() -> Any:
        for start in range(0, 14 * size, size):
            table = pd.DataFrame({"row": range(start, start + size), "p_value": rng.random(size)})
            yield table.assign(prompt=prompts, score=0.0, evaluations=2, error="", truncated=False)

    with ranked(tables(), 0.05, tmp_path) as found:
        seen = pd.concat([table[["row", "p_value", "q_value"]] for table in found.tables()], ignore_index=True)
    assert seen.p_value.is_monotonic_increasing
    assert sorted(seen.row) == list(range(14 * size))
    assert seen.q_value.to_numpy() == pytest.approx(false_discovery_control(seen.p_value), rel=1e-14)


def test_where_there_is_no_room_to_rank_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ranking, "MEMORY", "1MB")
    rows = [row | {"prompt": f"{i}" * 4000} for i, row in enumerate(rows_of([(0.5, 0)] * 2000))]
    with (
        pytest.raises(CannotWrite, match=rf"^{tmp_path} cannot be written: .*Make room"),
        ranked([pd.DataFrame(rows)], 0.05, tmp_path) as found,
    ):
        list(found.tables())
    assert not list(tmp_path.iterdir())


def test_a_table_of_all_rows_is_the_same() -> None:
    rows = rows_of([(0.2, 1), (math.nan, 0), (0.1, 1), (0.1, 2)])
    assert rank_prompts(rows, 0.5).row.tolist() == [9, 6, 0, 3]
