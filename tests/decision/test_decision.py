"""The cascade: what it costs, what it decides, and that its scores keep the conformal promise."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor

from sdguard.decision import cascade as decision
from sdguard.decision.cascade import Cascade, Scale, judge, judge_later, logistic_weights
from sdguard.decision.profile import Profile
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.signal import Signal

Observe = Callable[..., Observation]
PLAN = ((("free",), 0.2), (("paid", "dear"), 0.0))


def entry(place: int, cost: int) -> Callable[[Observation], Tensor]:
    """A signal that is an entry of ``x``."""

    def read(observation: Observation) -> Tensor:
        observation.count_nfe(cost)
        return observation.x.flatten(1)[:, place]

    return read


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = [Signal("free", entry(0, 0), 0), Signal("paid", entry(1, 2), 2), Signal("dear", entry(2, 5), 5)]
    monkeypatch.setattr(decision, "BY_NAME", {signal.name: signal for signal in signals})


def nothing(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    return torch.zeros_like(x)


def rows(observe: Observe, values: Tensor) -> Observation:
    return observe(nothing, values.view(len(values), -1, 1, 1), torch.zeros(len(values), 2, 2))


def fitted(values: Tensor) -> Cascade:
    return Cascade.fit({name: values[:, i].tolist() for i, name in enumerate(("free", "paid", "dear"))}, plan=PLAN)


def test_a_scale_standardises_what_it_was_fitted_to() -> None:
    values = torch.randn(50)
    for given_values in (values, values.exp()):
        z = Scale.fit(given_values.tolist()).z(given_values)
        assert z.mean().abs() < 1e-5
        assert z.std().item() == pytest.approx(1, abs=1e-5)
    assert Scale.fit(values.exp().tolist()).log
    assert not Scale.fit(values.tolist()).log


def test_labels_weigh_the_signals_and_find_their_signs() -> None:
    ordinary = torch.randn(300, 3)
    memorized = torch.randn(80, 3) + torch.tensor([2.0, 0.0, -1.0])
    strong, useless, reversed_ = logistic_weights(ordinary, memorized)
    assert strong > 0.5
    assert abs(useless) < 0.1
    assert reversed_ < -0.15
    assert strong + abs(useless) - reversed_ == pytest.approx(1)


def test_rows_that_stop_early_pay_nothing(observe: Observe) -> None:
    cascade = fitted(torch.randn(200, 3))
    observation = rows(observe, torch.tensor([[-1.0, 9, 9], [3.0, 1, 1]]))
    _, values = judge(observation, cascade)
    assert observation.evaluations.tolist() == [0, 7]
    assert values["paid"][0].isnan()
    assert values["dear"][1] == 1


def test_the_planned_share_of_ordinary_prompts_goes_on(observe: Observe) -> None:
    values = torch.randn(200, 3)
    observation = rows(observe, values)
    judge(observation, fitted(values))
    assert (observation.evaluations > 0).float().mean().item() == pytest.approx(0.2)


def test_going_on_counts_for_more_than_stopping(observe: Observe) -> None:
    values = torch.randn(300, 3)
    observation = rows(observe, values)
    score, _ = judge(observation, fitted(values))
    went_on = observation.evaluations > 0
    assert score[went_on].min() >= score[~went_on].max()


def test_a_rows_score_does_not_depend_on_its_neighbours(observe: Observe) -> None:
    values = torch.randn(40, 3)
    cascade = fitted(torch.randn(100, 3))
    together, _ = judge(rows(observe, values), cascade)
    for i in range(0, 40, 7):
        alone, _ = judge(rows(observe, values[i : i + 1]), cascade)
        assert alone.item() == pytest.approx(together[i].item(), abs=1e-5)


#: prompts that fit the cascade, memorized ones that weigh its signals, prompts that are scored, further ones, and repetitions of the whole.
FITTING, LABELLED, SCORED, FURTHER, DRAWS = 59, 30, 59, 100, 200
SIGNALS = tuple(f"signal {i}" for i in range(6))


@pytest.fixture
def deviations(observe: Observe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[float, float]]:
    """By level, how far the number of further ordinary prompts that are flagged lies from the promised one, in standard deviations.

    Signals are random and labels say nothing, so that what a fit makes of them is overfitting. Over draws of the scored prompts, the number
    flagged among the further ones is beta-binomial (Vovk 2012, 1209.2673).
    """
    monkeypatch.setattr(decision, "BY_NAME", {name: Signal(name, entry(i, 1), 1) for i, name in enumerate(SIGNALS)})
    plan = ((SIGNALS[:2], 0.3), (SIGNALS[2:], 0.0))

    def measure(fit_on_scored: bool) -> dict[float, float]:
        generator = torch.Generator().manual_seed(0)
        flagged: Counter[float] = Counter()
        for _ in range(DRAWS):
            sizes = (FITTING, LABELLED, SCORED, FURTHER)
            fitting, memorized, scored, further = torch.randn(sum(sizes), len(SIGNALS), generator=generator).split(sizes)
            ordinary, known = (
                dict(zip(SIGNALS, part.T.tolist(), strict=True)) for part in (scored if fit_on_scored else fitting, memorized)
            )
            cascade = Cascade.fit(ordinary, known, plan)
            scores, found = (judge(rows(observe, part), cascade)[0].tolist() for part in (scored, further))
            profile = Profile({}, cascade, sorted(scores), {})
            for level in (0.05, 0.1, 0.2):
                count = sum(profile.p_value(score) <= level for score in found)
                assert count == sum(score > profile.threshold(level) for score in found)
                flagged[level] += count
        promised = {level: betabinom(FURTHER, k := round(level * (SCORED + 1)), SCORED + 1 - k) for level in flagged}
        return {level: float((flagged[level] - DRAWS * law.mean()) / (DRAWS**0.5 * law.std())) for level, law in promised.items()}

    return measure


def test_the_cascade_keeps_the_conformal_promise(deviations: Callable[..., dict[float, float]]) -> None:
    """Fitted on some ordinary prompts and scoring others, it flags the promised share of further ones, no more and no fewer."""
    assert all(abs(deviation) < 3 for deviation in deviations(fit_on_scored=False).values())


def test_fitted_on_the_prompts_it_scores_it_would_not(deviations: Callable[..., dict[float, float]]) -> None:
    assert all(deviation > 3 for deviation in deviations(fit_on_scored=True).values())


def test_a_later_call_counts_only_where_it_is_watched() -> None:
    cascade = Cascade((), {}, later=(Scale(False, 1.0, 0.5),))
    norms = torch.tensor([1.0, 2.0])
    assert judge_later(norms, 1, cascade).tolist() == [0.0, 2.0]
    assert judge_later(norms, 0, cascade).isneginf().all()
    assert judge_later(norms, 2, cascade).isneginf().all()
