"""What a signal is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sdguard.observation import Observation


class UnsupportedModel(ValueError):
    """A signal reads something inside the denoiser that this one does not have."""


@dataclass(frozen=True)
class Signal:
    """A measure of one denoiser call; one file each in this folder.

    Attributes:
        name: the one it has in profiles, reports and tables.
        read: Observation -> one value per image, ``[B]``, of that row alone; higher = more memorized.
        cost: extra denoiser evaluations per image. Those at cost 0 can be read at every call of a run, the others are meant for the first.
    """

    name: str
    read: Callable[[Observation], Tensor]
    cost: int
