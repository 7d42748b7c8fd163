"""Ranking: the rows of a scan by p-value, with what can be discovered among them, in memory of one size whatever their number.

The rows go into a DuckDB database of files, which sorts on disk what is more than its memory.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sdguard.files.atomic import CannotWrite
from sdguard.files.prompt_files import import_pandas

if TYPE_CHECKING:
    import pandas as pd

#: memory of the database, over that of the process, and its threads, each of which needs a share of it whatever the machine.
MEMORY, THREADS = "1GB", 4
#: rows of the ranked table that are held at a time.
ROWS = 65_536

#: Benjamini-Hochberg by distinct p-values, which are few: a p-value's rank is that of the last row that has it.
ADJUST = """
CREATE TABLE adjusted AS
WITH counted AS (SELECT p_value, count(*) AS found FROM scanned WHERE p_value IS NOT NULL GROUP BY p_value),
     placed AS (SELECT p_value, sum(found) OVER (ORDER BY p_value) AS rank, sum(found) OVER () AS judged FROM counted)
SELECT p_value, least(1.0, min(p_value * (judged::DOUBLE / rank::DOUBLE)) OVER (ORDER BY p_value DESC)) AS q_value FROM placed
"""
RANK = """
SELECT "row", prompt, score, p_value, q_value, coalesce(q_value <= $fdr, false) AS discovered,
       scanned.* EXCLUDE ("row", prompt, score, p_value, truncated)
FROM scanned LEFT JOIN adjusted USING (p_value)
ORDER BY p_value NULLS LAST, score DESC NULLS LAST, "row"
"""
SUMMARIZE = """
SELECT count(*) AS prompts, count(p_value) AS judged, count(*) FILTER (q_value <= $fdr) AS discovered,
       count(*) FILTER (truncated) AS truncated, avg(evaluations) AS evaluations,
       count(*) FILTER (error <> '') AS failed, min("row") FILTER (error <> '') AS failed_row,
       arg_min(error, "row") FILTER (error <> '') AS failed_error
FROM scanned LEFT JOIN adjusted USING (p_value)
"""


def import_duckdb() -> Any:
    """DuckDB, in which rows are ranked.

    Raises:
        ModuleNotFoundError: it is not installed; the message says which extra has it.
    """
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("A ranking needs DuckDB: pip install 'sdguard[files]'.", name=error.name) from None
    return duckdb


@dataclass(frozen=True)
class Summary:
    """What a scan found, in numbers and the first rows of its ranking.

    Attributes:
        prompts, judged, discovered: how many there are, could be judged, are discovered.
        truncated: how many are longer than the text encoder reads.
        evaluations: denoiser evaluations a prompt, in the mean.
        failed: how many could not be judged; of the first of them ``failed_row`` and ``failed_error``, None where there is none.
        first: the first rows of the ranked table.
    """

    prompts: int
    judged: int
    discovered: int
    truncated: int
    evaluations: float
    failed: int
    failed_row: int | None
    failed_error: str | None
    first: pd.DataFrame


class Ranking:
    """The rows of a scan in a database, and the false discovery rate they are ranked for; made by `ranked`."""

    def __init__(self, database: Any, fdr: float) -> None:
        self.database, self.given = database, {"fdr": float(fdr)}

    def summary(self, shown: int) -> Summary:
        """What was found, with so many rows. Cost: a pass over the rows."""
        numbers = self.database.sql(SUMMARIZE, params=self.given).to_arrow_table().to_pylist()[0]
        first = self.database.sql(f"{RANK} LIMIT {shown:d}", params=self.given)
        return Summary(**numbers, first=first.to_arrow_table().to_pandas())

    def tables(self) -> Iterator[pd.DataFrame]:
        """The table of `rank_prompts`, so many rows at a time. Cost: a sort of all rows, on disk where they are more than `MEMORY`."""
        import pyarrow as pa

        for batch in self.database.sql(RANK, params=self.given).to_arrow_reader(ROWS):
            yield pa.Table.from_batches([batch]).to_pandas()


@contextmanager
def ranked(tables: Iterable[pd.DataFrame], fdr: float, folder: Path) -> Iterator[Ranking]:
    """Rank the rows of a scan, given in tables as `sdguard.scan.scan.scan_batch` makes them; work files in ``folder`` go at the end.

    Those of a ranking that was killed there go too: nobody else may rank in it at once.

    Raises:
        CannotWrite: the disk is full, or cannot be written to.
    """
    duckdb = import_duckdb()
    limits = {"memory_limit": MEMORY, "threads": THREADS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_behind in folder.glob("ranking-*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        files = TemporaryDirectory(prefix="ranking-", dir=folder)
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or str(error), str(folder)) from None
    with files as own:
        try:
            with duckdb.connect(f"{own}/rows.duckdb", config={**limits, "temp_directory": own}) as database:
                for number, table in enumerate(tables):
                    database.register("piece", table)
                    database.execute("INSERT INTO scanned BY NAME FROM piece" if number else "CREATE TABLE scanned AS FROM piece")
                    database.unregister("piece")
                database.execute(ADJUST)
                yield Ranking(database, fdr)
        except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
            raise CannotWrite(errno.ENOSPC, str(error).splitlines()[0].rstrip("."), str(folder)) from None


def rank_prompts(rows: Iterable[Mapping[str, Any]], fdr: float) -> pd.DataFrame:
    """The rows of a scan as one table with ``q_value``, ``discovered``: smallest p-value first, of equal ones the higher score.

    ``q_value`` is the Benjamini-Hochberg adjusted p-value over all prompts that could be judged, and ``discovered`` whether it is at most
    ``fdr``: of the discoveries, that share at most is expected to be ordinary. Conformal p-values that share their calibration scores
    depend on each other positively (PRDS), which the procedure allows for (Bates et al. 2023, Annals of Statistics 51, 149-178).
    This is proved for one seed and prompts that are independent of each other; means over seeds give p-values too, but no PRDS is
    proved of them.
    """
    pd = import_pandas()
    with TemporaryDirectory() as folder, ranked([pd.DataFrame(list(rows))], fdr, Path(folder)) as ranking:
        return pd.concat(ranking.tables(), ignore_index=True)
