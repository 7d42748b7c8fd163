"""The cascade: what it costs, what it decides, and that its scores keep the conformal promise."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor

from sdguard.decision import cascade as decision
from sdguard.decision.cascade import CLIP, Cascade, Scale, StagePlan, fuse, judge
from sdguard.decision.profile import Profile
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.signal import Signal

Observe = Callable[..., Observation]
PLAN = (StagePlan(("free",), ("free",), 0.2), StagePlan(("paid", "dear"), ("free", "paid"), 0.0))


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


@pytest.mark.parametrize("take", [torch.Tensor.clone, torch.exp])
def test_a_scale_standardises_what_it_was_fitted_to(take: Callable[[Tensor], Tensor]) -> None:
    values = take(torch.randn(5000))
    scale = Scale.fit(values.tolist())
    assert scale.log == bool((values > 0).all())
    assert scale.z(values).mean().abs() < 0.05
    assert scale.z(values).std().item() == pytest.approx(1, abs=0.05)


def test_memorized_prompts_among_the_ordinary_hardly_move_a_scale() -> None:
    ordinary = torch.randn(1000).tolist()
    clean, mixed = Scale.fit(ordinary), Scale.fit(ordinary + [50.0] * 20)
    assert mixed.median == pytest.approx(clean.median, abs=0.1)
    assert mixed.deviation == pytest.approx(clean.deviation, rel=0.1)


def test_no_signal_decides_alone() -> None:
    assert fuse([torch.tensor([1e6, -1e6]), torch.zeros(2)]).tolist() == [CLIP[1] / 2, CLIP[0] / 2]


def test_a_signal_that_the_denoiser_has_no_part_for_is_left_out() -> None:
    values = torch.randn(100, 2)
    cascade = Cascade.fit({"free": values[:, 0].tolist(), "paid": values[:, 1].tolist()}, PLAN)
    assert cascade.signals == ("free", "paid")
    assert cascade.stages[1].fused == ("free", "paid")


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


#: prompts that fit the cascade, prompts that are scored, further ones, and repetitions of the whole.
FITTING, SCORED, FURTHER, DRAWS = 59, 59, 100, 200
SIGNALS = tuple(f"signal {i}" for i in range(6))


@pytest.fixture
def deviations(observe: Observe, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[float, float]]:
    """By level, how far the number of further ordinary prompts that are flagged lies from the promised one, in standard deviations.

    Signals are random. Over draws of the scored prompts, the number flagged among the further ones is beta-binomial (Vovk 2012, 1209.2673).
    ``left_out`` of the scored prompts, the highest, are missing from the profile, which makes its threshold a rank or two too low.
    """
    monkeypatch.setattr(decision, "BY_NAME", {name: Signal(name, entry(i, 1), 1) for i, name in enumerate(SIGNALS)})
    plan = (StagePlan(SIGNALS[:2], SIGNALS[:2], 0.3), StagePlan(SIGNALS[2:], SIGNALS[2:], 0.0))

    def measure(left_out: int) -> dict[float, float]:
        generator = torch.Generator().manual_seed(0)
        flagged: Counter[float] = Counter()
        for _ in range(DRAWS):
            sizes = (FITTING, SCORED, FURTHER)
            fitting, scored, further = torch.randn(sum(sizes), len(SIGNALS), generator=generator).split(sizes)
            cascade = Cascade.fit(dict(zip(SIGNALS, fitting.T.tolist(), strict=True)), plan)
            scores, found = (judge(rows(observe, part), cascade)[0].tolist() for part in (scored, further))
            profile = Profile({}, cascade, sorted(scores)[: SCORED - left_out], {})
            for level in (0.05, 0.1, 0.2):
                count = sum(profile.p_value(score) <= level for score in found)
                assert count == sum(score > profile.threshold(level) for score in found)
                flagged[level] += count
        promised = {level: betabinom(FURTHER, k := round(level * (SCORED + 1)), SCORED + 1 - k) for level in flagged}
        return {level: float((flagged[level] - DRAWS * law.mean()) / (DRAWS**0.5 * law.std())) for level, law in promised.items()}

    return measure


def test_the_cascade_keeps_the_conformal_promise(deviations: Callable[..., dict[float, float]]) -> None:
    """Fitted on some ordinary prompts and scoring others, it flags the promised share of further ones, no more and no fewer."""
    assert all(abs(deviation) < 3 for deviation in deviations(left_out=0).values())


def test_a_threshold_two_ranks_off_would_not(deviations: Callable[..., dict[float, float]]) -> None:
    assert any(abs(deviation) > 3 for deviation in deviations(left_out=3).values())
