"""Text embeddings that a run's denoiser was given unseen: written into past torch's own count, through ``.data`` or a numpy array."""

from __future__ import annotations

from dataclasses import dataclass

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
        found: ``[2, B]``, the call at which each image first had one, -1 where it had none; and whether it had several.
    """

    texts: Embeddings
    found: Tensor

    @classmethod
    def beside(cls, judged: Embeddings) -> HiddenTexts:
        """None so far beside what was judged."""
        tokens, _ = judged
        first, several = (torch.full((len(tokens),), value, device=tokens.device) for value in (-1, 0))
        return cls(judged, torch.stack([first, several]))

    def note(self, judged: Embeddings, now: Embeddings, step: int) -> None:
        """Note the text of the call ``step`` beside the judged one, which has its shapes."""
        first, several = self.found
        hidden, had = apart(now, judged), first >= 0
        self.found = torch.stack([first.where(~hidden | had, step), several | (hidden & had & apart(now, self.texts))])
        (tokens, pooled), (kept, kept_pooled) = now, self.texts
        self.texts = (
            tokens.where(hidden[:, None, None], kept),
            None if pooled is None or kept_pooled is None else pooled.where(hidden[:, None], kept_pooled),
        )


def apart(some: Embeddings, others: Embeddings) -> Tensor:
    """Of which images two texts differ, ``[B]``."""
    pairs = [(one, other) for one, other in zip(some, others, strict=True) if one is not None and other is not None]
    return torch.stack([(one != other).flatten(1).any(1) for one, other in pairs]).any(0)


def is_alike(some: Embeddings, others: Embeddings) -> bool:
    """Whether two texts can be compared value by value: they have the same parts, of one shape, dtype and device."""
    described = [[None if part is None else (part.shape, part.dtype, part.device) for part in text] for text in (some, others)]
    return described[0] == described[1]
