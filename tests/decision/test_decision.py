"""The cascade: what it costs, what it decides, and that its scores keep the conformal promise."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdguard.decision import cascade as decision
from sdguard.decision.cascade import Cascade, Scale, fuse, judge, judge_later, logistic_weights
from sdguard.decision.profile import Profile
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.signal import Signal

Observe = Callable[..., Observation]
PLAN = ((("free",), 0.2), (("paid", "dear"), 0.0))


def entry(place: int, cost: int) -> Callable[[Observation], Tensor]:
    """A signal that is an entry of ``x``."""

    def read(observation: Observation) -> Tensor:
        observation.spend(cost)
        return observation.x.flatten(1)[:, place]

    return read


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = [Signal("free", entry(0, 0), 0), Signal("paid", entry(1, 2), 2), Signal("dear", entry(2, 5), 5)]
    monkeypatch.setattr(decision, "BY_NAME", {signal.name: signal for signal in signals})


def nothing(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    return torch.zeros_like(x)


def rows(observe: Observe, values: Tensor) -> Observation:
    return observe(nothing, values.view(len(values), 3, 1, 1), torch.zeros(len(values), 2, 2))


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


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 0.2]))
def test_the_cascade_keeps_the_conformal_promise(seed: int, rate: float) -> None:
    """Fitted on some ordinary prompts and calibrated on others, it flags no more than the promised share of further ones."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(60 + 400, 3, generator=generator)
    cascade = fitted(draw[:60])
    score = scores(draw[60:], cascade)
    # leave-one-out over an exchangeable sample is the promise itself
    ordered = score.sort().values
    flagged = sum(Profile({}, cascade, ordered[ordered != s].tolist(), {}).p_value(s.item()) <= rate for s in score)
    assert flagged <= rate * len(score) + 1e-9


def scores(values: Tensor, cascade: Cascade) -> Tensor:
    """`judge` without an observation."""
    z = {name: cascade.scales[name].z(values[:, i]) for i, name in enumerate(("free", "paid", "dear"))}
    first, second = z["free"], fuse(z, cascade.stages[1].weights)
    bound = torch.tensor(cascade.stages[0].bound)
    return torch.where(first >= bound, decision.above(bound, second), first)


def test_a_later_call_counts_only_where_it_is_watched() -> None:
    cascade = Cascade((), {}, later=(Scale(False, 1.0, 0.5),))
    norms = torch.tensor([1.0, 2.0])
    assert judge_later(norms, 1, cascade).tolist() == [0.0, 2.0]
    assert judge_later(norms, 0, cascade).isneginf().all()
    assert judge_later(norms, 2, cascade).isneginf().all()
