"""Files of prompts, and tables to and from files: plain text, CSV, JSON lines and parquet, told apart by the suffix."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from sdguard.files.atomic import atomic_write

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
#: what a column of prompts is called, in order of preference, whatever its case.
PROMPT_COLUMNS = ("prompt", "caption", "text")
#: what separates the fields of a CSV file, in order of preference.
SEPARATORS = ",;\t"
#: characters that the first line of a CSV file has at most.
LONGEST_HEADER = 65_536
#: cells of a table made of JSON objects from which on most of them may not be empty.
SPARSE_CELLS = 10_000_000
#: characters of a file's column names that a sentence about them has at most.
SHOWN_NAMES = 200


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


# reading


def kind_of(path: Path) -> str:
    """A file's suffix in lower case, both of them where it is compressed, and ``.txt`` where there is none."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix) or ".txt"


def open_text(path: Path) -> IO[str]:
    """A text file in UTF-8, with or without a byte order mark, and compressed if its name says so; its line ends stay what they are."""
    opened: Any = gzip.open if kind_of(path).endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[no-any-return]


def read_lines(path: Path) -> dict[int, str]:
    """The lines of a text file, stripped, by number from 0; blank ones are left out."""
    with open_text(path) as file:  # iterating breaks at newlines only, unlike str.splitlines
        return {number: line.strip() for number, line in enumerate(file) if line.strip()}


def lines_table(path: Path) -> pd.DataFrame:
    """A text file as a table with the one column ``prompt``, indexed by line."""
    pd = import_pandas()
    return pd.DataFrame({"prompt": pd.Series(read_lines(path), dtype=str)})


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file, every field of it as the text that stands there; blank lines are left out.

    It is separated by what its header uses most outside quotes, or by what a first line ``sep=`` of a spreadsheet names.

    Raises:
        ValueError: a header that is none, too long, or does not tell the separator; a row with more or fewer fields than it, or a quote
            out of place, with the line.
    """
    pd = import_pandas()
    with open_text(path) as file:
        header, rows = csv_rows(file, tabs=kind_of(path).startswith(".tsv"))
        return pd.DataFrame(list(rows), columns=header, dtype=str)


def csv_rows(file: IO[str], tabs: bool = False) -> tuple[list[str], Iterator[list[str]]]:
    """The header and the rows of a CSV file, separated by ``tabs`` or as `read_csv` says, in time linear in its length; raises as that."""
    first, before = "", 0
    for first in iter(lambda: file.readline(LONGEST_HEADER + 1), ""):
        if len(first) > LONGEST_HEADER:
            raise ValueError(f"its first line is no header: it has more than {LONGEST_HEADER:,} characters")
        if first.strip():
            break
        before += 1
    if not first.strip():
        raise ValueError("No columns to parse from file")
    separator = "\t" if tabs else separator_of(first)
    if named := re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE):
        separator, first, before = named[1], "", before + 1
    reader = csv.reader(chain([first] if first else [], file), delimiter=separator, strict=True)
    rows = numbered(reader, before)
    _, header = next(rows, (0, None))
    if header is None:
        raise ValueError("No columns to parse from file")
    return header, (checked_row(line, row, header, separator) for line, row in rows)


def separator_of(header: str) -> str:
    """What the first line of a CSV file uses most of `SEPARATORS` outside quotes; raises `ValueError` where it uses two as often."""
    unquoted = re.sub(r'"[^"]*"?', "", header)
    first, second, *_ = sorted(SEPARATORS, key=unquoted.count, reverse=True)
    if unquoted.count(first) == unquoted.count(second) > 0:
        raise ValueError(
            f"its header has {first!r} as often as {second!r}: a first line 'sep={first}' would tell which of them separates the fields"
        )
    return first


def numbered(reader: Any, before: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of a ``csv.reader`` that are not blank, each with the line that it begins in, of which there were some ``before``."""
    while True:
        line = before + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}") from None
        if row:
            yield line, row


