"""Files of prompts, and tables to and from files: plain text, CSV, JSON lines and parquet, told apart by the suffix.

A file is read in pieces of so many rows, so that one of any length takes the memory of a piece; whoever wants it whole asks for one piece.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from sdguard.files.atomic import atomic_write
from sdguard.files.inputs import first_line

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
#: what JSON calls what a line may hold beside an object.
JSON_KINDS = {int: "a number", float: "a number", str: "a string", bool: "a boolean", list: "an array", type(None): "null"}
#: rows of a file that are held at a time where it is read in pieces.
PIECE_ROWS = 8192
#: rows of a file that are held at a time where it is asked which column holds the prompts, since pictures may stand beside them.
COLUMN_ROWS = 256
#: bytes of a column of a parquet file that are read at a time.
PARQUET_BUFFER = 1 << 20
#: what a column of prompts is called, in order of preference, whatever its case.
PROMPT_COLUMNS = ("prompt", "caption", "text")
#: what separates the fields of a CSV file, in order of preference.
SEPARATORS = ",;\t"
#: characters that the first line of a CSV file has at most.
LONGEST_HEADER = 65_536
#: what stands for a missing value in a CSV file, in lower case.
MISSING = ("na", "n/a", "null", "none")
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


def in_pieces(items: Iterable[Item], rows: int | None) -> Iterator[tuple[int, list[Item]]]:
    """So many items at a time, or all of them where no number is given, each piece after the number of its first item."""
    start, left = 0, iter(items)
    while piece := list(islice(left, rows)):
        yield start, piece
        start += len(piece)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, stripped, after their number from 0; blank ones are left out."""
    with open_text(path) as file:  # iterating breaks at newlines only, unlike str.splitlines
        yield from ((number, line.strip()) for number, line in enumerate(file) if line.strip())


def read_lines(path: Path) -> dict[int, str]:
    """`numbered_lines` as a dictionary."""
    return dict(numbered_lines(path))


def lines_tables(path: Path, rows: int | None = None, only: str | None = None) -> Iterator[pd.DataFrame]:
    """A text file as tables with the one column ``prompt``, indexed by line."""
    pd = import_pandas()
    for _, piece in in_pieces(numbered_lines(path), rows):
        yield pd.DataFrame({"prompt": pd.Series(dict(piece), dtype=str)})


def csv_tables(path: Path, rows: int | None = None, only: str | None = None) -> Iterator[pd.DataFrame]:
    """A CSV file, every field of it as the text that stands there.

    It is separated by what its header uses most outside quotes, or by what a first line ``sep=`` of a spreadsheet names. Blank lines are
    left out; but in a table of one column a blank line with another row behind it is a row whose field is empty.

    Raises:
        ValueError: a header that is none, too long, or does not tell the separator; a row with more or fewer fields than it, or a quote
            out of place, with the line.
    """
    pd = import_pandas()
    with open_text(path) as file:
        header, fields = csv_rows(file, tabs=kind_of(path).startswith(".tsv"))
        for start, piece in in_pieces(fields, rows):
            yield pd.DataFrame(piece, columns=header, index=range(start, start + len(piece)), dtype=str)


def csv_rows(file: IO[str], tabs: bool = False) -> tuple[list[str], Iterator[list[str]]]:
    """The header and the rows of a CSV file, separated by ``tabs`` or as `csv_tables` says, in time linear in its length; raises so."""
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
    header = next((row for _, row in rows if row), None)
    if header is None:
        raise ValueError("No columns to parse from file")
    found = with_empty_fields(rows) if len(header) == 1 else ((line, row) for line, row in rows if row)
    return header, (checked_row(line, row, header, separator) for line, row in found)


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
    """The rows of a ``csv.reader``, blank ones too, each with the line that it begins in, of which there were some ``before``."""
    while True:
        line = before + reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"line {line}: {error}") from None
        yield line, row


