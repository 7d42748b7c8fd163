"""Long work in pieces: each result is a file, so that what was killed goes on, and processes share what there is to do."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress

from sdguard.files.atomic import write_bytes
from sdguard.files.processes import processes
from sdguard.files.prompt_files import import_pandas

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Result = TypeVar("Result")

#: how a result is turned into bytes and back, by the suffix of its file.
TO_BYTES: dict[str, Callable[[Any], bytes]] = {
    ".json": lambda result: json.dumps(result).encode(),
    ".parquet": lambda table: bytes(table.to_parquet(index=False)),
}
FROM_BYTES: dict[str, Callable[[bytes], Any]] = {
    ".json": json.loads,
    ".parquet": lambda content: import_pandas().read_parquet(BytesIO(content)),
}


def sealed(content: bytes) -> bytes:
    """Bytes behind a line that has their hash."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unsealed(content: bytes) -> bytes | None:
    """The bytes that `sealed` was given; None if what it made of them has changed since, or was never made by it."""
    digest, _, sound = content.partition(b"\n")
    return sound if digest == hashlib.sha256(sound).hexdigest().encode() else None


class Parts(Mapping[str, Any]):
    """Results of one work by the name of their piece, each in a file that is whole or not there.

    A file that has changed since it was written, by whatever accident, is not there.

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
        """Keep the result of one piece; raises `CannotWrite`."""
        if (path := self.path(name)) is None:
            self.held[name] = result
        else:
            write_bytes(path, sealed(TO_BYTES[self.suffix](result)))

    def __getitem__(self, name: str) -> Any:
        if (path := self.path(name)) is None:
            return self.held[name]
        try:
            content = unsealed(path.read_bytes())
        except OSError:
            raise KeyError(name) from None
        if content is None:
            logger.warning("sdguard: passed over, and done again: %s is damaged, or of another version", path)
            raise KeyError(name)
        return FROM_BYTES[self.suffix](content)

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of this name, be it damaged."""
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

    def remove(self, names: Iterable[str] | None = None) -> None:
        """The work is done: its files go, all or those of some ``names``, and the folders around them if they were all these held."""
        self.held.clear()
        if not self.folder:
            return
        if names is None:
            remove_folder(self.folder)
            return
        for path in filter(None, map(self.path, names)):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # other work is kept there too
            self.folder.rmdir()
            self.folder.parent.rmdir()


def remove_folder(folder: Path) -> None:
    """Remove a folder, and the one around it if it was all that was there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other work is kept there too, or another process was faster
        folder.parent.rmdir()


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
    results = {}
    for name, piece in mine:
        try:
            results[name] = parts[name]
        except KeyError:
            parts.keep(name, made := work(piece))
            # as it will be read the next time, so that an interruption moves nothing
            results[name] = FROM_BYTES[parts.suffix](TO_BYTES[parts.suffix](made)) if parts.folder else made
        if done:
            done(piece)
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