def checked_row(line: int, row: list[str], header: list[str], separator: str) -> list[str]:
    """A row that has as many fields as the header; raises `ValueError` for any other."""
    if len(row) != len(header):
        quotes = f": a text that has {separator!r} in it must stand in quotes" if len(row) > len(header) else ""
        raise ValueError(f"line {line} has {counted(len(row))}, and the header {len(header)}{quotes}")
    return row


def counted(fields: int) -> str:
    """So many fields, in words."""
    return f"{fields} field{'s' * (fields != 1)}"


def read_json_lines(path: Path) -> pd.DataFrame:
    """A file of JSON objects, one a line, whose values stay what they are; raises `ValueError` with the line of what is none."""
    with open_text(path) as file:
        rows = [json_object(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    names = {name for row in rows for name in row}
    if len(names) * len(rows) > max(SPARSE_CELLS, 20 * sum(map(len, rows))):
        raise ValueError(f"its {len(rows):,} objects have {len(names):,} different names between them, which makes no table")
    return import_pandas().DataFrame(rows)


def json_object(number: int, line: str) -> dict[str, Any]:
    """The object in a line of this number; raises `ValueError` if there is none, or one that is not to be written again."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
            return row
        what = f"it holds {'null' if row is None else type(row).__name__}, and no object"
    except UnicodeEncodeError:
        what = "a character of it is half a surrogate pair"
    except ValueError as error:
        what = str(error)
    except RecursionError:
        what = "it is nested too deep"
    raise ValueError(f"line {number}: {what}")


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file, indexed by row from 0; an index that pandas wrote into it is a column like the others, if it has a name."""
    import_pandas()
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        table = table.select([i for i, name in enumerate(table.column_names) if not re.fullmatch(r"__index_level_\d+__", name)])
        for i, column in enumerate(table.columns):
            if pa.types.is_dictionary(column.type):
                table = table.set_column(i, table.field(i).name, column.cast(column.type.value_type))
        return table.to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(str(error)) from None


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".txt": lines_table,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
}
READERS |= {f"{kind}.gz": reader for kind, reader in READERS.items()} | {".parquet": read_parquet}


def read_table(path: Path) -> pd.DataFrame:
    """The table in a file, indexed by row from 0 (by line in a text file).

    Raises:
        ValueError: its suffix is unknown, it cannot be read, is not what its suffix says, or holds no row; one sentence naming the file.
    """
    table = read_checked(reader_of(path), path)
    if table.empty:
        raise ValueError(f"{path} holds no prompt.")
    return table


def reader_of(path: Path) -> Callable[[Path], pd.DataFrame]:
    """What reads the table in a file of this name; raises `ValueError` if nothing does."""
    if kind_of(path) not in READERS:
        known = [kind for kind in READERS if not kind.endswith(".gz")]
        raise ValueError(f"{path} has a suffix that is not known: {', '.join(known)} are, and .gz of those that are text.")
    return READERS[kind_of(path)]


def read_checked(reader: Callable[[Path], Found], path: Path) -> Found:
    """What ``reader`` makes of a file; its errors become a `ValueError` of one sentence."""
    try:
        return reader(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error.strerror or error)}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {kind_of(path)} file that can be read: {first_line(error)}; save it as UTF-8.") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no {kind_of(path)} file that can be read: {first_line(error)}.") from None


