"""Text embeddings that a run's denoiser was given unseen: written into past torch's own count, through ``.data`` or a numpy array."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: token embeddings ``[B, T, E]`` and, where a model has one, the pooled one ``[B, E]``.
Embeddings = tuple[Tensor, Tensor | None]


@dataclass
class HiddenTexts:
    """What each image's text was at calls at which it was another than the judged one and nothing but its values told so.

    They are told apart where they lie, so that no GPU is waited for. One text an image is kept, whatever the length of the run.

    Attributes:
        texts: of each image the last such text; where it had none, the judged one.
        steps: the calls that were looked at.
        hidden, again: of each of these, which images had such a text, and which had another one than was kept by then, ``[B]``.
    """

    texts: Embeddings
    steps: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    again: list[Tensor] = field(default_factory=list)

    def note(self, judged: Embeddings, now: Embeddings, step: int) -> None:
        """Note the text of the call ``step`` beside the judged one, which has its shapes."""
        hidden = apart(now, judged)
        self.steps.append(step)
        self.hidden.append(hidden)
        self.again.append(apart(now, self.texts))
        (tokens, pooled), (kept, kept_pooled) = now, self.texts
        self.texts = (
            tokens.where(hidden[:, None, None], kept),
            None if pooled is None or kept_pooled is None else pooled.where(hidden[:, None], kept_pooled),
        )

    @property
    def found(self) -> Tensor:
        """``[2, B]``: the place in ``steps`` of the call at which each image first had such a text, -1 where it had none; and whether it
        had several."""
        hidden, again = torch.stack(self.hidden), torch.stack(self.again)
        had = hidden.cumsum(0) > hidden.int()
        first = hidden.int().argmax(0)
        return torch.stack([first.where(hidden.any(0), -1), (hidden & had & again).any(0)])


def apart(some: Embeddings, others: Embeddings) -> Tensor:
    """Of which images two texts differ, ``[B]``."""
    pairs = [(one, other) for one, other in zip(some, others, strict=True) if one is not None and other is not None]
    return functools.reduce(torch.bitwise_or, [(one != other).flatten(1).any(1) for one, other in pairs])


def is_alike(*texts: Embeddings) -> bool:
    """Whether texts can be compared value by value: they have the same parts, of one shape, dtype and device."""
    described = [[None if part is None else (part.shape, part.dtype, part.device) for part in text] for text in texts]
    return all(of == described[0] for of in described)
