"""What every steering method returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """A new text condition for each row of an observation.

    Attributes:
        condition: ``[B, T, E]``.
        how: one entry per row for the report: ``method`` and what it did.
    """

    condition: Tensor
    how: list[dict[str, Any]]