def with_empty_fields(rows: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table of one column: a blank one is an empty field, unless none but blank ones come after it."""
    blank = 0
    for line, row in rows:
        if not row:
            blank += 1
            continue
        yield from ((earlier, [""]) for earlier in range(line - blank, line))
        blank = 0
        yield line, row


def checked_row(line: int, row: list[str], header: list[str], separator: str) -> list[str]:
    """A row that has as many fields as the header; raises `ValueError` for any other."""
    if len(row) != len(header):
        quotes = f": a text that has {separator!r} in it must stand in quotes" if len(row) > len(header) else ""
        raise ValueError(f"line {line} has {counted(len(row))}, and the header {len(header)}{quotes}")
    if separator == "\t" and any("\t" in field and "\n" in field for field in row):
        raise ValueError(
            f"line {line} begins a text in quotes that goes on over tabs and lines: a quote that is text must be doubled, in quotes"
        )
    return row


def counted(fields: int) -> str:
    """So many fields, in words."""
    return f"{fields} field{'s' * (fields != 1)}"


def json_tables(path: Path, rows: int | None = None, only: str | None = None) -> Iterator[pd.DataFrame]:
    """A file of JSON objects, one a line, whose values stay what they are; a piece has the columns that its own objects have.

    Raises:
        ValueError: a line that is no object, with its number; or objects with too little in common, as far as they have been read.
    """
    pd, names, cells = import_pandas(), set[str](), 0
    with open_text(path) as file:
        objects = (json_object(number, line) for number, line in enumerate(file, start=1) if line.strip())
        for start, piece in in_pieces(objects, rows):
            count = start + len(piece)
            names |= {name for row in piece for name in row}
            cells += sum(map(len, piece))
            if len(names) * count > max(SPARSE_CELLS, 20 * cells):
                raise ValueError(f"its {count:,} objects have {len(names):,} different names between them, which makes no table")
            yield pd.DataFrame(piece, index=range(start, count))


def json_object(number: int, line: str) -> dict[str, Any]:
    """The object in a line of this number; raises `ValueError` if there is none, or one that is not to be written again."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # fails for half of a surrogate pair, which is no text
            return row
        what = f"it holds {JSON_KINDS[type(row)]}, and no object"
    except UnicodeEncodeError:
        what = "a character of it is half a surrogate pair"
    except ValueError as error:
        what = str(error)
    except RecursionError:
        what = "it is nested too deep"
    raise ValueError(f"line {number}: {what}")


def parquet_tables(path: Path, rows: int | None = None, only: str | None = None) -> Iterator[pd.DataFrame]:
    """A parquet file, indexed by row from 0; an index that pandas wrote into it is a column like the others, if it has a name."""
    pd = import_pandas()
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True, buffer_size=PARQUET_BUFFER) as file:
            names = file.schema_arrow.names
            columns = [only] if only is not None and names.count(only) == 1 else None
            start = 0
            for piece in (pa.Table.from_batches([batch]) for batch in file.iter_batches(rows, columns=columns)) if rows else [file.read()]:
                piece.validate(full=True)  # here and not where an entry is read: not all texts of a file are text
                yield plain_table(piece).set_index(pd.RangeIndex(start, start + len(piece)))
                start += len(piece)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(str(error)) from None


def plain_table(table: Any) -> pd.DataFrame:
    """An arrow table as one of pandas, without the index that pandas wrote into it without a name, and without dictionaries."""
    import pyarrow as pa

    table = table.select([i for i, name in enumerate(table.column_names) if not re.fullmatch(r"__index_level_\d+__", name)])
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(i, table.field(i).name, column.cast(column.type.value_type))
    return table.to_pandas(ignore_metadata=True)


#: what reads a file's tables, so many rows at a time, or all at once; where only one column is needed, others may come along.
READERS: dict[str, Callable[[Path, int | None, str | None], Iterator[pd.DataFrame]]] = {
    ".txt": lines_tables,
    ".csv": csv_tables,
    ".tsv": csv_tables,
    ".jsonl": json_tables,
    ".ndjson": json_tables,
}
READERS |= {f"{kind}.gz": reader for kind, reader in READERS.items()} | {".parquet": parquet_tables}


def read_pieces(path: Path, rows: int | None = PIECE_ROWS, only: str | None = None) -> Iterator[pd.DataFrame]:
    """The table in a file, so many rows at a time, indexed by row from 0 (by line in a text file); ``only`` as in `READERS`.

    Raises:
        ValueError: its suffix is unknown, it cannot be read, or is not what its suffix says; one sentence naming the file.
    """
    reader = reader_of(path)
    with refused_in_one_sentence(path):
        yield from reader(path, rows, only)


def read_table(path: Path) -> pd.DataFrame:
    """The whole table in a file.

    Raises:
        ValueError: as `read_pieces`, or it holds no row.
    """
    table = next(read_pieces(path, None), None)
    if table is None or table.empty:
        raise ValueError(f"{path} holds no prompt.")
    return table


def reader_of(path: Path) -> Callable[[Path, int | None, str | None], Iterator[pd.DataFrame]]:
    """What reads the table in a file of this name; raises `ValueError` if nothing does."""
    if kind_of(path) not in READERS:
        known = [kind for kind in READERS if not kind.endswith(".gz")]
        raise ValueError(f"{path} has a suffix that is not known: {', '.join(known)} are, and .gz of those that are text.")
    return READERS[kind_of(path)]


