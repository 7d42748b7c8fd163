"""Attribution on models whose responsible words and places are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdguard.explain.attribution import curvature_map, diagonal, norm_gradient, norms_without, pull_map, token_shares
from sdguard.explain.explanation import explain, heat, word_spans
from sdguard.observation import NoiseLevel, Observation

Observe = Callable[..., Observation]
X = (1, 2, 8, 8)
WORDS = "a zebra at zork".split()


def bag_of_words(texts: list[str]) -> Tensor:
    """Text embeddings whose token i + 1 says whether the text holds word i."""
    return torch.tensor([[[0.0] * 3] + [[float(word in text.split())] * 3 for word in WORDS] for text in texts])


def zork(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """ "zork" pulls three times as hard as "zebra", at one place of the picture, and makes it sharp there."""
    place = torch.zeros(X[1:])
    place[:, 2, 5] = 1.0
    strength = (3 * text[:, 4, 0] + text[:, 2, 0]).view(-1, 1, 1, 1)
    return level.s * x + place * strength * (1 + x)


def test_token_shares_follow_the_pull_and_sum_to_one(observe: Observe) -> None:
    observation = observe(zork, torch.zeros(X), bag_of_words([" ".join(WORDS)]))
    shares = token_shares(norm_gradient(observation, observation.condition)[1])
    torch.testing.assert_close(shares, torch.tensor([[0, 0, 0.1, 0, 0.9]]))


def test_the_norm_falls_most_without_the_responsible_word(observe: Observe) -> None:
    observation = observe(zork, torch.zeros(X), bag_of_words([" ".join(WORDS)]))
    norms = norms_without(observation, WORDS, [0, 1, 2, 3], bag_of_words)
    assert norms == pytest.approx([4 * 2**0.5, 3 * 2**0.5, 4 * 2**0.5, 2**0.5])
    assert observation.evaluations.tolist() == [4]


@pytest.mark.parametrize("read", [pull_map, curvature_map])
def test_maps_show_the_place(read: Callable[[Observation], Tensor], observe: Observe) -> None:
    observation = observe(zork, torch.rand(X), bag_of_words([" ".join(WORDS)]))
    found = read(observation)[0].abs()
    assert found.shape == X[2:]
    assert found.argmax().item() == 2 * 8 + 5


def test_the_diagonal_of_a_diagonal_hessian_is_exact_with_one_probe() -> None:
    hessian = torch.linspace(-3, -1, 12).view(1, 12)
    found = diagonal(lambda v: hessian * v, [torch.randint(0, 2, (1, 12)) * 2.0 - 1])
    torch.testing.assert_close(found, hessian)


def test_explaining_a_prompt_gives_one_weight_a_word(embedded: Any) -> None:
    found = explain(embedded, "a zebra at beach", num_inference_steps=4, guidance_scale=2.5)
    assert found.words == ["a", "zebra", "at", "beach"]
    assert len(found.gradient) == len(found.left_out) == 4
    assert 0 <= sum(found.gradient) <= 1 + 1e-6
    assert np.shape(found.pull) == np.shape(found.curvature) == (16, 16)


def test_word_spans_cover_the_encoded_prompt(embedded: Any) -> None:
    words = "a zebra at zoulpeith, canyon".split()
    spans = word_spans(words, embedded.tokenizer)
    ids = embedded.tokenizer(" ".join(words)).input_ids
    assert spans[0][0] == 1
    assert spans[-1][1] == len(ids) - 1


def test_an_empty_prompt_has_nothing_to_explain(tiny: Any) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        explain(tiny, " ")


def test_heat_reddens_the_strongest_place_most(tmp_path: Path) -> None:
    places = [[0.0] * 4 for _ in range(4)]
    places[1][2] = 1.0
    pixels = np.asarray(heat(Image.new("RGB", (4, 4)), places))
    assert pixels[1, 2, 0] == pixels[..., 0].max() > 100
    assert pixels[3, 0].max() == 0
