"""Rewording: the prompt put differently, encoded by the pipeline's own text encoder."""

from __future__ import annotations

from functools import partial

from sdguard.correction import Correction
from sdguard.steering.method import Method, SteeringInput

#: wordings of one prompt that are tried at most; a rewriter's are among them.
TRIED = 6


def rewording(place: int, flagged: SteeringInput) -> list[Correction | None]:
    """The wording at ``place`` in place of each prompt; not where there are fewer. Cost: the text encoder's alone."""
    found = [offered[place] if place < len(offered) else None for offered in flagged.wordings]
    conditions = iter(flagged.encoder([wording.text for wording in found if wording]) if any(found) else ())
    return [
        Correction({"wording": wording.text, "kept": wording.kept, "dropped": wording.dropped}, condition=next(conditions))
        if wording
        else None
        for wording in found
    ]


REWORDING = Method("rewording", partial(rewording, 0), cost=0, stronger=tuple(partial(rewording, place) for place in range(1, TRIED)))
