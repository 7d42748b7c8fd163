"""What commands say to people beside tables and progress."""

from __future__ import annotations

from rich.console import Console


def say(text: str) -> None:
    """Print a text as it is, whatever brackets the paths in it have, on as many lines as the terminal needs."""
    Console().print(text, markup=False, highlight=False)


def say_line(text: str) -> None:
    """Print a text on one line, for who copies it."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
