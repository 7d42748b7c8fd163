"""Explain a prompt: which words make it memorized, and where in the picture."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

from sdguard.denoiser.probe import probe_run
from sdguard.denoiser.text_encoding import Encoder
from sdguard.explain.attribution import curvature_map, norm_gradient, norms_without, pull_map, token_shares
from sdguard.files.outputs import enlarged
from sdguard.observation import Observation
from sdguard.signals.guidance_norm import guidance_norm


@dataclass(frozen=True)
class Explanation:
    """Why a prompt pulls as it does, at the first denoiser call.

    Attributes:
        prompt, seed: what was explained.
        guidance_norm: of the whole prompt.
        words: the prompt's words.
        gradient: each word's share of the guidance norm's gradient on the token embeddings, the shares of words summing to at most 1 (the
            rest lies on the end and padding tokens).
        left_out: the share of the guidance norm that goes when a word is left out and the rest is encoded again; negative where it grows.
        agreement: rank correlation (Spearman) of the two over the words; nan for fewer than three.
        pull: root energy of the conditional minus the unconditional noise prediction at each place of the latent grid, ``[H][W]``.
        curvature: by how much the text sharpens the density at each place, ``[H][W]``.
    """

    prompt: str
    seed: int
    guidance_norm: float
    words: list[str]
    gradient: list[float]
    left_out: list[float]
    agreement: float
    pull: list[list[float]]
    curvature: list[list[float]]


def word_spans(words: list[str], tokenizer: Any) -> list[tuple[int, int]]:
    """The tokens ``[first, last)`` of each word in the encoded prompt, whose token 0 is the begin token."""
    ends = np.cumsum([1, *(len(tokenizer(word, add_special_tokens=False).input_ids) for word in words)]).tolist()
    return list(itertools.pairwise(ends))


def explain(pipe: Any, prompt: str, seed: int = 0, **setting: Any) -> Explanation:
    """Explain ``prompt`` on an unguarded pipeline of a supported class; ``setting`` goes to the pipeline.

    Cost: the first guidance pair, 2 evaluations for the gradient, 1 a word, 8 for the curvature map.

    Raises:
        ValueError: the prompt has no words.
    """
    words = prompt.split()
    if not words:
        raise ValueError("There is nothing to explain: the prompt is empty.")
    spans = word_spans(words, pipe.tokenizer)
    found: list[Explanation] = []

    def look(observation: Observation) -> None:
        norm = guidance_norm(observation).item()
        shares = token_shares(norm_gradient(observation, observation.condition)[1])[0]
        gradient = [shares[first:last].sum().item() for first, last in spans]
        without = norms_without(observation, words, list(range(len(words))), Encoder(pipe))
        left_out = [1 - other / norm for other in without]
        agreement = float(spearmanr(gradient, left_out).statistic) if len(words) > 2 else float("nan")
        maps = pull_map(observation)[0].tolist(), curvature_map(observation)[0].tolist()
        found.append(Explanation(prompt, seed, norm, words, gradient, left_out, agreement, *maps))

    probe_run(pipe, [prompt], [seed], look, **setting)
    return found[0]


def heat(picture: Image.Image, places: list[list[float]]) -> Image.Image:
    """``picture`` with ``places`` laid over it in red, the strongest place opaque by two thirds."""
    grid = np.asarray(places, dtype=np.float32)
    grid = (grid - grid.min()) / max(float(np.ptp(grid)), 1e-12)
    mask = Image.fromarray((grid * 170).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", picture.size, (230, 30, 30)), picture.convert("RGB"), mask)


def unguarded_picture(pipe: Any, prompt: str, seed: int = 0, **setting: Any) -> Image.Image:
    """What the pipeline makes of the prompt and seed that `explain` explains. Cost: a whole run."""
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **setting).images[0]


def explanation_sheet(picture: Image.Image, found: Explanation) -> Image.Image:
    """The picture, and beside it the same under the heat of where the text pulls."""
    picture = enlarged(picture)
    sheet = Image.new("RGB", (2 * picture.width, picture.height))
    sheet.paste(picture, (0, 0))
    sheet.paste(heat(picture, found.pull), (picture.width, 0))
    return sheet