@contextmanager
def refused_in_one_sentence(path: Path) -> Iterator[None]:
    """What goes wrong in reading a file becomes a `ValueError` of one sentence."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error.strerror or error)}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {kind_of(path)} file that can be read: {first_line(error)}; save it as UTF-8.") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no {kind_of(path)} file that can be read: {first_line(error)}.") from None


# which of it are prompts


def prompt_column(table: pd.DataFrame, path: Path, column: str | None = None, skip_empty: bool = False) -> pd.Series:
    """The prompts of a table read from ``path``: ``column``, else the one with a name of `PROMPT_COLUMNS`, else the only one of text.

    ``skip_empty`` leaves out the rows whose entry is missing or blank, and has the log say how many those are.

    Raises:
        ValueError: there is no such column, more than one could be meant, or one of its entries is no text; one sentence naming the file.
    """
    name = find_column([table], path, column)
    return import_pandas().concat(kept_prompts([table], path, name, skip_empty, tell=True))


def find_column(tables: Iterable[pd.DataFrame], path: Path, column: str | None = None) -> str:
    """The name of the column that holds the prompts of a file, given as the pieces of its table, no more of them than it takes to tell.

    Raises:
        ValueError: as `prompt_column`, or there is no row.
    """
    names: list[str] = []
    kinds: dict[str, set[str]] = defaultdict(set)
    same_columns, of_fields = reader_of(path) is not json_tables, reader_of(path) is csv_tables
    for table in tables:
        here = list(map(str, table.columns))
        names += [name for name in here if name not in names] if names else here
        wanted = column if column is not None else named_as_prompts(names)
        first_choice = column is not None or (wanted or "").strip().lower() == PROMPT_COLUMNS[0]
        if wanted is not None and (same_columns or (first_choice and wanted in names)):
            break  # no later piece can change it
        if wanted is None:
            for place, name in enumerate(here):
                kinds[name].add(kind_of_entries(table.iloc[:, place], of_fields))
    if not names:
        raise ValueError(f"{path} holds no prompt.")
    there = f"it has {', '.join(names)}"
    if len(there) > SHOWN_NAMES:
        there = f"{there[:SHOWN_NAMES]}..."
    if column is not None and column not in names:
        raise ValueError(f"{path} has no column {column!r}: {there}.")
    name = column if column is not None else named_as_prompts(names) or only_text(path, names, kinds, there)
    alike = [other for other in names if other == name or (column is None and other.strip().lower() == name.strip().lower())]
    if len(alike) > 1:
        those = " and ".join(map(repr, alike)) if len({*alike}) > 1 else f"{name!r}"
        raise ValueError(f"{path} has {len(alike)} columns {those}: it does not tell which of them holds the prompts.")
    return name


def column_of(path: Path, column: str | None = None) -> str:
    """`find_column` of a file, of which few rows are held."""
    return find_column(read_pieces(path, COLUMN_ROWS), path, column)


def named_as_prompts(names: list[str]) -> str | None:
    """The first of these names of columns that is one of `PROMPT_COLUMNS`, of several such the one that comes first there."""
    lower = [name.strip().lower() for name in names]
    return next((names[lower.index(name)] for name in PROMPT_COLUMNS if name in lower), None)


def only_text(path: Path, names: list[str], kinds: dict[str, set[str]], there: str) -> str:
    """The one column of text, of which ``kinds`` has what `kind_of_entries` says of its pieces; raises as `prompt_column`."""
    text = [name for name in names if "text" in kinds[name] and "other" not in kinds[name]]
    if len(text) != 1:
        raise ValueError(f"{path} does not tell which column holds the prompts: {there}; name one.")
    if reader_of(path) is csv_tables and all(name in text or is_value(name) for name in names):
        raise ValueError(f"{path} does not tell whether its first line is a header: {there}; name the column, or write 'prompt' over it.")
    return text[0]


def is_value(field: str) -> bool:
    """Whether the first field of a column of numbers is one of them and not its name: a number, of a row too, or a missing one."""
    return is_number(field.strip().removeprefix("#")) or field.strip().lower() in MISSING


def kind_of_entries(column: pd.Series, of_fields: bool) -> str:
    """What a piece of a column says about it: ``"text"``, ``"other"``, or nothing where no entry does.

    Among the fields of a CSV file a number says nothing, and anything else is text.
    """
    from pandas import StringDtype

    if of_fields:
        return "" if all(map(is_number, column)) else "text"
    there = column.dropna()
    if isinstance(column.dtype, StringDtype) or (len(there) and all(isinstance(entry, str) for entry in there)):
        return "text"
    return "other" if len(there) else ""


def kept_prompts(
    tables: Iterable[pd.DataFrame], path: Path, name: str, skip_empty: bool = False, tell: bool = False
) -> Generator[pd.Series, None, None]:
    """The prompts of each piece of a file's table, where it has any; after the last, raises as `prompt_column`, or else logs if told.

    Until then, entries that are no text are left out.
    """
    pd = import_pandas()
    rows, empties, kept = 0, 0, 0
    first_empty: Any = None
    first_bad: Any = None
    for table in tables:
        entries = table[name] if name in table else pd.Series(None, table.index, dtype=object)
        empty = entries.isna() | entries.map(lambda entry: isinstance(entry, str) and not entry.strip()).astype(bool)
        text = entries.map(lambda entry: isinstance(entry, str)).astype(bool)
        first_empty = empty.idxmax() if first_empty is None and empty.any() else first_empty
        first_bad = (~empty & ~text).idxmax() if first_bad is None and (~empty & ~text).any() else first_bad
        rows, empties, kept = rows + len(entries), empties + int(empty.sum()), kept + int((~empty).sum())
        if (text & ~empty).any():
            yield entries[text & ~empty].rename("prompt").astype(str)
    if empties and not skip_empty:
        first = f"row {first_empty} of column {name!r}" + (f", the first of {empties} such rows" if empties > 1 else "")
        raise ValueError(f"{path} holds no text in {first}: --skip-empty leaves such rows out.")
    if first_bad is not None:
        raise ValueError(f"{path} holds no text in row {first_bad} of column {name!r}.")
    if not kept:
        raise ValueError(f"{path} holds no prompt.")
    if empties and tell:
        logger.warning("sdguard: %s: %d of %d rows hold no text in column %r and are left out", path, empties, rows, name)


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
    """`read_prompts` as a dictionary, of which no other column is held; of a text file without pandas, whose only column is ``prompt``."""
    if kind_of(path) not in (".txt", ".txt.gz") or column not in (None, "prompt"):
        pieces = PromptFile(path, column_of(path, column), skip_empty).pieces(tell=True)
        return {row: prompt for piece in pieces for row, prompt in piece.items()}
    with refused_in_one_sentence(path):
        prompts = read_lines(path)
    if not prompts:
        raise ValueError(f"{path} holds no prompt.")
    return prompts


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts of any length, whose column of them is known (`column_of`).

    Attributes:
        column: the name of that column.
        skip_empty: whether rows without text are left out.
        rows: of the file in a piece.
    """

    path: Path
    column: str
    skip_empty: bool = False
    rows: int = PIECE_ROWS

    def pieces(self, tell: bool = False) -> Iterator[dict[int, str]]:
        """The prompts of so many rows at a time, by row; the same pieces each time. Whatever is refused is so after the last at the latest.

        ``tell``: have the log say how many rows are left out. Raises as `read_prompts` does.
        """
        tables = read_pieces(self.path, self.rows, self.column)
        for prompts in kept_prompts(tables, self.path, self.column, self.skip_empty, tell):
            yield prompts.to_dict()


