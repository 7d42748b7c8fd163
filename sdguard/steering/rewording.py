"""Rewording: the prompt as ordinary prompts would put it, encoded by the pipeline's own text encoder."""

from __future__ import annotations

from sdguard.correction import Correction
from sdguard.steering.method import Method, SteeringInput


def rewording(flagged: SteeringInput) -> list[Correction | None]:
    """The prompt's paraphrase in place of the prompt; not where none was found. Cost: the text encoder's alone."""
    found = [paraphrase for paraphrase in flagged.paraphrases if paraphrase]
    conditions = iter(flagged.encoder([paraphrase.text for paraphrase in found]) if found else ())
    return [
        Correction({"paraphrase": paraphrase.text, "dropped": paraphrase.dropped}, condition=next(conditions)) if paraphrase else None
        for paraphrase in flagged.paraphrases
    ]


REWORDING = Method("rewording", rewording, cost=0)
