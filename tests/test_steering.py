"""Embedding descent and the ladder on models whose answer is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdguard.calibration import Profile
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.embedding import embedding_descent, responsible
from sdguard.steering.ladder import climb

Observe = Callable[..., Observation]
X = (3, 2, 8, 8)


def key_token(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """Only token 2 of the text matters, and it pulls in proportion to its first entry."""
    return x * 0.1 + text[:, 2, 0].view(-1, 1, 1, 1)


def test_responsible_tokens_are_the_fewest_that_hold_the_share_and_never_the_begin_token() -> None:
    gradient = torch.tensor([[9.0, 1.0, 3.0, 0.1], [0.0, 2.0, 2.0, 2.0]]).unsqueeze(-1)
    assert responsible(gradient, 0.85).tolist() == [[False, False, True, False], [False, True, True, True]]


def test_descent_moves_only_responsible_tokens_inside_the_trust_region(observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    observation = observe(key_token, torch.randn(X), text)
    correction = embedding_descent(observation, target=0.0, radius=0.5)
    moved = (correction.condition - text).norm(dim=-1)
    assert correction.tokens == [[2]] * 3
    assert moved[:, [0, 1, 3, 4]].max() == 0
    assert (moved[:, 2] <= 0.5 * text[:, 2].norm(dim=-1) + 1e-5).all()
    assert (guidance_norm(observation.with_condition(correction.condition)) < guidance_norm(observation)).all()


def test_descent_leaves_a_row_that_is_under_its_target_alone(observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    text[1, 2] = 0.01
    correction = embedding_descent(observe(key_token, torch.randn(X), text), target=1.0, radius=0.5)
    assert correction.moved[1] == 0
    assert (correction.moved[[0, 2]] > 0).all()


def test_descent_books_two_evaluations_an_iteration(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.rand(3, 5, 4) + 1)
    embedding_descent(observation, target=0.0, radius=0.5, iterations=3)
    assert observation.evaluations.tolist() == [6, 6, 6]


def memorizing(picture: Tensor) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """A model that gives one picture while token 2 is near its origin of norm 1, and white data elsewhere."""

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        held = torch.sigmoid(12 * (text[:, 2, 0] - 0.75)).view(-1, 1, 1, 1)
        delta, white = (x - level.a * picture) / level.s, level.s * x
        return held * delta + (1 - held) * white

    return eps


def test_the_ladder_stops_at_the_first_verified_rung(observe: Observe) -> None:
    text = torch.zeros(3, 5, 4)
    text[:, 2, 0] = 1.0
    observation = observe(memorizing(torch.randn(X[1:]) * 2), torch.randn(X), text)
    profile = Profile({}, [1e-3, 1e-3, 1e-3], [], [0.4] * 100)
    outcomes = climb(observation, profile)
    assert all(outcome.condition is not None for outcome in outcomes)
    assert all(outcome.agreement <= 0.4 and len(outcome.attempts) <= 2 for outcome in outcomes)


def test_a_memorized_picture_no_rung_escapes_is_never_called_steered(observe: Observe) -> None:
    """Lower norm or not: a model that gives one picture under every condition does not pass verification."""
    picture = torch.randn(X[1:])

    def stuck(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return (x - level.a * picture) / level.s + 0.01 * text.sum(dim=(1, 2)).view(-1, 1, 1, 1)

    outcomes = climb(observe(stuck, torch.randn(X), torch.rand(3, 5, 4) + 1), Profile({}, [1e-3] * 3, [], [0.4] * 100))
    assert all(outcome.condition is None and outcome.agreement > 0.9 for outcome in outcomes)


@pytest.mark.parametrize("rows", [[0], [2, 1]])
def test_steering_a_row_does_not_depend_on_its_neighbours(rows: list[int], observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    x = torch.randn(X)
    together = embedding_descent(observe(key_token, x, text), 0.0, 0.5)
    apart = embedding_descent(observe(key_token, x, text).select(torch.tensor(rows)), 0.0, 0.5)
    torch.testing.assert_close(apart.condition, together.condition[rows])
