"""Tables and sentences of the README and the documentation, each between two markers that name the command it comes from."""

from __future__ import annotations

from pathlib import Path

from sdguard.files.atomic import write_text

ROOT = Path(__file__).parents[1]


def documents(root: Path = ROOT) -> list[Path]:
    """What people read: ``README.md`` and the pages under ``docs/``, those that are made at build time left out."""
    pages = (path for path in sorted((root / "docs").rglob("*.md")) if "generated" not in path.relative_to(root).parts)
    return [path for path in (root / "README.md", *pages) if path.exists()]


def put(name: str, text: str, root: Path = ROOT) -> None:
    """Replace what stands between ``<!-- NAME: ... -->`` and ``<!-- /NAME -->`` by ``text``, in the one document that has them.

    Raises:
        ValueError: no document has the markers, one has no more than the first, or several have them.
    """
    places = [path for path in documents(root) if f"<!-- {name}: " in path.read_text()]
    if len(places) > 1:
        raise ValueError(f"The table {name!r} has a place in each of {', '.join(str(path.relative_to(root)) for path in places)}.")
    before, found, rest = places[0].read_text().partition(f"<!-- {name}: ") if places else ("", "", "")
    command, opened, rest = rest.partition(" -->\n")
    _, closed, after = rest.partition(f"<!-- /{name} -->")
    if not (found and opened and closed):
        raise ValueError(f"No document under {root} has a place for the table {name!r}.")
    write_text(places[0], f"{before}{found}{command}{opened}{text}\n<!-- /{name} -->{after}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
