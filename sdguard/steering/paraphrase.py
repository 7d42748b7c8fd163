"""Paraphrases: a prompt as ordinary prompts would put it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sdguard.denoiser.text_encoding import Encoder
from sdguard.explain.attribution import norms_without
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.words import bare, without

#: words of a prompt that are tried without, and how many of them may go together.
TRIED_WORDS, DROPPED_WORDS = 12, 4
#: a word that this share of ordinary prompts holds is never dropped: it is what the prompt is about, or grammar.
ORDINARY_WORD = 0.02

#: paraphrases of a prompt, the most faithful first: a language model, for one.
Rewriter = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Paraphrase:
    """A prompt put differently: its text, and the words that went."""

    text: str
    dropped: list[str]

    @classmethod
    def of(cls, text: str, prompt: str) -> Paraphrase:
        """``text`` as a paraphrase of ``prompt``."""
        kept = {bare(word) for word in text.split()}
        return cls(text, [bare(word) for word in prompt.split() if bare(word) not in kept])


def candidates(
    observation: Observation, prompt: str, encoder: Encoder, frequency: Mapping[str, float], rewriter: Rewriter | None = None
) -> list[Paraphrase]:
    """Paraphrases of one image's prompt, the most faithful first: the rewriter's, then those with one, two, ... words dropped.

    Words go in the order in which ordinary prompts use them least (``frequency``: the share of them that holds a word), among equals
    the one without which the guidance norm falls most; what ordinary prompts speak of stays. The remedy is that of
    Ross et al. 2024 (2411.00113) and PRSS (2504.18032), who leave the rewriting to a language model. Cost: 1 evaluation for each of
    the `TRIED_WORDS` rarest words that has an equal.
    """
    words = prompt.split()
    if len(words) < 2:
        return []
    rarity = [frequency.get(bare(word), 0.0) for word in words]
    rarest = sorted((i for i in range(len(words)) if rarity[i] < ORDINARY_WORD), key=rarity.__getitem__)[:TRIED_WORDS]
    equals = [i for i in rarest[: DROPPED_WORDS + 1] if rarity.count(rarity[i]) > 1]
    equals = [i for i in rarest if any(rarity[i] == rarity[j] for j in equals)]
    alone = dict(zip(equals, norms_without(observation, words, equals, encoder), strict=True)) if equals else {}
    order = sorted(rarest, key=lambda i: (rarity[i], alone.get(i, 0.0)))
    shorter = [order[:count] for count in range(1, min(DROPPED_WORDS, len(rarest), len(words) - 1) + 1)]
    rewritten = [Paraphrase.of(text, prompt) for text in rewriter(prompt)] if rewriter else []
    return rewritten + [Paraphrase(without(words, positions), [bare(words[i]) for i in positions]) for positions in shorter]


def first_ordinary(
    observation: Observation, offered: Sequence[Sequence[Paraphrase]], encoder: Encoder, target: float
) -> list[Paraphrase | None]:
    """Each image's first paraphrase under which its guidance norm is at most ``target``. Cost: 1 evaluation a paraphrase looked at."""
    found: list[Paraphrase | None] = [None] * len(offered)
    for turn in range(max(map(len, offered), default=0)):
        rows = [row for row, paraphrases in enumerate(offered) if found[row] is None and turn < len(paraphrases)]
        if not rows:
            break
        here = observation.select(torch.tensor(rows)).with_condition(encoder([offered[row][turn].text for row in rows]))
        for row, norm in zip(rows, guidance_norm(here).tolist(), strict=True):
            if norm <= target:
                found[row] = offered[row][turn]
    return found
