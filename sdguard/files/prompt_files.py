"""Files of prompts, and tables to and from files: plain text, CSV, JSON lines and parquet, told apart by the suffix."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdguard.files.atomic import atomic_write

if TYPE_CHECKING:
    import pandas as pd

Found = TypeVar("Found")
#: what a column of prompts is called, in order of preference, whatever its case.
PROMPT_COLUMNS = ("prompt", "caption", "text")


def import_pandas() -> Any:
    """pandas, which tables in files need, and a text file of prompts does not.

    Raises:
        ModuleNotFoundError: pandas or pyarrow is not installed; the message says which extra has them.
    """
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Tables in files need pandas and pyarrow: pip install 'sdguard[files]'.", name=error.name) from None
    return pandas


def read_lines(path: Path) -> dict[int, str]:
    """The lines of a text file, stripped, by number from 0; blank ones are left out."""
    with path.open(encoding="utf-8-sig") as file:  # iterating breaks at newlines only, unlike str.splitlines
        return {number: line.strip() for number, line in enumerate(file) if line.strip()}


def lines_table(path: Path) -> pd.DataFrame:
    """A text file as a table with the one column ``prompt``, indexed by line."""
    pd = import_pandas()
    return pd.DataFrame({"prompt": pd.Series(read_lines(path), dtype=str)})


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, separated by whichever of comma, semicolon and tab its header uses; no word in it is taken for a missing value."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    try:
        separator = csv.Sniffer().sniff(header, delimiters=",;\t").delimiter
    except csv.Error:  # a header of one column has no separator
        separator = ","
    return import_pandas().read_csv(path, sep=separator, encoding="utf-8-sig", keep_default_na=False)


def read_json_lines(path: Path) -> pd.DataFrame:
    """A file of JSON objects, one a line; no string is taken for a number or a date."""
    return import_pandas().read_json(path, lines=True, dtype=False)


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file."""
    return import_pandas().read_parquet(path)


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "": lines_table,
    ".txt": lines_table,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
    ".parquet": read_parquet,
}

WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, double_precision=15),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
}


def read_table(path: Path) -> pd.DataFrame:
    """The table in a file, indexed by row from 0 (by line in a text file).

    Raises:
        ValueError: its suffix is unknown, it cannot be read, is not what its suffix says, or holds no row; one sentence naming the file.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path} has a suffix that is not known: {', '.join(filter(None, READERS))} are.")
    table = read_checked(READERS[path.suffix], path)
    if table.empty:
        raise ValueError(f"{path} holds no prompt.")
    return table


def read_checked(reader: Callable[[Path], Found], path: Path) -> Found:
    """What ``reader`` makes of a file; its errors become a `ValueError` of one sentence."""
    try:
        return reader(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # what pandas, pyarrow and the UTF-8 codec raise is one, or descends from it
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is no {path.suffix or '.txt'} file that can be read: {first}.") from None


def prompt_column(table: pd.DataFrame, path: Path, column: str | None = None) -> pd.Series:
    """The prompts of a table read from ``path``: ``column``, else the one with a name of `PROMPT_COLUMNS`, else the only one of text.

    Raises:
        ValueError: there is no such column, more than one could be meant, or one of its entries is no text; one sentence naming the file.
    """
    from pandas.api.types import is_string_dtype

    there = f"it has {', '.join(map(str, table.columns))}"
    if column is None:
        named = {str(name).lower(): name for name in reversed(table.columns)}
        text = [name for name in table.columns if is_string_dtype(table[name])]
        found = [named[name] for name in PROMPT_COLUMNS if name in named] or (text if len(text) == 1 else [])
        if not found:
            raise ValueError(f"{path} does not tell which column holds the prompts: {there}; name one.")
        column = found[0]
    elif column not in table.columns:
        raise ValueError(f"{path} has no column {column!r}: {there}.")
    prompts = table[column]
    bad = [row for row, prompt in prompts.items() if not (isinstance(prompt, str) and prompt.strip())]
    if bad:
        raise ValueError(f"{path} holds no text in row {bad[0]} of column {column!r}.")
    return prompts.rename("prompt")


def read_prompts(path: Path, column: str | None = None) -> pd.Series:
    """The prompts in a file, indexed by row from 0 (by line in a text file); raises as `read_table` and `prompt_column` do."""
    return prompt_column(read_table(path), path, column)


def prompts_by_row(path: Path, column: str | None = None) -> dict[int, str]:
    """`read_prompts` as a dictionary; of a text file without pandas, whose only column is ``prompt``."""
    if path.suffix not in ("", ".txt") or column not in (None, "prompt"):
        return read_prompts(path, column).to_dict()
    prompts = read_checked(read_lines, path)
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


def check_suffix(path: Path) -> None:
    """Raise `ValueError` if `write_table` knows no such suffix."""
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} cannot be written: its suffix must be one of {', '.join(WRITERS)}.")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, in the format of the suffix, whole or not at all; raises as `check_suffix` does."""
    check_suffix(path)
    with atomic_write(path) as partial:
        WRITERS[path.suffix](table, partial)
