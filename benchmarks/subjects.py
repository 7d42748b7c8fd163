"""What a caption is about, and whether a picture shows it: a diffusion classifier that asks the model's own denoiser.

No outside network, so that it is asked of any model that memorizes, whatever its world: among several subjects, the one whose ordinary
caption explains the picture best (Li et al. 2023, 2303.16203).
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sdguard.observation import noise_level, prediction_type, to_noise

#: an ending is one that captions share where so many different words stand before it.
SHARED = 5
#: captions that ask for a subject, besides those that the model's own ordinary captions give.
GENERIC = ("a picture of {}",)
#: how many of its own.
OWN_FRAMES = 2
#: noise levels a picture is explained at, as shares of the training steps. High, where it is open yet what it shows: of 0.2 to 0.94, those
#: at which unguarded pictures of two models, memorized and not, were told best. At lower ones backgrounds that a frame names weigh more.
LEVELS = (0.8, 0.9)
#: denoiser rows a call.
ROWS = 96
NOISE_SEED = 5


def subjects(captions: Sequence[str]) -> list[str]:
    """What each of ``captions`` is about: what is left without the words that say of what make it is.

    A make is told by its place. Where captions share an ending ("... framed canvas print"), it begins where the most different words stand
    before it (the variety of Harris 1955, counted in words): more subjects go with a make than words with the end of one subject. Where
    none is shared, or it comes after a comma, makes are a list of attributes: the subject ends at the last comma, and at the first "at".
    """
    before: dict[str, set[str]] = defaultdict(set)
    for caption in set(captions):
        words = caption.split()
        for i in range(1, len(words)):
            before[" ".join(words[i:])].add(words[i - 1])

    def subject(caption: str) -> str:
        words = caption.split()
        ends = range(len(words) - 1, 0, -1)
        begin = max(ends, key=lambda i: len(before[" ".join(words[i:])]), default=0)
        head = " ".join(words[:begin])
        if head and not head.endswith(",") and len(before[" ".join(words[begin:])]) >= SHARED:
            return head
        return caption.rpartition(", ")[0].split(" at ")[0] or caption

    return [subject(caption) for caption in captions]


def frames(ordinary: Iterable[str], specific: Iterable[str], about: Iterable[str]) -> list[str]:
    """Captions that ask for a subject, with ``{}`` in its place: `GENERIC`, and those that ``ordinary`` captions put around ``about``.

    Of the latter the `OWN_FRAMES` most frequent that are no frame of ``specific`` captions, whose make pulls memorized pictures. All
    subjects are asked for in the same ones: what they share tells none of them.
    """
    longest_first = sorted(set(about), key=lambda text: (-len(text), text))
    if not longest_first:
        return list(GENERIC)
    pattern = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?![^\s,.])")

    def around(captions: Iterable[str]) -> Counter[str]:
        framed = (pattern.subn("{}", caption.replace("{", "").replace("}", ""), count=1) for caption in captions)
        return Counter(frame for frame, count in framed if count and frame != "{}")

    found, avoided = around(ordinary), around(specific)
    own = sorted(found.keys() - avoided.keys() - set(GENERIC), key=lambda frame: (-found[frame], frame))
    return [*GENERIC, *own[:OWN_FRAMES]]


def choices(about: Sequence[str], count: int) -> list[list[str]]:
    """For each of ``about``, itself first and then the ``count - 1`` others that follow it in their order, over the end to the start."""
    distinct = list(dict.fromkeys(about))
    place = {subject: i for i, subject in enumerate(distinct)}
    return [[distinct[(place[subject] + k) % len(distinct)] for k in range(min(count, len(distinct)))] for subject in about]


@torch.no_grad()
def errors(pipe: Any, latents: Tensor, offered: Sequence[Sequence[str]], asked: Sequence[str]) -> Tensor:
    """How badly each of the subjects ``offered`` for a picture explains it, ``[n, k]`` (k subjects each).

    Mean squared error of the predicted noise over `LEVELS` and the frames ``asked``, one noise for each pair of these and the same for all
    subjects. ``latents``: ``[n, C, h, w]``, scaled. Cost: ``k * len(LEVELS) * len(asked)`` evaluations a picture.
    """
    distinct = sorted({subject for each in offered for subject in each})
    place = torch.tensor([[distinct.index(subject) for subject in each] for each in offered])
    n, k = place.shape
    picture, subject = torch.arange(n).repeat_interleave(k), place.flatten()
    generator = torch.Generator().manual_seed(NOISE_SEED)
    total = torch.zeros(n * k)
    predicts, steps = prediction_type(pipe.scheduler), pipe.scheduler.config.num_train_timesteps
    for share, frame in itertools.product(LEVELS, asked):
        timestep = round(share * (steps - 1))
        level = noise_level(pipe.scheduler, timestep)
        conditions = encoded(pipe, [frame.format(subject) for subject in distinct])
        added = torch.randn(latents.shape[1:], generator=generator)
        noisy = level.a * latents + level.s * added
        for part in torch.arange(n * k).split(ROWS):
            x, condition = noisy[picture[part]], [each[subject[part]] for each in conditions]
            predicted = to_noise(asked_of(pipe, x, timestep, *condition), x, level, predicts)
            total[part] += (predicted - added).square().flatten(1).mean(dim=1)
    return total.view(n, k) / (len(LEVELS) * len(asked))


def encoded(pipe: Any, texts: list[str], guided: bool = False) -> list[Tensor]:
    """What a pipeline's `encode_prompt` makes of texts, whichever encoders it has.

    Of each text the condition, ``[n, tokens, width]``, and, where there is one, the pooled embedding; ``guided``: each followed by the
    unconditional prompt's.
    """
    wanted = {
        "prompt": texts,
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
    }
    found = pipe.encode_prompt(**{name: wanted[name] for name in inspect.signature(pipe.encode_prompt).parameters if name in wanted})
    return [each for each in found if each is not None]


def asked_of(pipe: Any, x: Tensor, timestep: int, condition: Tensor, *pooled: Tensor) -> Tensor:
    """The output of a pipeline's denoiser: a U-Net's, with sizes where it has a pooled embedding, or a transformer's."""
    t = torch.full((len(x),), timestep)
    if pipe.components.get("transformer") is not None:
        return cast(Tensor, pipe.transformer(x, condition, pooled[0], t, return_dict=False)[0])
    if not pooled:
        return cast(Tensor, pipe.unet(x, t, condition, return_dict=False)[0])
    side = x.shape[-1] * pipe.vae_scale_factor
    added = {"text_embeds": pooled[0], "time_ids": x.new_tensor([[side, side, 0, 0, side, side]]).expand(len(x), -1)}
    return cast(Tensor, pipe.unet(x, t, condition, added_cond_kwargs=added, return_dict=False)[0])


def places(pipe: Any, latents: Tensor, offered: Sequence[Sequence[str]], asked: Sequence[str]) -> Tensor:
    """At which place the first subject offered for a picture comes by its `errors`, ``[n]``, 0 = it explains the picture best.

    Ties count against it. Cost: that of `errors`.
    """
    found = errors(pipe, latents, offered, asked)
    return (found[:, 1:] <= found[:, :1]).sum(dim=1)
