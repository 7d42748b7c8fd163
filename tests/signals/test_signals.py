"""Signals and the short rollout against models whose answer is known."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdguard.denoiser.probe import probe_run
from sdguard.geometry.rollout import grid, short_rollout
from sdguard.geometry.rowwise import correlation
from sdguard.geometry.volume import RESOLUTION
from sdguard.noise import independent_noise
from sdguard.observation import CLEAN, NoiseLevel, Observation
from sdguard.signals import SIGNALS, Signal
from sdguard.signals.agreement import agreement
from sdguard.signals.attention_entropy import ATTENTION_ENTROPY, attention_by_token, entropy, mean_attention
from sdguard.signals.bottleneck_shift import BOTTLENECK_SHIFT
from sdguard.signals.bottleneck_spread import BOTTLENECK_SPREAD
from sdguard.signals.condition_jacobian import condition_jacobian
from sdguard.signals.denoised_norm import denoised_norm
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.signals.guidance_peak import guidance_peak
from sdguard.signals.lid import TIMESTEP, lid_conditional, lid_contrast, lid_guided, lid_noisy, lid_unconditional
from sdguard.signals.low_noise_alignment import low_noise_alignment
from sdguard.signals.output_density import output_density, output_density_ahead
from sdguard.signals.prediction_change import prediction_change
from sdguard.signals.sharpness import curvature, sharpness
from sdguard.signals.update_norm import update_norm

SHAPE = (4, 4, 8, 8)
Observe = Callable[..., Observation]


def gaussian(mean: Tensor, spread: float) -> Callable[[Tensor, NoiseLevel, Tensor], Tensor]:
    """The exact noise prediction for data ``N(mean, spread**2)``; every condition is the same."""
    return lambda x, level, text: level.s * (x - level.a * mean) / (level.a**2 * spread**2 + level.s**2)


def test_a_short_rollout_ends_at_the_only_picture_a_delta_has(observe: Observe) -> None:
    mean = torch.randn(SHAPE[1:])
    found = short_rollout(observe(gaussian(mean, 1e-4), torch.randn(SHAPE), torch.zeros(4, 3, 2)))
    torch.testing.assert_close(found, mean.expand(SHAPE), atol=1e-3, rtol=1e-3)


def test_a_short_rollout_costs_what_it_says(observe: Observe) -> None:
    observation = observe(gaussian(torch.zeros(SHAPE[1:]), 1.0), torch.randn(SHAPE), torch.zeros(4, 3, 2))
    short_rollout(observation.select(torch.tensor([1, 3])))
    assert observation.evaluations.tolist() == [0, 6, 0, 6]
    short_rollout(observation, noise=torch.randn(SHAPE))
    assert observation.evaluations.tolist() == [8, 14, 8, 14]


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


#: signals that read features inside the network, which a model given as a formula has not.
INSIDE = (ATTENTION_ENTROPY, BOTTLENECK_SPREAD, BOTTLENECK_SHIFT)


@pytest.mark.parametrize("signal", [signal for signal in SIGNALS if signal not in INSIDE], ids=lambda signal: signal.name)
def test_a_signal_is_a_function_of_its_row_and_costs_what_it_declares(signal: Signal, observe: Observe) -> None:
    def model(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        return level.s * x * (1 + text.mean(dim=(1, 2))).view(-1, 1, 1, 1) + 0.1 * torch.sin(x)

    x, text = torch.randn(SHAPE), torch.rand(4, 3, 2)
    whole = observe(model, x, text)
    together = signal.read(whole)
    assert together.shape == (4,)
    assert whole.evaluations.tolist() == [signal.cost] * 4
    order = torch.tensor([2, 0])
    torch.testing.assert_close(signal.read(observe(model, x[order], text[order])), together[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signal.read(observe(model, x, text).select(order)), together[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("signal", INSIDE, ids=lambda signal: signal.name)
def test_a_signal_that_reads_features_keeps_the_same_contract(signal: Signal, tiny: Any) -> None:
    prompts = ["a cat", "a zebra on a hill", "a boat"]
    setting: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0}
    together: list[float] = []
    costs: list[int] = []

    def look(observation: Observation) -> None:
        together.extend(signal.read(observation).tolist())
        costs.extend(observation.evaluations.tolist())

    probe_run(tiny, prompts, range(3), look, **setting)
    assert costs == [signal.cost] * 3
    for i in (2, 0):
        probe_run(tiny, prompts[i : i + 1], [i], lambda observation: together.append(signal.read(observation).item()), **setting)
    assert together[3:] == pytest.approx([together[2], together[0]], rel=1e-4)
    assert not tiny.unet.mid_block._forward_hooks


def test_entropy_of_even_and_of_single_attention() -> None:
    assert entropy(mean_attention(torch.zeros(1, 5, 8), torch.randn(1, 7, 8), 2)).tolist() == [pytest.approx([math.log(7)] * 2)]
    key = torch.zeros(1, 7, 8)
    key[:, 3] = 100.0
    assert entropy(mean_attention(torch.ones(1, 5, 8), key, 2)).tolist() == [pytest.approx([0, 0], abs=1e-3)]


def test_attention_layers_come_in_the_order_in_which_they_run_each_with_its_own_heads(observe: Observe) -> None:
    """As in Stable Diffusion 2, whose blocks differ in heads, and whose middle is registered after everything else."""
    net = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=2,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
    )

    def denoise(x: Tensor, t: float, text: Tensor, places: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x, t, text).sample

    observation = observe(lambda x, level, text: x, torch.randn(SHAPE), torch.randn(4, 3, 2), denoiser=net, denoise=denoise)
    shares = attention_by_token(observation)
    assert [share.shape[1] for share in shares] == [2, 4, 4, 4, 4, 2, 2]
    assert observation.evaluations.tolist() == [1] * 4
    for share in shares:
        torch.testing.assert_close(share.sum(-1), torch.ones(share.shape[:2]))


PICTURE = torch.linspace(-2, 2, 4 * 8 * 8).view(SHAPE[1:])
D = PICTURE.numel()


def remembered(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
    """Text 1 has but one picture, text 0 has white data."""
    share = text[:, 0, 0].view(-1, 1, 1, 1)
    return share * (x - level.a * PICTURE) / level.s + (1 - share) * level.s * x


def recall(observe: Observe, **fields: Any) -> Observation:
    return observe(remembered, torch.randn(SHAPE), torch.ones(4, 3, 2), **fields)


def test_guidance_peak_ignores_a_free_background(observe: Observe) -> None:
    def one_place(x: Tensor, level: NoiseLevel, text: Tensor) -> Tensor:
        pull = torch.zeros(SHAPE[1:])
        pull[:, 3, 4] = 2.0
        return 0 * x + text[:, :1, :1, None] * pull

    assert torch.allclose(guidance_peak(observe(one_place, torch.randn(SHAPE), torch.ones(4, 3, 2))), torch.tensor(4.0))


def test_denoised_norm_of_the_only_picture_is_its_own(observe: Observe) -> None:
    torch.testing.assert_close(denoised_norm(recall(observe)), PICTURE.norm().expand(4), rtol=1e-3, atol=0)


def test_update_norm_is_that_of_the_first_rollout_step(observe: Observe) -> None:
    observation = recall(observe)
    level = observation.level_at(736.0)
    expected = level.a * PICTURE + level.s * observation.eps_c - observation.x
    torch.testing.assert_close(update_norm(observation), expected.flatten(1).norm(dim=1))


def test_the_prediction_of_the_only_picture_does_not_change(observe: Observe) -> None:
    assert prediction_change(recall(observe)).max() < 1e-5
    white = observe(remembered, torch.randn(SHAPE), torch.zeros(4, 3, 2))
    first, second = white.level, white.level_at(736.0)
    factor = second.s * (second.a * first.a + second.s * first.s) - first.s
    torch.testing.assert_close(prediction_change(white), factor**2 * white.x.flatten(1).square().sum(1), rtol=1e-2, atol=0)


def test_low_noise_alignment_is_the_cosine_at_timestep_41(observe: Observe) -> None:
    observation = recall(observe)
    level = observation.level_at(41.0)
    pull = (observation.x - level.a * PICTURE) / level.s - level.s * observation.x
    expected = torch.cosine_similarity(pull.flatten(1), observation.x.flatten(1))
    torch.testing.assert_close(low_noise_alignment(observation), expected)


def test_condition_jacobian_is_the_guidance_norm_of_a_linear_text(observe: Observe) -> None:
    observation = recall(observe)
    torch.testing.assert_close(condition_jacobian(observation), guidance_norm(observation), rtol=1e-3, atol=1e-3)


def test_sharpness_and_curvature_of_the_only_picture_against_white_data(observe: Observe) -> None:
    observation = recall(observe, timestep=301.0)
    s = observation.level.s
    gap = 1 / s**2 - 1  # H_c = -1/s**2, H_u = -1
    torch.testing.assert_close(sharpness(observation), (gap * guidance_norm(observation) / s).square(), rtol=1e-2, atol=0)
    torch.testing.assert_close(curvature(observation), torch.full((4,), gap), rtol=2e-2, atol=0)


def test_dimensions_of_the_only_picture_and_of_white_data(observe: Observe) -> None:
    """A single picture has none; white data has d, less what the noise level blurs."""
    observation = recall(observe)
    level = observation.level_at(TIMESTEP)
    white = D + level.s**2 * (-D + level.a**2 * PICTURE.square().sum())
    torch.testing.assert_close(lid_conditional(observation), torch.zeros(4), rtol=0, atol=0.01 * D)
    torch.testing.assert_close(-lid_unconditional(observation), white.expand(4), rtol=1e-2, atol=0)
    torch.testing.assert_close(lid_contrast(observation), white.expand(4), rtol=2e-2, atol=0)
    torch.testing.assert_close(lid_guided(observation), lid_conditional(observation), rtol=0, atol=0.01 * D)


def test_lid_at_the_noisy_point_counts_the_directions_the_denoiser_keeps(observe: Observe) -> None:
    """The denoiser of white data keeps a**2 of every direction, that of a single picture none."""
    observation = recall(observe, timestep=301.0)
    torch.testing.assert_close(lid_noisy(observation), torch.full((4,), observation.level.a**2 * D), rtol=1e-2, atol=0)


def test_output_density_of_the_only_picture_against_white_data(observe: Observe) -> None:
    """J_u = a, J_c = 0, both seen at the resolution."""
    observation = recall(observe, timestep=301.0)
    expected = D * (math.log(observation.level.a**2 + RESOLUTION**2) / 2 - math.log(RESOLUTION))
    torch.testing.assert_close(output_density(observation), torch.full((4,), expected), rtol=2e-2, atol=0)


def test_output_density_along_the_short_rollout_is_the_product_of_its_steps(observe: Observe) -> None:
    """On white data every DDIM step multiplies by a' a + s' s, in every direction alike, and the bound is the density."""
    observation = observe(remembered, torch.randn(SHAPE), torch.zeros(4, 3, 2))
    levels = [*map(observation.level_at, grid(observation)), CLEAN]
    factors = [math.log(after.a * before.a + after.s * before.s) for before, after in itertools.pairwise(levels)]
    torch.testing.assert_close(output_density_ahead(observation), torch.full((4,), -sum(factors)), rtol=1e-2, atol=1e-3)


def test_independent_noise_is_a_function_of_the_row_and_independent_of_it() -> None:
    x = torch.randn(3, 4, 32, 32)
    noise = independent_noise(x)
    assert torch.equal(independent_noise(x[1:2])[0], noise[1])
    assert correlation(x, noise).abs().max() < 0.1
    assert noise.std().item() == pytest.approx(1, abs=0.05)
