"""Tables of the README, each between two markers that name the command it comes from."""

from __future__ import annotations

from pathlib import Path

from sdguard.files.atomic import write_text

README = Path(__file__).parents[1] / "README.md"


def put(name: str, text: str, path: Path = README) -> None:
    """Replace what stands between ``<!-- NAME: ... -->`` and ``<!-- /NAME -->`` by ``text``; raises `ValueError` where they are not."""
    before, found, rest = path.read_text().partition(f"<!-- {name}: ")
    command, opened, rest = rest.partition(" -->\n")
    _, closed, after = rest.partition(f"<!-- /{name} -->")
    if not (found and opened and closed):
        raise ValueError(f"{path} has no place for the table {name!r}.")
    write_text(path, f"{before}{found}{command}{opened}{text}\n<!-- /{name} -->{after}")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
