"""The reference reading, and the signals read off it, against densities whose answer is known."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdguard.denoiser.probe import probe_run
from sdguard.geometry.alignment import alignment
from sdguard.geometry.reference import NOISED_LOG_SNR, estimate_ahead, estimate_at_start, recurrence, timestep_at
from sdguard.observation import NoiseLevel, Observation
from sdguard.signals.bottleneck_shift import bottleneck_shift
from sdguard.signals.estimate_agreement import estimate_agreement, estimate_agreement_ahead
from sdguard.signals.guidance_detail import guidance_detail
from sdguard.signals.persistence import detail, persistence
from sdguard.signals.signal import UnsupportedModel

SHAPE = (4, 4, 8, 8)
Observe = Callable[..., Observation]
SIGNALS = (persistence, estimate_agreement, estimate_agreement_ahead)


def gaussian(mean: Tensor, spread: float) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """The exact noise prediction for data ``N(mean, spread**2)``."""
    return lambda x, level, text: level.s * (x - level.a * mean) / (level.a**2 * spread**2 + level.s**2)


def two_pictures(one: Tensor, other: Tensor) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """The exact noise prediction for data that is one of two pictures, evenly."""

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        pictures = torch.stack([one, other])
        distance = (x[:, None] - level.a * pictures).flatten(2).square().sum(2) / (2 * level.s**2)
        mean = torch.einsum("bk,kchw->bchw", torch.softmax(-distance, dim=1), pictures)
        return (x - level.a * mean) / level.s

    return eps


def observed(observe: Observe, model: Callable[..., Tensor]) -> Observation:
    return observe(model, torch.randn(SHAPE), torch.zeros(len(SHAPE), 3, 2))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_recurrence_of_white_data_is_the_correlation_that_noise_leaves(spread: float, observe: Observe) -> None:
    """The posterior mean is a multiple of the noised picture: its correlation with it is ``a sigma / sqrt(a^2 sigma^2 + s^2)``."""
    x = torch.randn(2, 4, 64, 64)
    observation = observe(gaussian(torch.zeros(x.shape[1:]), spread), x, torch.zeros(2, 3, 2))
    timestep = timestep_at(observation, NOISED_LOG_SNR)
    a, s = observation.level_at(timestep)
    expected = a * spread / math.hypot(a * spread, s)
    torch.testing.assert_close(
        recurrence(observation, spread * torch.randn_like(x), timestep), torch.full((2,), expected), atol=0.02, rtol=0
    )
    assert observation.evaluations.tolist() == [1, 1]


def test_each_of_several_memorized_pictures_recurs_and_no_mixture_of_them(observe: Observe) -> None:
    one, other = 2 * torch.randn(SHAPE[1:]), 2 * torch.randn(SHAPE[1:])
    observation = observed(observe, two_pictures(one, other))
    pictures = torch.stack([one, other, torch.randn_like(one), (one + other) / 2])
    values = recurrence(observation, pictures, timestep_at(observation, NOISED_LOG_SNR))
    assert values[:2].min() > 0.99
    assert values[2] < 0.5
    assert values[3] < 0.9


def told(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """The exact noise prediction for data around its text's mean."""
    return gaussian(text.mean(dim=(1, 2)).view(-1, 1, 1, 1), 0.5)(x, level, text)


@pytest.mark.parametrize(
    "ask",
    [
        lambda observation, pictures: recurrence(observation, pictures, 500.0),
        lambda observation, pictures: alignment(observation, pictures, torch.ones_like(observation.condition)),
    ],
)
def test_what_is_asked_of_a_picture_does_not_hang_on_its_last_bits(ask: Callable[..., Tensor], observe: Observe) -> None:
    """They round with threads and processor, with which the noise that is drawn for a picture must not change."""
    observation, pictures = observed(observe, told), torch.randn(SHAPE)
    torch.testing.assert_close(ask(observation, pictures * (1 + 1e-6)), ask(observation, pictures), atol=1e-4, rtol=0)


