"""A file of prompts scanned."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sdguard.decision.profile import Profile
from sdguard.demo.model import Model
from sdguard.demo.profiles import find_or_make_profile
from sdguard.demo.settings import MOST_SEEDS, bounded, whole
from sdguard.demo.streaming import Emit, Progress
from sdguard.scan.ranking import rank_prompts
from sdguard.scan.scan import scan


@dataclass
class Scanned:
    """A finished scan: its ranked table, the profile, seeds a prompt and false discovery rate it went by, and how long it took."""

    table: pd.DataFrame
    profile: Profile
    seeds: int
    fdr: float
    seconds: float


def scan_prompts(model: Model, prompts: pd.Series, seeds: int, fdr: float, rate: float, own: Profile | None, emit: Emit) -> None:
    """Emit progress over the prompts of a file, then `Scanned`; ``rate`` is the guard's. Raises as `compare` does."""
    seeds = whole("The number of seeds", seeds, 1, MOST_SEEDS)
    bounded("The false discovery rate", fdr, 0.001, 0.5)
    profile = find_or_make_profile(model, rate, own, emit)
    found = prompts.to_dict()
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    emit(Progress("Scanning", 0, len(found)))
    for batch in scan(model.own(), profile, found, seeds=seeds, false_positive_rate=rate):
        rows += batch
        emit(Progress("Scanning", len(rows), len(found), rests=True))
    emit(Scanned(rank_prompts(rows, fdr), profile, seeds, fdr, time.monotonic() - began))
