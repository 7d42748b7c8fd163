"""A profile of real traffic: the scores that the guard gave to what people really asked for, in place of those of a list."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdguard.decision.cache import name_of
from sdguard.decision.profile import Profile, ProfileError
from sdguard.files.appending import append_lines

#: scores that a profile of traffic is made of at least.
LEAST_SCORES = 100


def append_scores(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line a row to a log, which processes may share; raises `CannotWrite`.

    A line that a full disk once cut off is ended first, so that it spoils no other.
    """
    append_lines(path, (json.dumps(dict(row)) for row in rows))


def logged_scores(path: Path, profiles: Sequence[Profile]) -> tuple[Profile, list[float]]:
    """The first of some profiles that enough of the scores in a log were given by, and these scores in their order.

    Raises:
        ProfileError: the file cannot be read, holds a line that is none of the guard's, or too few scores by any of the profiles.
    """
    scores: dict[str, list[float]] = {name_of(profile): [] for profile in profiles}
    others = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = score_line(line)
                if row is None:
                    raise ProfileError(f"{path}: line {number} is no line of a log of scores: remove it, and try again.")
                if row.get("profile") in scores:
                    scores[row["profile"]].append(row["score"])
                else:
                    others += 1
    except OSError as error:
        raise ProfileError(f"The log {path} cannot be read: {error.strerror}.") from None
    for profile in profiles:
        if len(found := scores[name_of(profile)]) >= LEAST_SCORES:
            return profile, found
    given = ", ".join(f"{len(found)} scores that profile {name} gave" for name, found in scores.items())
    beside = f", and {others} that another profile gave" if others else ""
    raise ProfileError(f"{path} holds {given}{beside}; {LEAST_SCORES} by one profile are needed at least.")


def score_line(line: bytes) -> dict[str, Any] | None:
    """The row in a line of a log of scores; None if it is no such line."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("score"), float) and math.isfinite(row["score"]) else None


def profile_of_traffic(profile: Profile, scores: list[float], memorized_share: float) -> Profile:
    """``profile`` with the threshold and the p-values resting on ``scores`` that it gave to real pictures.

    The highest ``memorized_share`` of them are left out: where no more than that share of the pictures were memorized, an ordinary one is
    flagged with at most the promised rate plus that share, and with no more than the promise where the memorized ones scored highest and
    were that many. A prompt counts as often as it was asked for, which is what a server's rate is about.

    Raises:
        ValueError: the share is none.
    """
    if not 0 <= memorized_share < 1:
        raise ValueError(f"The share of memorized pictures is {memorized_share}; it must be at least 0 and under 1.")
    kept = sorted(scores)[: len(scores) - math.ceil(memorized_share * len(scores))]
    if len(kept) < 2:
        raise ProfileError(f"Of {len(scores)} scores a share of {memorized_share:g} leaves {len(kept)}: give more, or a smaller share.")
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]
    note = f"of {len(scores):,} scores of real traffic, the highest {memorized_share:.1%} left out"
    return replace(profile, scores=kept, prompts_digest=digest, set_aside=[], note=note)
