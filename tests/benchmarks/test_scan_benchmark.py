"""The benchmark of scanning at scale: what it counts, and what it says of a corpus."""

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.scan import CORPUS, caption_tables, on_paper, rows_done
from sdguard.files.prompt_files import PIECE_ROWS
from sdguard.files.resumable import Parts


def test_captions_are_the_same_each_time_and_begin_alike() -> None:
    few, more = (pd.concat(caption_tables(count), ignore_index=True) for count in (50, PIECE_ROWS + 7))
    assert len(more) == PIECE_ROWS + 7
    pd.testing.assert_frame_equal(pd.concat(caption_tables(50)), few)
    assert few.caption.str.strip().all()


def test_rows_of_a_batch_count_once_its_piece_is_whole_or_not(tmp_path: Path) -> None:
    pieces, count = Parts(tmp_path, "pieces", {}, ".parquet"), PIECE_ROWS + 100
    for name, rows in ((f"{0:012d}-a", 8), (f"{PIECE_ROWS:012d}-b", 5)):
        Parts(tmp_path, f"batches-{name}", {}).keep("one", [{}] * rows)
    assert rows_done(tmp_path, count, {}) == 13
    pieces.keep(f"{0:012d}-a", pd.DataFrame({"row": [0]}))
    assert rows_done(tmp_path, count, {}) == PIECE_ROWS + 5
    pieces.keep(f"{PIECE_ROWS:012d}-b", pd.DataFrame({"row": [0]}))
    assert rows_done(tmp_path, count, {}) == count


def test_a_corpus_costs_what_the_measured_rates_come_to() -> None:
    case = {"captions": 1000, "captions a second": 20.0, "device": "a GPU", "bytes of parts a caption": 100.0}
    ranking = {"rows": CORPUS, "seconds": 7200.0, "peak MB": 1500.0, "bytes of the database a row": 70.0, "bytes of the table a row": 30.0}
    said = on_paper({"cases": [case, case | {"captions": 10, "captions a second": 1.0}], "ranking": [ranking]})
    days = CORPUS / 20 / 86400
    assert days == pytest.approx(578.7, abs=0.1)
    assert "578.7 days of one such machine (a GPU)" in said
    assert "200 GB of disk" in said
    assert "2.0 hours to rank" in said
