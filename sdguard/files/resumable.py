"""Long work in pieces: each result is a file, so that what was killed goes on, and processes share what there is to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress

from sdguard.files.atomic import write_text
from sdguard.files.processes import processes
from sdguard.files.prompt_files import import_pandas, read_parquet, write_table

if TYPE_CHECKING:
    import pandas as pd

Piece = TypeVar("Piece")
Result = TypeVar("Result")


#: how a result is written, whole or not at all, and read, by the suffix of its file.
WRITERS: dict[str, Callable[[Any, Path], None]] = {
    ".json": lambda result, path: write_text(path, json.dumps(result)),
    ".parquet": write_table,
}
READERS: dict[str, Callable[[Path], Any]] = {".json": lambda path: json.loads(path.read_text()), ".parquet": read_parquet}


class Parts(Mapping[str, Any]):
    """Results of one work by the name of their piece, each in a file that is whole or not there.

    Args:
        folder: has a subfolder for each work. None: results are kept in memory and nowhere else.
        what: the work's name for people.
        about: whatever its results hang on; what is known of any other ``about`` is not known of this one.
        suffix: ``".json"`` for results that JSON can hold, ``".parquet"`` for tables.
    """

    def __init__(self, folder: Path | None, what: str, about: Any, suffix: str = ".json") -> None:
        digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:12]
        self.suffix, self.folder = suffix, folder and folder / f"{what}-{digest}"
        self.held: dict[str, Any] = {}

    def path(self, name: str) -> Path | None:
        """The file of a piece's result."""
        return self.folder and self.folder / f"{name}{self.suffix}"

    def keep(self, name: str, result: Any) -> None:
        """Keep the result of one piece."""
        if (path := self.path(name)) is None:
            self.held[name] = result
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[self.suffix](result, path)

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        path = self.path(name)
        return READERS[self.suffix](path) if path else self.held[name]

    def __contains__(self, name: object) -> bool:
        path = self.path(str(name))
        return path.exists() if path else name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.stem for path in self.folder.glob(f"*{self.suffix}")) if self.folder else list(self.held))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def dealt(self, state: PartialState | None = None) -> list[str]:
        """The names that fall to this process: each to one of those that can see its file. To be asked before anything is kept."""
        if state is None or state.num_processes == 1:
            return list(self)
        seen = [set(names) for names in gather_object([list(self)])]
        names = sorted(set().union(*seen))
        owners = [[rank for rank, held in enumerate(seen) if name in held] for name in names]
        return [name for i, name in enumerate(names) if owners[i][i % len(owners[i])] == state.process_index]

    def remove(self) -> None:
        """The work is done: its files go, and the folder around them if they were all it held."""
        self.held.clear()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other work is kept there too, or another process was faster
                self.folder.parent.rmdir()


def parts_folder(path: Path) -> Path:
    """Where the parts of what is to become the file ``path`` are kept until it is there."""
    return path.with_name(f"{path.name}.parts")


def run_pieces(
    parts: Parts,
    pieces: Mapping[str, Piece],
    work: Callable[[Piece], Result],
    state: PartialState | None = None,
    done: Callable[[Piece], None] | None = None,
) -> list[Result]:
    """What ``work`` makes of each of ``pieces``, in their order; what is known in ``parts`` is not done again.

    Processes take turns with the pieces, and each returns all results. ``done`` is called after each piece of this process's own.
    """
    rank, count = (state.process_index, state.num_processes) if state else (0, 1)
    mine = list(pieces.items())[rank::count]
    for name, piece in mine:
        if name not in parts:
            parts.keep(name, work(piece))
        if done:
            done(piece)
    results = {name: parts[name] for name, _ in mine}
    if count > 1:
        results = {name: result for each in gather_object([results]) for name, result in each.items()}
    return [results[name] for name in pieces]


def measured(
    what: str,
    samples: pd.DataFrame,
    measure: Callable[[pd.DataFrame], pd.DataFrame],
    folder: Path,
    about: Mapping[str, Any],
    batch: int,
) -> pd.DataFrame:
    """What ``measure`` makes of ``samples``, a batch at a time; every row carries ``about``.

    Each batch is a parquet file among the `Parts` under ``folder`` that are known by ``what``, the samples and ``about``: a measurement
    that was killed goes on and has lost a batch at most. Under ``accelerate launch`` the processes take turns with the batches and all
    return all rows.
    """
    pandas, state = import_pandas(), processes()
    parts = Parts(folder, what, [what, batch, samples.to_json(orient="split"), dict(about)], ".parquet")
    starts = {f"{start:06d}": start for start in range(0, len(samples), batch)}

    def measure_from(start: int) -> pd.DataFrame:
        return measure(samples[start : start + batch].reset_index(drop=True)).assign(**about)

    with Progress(disable=not state.is_main_process or all(name in parts for name in starts)) as bar:
        task = bar.add_task(what, total=len(range(state.process_index, len(starts), state.num_processes)))
        tables = run_pieces(parts, starts, measure_from, state, lambda _: bar.advance(task))
    return pandas.concat(tables, ignore_index=True)