def first_line(error: object) -> str:
    """The first line of an error's text, or its name, without a full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# which of it are prompts


def prompt_column(table: pd.DataFrame, path: Path, column: str | None = None, skip_empty: bool = False) -> pd.Series:
    """The prompts of a table read from ``path``: ``column``, else the one with a name of `PROMPT_COLUMNS`, else the only one of text.

    ``skip_empty`` leaves out the rows whose entry is missing or blank, and has the log say how many those are.

    Raises:
        ValueError: there is no such column, more than one could be meant, or one of its entries is no text; one sentence naming the file.
    """
    names = list(map(str, table.columns))
    there = f"it has {', '.join(names)}"
    if len(there) > SHOWN_NAMES:
        there = f"{there[:SHOWN_NAMES]}..."
    if column is None:
        place = guessed_place(table, path, names, there)
    elif column not in names:
        raise ValueError(f"{path} has no column {column!r}: {there}.")
    else:
        place = names.index(column)
    name = names[place]
    if names.count(name) > 1:
        raise ValueError(f"{path} has {names.count(name)} columns {name!r}: it does not tell which of them holds the prompts.")
    prompts = table.iloc[:, place].rename("prompt")
    empty = prompts.isna() | prompts.map(lambda prompt: isinstance(prompt, str) and not prompt.strip()).astype(bool)
    if (count := int(empty.sum())) and not skip_empty:
        first = f"row {empty.idxmax()} of column {name!r}" + (f", the first of {count} such rows" if count > 1 else "")
        raise ValueError(f"{path} holds no text in {first}: --skip-empty leaves such rows out.")
    kept = prompts[~empty]
    if bad := [row for row, prompt in kept.items() if not isinstance(prompt, str)]:
        raise ValueError(f"{path} holds no text in row {bad[0]} of column {name!r}.")
    if kept.empty:
        raise ValueError(f"{path} holds no prompt.")
    if count:
        logger.warning("sdguard: %s: %d of %d rows hold no text in column %r and are left out", path, count, len(prompts), name)
    return kept


def guessed_place(table: pd.DataFrame, path: Path, names: list[str], there: str) -> int:
    """The place of the column that holds the prompts where nobody has said which; raises as `prompt_column`."""
    lower = [name.strip().lower() for name in names]
    if known := [name for name in PROMPT_COLUMNS if name in lower]:
        return lower.index(known[0])
    of_fields = reader_of(path) is read_csv
    text = [is_text(table.iloc[:, place], of_fields) for place in range(len(names))]
    if text.count(True) != 1:
        raise ValueError(f"{path} does not tell which column holds the prompts: {there}; name one.")
    if of_fields and all(text[place] or is_number(name) for place, name in enumerate(names)):
        raise ValueError(f"{path} does not tell whether its first line is a header: {there}; name the column, or write 'prompt' over it.")
    return text.index(True)


def is_text(column: pd.Series, of_fields: bool) -> bool:
    """Whether a column is one of text; among the fields of a CSV file, whether it holds anything but numbers."""
    from pandas.api.types import is_string_dtype

    return not all(map(is_number, column)) if of_fields else is_string_dtype(column)


def is_number(field: str) -> bool:
    """Whether a field of a CSV file is a number."""
    try:
        float(field)
    except ValueError:
        return False
    return True


def read_prompts(path: Path, column: str | None = None, skip_empty: bool = False) -> pd.Series:
    """The prompts in a file, indexed by row from 0 (by line in a text file); raises as `read_table` and `prompt_column` do."""
    return prompt_column(read_table(path), path, column, skip_empty)


def prompts_by_row(path: Path, column: str | None = None, skip_empty: bool = False) -> dict[int, str]:
    """`read_prompts` as a dictionary; of a text file without pandas, whose only column is ``prompt``."""
    if kind_of(path) not in (".txt", ".txt.gz") or column not in (None, "prompt"):
        return read_prompts(path, column, skip_empty).to_dict()
    prompts = read_checked(read_lines, path)
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


# writing


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC),  # else pandas writes a lone \r bare
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, double_precision=15),
    ".parquet": lambda table, path: table.to_parquet(path, index=False, write_page_checksum=True),
}


def check_suffix(path: Path) -> None:
    """Raise `ValueError` if `write_table` knows no such suffix."""
    if kind_of(path) not in WRITERS:
        raise ValueError(f"{path} cannot be written: its suffix must be one of {', '.join(WRITERS)}.")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table without its index, in the format of the suffix, whole or not at all; raises as `check_suffix` and `atomic_write` do."""
    check_suffix(path)
    with atomic_write(path) as partial:
        WRITERS[kind_of(path)](table, partial)
