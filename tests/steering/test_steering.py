"""Steering methods, verification and the fallback sequence on models whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sdguard.correction import Correction, corrected
from sdguard.decision.cascade import Cascade
from sdguard.decision.profile import MethodStatistics, Profile
from sdguard.denoiser.text_encoding import Encoder
from sdguard.geometry.reference import reference_end
from sdguard.geometry.rollout import independent_start
from sdguard.geometry.rowwise import norm
from sdguard.observation import NoiseLevel, Observation, denoised
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering import BASELINES, METHODS, Method, SteeringInput, neutral
from sdguard.steering.clamp import clamped
from sdguard.steering.descent import descent, lid_gradient, responsible
from sdguard.steering.fallback import methods_of, try_in_order
from sdguard.steering.guidance import LATEST, delay_rule, past_transition, repulsion_rule, weakened_rule
from sdguard.steering.learning import ordered
from sdguard.steering.noise import noise_adjustment, on_shell, released_loss, sail, sharpness
from sdguard.steering.verification import verify
from sdguard.steering.wording import Wording

Observe = Callable[..., Observation]
Eps = Callable[[Tensor, NoiseLevel, Tensor], Tensor]
X = (3, 2, 8, 8)
WORDS = "a of zebra canyon zork blick".split()


class BagOfWords(Encoder):
    """Text embeddings whose token i says whether the text holds word i; a prompt is as long as its words and two more."""

    def __init__(self, pads_with_end: bool = True) -> None:
        super().__init__(None)
        object.__setattr__(self, "pads", pads_with_end)

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([[[float(word in text.split())] * 4 for word in WORDS] for text in texts])

    def length(self, text: str) -> int:
        return len(text.split()) + 2

    @property
    def pads_with_end(self) -> bool:
        return bool(vars(self)["pads"])


ENCODER = BagOfWords()


def ordinary(words: dict[str, int] | None = None, norm: float = 1e-3, **fields: Any) -> Profile:
    """Ordinary prompts hardly pull, ask for any detail, their short rollouts agree to .4, and any alignment is ordinary."""
    limits = {"guidance_detail": [1e9], "reference_agreement": [0.4] * 100, "recurrence": [0.5] * 100, "alignment": [-1e9] * 100}
    values = {"guidance_norm": [norm] * 3, **limits}
    return Profile({}, Cascade((), {}), [0.0] * 997, values, words=words or {}, **fields)


def flag(observation: Observation, profile: Profile | None = None, prompts: list[str | None] | None = None) -> SteeringInput:
    """All rows of an observation, as steering gets them."""
    return SteeringInput.of(observation, prompts or [None] * len(observation.x), ENCODER, profile or ordinary())


def key_token(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """Only token 2 of the text matters, and it pulls in proportion to its first entry."""
    return x * 0.1 + text[:, 2, 0].view(-1, 1, 1, 1)


# embedding descent


def test_responsible_tokens_are_the_fewest_that_hold_the_share_and_never_the_begin_token() -> None:
    gradient = torch.tensor([[9.0, 1.0, 3.0, 0.1], [0.0, 2.0, 2.0, 2.0]]).unsqueeze(-1)
    assert responsible(gradient, 0.85).tolist() == [[False, False, True, False], [False, True, True, True]]


def test_descent_moves_only_responsible_tokens_inside_the_trust_region(observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    observation = observe(key_token, torch.randn(X), text)
    condition, tokens = descent(observation, target=0.0, share=0.9, radius=0.5)
    moved = (condition - text).norm(dim=-1)
    assert tokens == [[2]] * 3
    assert moved[:, [0, 1, 3, 4]].max() == 0
    assert (moved[:, 2] <= 0.5 * text[:, 2].norm(dim=-1) + 1e-5).all()
    assert (guidance_norm(observation.with_condition(condition)) < guidance_norm(observation)).all()


def test_descent_leaves_a_row_that_is_under_its_target_alone(observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    text[1, 2] = 0.01
    condition, _ = descent(observe(key_token, torch.randn(X), text), target=1.0)
    moved = (condition - text).flatten(1).norm(dim=1)
    assert moved[1] == 0
    assert min(moved[0], moved[2]) > 0


def test_descent_books_two_evaluations_an_iteration(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.rand(3, 5, 4) + 1)
    descent(observation, target=0.0, iterations=3)
    assert observation.evaluations.tolist() == [6, 6, 6]


@pytest.mark.parametrize("rows", [[0], [2, 1]])
def test_steering_a_row_does_not_depend_on_its_neighbours(rows: list[int], observe: Observe) -> None:
    text = torch.rand(3, 5, 4) + 1
    observation = observe(key_token, torch.randn(X), text)
    together, _ = descent(observation, 0.0)
    apart, _ = descent(observation.select(torch.tensor(rows)), 0.0)
    torch.testing.assert_close(apart, together[rows])


def test_lid_gradient_points_to_where_the_prompts_density_is_narrower(observe: Observe) -> None:
    """eps = k(c) x / s is a Gaussian's of which k dimensions-shares are lost: the loss of dimensions is k d / h-free, its slope d."""

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return text[:, 1, 0].view(-1, 1, 1, 1) * x

    observation = observe(eps, torch.randn(X), torch.rand(3, 2, 4))
    _, gradient = lid_gradient(observation, observation.condition)
    torch.testing.assert_close(gradient[:, 1, 0], torch.full((3,), observation.level.s * math.prod(X[1:])), rtol=1e-3, atol=1e-3)
    assert gradient[:, 0].abs().max() == 0
    assert observation.evaluations.tolist() == [4] * 3


