"""Noise levels and prediction types agree, whatever the scheduler and the network do."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, ScoreSdeVeScheduler
from hypothesis import given
from hypothesis import strategies as st

from sdguard.observation import NoiseLevel, denoised, noise_level, to_noise

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@given(alpha=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_every_prediction_type_gives_the_noise_that_was_added(alpha: float, seed: int) -> None:
    level = NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5)
    x0, eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    x = level.a * x0 + level.s * eps
    outputs = {"epsilon": eps, "v_prediction": level.a * eps - level.s * x0, "sample": x0}
    for kind, output in outputs.items():
        torch.testing.assert_close(to_noise(output, x, level, kind), eps)
    torch.testing.assert_close(denoised(x, eps, level), x0)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(TypeError, match="'flow'"):
        to_noise(torch.zeros(1), torch.zeros(1), NoiseLevel(0.6, 0.8), "flow")


def test_noise_level_is_the_schedulers_own() -> None:
    scheduler = DDIMScheduler(**SCHEDULE)
    level = noise_level(scheduler, 981)
    assert level.a == pytest.approx(scheduler.alphas_cumprod[981].sqrt().item())
    assert level.s == pytest.approx(0.997, abs=1e-3)


def test_scaled_input_of_a_sigma_scheduler_is_x_t() -> None:
    scheduler = EulerDiscreteScheduler(**SCHEDULE)
    scheduler.set_timesteps(20)
    x0, eps = torch.randn(2, 4)
    for timestep, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas, strict=False):
        scheduler.set_timesteps(20)  # forgets the step it was at
        level = noise_level(scheduler, timestep)
        shown = scheduler.scale_model_input(x0 + sigma * eps, torch.tensor(timestep))
        torch.testing.assert_close(shown, level.a * x0 + level.s * eps, atol=2e-3, rtol=2e-3)


def test_a_scheduler_without_alphas_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="ScoreSdeVeScheduler"):
        noise_level(ScoreSdeVeScheduler(), 10)
