"""End-token and padding damping: what the text encoder says in the places where the prompt says nothing."""

from __future__ import annotations

from sdguard.correction import Correction
from sdguard.steering.method import Method, SteeringInput


def padding_damping(flagged: SteeringInput) -> list[Correction | None]:
    """The end token and the padding after it replaced by the unconditional prompt's in the same places.

    Where the padding repeats the end token, as in Stable Diffusion 1, its copies sum up the prompt and dominate cross-attention
    (Kim & No 2026, 2605.02908, who pad with ``!`` or mask them). Not where the text is unknown or the padding is another token. Cost: none.
    """
    encoder, observation = flagged.encoder, flagged.observation
    corrections: list[Correction | None] = []
    for prompt, text, null in zip(flagged.prompts, observation.condition, observation.null_condition, strict=True):
        if prompt is None or not encoder.pads_with_end:
            corrections.append(None)
            continue
        damped, end = text.clone(), encoder.length(prompt) - 1
        damped[end:] = null[end:]
        corrections.append(Correction({"from_token": end}, condition=damped))
    return corrections


PADDING_DAMPING = Method("padding damping", padding_damping, cost=0)
