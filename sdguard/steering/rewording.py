"""Rewording: the prompt without the words that hold the key, encoded again by the pipeline's own text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdguard.attribution import Encode, norms_under, norms_without
from sdguard.observation import Observation
from sdguard.steering.correction import Correction
from sdguard.words import bare, without

#: words of a prompt that are tried without, and how many of them may go together.
TRIED_WORDS, DROPPED_WORDS = 12, 4


@dataclass(frozen=True)
class Wording:
    """A prompt put differently: its text, and the words that went."""

    text: str
    dropped: list[str]


def rewordings(observation: Observation, prompt: str, encode: Encode, frequency: Mapping[str, int], target: float) -> list[Wording]:
    """Wordings of ``prompt`` under which the guidance norm of a single image is at most ``target``, the fewest words dropped first.

    Words go in the order in which ordinary prompts use them least (``frequency``: how many ordinary prompts hold a word), among
    equals the one without which the norm falls most. What ordinary prompts speak of therefore stays. The remedy is that of
    Ross et al. 2024 (2411.00113) and PRSS (2504.18032), without their language model. Cost: 1 evaluation for each of the
    `TRIED_WORDS` rarest words and for each of at most `DROPPED_WORDS` wordings.
    """
    words = prompt.split()
    if len(words) < 2:
        return []

    def rarity(i: int) -> int:
        return frequency.get(bare(words[i]), 0)

    rarest = sorted(range(len(words)), key=rarity)[:TRIED_WORDS]
    alone = dict(zip(rarest, norms_without(observation, words, rarest, encode), strict=True))
    order = sorted(rarest, key=lambda i: (rarity(i), alone[i]))
    dropped = [order[:count] for count in range(1, min(DROPPED_WORDS + 1, len(words)))]
    shorter = [Wording(without(words, positions), [bare(words[i]) for i in positions]) for positions in dropped]
    norms = norms_under(observation, [wording.text for wording in shorter], encode)
    return [wording for wording, norm in zip(shorter, norms, strict=True) if norm <= target]


def reword(wordings: list[Wording], encode: Encode) -> Correction:
    """The correction that puts each row's prompt in the words of ``wordings``. Cost: the text encoder's alone."""
    how = [{"method": "rewording", "wording": wording.text, "dropped": wording.dropped} for wording in wordings]
    return Correction(encode([wording.text for wording in wordings]), how)