# initial noise


def test_a_noise_is_brought_to_the_gaussian_shell() -> None:
    torch.testing.assert_close(norm(on_shell(torch.randn(X) * 7)), torch.full((3,), 128.0**0.5))


def curved(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """The contrast is a saturating pull of the text along x: sharp near 0, flat far away."""
    return text[:, 1, 0].view(-1, 1, 1, 1) * torch.tanh(3 * x)


def test_noise_adjustment_follows_its_formula_and_counts_what_it_says(observe: Observe) -> None:
    """With D = x the look uphill changes D by u = rho x / ||x||, so that each pass shortens x; the shell undoes just that."""
    observation = observe(lambda x, level, text: text[:, 1, 0].view(-1, 1, 1, 1) * x, torch.randn(X), torch.ones(3, 2, 4))
    found = torch.stack([correction.x for correction in noise_adjustment(flag(observation)) if correction and correction.x is not None])
    torch.testing.assert_close(found, on_shell(observation.x))
    assert observation.evaluations.tolist() == [METHODS["initial-noise adjustment"].cost] * 3


def test_sail_lowers_sharpness_stays_on_the_shell_and_within_its_cost(observe: Observe) -> None:
    observation = observe(curved, torch.randn(X), torch.ones(3, 2, 4))
    found = sail(flag(observation))
    x = torch.stack([correction.x for correction in found if correction and correction.x is not None])
    spent = observation.evaluations.clone()
    assert (sharpness(observation, x) < sharpness(observation, observation.x)).all()
    torch.testing.assert_close(norm(x), torch.full((3,), 128.0**0.5))
    assert (spent <= METHODS["SAIL"].cost).all()
    assert [correction.x.tolist() for correction in sail(flag(observation)) if correction and correction.x is not None] == x.tolist()


def test_sail_as_released_descends_its_own_loss_within_its_cost(observe: Observe) -> None:
    observation = observe(curved, torch.randn(X), torch.ones(3, 2, 4))
    found = BASELINES["SAIL as released"].correct(flag(observation))
    x = torch.stack([correction.x for correction in found if correction and correction.x is not None])
    assert (observation.evaluations <= BASELINES["SAIL as released"].cost).all()
    fresh = independent_start(observation, 20)
    look = 0 * x
    assert (released_loss(observation, x, look) < released_loss(observation, fresh, look)).all()


def test_sharpness_is_that_of_the_squared_difference(observe: Observe) -> None:
    """A linear contrast D = k x changes by k h u over a step h u along it."""
    observation = observe(lambda x, level, text: text[:, 1, 0].view(-1, 1, 1, 1) * x, torch.randn(X), torch.full((3, 2, 4), 2.0))
    expected = (2 * norm(observation.x) / 128).square()
    torch.testing.assert_close(sharpness(observation, observation.x), expected, rtol=1e-3, atol=1e-6)


# rules in guidance's place


def at_step(observe: Observe, timestep: float, norms: list[float], pull: float) -> Observation:
    """One row whose guidance norm was ``norms`` and is ``pull`` now."""
    text = torch.full((1, 2, 1), pull / 128**0.5)
    eps: Eps = lambda x, level, text: 0.1 * x + text[:, 1].view(-1, 1, 1, 1)  # noqa: E731
    past = torch.tensor([norms]) if norms else torch.zeros(1, 0)
    return observe(eps, torch.randn(1, *X[1:]), text, timestep=timestep, past_norms=past, guidance_scale=4.0)


@pytest.mark.parametrize(
    ("timestep", "norms", "pull", "past"),
    [(900.0, [], 1.0, False), (900.0, [3.0, 2.0], 1.0, False), (800.0, [3.0, 1.0], 2.0, True), (700.0, [2.0, 1.0, 3.0], 2.0, True)],
)
def test_the_transition_point_is_the_first_local_minimum(
    timestep: float, norms: list[float], pull: float, past: bool, observe: Observe
) -> None:
    assert past_transition(at_step(observe, timestep, norms, pull)).item() is past


def test_guidance_sets_in_at_the_latest_timestep(observe: Observe) -> None:
    early, late = at_step(observe, LATEST + 1, [], 1.0), at_step(observe, LATEST, [], 1.0)
    torch.testing.assert_close(delay_rule(0.0, early), early.eps_u)
    torch.testing.assert_close(delay_rule(-2.0, early), early.eps_u - 2 * early.difference)
    torch.testing.assert_close(delay_rule(0.0, late), late.guided(late.eps_c, late.eps_u))


def test_weakened_guidance_pulls_no_harder_than_its_target(observe: Observe) -> None:
    strong, weak = at_step(observe, 500.0, [], 5.0), at_step(observe, 500.0, [], 0.5)
    assert norm(weakened_rule(1.0, strong) - strong.eps_u).item() == pytest.approx(4.0 * 1.0, rel=1e-4)
    torch.testing.assert_close(weakened_rule(1.0, weak), weak.guided(weak.eps_c, weak.eps_u))


def test_repulsion_is_the_published_combination(observe: Observe) -> None:
    observation, original = at_step(observe, 500.0, [], 1.0), torch.full((2, 1), 3.0)
    expected = observation.guided(observation.eps_c, observation.eps_u) - 4.0 * 2 / 7.5 * 3.0
    torch.testing.assert_close(repulsion_rule(original, observation), expected)
    assert observation.evaluations.tolist() == [1]


def test_clamping_brings_the_denoised_norm_into_the_band_and_leaves_what_is_inside(observe: Observe) -> None:
    observation = at_step(observe, 500.0, [], 5.0)
    length = norm(denoised(observation.x, observation.prediction, observation.level)).item()
    for mean, expected in [(length / 2, length / 2 + 0.2), (2 * length, 2 * length - 0.2), (length, length)]:
        profile = ordinary(series={"denoised_norm": [(mean, 0.1)] * 2}, timesteps=[900.0, 100.0])
        estimate = denoised(observation.x, clamped(profile, observation), observation.level)
        assert norm(estimate).item() == pytest.approx(expected, rel=1e-4)


# the text


def test_padding_damping_replaces_the_end_token_and_what_follows(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(1, *X[1:]), torch.ones(1, 6, 4))
    (correction,) = METHODS["padding damping"].correct(flag(observation, prompts=["a zork"]))
    assert correction is not None
    assert correction.condition is not None
    assert correction.condition.sum(-1).tolist() == [4.0, 4.0, 4.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("prompt", "pads"), [(None, True), ("a zork", False)])
def test_padding_damping_applies_only_where_the_end_token_pads_a_known_prompt(prompt: str | None, pads: bool, observe: Observe) -> None:
    observation = observe(key_token, torch.randn(1, *X[1:]), torch.ones(1, 6, 4))
    flagged = SteeringInput(observation, [prompt], BagOfWords(pads), ordinary(), [[]])
    assert METHODS["padding damping"].correct(flagged) == [None]


def pulled_by(**pull: float) -> Eps:
    """A model on which each word pulls as hard as told."""
    weight = torch.tensor([pull.get(word, 0.0) for word in WORDS])
    return lambda x, level, text: x * 0.1 + (text[:, :, 0] @ weight).view(-1, 1, 1, 1)


PROMPT = "a zebra of zork, canyon blick"


def test_a_rewriters_wordings_are_tried_first(observe: Observe) -> None:
    observation = observe(pulled_by(zork=1.0), torch.randn(1, *X[1:]), ENCODER([PROMPT]))
    flagged = SteeringInput.of(observation, [PROMPT], ENCODER, ordinary(norm=1.0), lambda prompt: ["a striped horse", prompt])
    assert flagged.wordings[0][0] == Wording("a striped horse", ["a"], ["zebra", "of", "zork", "canyon", "blick"])
    assert PROMPT not in [wording.text for wording in flagged.wordings[0]]


def test_the_neutral_blend_goes_along_one_line_and_needs_no_prompt(observe: Observe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral, "ordinary_prompts", lambda pipe: ["a", "a zebra"])
    text = torch.rand(1, 6, 4)
    flagged = flag(observe(key_token, torch.randn(1, *X[1:]), text))
    mean = ENCODER(["a", "a zebra"]).mean(dim=0)
    for share, correct in zip(neutral.SHARES, (neutral.NEUTRAL_BLEND.correct, *neutral.NEUTRAL_BLEND.stronger), strict=True):
        (correction,) = correct(flagged)
        assert correction is not None
        torch.testing.assert_close(correction.condition, text[0] + share * (mean - text[0]))


def test_the_neutral_blend_goes_to_the_empty_prompt_where_there_is_no_text_encoder(observe: Observe) -> None:
    null = torch.rand(1, 6, 4)
    observation = observe(key_token, torch.randn(1, *X[1:]), torch.rand(1, 6, 4), null_condition=null)
    flagged = SteeringInput(observation, [None], Encoder(None), ordinary(), [[]])
    torch.testing.assert_close(neutral.neutral(flagged), null[0])


@pytest.mark.parametrize("name", ["random tokens", "random numbers"])
def test_baselines_put_words_in_and_keep_the_prompt(name: str, observe: Observe) -> None:
    observation = observe(key_token, torch.randn(1, *X[1:]), ENCODER([PROMPT]))
    flagged = flag(observation, ordinary({"lion": 3, "sea": 2}), [PROMPT])
    (first,), (again,) = BASELINES[name].correct(flagged), BASELINES[name].correct(flagged)
    assert first is not None
    assert again is not None
    words = first.how["wording"].split()
    assert len(words) == len(PROMPT.split()) + 4
    rest = iter(words)
    assert all(word in rest for word in PROMPT.split())
    assert again.how == first.how


def test_embedding_noise_has_the_stated_size(observe: Observe) -> None:
    text = torch.randn(1, 40, 60)
    (correction,) = BASELINES["embedding noise"].correct(flag(observe(key_token, torch.randn(1, *X[1:]), text)))
    assert correction is not None
    assert correction.condition is not None
    assert (correction.condition - text[0]).std().item() == pytest.approx(0.1, rel=0.1)


# verification and the fallback sequence


def memorizing(pictures: dict[float, Tensor]) -> Eps:
    """A model that gives one picture where token 2 is within .2 of a key, and white data elsewhere."""

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        out = level.s * x
        for key, picture in pictures.items():
            held = ((text[:, 2, 0] - key).abs() < 0.2).view(-1, 1, 1, 1)
            out = torch.where(held, (x - level.a * picture) / level.s, out)
        return out

    return eps


def keyed(key: float) -> Tensor:
    text = torch.zeros(5, 4)
    text[2, 0] = key
    return text


def to(key: float) -> Method:
    """A method that puts another key into every prompt."""
    return Method(f"to {key}", lambda flagged: [Correction({}, condition=keyed(key)) for _ in flagged.prompts], cost=0)


def test_the_sequence_stops_at_the_first_method_that_passes(observe: Observe) -> None:
    picture, other = torch.randn(X[1:]) * 2, torch.randn(X[1:]) * 2
    observation = observe(memorizing({1.0: picture, 2.0: other}), torch.randn(X), keyed(1.0).expand(3, 5, 4))
    outcomes = try_in_order(flag(observation, ordinary(norm=0.0)), [to(1.1), to(2.0), to(3.0), to(4.0)])
    assert [[attempt["method"] for attempt in outcome.attempts] for outcome in outcomes] == [["to 1.1", "to 2.0", "to 3.0"]] * 3
    assert all(outcome.correction is not None for outcome in outcomes)


def test_verification_sees_the_same_picture_another_memorized_one_and_neither(observe: Observe) -> None:
    picture, other = torch.randn(X[1:]) * 2, torch.randn(X[1:]) * 2
    observation = observe(memorizing({1.0: picture, 2.0: other}), torch.randn(X), keyed(1.0).expand(3, 5, 4))
    same, another, free = verify(flag(observation), [Correction({}, condition=keyed(key)) for key in (1.0, 2.0, 3.0)])
    assert same.recurrence > 0.9
    assert same.agreement_with_uncorrected > 0.9
    assert another.recurrence > 0.9
    assert another.agreement_with_uncorrected < 0.4
    assert free.recurrence < 0.5
    assert (same.memorized, another.memorized, free.memorized) == (True, True, False)


def test_an_emptied_prompt_does_not_pass(observe: Observe) -> None:
    """Nothing memorized, and nothing of the prompt either: it pulls less than ordinary prompts do."""
    white: Eps = lambda x, level, text: level.s * x + key_token(0 * x, level, text)  # noqa: E731
    observation = observe(white, torch.randn(X), torch.ones(3, 5, 4))
    kept, emptied = torch.ones(5, 4), torch.zeros(5, 4)
    found = verify(flag(observation, ordinary(norm=1.0)), [Correction({}, condition=c) for c in (kept, emptied, emptied)])
    assert [verification.aligned for verification in found] == [True, False, False]
    assert all(math.isnan(verification.alignment) for verification in found)
    assert found[0].entry()["alignment"] is None


def test_alignment_is_asked_of_the_subject_whatever_the_cure_says(observe: Observe) -> None:
    """Each word stands for a picture of its own; a sample has to show that of the prompt's first phrase."""
    pictures = torch.randn(len(WORDS), *X[1:])
    pictures[: WORDS.index("zebra")] = 0  # "a" and "of" show nothing

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return level.s * x - level.s * level.a * torch.einsum("bw,wcij->bcij", text[:, :, 0], pictures)

    prompts: list[str | None] = ["zebra, zork", "zebra, zork"]
    observation = observe(eps, torch.randn(2, *X[1:]), ENCODER(["zork zebra"] * 2), guidance_scale=1.0)
    profile = ordinary(norm=1e9)
    profile.values["alignment"] = [0.0] * 100
    flagged = SteeringInput.of(observation, prompts, ENCODER, profile)
    zebra, canyon = verify(flagged, [Correction({}, condition=c) for c in ENCODER(["zebra", "canyon"])])
    assert zebra.alignment > 0.1 > 0 > canyon.alignment
    assert (zebra.aligned, canyon.aligned) == (True, False)


def test_what_fails_one_question_is_asked_no_other(observe: Observe) -> None:
    """One that asks for more detail than ordinary conditions pays for nothing more, one that draws a memorized picture for no alignment."""
    key = [torch.cat([keyed(value), torch.zeros(1, 4)]) for value in (1.0, 3.0, 3.0)]
    observation = observe(memorizing({1.0: torch.randn(X[1:]) * 2}), torch.randn(X), key[1].expand(3, 6, 4), memo={})
    profile = ordinary(norm=0.0)
    flagged = flag(observation, profile, ["zebra"] * 3)
    reference_end(observation, 0)
    before = observation.evaluations.clone()
    found = verify(flagged, [Correction({}, condition=condition) for condition in key])
    assert (observation.evaluations - before).tolist() == [5, 7, 7]
    assert math.isnan(found[0].alignment)
    profile.values["guidance_detail"] = [0.0]
    before = observation.evaluations.clone()
    found = verify(flagged, [Correction({}, condition=condition) for condition in key])
    assert (observation.evaluations - before).tolist()[0] == 1
    assert found[0].memorized
    assert math.isnan(found[0].recurrence)
    assert [found[0].entry()[name] for name in ("failed", "aligned", "alignment")] == ["detail", None, None]


def test_a_memorized_picture_no_method_escapes_is_never_called_steered(observe: Observe) -> None:
    """Lower norm or not: a model that gives one picture under every condition does not pass verification."""
    picture = torch.randn(X[1:])

    def stuck(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return (x - level.a * picture) / level.s + 0.01 * text.sum(dim=(1, 2)).view(-1, 1, 1, 1)

    observation = observe(stuck, torch.randn(X), torch.rand(3, 5, 4) + 1)
    outcomes = try_in_order(flag(observation), methods_of(ordinary()))
    assert all(outcome.correction is None for outcome in outcomes)
    assert all(attempt["recurrence"] > 0.9 for outcome in outcomes for attempt in outcome.attempts)
    assert outcomes[0].summary()["passed"] is None


def test_rows_that_have_passed_pay_no_more(observe: Observe) -> None:
    text = torch.stack([keyed(1.0), keyed(2.0)])
    observation = observe(memorizing({1.0: torch.randn(X[1:]) * 2, 2.0: torch.randn(X[1:]) * 2}), torch.randn(2, *X[1:]), text)

    def first_only(flagged: SteeringInput) -> list[Correction | None]:
        return [Correction({}, condition=keyed(3.0 if t[2, 0] == 1.0 else 2.0)) for t in flagged.observation.condition]

    outcomes = try_in_order(flag(observation, ordinary(norm=0.0)), [Method("first only", first_only, cost=0), to(3.0)])
    assert [len(outcome.attempts) for outcome in outcomes] == [1, 2]
    assert observation.evaluations[0] < observation.evaluations[1]


def test_a_method_that_fails_on_one_image_takes_neither_the_others_nor_the_next_method_with_it(observe: Observe) -> None:
    """Two of three rows are cured by a method that breaks on the third; that one is cured by the next."""
    picture = torch.randn(X[1:]) * 2
    text = keyed(1.0).expand(3, 5, 4).clone()
    text[1, 3, 0] = 7.0  # the row on which it breaks
    observation = observe(memorizing({1.0: picture}), torch.randn(X), text)

    def fragile(flagged: SteeringInput) -> list[Correction | None]:
        if (flagged.observation.condition[:, 3, 0] == 7.0).any():
            raise RuntimeError("no luck")
        return [Correction({}, condition=keyed(3.0)) for _ in flagged.prompts]

    outcomes = try_in_order(flag(observation, ordinary(norm=0.0)), [Method("fragile", fragile, cost=0), to(3.0)])
    assert all(outcome.correction is not None for outcome in outcomes)
    assert [[attempt["method"] for attempt in outcome.attempts] for outcome in outcomes] == [
        ["fragile"],
        ["fragile", "to 3.0"],
        ["fragile"],
    ]
    assert outcomes[1].attempts[0] == {"method": "fragile", "error": "RuntimeError: no luck"}


def test_a_method_that_does_not_apply_leaves_no_attempt(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.ones(3, 5, 4))
    outcomes = try_in_order(flag(observation), [METHODS["attention attenuation"], METHODS["padding damping"]])
    assert [outcome.attempts for outcome in outcomes] == [[]] * 3


def test_the_sequence_rewords_before_it_moves_embeddings(observe: Observe) -> None:
    picture = torch.randn(X[1:]) * 2

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        held = text[:, WORDS.index("zork"), 0].view(-1, 1, 1, 1)
        return held * (x - level.a * picture) / level.s + (1 - held) * level.s * x

    prompts: list[str | None] = ["a zebra, zork", "canyon by zork"]
    observation = observe(eps, torch.randn(2, *X[1:]), ENCODER([str(prompt) for prompt in prompts]))
    outcomes = try_in_order(flag(observation, ordinary(), prompts), methods_of(ordinary()))
    assert [outcome.attempts[-1]["wording"] for outcome in outcomes] == ["a photo of a zebra", "a photo of canyon"]
    assert [outcome.attempts[-1]["dropped"] for outcome in outcomes] == [["zork"], ["by", "zork"]]
    assert all(outcome.correction is not None and len(outcome.attempts) == 2 for outcome in outcomes)


def test_a_sequence_goes_on_with_what_has_not_been_tried(observe: Observe) -> None:
    observation = observe(memorizing({}), torch.randn(2, *X[1:]), keyed(1.0).expand(2, 5, 4))
    methods = [replace(to(2.0), stronger=(to(3.0).correct,)), to(4.0)]
    flagged = flag(observation, ordinary(norm=0.0))
    begun = try_in_order(flagged, methods)
    again = try_in_order(flagged, methods, begun)
    assert [outcome.taken for outcome in again] == [2, 2]
    assert [attempt["method"] for attempt in again[0].attempts] == ["to 2.0", "to 2.0"]
    assert again[0].correction is not None
    torch.testing.assert_close(again[0].correction.condition, keyed(3.0))
    third = try_in_order(flagged, methods, again)
    assert try_in_order(flagged, methods, third)[0].correction is None


def test_methods_are_those_chosen_else_learnt_else_the_default() -> None:
    learnt = ordinary(methods=[MethodStatistics("padding damping", 0.9, 17.0, 0.2)])
    assert [method.name for method in methods_of(learnt, ["SAIL"])] == ["SAIL"]
    assert [method.name for method in methods_of(learnt)] == ["padding damping"]
    assert methods_of(ordinary())[0].name == "rewording"


def test_what_keeps_most_of_the_prompt_comes_first_and_of_equals_what_moves_least() -> None:
    gentle, rough = MethodStatistics("gentle", 0.6, 100.0, 0.1, 0.19), MethodStatistics("rough", 1.0, 20.0, 0.9, 0.21)
    faithful, useless = MethodStatistics("faithful", 0.7, 90.0, 0.2, 0.4), MethodStatistics("useless", 0.4, 1.0, 0.0, 0.9)
    assert [measured.method for measured in ordered([rough, gentle, useless, faithful])] == ["faithful", "gentle", "rough"]


def test_what_is_a_hair_above_a_twentieth_is_no_better_than_what_is_a_hair_below() -> None:
    """Equals lie within a twentieth of the best of them, wherever the twentieths fall."""
    above, below = MethodStatistics("above", 1.0, 20.0, 0.9, 0.026), MethodStatistics("below", 1.0, 20.0, 0.1, 0.024)
    assert [measured.method for measured in ordered([above, below])] == ["below", "above"]


def test_every_published_method_is_there_and_says_what_it_costs(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.rand(3, 6, 4) + 1)
    prompts: list[str | None] = ["a zork", "a zebra zork", "canyon of zork"]
    for method in METHODS.values():
        flagged = flag(
            observation, ordinary(series={"denoised_norm": [(1.0, 1.0)], "guidance_norm": [(1.0, 1.0)]}, timesteps=[1.0]), prompts
        )
        observation.evaluations.zero_()
        corrections = method.correct(flagged)
        assert len(corrections) == 3
        assert (observation.evaluations <= method.cost).all(), method.name


# corrections


@pytest.mark.parametrize(("correction", "cost"), [({}, 0), ({"condition": torch.ones(5, 4)}, 1), ({"x": torch.zeros(X[1:])}, 2)])
def test_a_correction_changes_what_it_names_and_counts_what_it_says(correction: dict[str, Any], cost: int, observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.rand(3, 5, 4))
    found = corrected(observation, [Correction({}, **correction)] * 3)
    assert observation.evaluations.tolist() == [cost] * 3
    again = observe(
        key_token, correction.get("x", observation.x).expand(X), correction.get("condition", observation.condition).expand(3, 5, 4)
    )
    torch.testing.assert_close((found.x, found.eps_c, found.eps_u), (again.x, again.eps_c, again.eps_u))


def test_rules_hold_for_their_own_row_alone(observe: Observe) -> None:
    observation = observe(key_token, torch.randn(X), torch.rand(3, 5, 4), guidance_scale=3.0)
    rule = partial(delay_rule, 0.0)
    found = corrected(observation, [Correction({}), Correction({}, rule=rule), Correction({})])
    torch.testing.assert_close(found.prediction[1], observation.eps_u[1])
    torch.testing.assert_close(found.prediction[[0, 2]], observation.prediction[[0, 2]])
    assert found.select(torch.tensor([1])).rules == (rule,)
