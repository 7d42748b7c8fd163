"""Signals and the look-ahead against models whose answer is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdguard.lookahead import independent_noise, look_ahead
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.agreement import agreement, correlation
from sdguard.signals.guidance_norm import guidance_norm

SHAPE = (4, 4, 8, 8)
Observe = Callable[..., Observation]


def gaussian(mean: Tensor, spread: float) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """The exact noise prediction for data ``N(mean, spread**2)``; every condition is the same."""
    return lambda x, level, text: level.s * (x - level.a * mean) / (level.a**2 * spread**2 + level.s**2)


def test_look_ahead_ends_at_the_only_picture_a_delta_has(observe: Observe) -> None:
    mean = torch.randn(SHAPE[1:])
    found = look_ahead(observe(gaussian(mean, 1e-4), torch.randn(SHAPE), torch.zeros(4, 3, 2)))
    torch.testing.assert_close(found, mean.expand(SHAPE), atol=1e-3, rtol=1e-3)


def test_look_ahead_costs_what_it_says(observe: Observe) -> None:
    observation = observe(gaussian(torch.zeros(SHAPE[1:]), 1.0), torch.randn(SHAPE), torch.zeros(4, 3, 2))
    look_ahead(observation.select(torch.tensor([1, 3])))
    assert observation.evaluations.tolist() == [0, 8, 0, 8]
    look_ahead(observation, noise=torch.randn(SHAPE))
    assert observation.evaluations.tolist() == [10, 18, 10, 18]


def test_agreement_is_one_for_a_delta_and_near_zero_for_white_data(observe: Observe) -> None:
    x, text = torch.randn(SHAPE), torch.zeros(4, 3, 2)
    assert agreement(observe(gaussian(torch.randn(SHAPE[1:]), 1e-4), x, text)).min() > 0.999
    assert agreement(observe(gaussian(torch.zeros(SHAPE[1:]), 1.0), x, text)).abs().max() < 0.35


def test_guidance_norm_is_the_distance_of_the_two_predictions(observe: Observe) -> None:
    def pulled(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return x + text.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    text = torch.arange(4.0).view(4, 1, 1).expand(4, 3, 2)
    expected = torch.arange(4.0) * (4 * 8 * 8) ** 0.5
    torch.testing.assert_close(guidance_norm(observe(pulled, torch.randn(SHAPE), text)), expected)


@pytest.mark.parametrize("signal", [guidance_norm, agreement])
def test_a_rows_value_does_not_depend_on_its_neighbours(signal: Callable[[Observation], Tensor], observe: Observe) -> None:
    def model(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return x * text.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    x, text = torch.randn(SHAPE), torch.rand(4, 3, 2)
    together = signal(observe(model, x, text))
    order = torch.tensor([2, 0])
    torch.testing.assert_close(signal(observe(model, x[order], text[order])), together[order])
    torch.testing.assert_close(signal(observe(model, x, text).select(order)), together[order])


def test_independent_noise_is_a_function_of_the_row_and_independent_of_it() -> None:
    x = torch.randn(3, 4, 32, 32)
    noise = independent_noise(x)
    assert torch.equal(independent_noise(x[1:2])[0], noise[1])
    assert correlation(x, noise).abs().max() < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.05)
