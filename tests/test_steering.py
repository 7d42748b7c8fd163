"""Embedding descent and the ladder on models whose answer is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdguard.decision import Cascade
from sdguard.observation import NoiseLevel, Observation
from sdguard.profile import Profile
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.embedding import embedding_descent, responsible
from sdguard.steering.ladder import climb
from sdguard.steering.rewording import Wording, rewordings

Observe = Callable[..., Observation]
X = (3, 2, 8, 8)


def no_text(texts: list[str]) -> Tensor:
    raise AssertionError("nothing is known of the text")


def ordinary(words: dict[str, int] | None = None) -> Profile:
    """Ordinary prompts hardly pull, and their look-aheads agree to .4."""
    return Profile({}, Cascade((), {}), [0.0] * 3, {"guidance_norm": [1e-3] * 3, "agreement": [0.4] * 100}, [], words or {})


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
    assert [how["tokens"] for how in correction.how] == [[2]] * 3
    assert moved[:, [0, 1, 3, 4]].max() == 0
    assert (moved[:, 2] <= 0.5 * text[:, 2].norm(dim=-1) + 1e-5).all()
    assert (guidance_norm(observation.with_condition(correction.condition)) < guidance_norm(observation)).all()


def test_descent_leaves_a_row_that_is_under_its_target_alone(observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    text[1, 2] = 0.01
    correction = embedding_descent(observe(key_token, torch.randn(X), text), target=1.0, radius=0.5)
    moved = [how["moved"] for how in correction.how]
    assert moved[1] == 0
    assert min(moved[0], moved[2]) > 0


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
    profile = ordinary()
    outcomes = climb(observation, profile, [None] * 3, no_text)
    assert all(outcome.condition is not None for outcome in outcomes)
    assert all(outcome.agreement <= 0.4 and len(outcome.attempts) <= 2 for outcome in outcomes)


def test_a_memorized_picture_no_rung_escapes_is_never_called_steered(observe: Observe) -> None:
    """Lower norm or not: a model that gives one picture under every condition does not pass verification."""
    picture = torch.randn(X[1:])

    def stuck(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return (x - level.a * picture) / level.s + 0.01 * text.sum(dim=(1, 2)).view(-1, 1, 1, 1)

    observation = observe(stuck, torch.randn(X), torch.rand(3, 5, 4) + 1)
    outcomes = climb(observation, ordinary(), [None] * 3, no_text)
    assert all(outcome.condition is None and outcome.agreement > 0.9 for outcome in outcomes)


WORDS = "a of zebra canyon zork blick".split()


def bag_of_words(texts: list[str]) -> Tensor:
    """Text embeddings whose token i says whether the text holds word i."""
    return torch.tensor([[[float(word in text.split())] * 4 for word in WORDS] for text in texts])


def pulled_by(**pull: float) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """A model on which each word pulls as hard as told."""
    weight = torch.tensor([pull.get(word, 0.0) for word in WORDS])
    return lambda x, level, text: x * 0.1 + (text[:, :, 0] @ weight).view(-1, 1, 1, 1)


def wordings_of(observe: Observe, pull: dict[str, float], frequency: dict[str, int], target: float) -> list[Wording]:
    prompt = "a zebra of zork canyon blick"
    observation = observe(pulled_by(**pull), torch.randn(1, *X[1:]), bag_of_words([prompt]))
    return rewordings(observation, prompt, bag_of_words, frequency, target)


def test_rewording_drops_the_word_ordinary_prompts_use_least(observe: Observe) -> None:
    frequency = {"a": 90, "of": 80, "zebra": 5, "canyon": 5, "blick": 2}
    found = wordings_of(observe, {"zork": 1.0, "zebra": 1.0}, frequency, target=12.0)  # a pull of 1 is a norm of sqrt(128)
    assert found[0] == Wording("a zebra of canyon blick", ["zork"])


def test_among_equally_rare_words_the_one_that_pulls_most_goes_first(observe: Observe) -> None:
    found = wordings_of(observe, {"canyon": 0.1, "zork": 0.5, "blick": 1.0}, {}, target=0.5)
    assert found[0].dropped == ["blick", "zork", "canyon"]


def test_no_wording_is_offered_whose_norm_stays_high(observe: Observe) -> None:
    assert wordings_of(observe, {"zebra": 1.0}, {"zebra": 99}, target=1.0) == []


def test_rewording_books_one_evaluation_a_word_and_one_a_wording(observe: Observe) -> None:
    prompt = "a zebra of zork canyon blick"
    observation = observe(pulled_by(zork=1.0), torch.randn(1, *X[1:]), bag_of_words([prompt]))
    rewordings(observation, prompt, bag_of_words, {}, 1.0)
    assert observation.evaluations.tolist() == [6 + 4]


def test_a_single_word_cannot_be_reworded(observe: Observe) -> None:
    observation = observe(pulled_by(zork=1.0), torch.randn(1, *X[1:]), bag_of_words(["zork"]))
    assert rewordings(observation, "zork", bag_of_words, {}, 1.0) == []


def test_the_ladder_rewords_before_it_moves_embeddings(observe: Observe) -> None:
    picture = torch.randn(X[1:]) * 2

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        held = text[:, WORDS.index("zork"), 0].view(-1, 1, 1, 1)
        return held * (x - level.a * picture) / level.s + (1 - held) * level.s * x

    prompts = ["a zork zebra", "zork of a canyon"]
    observation = observe(eps, torch.randn(2, *X[1:]), bag_of_words(prompts))
    words = {"a": 9, "of": 9, "zebra": 3, "canyon": 3}
    outcomes = climb(observation, ordinary(words), list(prompts), bag_of_words)
    assert [outcome.attempts[-1]["wording"] for outcome in outcomes] == ["a zebra", "of a canyon"]
    assert all(outcome.condition is not None and len(outcome.attempts) == 1 for outcome in outcomes)


@pytest.mark.parametrize("rows", [[0], [2, 1]])
def test_steering_a_row_does_not_depend_on_its_neighbours(rows: list[int], observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    x = torch.randn(X)
    together = embedding_descent(observe(key_token, x, text), 0.0, 0.5)
    apart = embedding_descent(observe(key_token, x, text).select(torch.tensor(rows)), 0.0, 0.5)
    torch.testing.assert_close(apart.condition, together.condition[rows])
