"""Restarting one row of a running batch: schedulers' memories, and what a corrected row becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.install import watched
from sdguard.denoiser.schedulers import input_scale
from sdguard.denoiser.text_encoding import Encoder
from sdguard.observation import Observation, Prediction

PROMPTS = ["a cat", "a dog in forest", "a fox at belen sky, poster"]
STEPS, ROW = 4, 1
DETERMINISTIC = [
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler",
]  # fmt: skip
STOCHASTIC = ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"]


class At:
    """Brings a correction of one row in at one call."""

    def __init__(self, step: int, correct: Callable[[Observation], Correction]) -> None:
        self.corrections: dict[int, Correction] = {}
        self.step, self.correct = step, correct
        self.spent: list[int] = []

    def reads(self, step: int) -> bool:
        return step == self.step

    def expects(self, rows: int, branches: int) -> bool:
        return True

    def follows(self, step: int) -> bool:
        return True

    def glance(self, prediction: Prediction, calls: int) -> None:
        """Each call is observed."""

    def made(self, latents: Tensor) -> None:
        """Nothing."""

    def lost(self, row: int, error: Exception) -> None:
        raise error

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        """Nothing."""

    def observe(self, observation: Observation) -> None:
        if observation.step == self.step:
            self.corrections = {ROW: self.correct(observation)}
        self.spent = observation.evaluations.tolist()


def run(pipe: Any, prompts: list[str] = PROMPTS, watcher: At | None = None, **extra: Any) -> np.ndarray:
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np", **extra}
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    if watcher is None:
        return np.asarray(pipe(prompts, generator=generators, **arguments).images)
    with watched(Encoder(pipe), watcher):
        return np.asarray(pipe(prompts, generator=generators, **arguments).images)


def use(pipe: Any, scheduler: str) -> None:
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)


def reworded(pipe: Any) -> Callable[[Observation], Correction]:
    return lambda observation: Correction({}, condition=Encoder(pipe)(["a dog"])[0])


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("scheduler", DETERMINISTIC)
def test_a_row_corrected_late_becomes_what_it_had_been_from_the_start(scheduler: str, step: int, tiny: Any) -> None:
    use(tiny, scheduler)
    plain = run(tiny)
    asked = run(tiny, [*PROMPTS[:ROW], "a dog", *PROMPTS[ROW + 1 :]])
    found = run(tiny, watcher=At(step, reworded(tiny)))
    np.testing.assert_allclose(found[ROW], asked[ROW], atol=2e-4)
    assert all(np.array_equal(found[i], plain[i]) for i in range(3) if i != ROW)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("scheduler", STOCHASTIC)
def test_neighbours_of_a_late_row_keep_their_noise_under_stochastic_schedulers(scheduler: str, step: int, tiny: Any) -> None:
    use(tiny, scheduler)
    plain = run(tiny)
    state = torch.get_rng_state()
    found = run(tiny, watcher=At(step, reworded(tiny)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [np.array_equal(found[i], plain[i]) for i in range(3)] == [i != ROW for i in range(3)]
    assert np.array_equal(run(tiny, watcher=At(step, reworded(tiny))), found)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_row_can_start_from_another_noise(scheduler: str, step: int, tiny: Any) -> None:
    use(tiny, scheduler)
    plain = run(tiny)
    noise = torch.randn(3, 4, 8, 8)
    found = run(tiny, watcher=At(step, lambda observation: Correction({}, x=noise[ROW])))
    asked = run(tiny, latents=noise)
    # latents given to the pipeline are scaled by the scheduler's sigma; what the guard gives is the denoiser's own input
    tolerance = 2e-2 if scheduler == "EulerDiscreteScheduler" else 2e-4
    np.testing.assert_allclose(found[ROW], asked[ROW], atol=tolerance)
    assert all(np.array_equal(found[i], plain[i]) for i in range(3) if i != ROW)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_rule_takes_guidances_place(step: int, prediction_type: str, tiny: Any) -> None:
    """A rule that follows the unconditional prediction gives what an empty prompt gives."""
    tiny.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(tiny.scheduler.config, prediction_type=prediction_type)
    plain = run(tiny)
    empty = run(tiny, [*PROMPTS[:ROW], "", *PROMPTS[ROW + 1 :]])
    found = run(tiny, watcher=At(step, lambda observation: Correction({}, rule=unconditional)))
    np.testing.assert_allclose(found[ROW], empty[ROW], atol=2e-4)
    assert all(np.array_equal(found[i], plain[i]) for i in range(3) if i != ROW)


def unconditional(observation: Observation) -> Tensor:
    return observation.eps_u


def test_rescaled_guidance_is_gone_through_again_as_the_pipeline_does_it(tiny: Any) -> None:
    asked = run(tiny, [*PROMPTS[:ROW], "a dog", *PROMPTS[ROW + 1 :]], guidance_rescale=0.7)
    found = run(tiny, watcher=At(2, reworded(tiny)), guidance_rescale=0.7)
    np.testing.assert_allclose(found[ROW], asked[ROW], atol=2e-4)


@pytest.mark.parametrize(("step", "spent"), [(0, 1), (2, 1 + 2 + 2)])
def test_the_nfe_of_a_replay_are_counted_for_the_row_that_is_replayed(step: int, spent: int, tiny: Any) -> None:
    watcher = At(step, reworded(tiny))
    run(tiny, watcher=watcher)
    assert watcher.spent == [0, spent, 0]


def test_a_restarted_row_knows_its_own_past(tiny: Any) -> None:
    """The guidance norms a rule sees are those of the way it has gone, not of the way it would have gone."""
    last: dict[int, list[float]] = {}

    def noting(step: int, observation: Observation) -> Tensor:
        last[step] = observation.past_norms[0].tolist()
        return observation.guided(observation.eps_c, observation.eps_u)

    for step in (0, 2):
        rule = partial(noting, step)
        run(tiny, watcher=At(step, lambda observation, rule=rule: replace(reworded(tiny)(observation), rule=rule)))  # type: ignore[misc]
    assert len(last[0]) == STEPS - 1
    assert last[2] == pytest.approx(last[0], rel=1e-3)


def test_input_scale_is_that_of_scaled_schedulers(tiny: Any) -> None:
    tiny.scheduler.set_timesteps(STEPS)
    assert input_scale(tiny.scheduler, tiny.scheduler.timesteps[0]) == 1
    use(tiny, "EulerDiscreteScheduler")
    tiny.scheduler.set_timesteps(STEPS)
    sigma = tiny.scheduler.sigmas[0]
    assert input_scale(tiny.scheduler, tiny.scheduler.timesteps[0]) == pytest.approx(float(1 / (sigma**2 + 1) ** 0.5))
