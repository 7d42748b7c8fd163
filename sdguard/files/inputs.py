"""What a user gave and cannot be used: the error that commands and the demo's page show as it is."""

from __future__ import annotations


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one sentence."""
