"""A correction: what is changed of one image's run, and the observation that results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdguard.observation import Observation, Rule


@dataclass(frozen=True)
class Correction:
    """What one image's run is given in place of its own; None leaves a thing as it is.

    Attributes:
        how: for the report: the ``method`` and what it did.
        condition: text embeddings ``[T, E]``.
        x: the noise it starts from, ``x_T`` in the variance-preserving convention, ``[C, H, W]``.
        rule: what takes guidance's place at every call.
    """

    how: dict[str, Any]
    condition: Tensor | None = None
    x: Tensor | None = None
    rule: Rule | None = None


def corrected(observation: Observation, corrections: Sequence[Correction]) -> Observation:
    """The observation under one correction a row. Cost: 2 evaluations where a noise is new, else 1 where a condition is, else none."""
    x = torch.stack([o if c.x is None else c.x.to(o) for c, o in zip(corrections, observation.x, strict=True)])
    condition = torch.stack(
        [o if c.condition is None else c.condition.to(o) for c, o in zip(corrections, observation.condition, strict=True)]
    )
    observation = replace(observation, rules=tuple(c.rule for c in corrections), memo={})
    if any(c.x is not None for c in corrections):
        return replace(observation, condition=condition).from_start(x)
    if any(c.condition is not None for c in corrections):
        return observation.with_condition(condition)
    return observation


def movement(before: Observation, after: Observation) -> list[dict[str, float]]:
    """How far each row has been moved: text embeddings and noise as shares of their norms, the prediction that is followed as a share of
    what guidance adds to the unconditional one. Cost: that of the rules at one call.
    """

    def length(change: Tensor) -> Tensor:
        return change.float().flatten(1).norm(dim=1)

    shares = {
        "embedding": length(after.condition - before.condition) / length(before.condition),
        "noise": length(after.x - before.x) / length(before.x),
        "prediction": length(after.prediction - before.prediction) / length(before.prediction - before.eps_u).clamp_min(1e-12),
    }
    return [dict(zip(shares, row, strict=True)) for row in zip(*(share.tolist() for share in shares.values()), strict=True)]
