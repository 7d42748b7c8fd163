"""Neutral blend: the prompt's embedding drawn towards what ordinary prompts say on average. It needs no text."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.decision.calibration import evenly
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.steering.method import Method, SteeringInput

#: how far it is drawn, as a share of the way; the next where that does not pass verification.
SHARES = (0.7, 0.8)
#: ordinary prompts that are averaged, and how many words they have at most: what fits into any text encoder's window.
AVERAGED, WORDS = 24, 8


def neutral(flagged: SteeringInput) -> Tensor:
    """The mean embedding of ordinary prompts, ``[T (+ 1), E]``; the empty prompt's where there is no text encoder any more."""
    null = flagged.observation.null_condition[0]
    try:
        short = [prompt for prompt in ordinary_prompts(flagged.encoder.pipe) if len(prompt.split()) <= WORDS]
        mean = flagged.encoder(evenly(short, AVERAGED)).float().mean(dim=0)
    except Exception:  # text encoders that were taken out of the pipeline, of whatever kind
        return null
    if len(null) > len(mean) and len(null) % len(mean) == 0:
        mean = mean.repeat(len(null) // len(mean), 1)  # prompts of several windows, as other libraries make them
    return mean.to(null) if mean.shape == null.shape else null


def blend(share: float, flagged: SteeringInput) -> list[Correction | None]:
    """Each embedding moved by ``share`` of the way to the neutral one, along one line. Cost: the text encoder's alone."""
    text = flagged.observation.condition
    moved = torch.lerp(text.float(), neutral(flagged).float(), share).to(text.dtype)
    return [Correction({"share": share}, condition=row) for row in moved]


NEUTRAL_BLEND = Method("neutral blend", partial(blend, SHARES[0]), cost=0, stronger=tuple(partial(blend, share) for share in SHARES[1:]))
