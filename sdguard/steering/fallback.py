"""The fallback sequence: steering methods one after the other, each verified by what it did not optimise, until one passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdguard.correction import Correction
from sdguard.decision.profile import Profile
from sdguard.steering import METHODS
from sdguard.steering.method import Method, SteeringInput
from sdguard.steering.verification import Verification, verify

logger = logging.getLogger(__name__)

#: tried where a profile has learnt no order: what keeps the prompt in words first, then what moves its embedding.
DEFAULT = ("rewording", "neutral blend", "token descent", "embedding descent")


@dataclass
class Outcome:
    """What steering did for one image; ``correction`` is None if nothing has passed verification.

    Attributes:
        attempts: what was tried and what was found of it, in order.
        taken: how many of the turns of its methods have been taken.
    """

    correction: Correction | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)
    taken: int = 0

    def summary(self) -> dict[str, Any]:
        """For the report: the attempt that passed, if any, and every attempt."""
        return {"passed": self.attempts[-1] if self.correction is not None else None, "attempts": self.attempts}


def methods_of(profile: Profile, chosen: Sequence[str] | None = None) -> list[Method]:
    """The methods to be tried: those chosen by name, else in the profile's learnt order, else `DEFAULT`."""
    return [METHODS[name] for name in chosen or [learnt.method for learnt in profile.methods] or DEFAULT]


def turns(methods: Sequence[Method]) -> list[Method]:
    """Every method, followed by what it does where its first correction does not pass."""
    return [replace(method, correct=correct, stronger=()) for method in methods for correct in (method.correct, *method.stronger)]


def attempt(flagged: SteeringInput, method: Method) -> list[tuple[Correction, Verification] | None]:
    """A method's correction of each image and what verification found of it; None where the method does not apply."""
    corrections = [c if c is None or c.x is None or flagged.own_noise else None for c in method.correct(flagged)]
    rows = [row for row, correction in enumerate(corrections) if correction]
    tried = [correction for correction in corrections if correction]
    found = iter(verify(flagged.select(rows), tried) if rows else ())
    return [(correction, next(found)) if correction else None for correction in corrections]


def attempt_each(flagged: SteeringInput, method: Method) -> list[tuple[Correction, Verification] | Exception | None]:
    """As `attempt`; where it fails each image is tried alone, so that an error is that image's, and takes its place here."""
    try:
        return list(attempt(flagged, method))
    except Exception as error:  # of whatever kind: it has to reach the report
        logger.exception("sdguard: %s failed", method.name)
        if len(flagged.prompts) == 1:
            return [error]
    return [attempt_each(flagged.select([row]), method)[0] for row in range(len(flagged.prompts))]


def try_in_order(flagged: SteeringInput, methods: Sequence[Method], outcomes: Sequence[Outcome] | None = None) -> list[Outcome]:
    """Try ``methods`` on every image until one passes verification; cost: what is tried takes, and its verification.

    A method that fails on an image stands among its attempts with its ``error``, and the next one is tried.

    Args:
        outcomes: of an earlier call, for images whose correction did not hold: they go on with what has not been tried.
    """
    outcomes = [replace(outcome, correction=None) for outcome in outcomes or [Outcome() for _ in flagged.prompts]]
    for turn, method in enumerate(turns(methods)):
        left = [row for row, outcome in enumerate(outcomes) if outcome.correction is None and outcome.taken <= turn]
        if not left:
            continue
        for row, tried in zip(left, attempt_each(flagged.select(left), method), strict=True):
            outcomes[row].taken = turn + 1
            if isinstance(tried, Exception):
                outcomes[row].attempts.append({"method": method.name, "error": f"{type(tried).__name__}: {tried}"})
            elif tried:
                correction, verification = tried
                outcomes[row].attempts.append({"method": method.name, **correction.how, **verification.entry()})
                outcomes[row].correction = correction if verification.passed else None
    return outcomes
