"""Files of prompts, and tables to and from files: plain text, CSV, JSON lines and parquet, told apart by the suffix."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from pandas.api.types import is_string_dtype

#: what a column of prompts is called, in order of preference, whatever its case.
PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_lines(path: Path) -> pd.DataFrame:
    """A text file as a table with the one column ``prompt``, indexed by line from 0; blank lines are left out."""
    with path.open(encoding="utf-8-sig") as file:  # iterating breaks at newlines only, unlike str.splitlines
        lines = {number: line.strip() for number, line in enumerate(file) if line.strip()}
    return pd.DataFrame({"prompt": pd.Series(lines, dtype=str)})


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, separated by whichever of comma, semicolon and tab its header uses; no word in it is taken for a missing value."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    try:
        separator = csv.Sniffer().sniff(header, delimiters=",;\t").delimiter
    except csv.Error:  # a header of one column has no separator
        separator = ","
    return pd.read_csv(path, sep=separator, encoding="utf-8-sig", keep_default_na=False)


def read_json_lines(path: Path) -> pd.DataFrame:
    """A file of JSON objects, one a line; no string is taken for a number or a date."""
    return pd.read_json(path, lines=True, dtype=False)


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "": read_lines,
    ".txt": read_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
    ".parquet": pd.read_parquet,
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
    try:
        table = READERS[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # what pandas, pyarrow and the UTF-8 codec raise is one, or descends from it
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"{path} is no {path.suffix or '.txt'} file that can be read: {first}.") from None
    if table.empty:
        raise ValueError(f"{path} holds no prompt.")
    return table


def prompt_column(table: pd.DataFrame, path: Path, column: str | None = None) -> pd.Series:
    """The prompts of a table read from ``path``: ``column``, else the one with a name of `PROMPT_COLUMNS`, else the only one of text.

    Raises:
        ValueError: there is no such column, more than one could be meant, or one of its entries is no text; one sentence naming the file.
    """
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


def check_writable(path: Path) -> None:
    """Raise `ValueError` if `write_table` knows no such suffix."""
    if path.suffix not in WRITERS:
        raise ValueError(f"{path} cannot be written: its suffix must be one of {', '.join(WRITERS)}.")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, in the format of the suffix, whole or not at all; raises as `check_writable` does."""
    check_writable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    WRITERS[path.suffix](table, partial)
    partial.replace(path)
