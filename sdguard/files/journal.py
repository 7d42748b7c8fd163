"""A journal of finished pieces of long work: a killed run reads it and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Results by key in a file of JSON lines, whose first line says what work they belong to.

    A journal of other work is started over. A line that a killed run left half-written is dropped. With ``path`` None nothing is kept.
    """

    def __init__(self, path: Path | None, work: dict[str, Any]) -> None:
        self.path, self.results = path, dict[str, Any]()
        if path is None:
            return
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [entry for entry in map(parsed, lines) if entry is not None]
        if entries[:1] == [work]:
            self.results = {entry["key"]: entry["result"] for entry in entries[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [work, *({"key": key, "result": result} for key, result in self.results.items())]
        partial = path.with_name(f".{path.name}.partial")  # a run killed right now must not lose what earlier ones kept
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        partial.replace(path)

    def add(self, key: str, result: Any) -> None:
        """Keep the result of one piece of work."""
        self.results[key] = result
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")

    def close(self) -> None:
        """The work is done; its journal goes."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def parsed(line: str) -> Any:
    """A line's JSON value, or None where it is cut."""
    try:
        return json.loads(line)
    except ValueError:
        return None
