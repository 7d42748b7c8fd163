"""The series of a report: what is read of calls of which nothing else is asked is read of many at once, and is what each shows."""

from typing import Any

import numpy as np
import pytest
import torch
from families import build, call, profile_for
from hypothesis import given
from hypothesis import strategies as st

import sdguard
from sdguard import GuardConfig
from sdguard.decision.profile import SERIES
from sdguard.denoiser.hook import GLANCES
from sdguard.guarded import pipeline as pipeline_module
from sdguard.observation import NoiseLevel, Prediction, joined

FAMILIES = ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "ChromaPipeline"]  # the last with a call for each branch


@pytest.fixture(autouse=True)
def given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile that is given is taken for any run."""
    monkeypatch.setattr(pipeline_module, "profile_of", lambda pipe, config, adapter_scale: config.profile)


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    return build(request.param, embedded.tokenizer)


def guarded(pipe: Any, **config: Any) -> Any:
    return sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6), **config))


def series(output: Any) -> list[dict[str, list[float]]]:
    return [report.series for report in output.guard]


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(-2, 9)), min_size=1, max_size=4), st.integers(1, 3))
def test_several_calls_are_read_as_each_by_itself(calls: list[tuple[float, float]], images: int) -> None:
    draw = torch.Generator().manual_seed(len(calls))
    predictions = [
        Prediction(x, eps_c, eps_u, NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5), scale)
        for (alpha, scale), (x, eps_c, eps_u) in zip(calls, torch.randn(len(calls), 3, images, 2, 4, 4, generator=draw), strict=True)
    ]
    for read in SERIES.values():
        torch.testing.assert_close(read(joined(predictions)), torch.cat([read(of) for of in predictions]))


def test_a_run_of_more_calls_than_are_read_at_once_has_the_series_of_one_of_which_every_call_is_observed(pipe: Any) -> None:
    steps: dict[str, Any] = {"num_inference_steps": GLANCES + 4}
    found, observed = series(call(guarded(pipe), **steps)), series(call(guarded(pipe, on_call=lambda *_: None), **steps))
    for one, other in zip(found, observed, strict=True):
        assert {name: len(values) for name, values in one.items()} == {name: len(values) for name, values in other.items()}
        for name, values in one.items():
            assert values == pytest.approx(other[name], rel=1e-5)


def test_what_is_written_over_before_it_is_read_is_read_as_the_call_had_it(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(FAMILIES[0], embedded.tokenizer)
    scale, step, given = pipe.scheduler.scale_model_input, pipe.scheduler.step, list[torch.Tensor]()

    def kept(*args: Any) -> torch.Tensor:
        given.append(scale(*args))
        return given[-1]

    def written_over(*args: Any, **kwargs: Any) -> Any:
        given[-1].zero_()
        return step(*args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "scale_model_input", kept)
    monkeypatch.setattr(pipe.scheduler, "step", written_over)
    found, observed = (series(call(guarded(pipe, **config))) for config in ({}, {"on_call": lambda *_: None}))
    assert given
    for one, other in zip(found, observed, strict=True):
        for name, values in one.items():
            assert values == pytest.approx(other[name], rel=1e-5)


def test_pictures_may_change_their_size_on_the_way(embedded: Any) -> None:
    def larger(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.nn.functional.interpolate(values["latents"], scale_factor=2)} if step == 1 else {}

    pipe = build(FAMILIES[0], embedded.tokenizer)
    output = call(guarded(pipe), callback_on_step_end=larger)
    assert np.array_equal(output.images, call(pipe, callback_on_step_end=larger).images)
    assert [len(report.series["guidance_norm"]) for report in output.guard] == [4] * 3


def test_a_run_that_an_error_ends_has_the_series_up_to_there(pipe: Any) -> None:
    def end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise RuntimeError("enough")
        return values

    target = guarded(pipe)
    length = len(series(call(target))[0]["guidance_norm"])
    with pytest.raises(RuntimeError, match="enough"):
        call(target, callback_on_step_end=end)
    assert [len(report.series["guidance_norm"]) for report in target.guard_reports] == [length - 1] * 3  # of four steps
