"""Rewording: the prompt as ordinary prompts would put it, encoded by the pipeline's own text encoder."""

from __future__ import annotations

from sdguard.correction import Correction
from sdguard.steering.flagged import Flagged, Method


def rewording(flagged: Flagged) -> list[Correction | None]:
    """The prompt's wording in place of the prompt; not where none was found. Cost: the text encoder's alone."""
    found = [wording for wording in flagged.wordings if wording]
    conditions = iter(flagged.encoder([wording.text for wording in found]) if found else ())
    return [
        Correction({"wording": wording.text, "dropped": wording.dropped}, condition=next(conditions)) if wording else None
        for wording in flagged.wordings
    ]


REWORDING = Method("rewording", rewording, cost=0)