# writing


def write_csv(tables: Iterator[pd.DataFrame], path: Path) -> None:
    """Write a table that comes in pieces as CSV."""
    for number, table in enumerate(tables):  # all text in quotes: else pandas writes a lone \r bare
        table.to_csv(path, mode="a" if number else "w", header=not number, index=False, quoting=csv.QUOTE_NONNUMERIC)


def write_json_lines(tables: Iterator[pd.DataFrame], path: Path) -> None:
    """Write a table that comes in pieces as JSON objects, one a line."""
    for number, table in enumerate(tables):
        table.to_json(path, orient="records", lines=True, double_precision=15, mode="a" if number else "w")


def write_parquet(tables: Iterator[pd.DataFrame], path: Path) -> None:
    """Write a table that comes in pieces as parquet, whose row groups they become."""
    import pyarrow as pa
    from pyarrow import parquet

    first = pa.Table.from_pandas(next(tables), preserve_index=False)
    with parquet.ParquetWriter(path, first.schema, write_page_checksum=True) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(pa.Table.from_pandas(table, first.schema, preserve_index=False))


WRITERS: dict[str, Callable[[Iterator[pd.DataFrame], Path], None]] = {
    ".csv": write_csv,
    ".jsonl": write_json_lines,
    ".parquet": write_parquet,
}


def check_suffix(path: Path) -> None:
    """Raise `ValueError` if `write_tables` knows no such suffix."""
    if kind_of(path) not in WRITERS:
        raise ValueError(f"{path} cannot be written: its suffix must be one of {', '.join(WRITERS)}.")


def write_tables(tables: Iterable[pd.DataFrame], path: Path) -> None:
    """Write a table that comes in pieces of the same columns, one at least, each without its index, in the format of the suffix.

    The file is there whole or not at all. Raises as `check_suffix` and `atomic_write` do.
    """
    check_suffix(path)
    with atomic_write(path) as partial:
        WRITERS[kind_of(path)](iter(tables), partial)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """`write_tables` of a whole table."""
    write_tables([table], path)