def test_the_recurrence_holds_in_half_precision(observe: Observe) -> None:
    picture = 2 * torch.randn(SHAPE[1:])

    def eps(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return gaussian(picture, 0.5)(x.bfloat16(), level, text).float()

    observation, pictures = observed(observe, gaussian(picture, 0.5)), picture + 0.5 * torch.randn(SHAPE)
    timestep = timestep_at(observation, NOISED_LOG_SNR)
    halved = replace(observation, denoise=lambda y, t, text, places: eps(y, observation.level_at(t), text))
    torch.testing.assert_close(recurrence(halved, pictures, timestep), recurrence(observation, pictures, timestep), atol=0.02, rtol=0)


def test_the_timestep_of_a_signal_to_noise_ratio_is_the_nearest_whole_one(observe: Observe) -> None:
    observation = observed(observe, gaussian(torch.zeros(SHAPE[1:]), 1.0))
    timestep = timestep_at(observation, 0.0)
    assert timestep == int(timestep)
    around = [abs(observation.level_at(timestep + step).log_snr) for step in (-2, 0, 2)]
    assert around[1] == min(around)


def test_the_estimates_of_a_delta_are_its_picture_from_any_noise(observe: Observe) -> None:
    picture = torch.randn(SHAPE[1:])
    observation = observed(observe, gaussian(picture, 1e-6))
    for found in (estimate_at_start(observation), estimate_at_start(observation, 3), estimate_ahead(observation, draw=1)):
        torch.testing.assert_close(found, picture.expand(SHAPE), atol=1e-3, rtol=1e-3)


def test_a_gaussians_estimate_ahead_is_the_posterior_mean_there(observe: Observe) -> None:
    """One DDIM step along the probability flow of N(0, spread**2), and ``a x spread**2 / (a**2 spread**2 + s**2)`` there."""
    observation, spread = observed(observe, gaussian(torch.zeros(SHAPE[1:]), 0.5)), 0.5
    start, level = observation.level, observation.level_at(timestep_at(observation, 0.0))

    def share(at: NoiseLevel) -> float:
        return spread**2 / (at.a**2 * spread**2 + at.s**2)

    x = level.a * (start.a * share(start)) + level.s * start.s * share(start) / spread**2
    torch.testing.assert_close(estimate_ahead(observation), observation.x * x * level.a * share(level), rtol=1e-3, atol=1e-4)


def test_a_run_that_begins_near_the_picture_is_read_nearer_still(observe: Observe) -> None:
    observation = observed(observe, gaussian(torch.zeros(SHAPE[1:]), 1.0))
    late = replace(observation, timestep=200.0, level=observation.level_at(200.0))
    assert persistence(late).isfinite().all()


def test_a_picture_that_is_known_at_once_persists(observe: Observe) -> None:
    delta, wide = (persistence(observed(observe, gaussian(torch.randn(SHAPE[1:]), spread))) for spread in (1e-4, 1.0))
    assert delta.min() > wide.max() + math.log(10)


def test_persistence_is_for_the_detail_there_is(observe: Observe) -> None:
    """The same change counts for more where the picture has less detail."""
    flat, rough = torch.ones(SHAPE), torch.ones(SHAPE)
    rough[..., ::2, ::2] = -1
    assert detail(flat).max() < 1e-6
    assert detail(rough).min() > 1


def test_agreement_is_one_for_a_delta_and_near_zero_for_white_data(observe: Observe) -> None:
    delta, white = (observed(observe, gaussian(mean, s)) for mean, s in ((torch.randn(SHAPE[1:]), 1e-4), (torch.zeros(SHAPE[1:]), 1.0)))
    for signal in (estimate_agreement, estimate_agreement_ahead):
        assert signal(delta).min() > 0.999
        assert signal(white).abs().max() < 0.35


def test_agreement_is_blind_to_a_text_with_two_pictures_ahead(observe: Observe) -> None:
    """What its docstring says: noises that lead to different pictures do not agree, though both are memorized."""
    one, other = torch.randn(2, *SHAPE[1:])
    found = torch.cat([estimate_agreement_ahead(observed(observe, two_pictures(one, other))) for _ in range(6)])
    assert found.max() > 0.99
    assert found.min() < 0.9


def test_of_three_noises_two_lead_to_the_same_of_two_pictures(observe: Observe) -> None:
    """At a low noise level, where an estimate is one of the pictures: by the pigeonhole, the closest pair agrees."""
    one, other = torch.randn(2, *SHAPE[1:])
    observation = observed(observe, two_pictures(one, other))
    late = replace(observation, timestep=400.0, level=observation.level_at(400.0))
    origin = torch.stack([one, other, one, other])
    x = late.level.a * origin + late.level.s * torch.randn(SHAPE)
    eps = two_pictures(one, other)(x, late.level, x)
    assert estimate_agreement(replace(late, x=x, eps_c=eps, origin=origin)).min() > 0.99


def test_what_one_signal_has_bought_the_next_does_not_pay_again(observe: Observe) -> None:
    observation = replace(observed(observe, gaussian(torch.zeros(SHAPE[1:]), 1.0)), memo={})
    spent = []
    for signal in SIGNALS:
        before = observation.evaluations[0].item()
        signal(observation)
        spent.append(observation.evaluations[0].item() - before)
    assert spent == [1, 2, 1]


def test_the_guidance_scale_moves_nothing(observe: Observe) -> None:
    observation = observed(observe, two_pictures(*torch.randn(2, *SHAPE[1:])))
    for signal in SIGNALS:
        torch.testing.assert_close(signal(observation), signal(replace(observation, guidance_scale=11.0)))


def test_a_smooth_pull_has_no_detail_whatever_its_size(observe: Observe) -> None:
    observation = observed(observe, gaussian(torch.zeros(SHAPE[1:]), 1.0))
    flat = replace(observation, eps_c=observation.eps_u + 100)
    assert guidance_detail(flat).max() < 1e-6
    edges = torch.zeros(SHAPE)
    edges[..., 4:] = 1.0
    stepped = replace(observation, eps_c=edges, eps_u=torch.zeros(SHAPE))
    torch.testing.assert_close(guidance_detail(stepped), torch.full((len(edges),), 1 / 7))


def test_the_bottleneck_shift_is_the_distance_of_what_the_mid_block_gave_the_two_branches(tiny: Any) -> None:
    outputs: list[Tensor] = []
    handle = tiny.unet.mid_block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    probe_run(tiny, ["a cat", "a boat"], range(2), lambda o: torch.testing.assert_close(bottleneck_shift(o), norms(outputs[0])))
    handle.remove()


def norms(outputs: Tensor) -> Tensor:
    """Distance of the second half of a batch of features to the first, row by row."""
    null, text = outputs.chunk(2)
    return (text - null).flatten(1).norm(dim=1)


def test_without_a_mid_block_there_is_no_shift(observe: Observe) -> None:
    with pytest.raises(UnsupportedModel):
        bottleneck_shift(observed(observe, gaussian(torch.zeros(SHAPE[1:]), 1.0)))
