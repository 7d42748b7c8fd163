"""Denoisers that give out one buffer again and again, as captured graphs do: readings and pictures are those of one that does not."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from families import PROMPTS, build, call, profile_for, reworded
from torch import Tensor, nn

import sdguard
from sdguard import GuardConfig
from sdguard.denoiser.bare import not_compiled
from sdguard.denoiser.calls import replace_prediction
from sdguard.denoiser.probe import read_prompts
from sdguard.guarded import run as run_module
from sdguard.signals import SIGNALS

DENOISERS = ("unet", "transformer")


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)


def one_buffer(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that writes what it gives into one buffer for each shape, and gives that."""
    buffers: dict[torch.Size, Tensor] = {}

    def again(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            return found
        buffer = buffers.setdefault(found[0].shape, torch.empty_like(found[0]))
        return replace_prediction(found, buffer.copy_(found[0]))

    return again


class Graphed(nn.Module):
    """A denoiser in a module that gives out one buffer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.again = one_buffer(inner)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name in ("inner", "again") else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.again(*args, **kwargs)


def replace_forward(pipe: Any, name: str) -> None:
    part = getattr(pipe, name)
    part.forward = one_buffer(part.forward)


def wrap(pipe: Any, name: str) -> None:
    setattr(pipe, name, Graphed(getattr(pipe, name)))


def pair(name: str, embedded: Any, graph: Callable[[Any, str], None] = replace_forward) -> tuple[Any, Any]:
    """A pipeline with a plain denoiser and one whose denoiser gives out one buffer."""
    plain, graphed = (build(name, embedded.tokenizer) for _ in range(2))
    (part,) = (part for part in DENOISERS if hasattr(graphed, part))
    graph(graphed, part)
    getattr(plain, part).register_forward_hook(lambda *_: None)  # with code from elsewhere on it, it is read in whole batches as well
    return plain, graphed


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "guidance": ("StableDiffusionPipeline", {}),
    "rescaled guidance": ("StableDiffusionPipeline", {"guidance_rescale": 0.7}),
    "no guidance": ("StableDiffusionPipeline", {"guidance_scale": 1.0}),
    "another reading than the run's": ("StableDiffusionPipeline", {"height": 24, "negative_prompt": ["a cow"] * 3}),
    "SDXL": ("StableDiffusionXLPipeline", {}),
    "SD3": ("StableDiffusion3Pipeline", {}),
    "Flux": ("FluxPipeline", {}),
}


@pytest.mark.parametrize("graph", [replace_forward, wrap])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_kept_of_a_call_is_not_written_over_by_the_next(name: str, graph: Any, embedded: Any) -> None:
    """Clean pictures are those of the run without the guard; what is flagged is steered, and reported, as on a plain denoiser."""
    pipeline, extra = WAYS[name]
    plain, graphed = pair(pipeline, embedded, graph)
    unguarded = call(graphed, **extra).images
    assert np.array_equal(unguarded, call(plain, **extra).images)
    clean = call(sdguard.guard(graphed, GuardConfig(profile=profile_for(1e6))), **extra)
    assert np.array_equal(clean.images, unguarded)
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    config = GuardConfig(profile=profile_for(sum(sorted(norms)[-2:]) / 2))
    one, other = (call(sdguard.guard(pipe, config), **extra) for pipe in (plain, graphed))
    assert sorted(report.verdict for report in one.guard)[:2] == ["clean"] * 2
    assert np.array_equal(one.images, other.images)
    assert all(limit.startswith("patch ") for report in other.guard for limit in report.limits)
    one_each, other_each = ([asdict(replace(report, id="", time="", limits=[])) for report in output.guard] for output in (one, other))
    assert one_each == other_each
    assert np.array_equal(call(graphed, **extra).images, unguarded)


def test_true_guidance_in_two_calls_is_what_it_is_on_a_plain_denoiser(embedded: Any) -> None:
    """Unguarded, the second call's output stands in the place of the first."""
    extra: dict[str, Any] = {"negative_prompt": ["a cow"] * 3, "true_cfg_scale": 3.0}
    plain, graphed = pair("FluxPipeline", embedded)
    output = call(sdguard.guard(graphed, GuardConfig(profile=profile_for(1e6))), **extra)
    assert np.array_equal(output.images, call(plain, **extra).images)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_every_signal_reads_what_it_reads_on_a_plain_denoiser(name: str, embedded: Any) -> None:
    one, other = (read_prompts(pipe, PROMPTS, [7, 8, 9]) for pipe in pair(name, embedded))
    assert torch.equal(one.eps_c, other.eps_c)
    read = []
    for signal in SIGNALS:
        with torch.no_grad(), contextlib.suppress(ValueError, AttributeError):  # some are of U-Nets alone
            read.append((signal.name, signal.read(one), signal.read(other)))
    assert len(read) > len(SIGNALS) / 2
    assert [name for name, ours, theirs in read if not torch.equal(ours, theirs)] == []


def test_on_call_is_shown_what_stays(embedded: Any) -> None:
    """Observations of all calls at once, the guard's own evaluations beside them."""
    kept: dict[str, list[Tensor]] = {}
    for name, pipe in zip(("plain", "graphed"), pair("StableDiffusionPipeline", embedded), strict=True):
        seen: list[Any] = []

        def look(observation: Any, reports: Any, seen: list[Any] = seen) -> None:
            seen.append(observation)
            observation.at(observation.x + 1, observation.timestep)

        call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6), on_call=look)))
        kept[name] = [tensor for observation in seen for tensor in (observation.eps_c, observation.eps_u)]
    assert len(kept["plain"]) == 8
    assert all(map(torch.equal, kept["plain"], kept["graphed"]))


def graphed_callable(module: nn.Module) -> None:
    """What `torch.cuda.make_graphed_callables` makes of a module's forward pass, for the one shape that it was captured with."""
    orig_fwd = module.forward
    given: dict[str, list[Tensor]] = {}

    def new_fwd(*args: Any, **kwargs: Any) -> Any:
        held = given.setdefault("arguments", [arg.clone() for arg in args if isinstance(arg, Tensor)])
        for buffer, arg in zip(held, args, strict=False):
            buffer.copy_(arg)
        return orig_fwd(*held, **kwargs)

    new_fwd.__module__ = "torch.cuda.graphs"
    module.forward = new_fwd


def test_torchs_graphs_are_set_aside_for_the_guards_own_evaluations(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which come in batches that would be spread over the captured one."""
    monkeypatch.setattr(run_module, "try_in_order", reworded)
    plain, graphed = (build("StableDiffusionPipeline", embedded.tokenizer) for _ in range(2))
    graphed_callable(graphed.unet.mid_block)
    wanted = call(graphed).images
    assert np.array_equal(wanted, call(plain).images)
    config = GuardConfig(profile=profile_for(1e-9))
    one, other = (call(sdguard.guard(pipe, config)) for pipe in (plain, graphed))
    assert [report.verdict for report in other.guard] == ["steered"] * 3
    assert np.array_equal(one.images, other.images)
    for ours, theirs in zip(*(read_prompts(pipe, PROMPTS[:1], [7]).eps_c for pipe in (plain, graphed)), strict=True):
        assert torch.equal(ours, theirs)
    assert np.array_equal(call(graphed).images, wanted)


def test_torch_still_names_what_a_graph_stands_for_as_it_did() -> None:
    source = inspect.getsource(torch.cuda.make_graphed_callables)
    assert "orig_fwd: Callable" in source
    assert "func.forward = make_graphed_forward(" in source
    assert torch.cuda.make_graphed_callables.__module__ == "torch.cuda.graphs"
    module = nn.Linear(1, 1)
    plain = module.forward
    graphed_callable(module)
    assert not_compiled(module.forward) == plain


def test_a_graph_of_one_shape_that_cannot_be_set_aside_is_said_to_be_one(embedded: Any) -> None:
    """What spreads one row over those it was captured with would be read as something else."""
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    forward = pipe.unet.forward

    def captured(sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        three = 3 // len(sample) + 1
        return forward(sample.repeat(three, 1, 1, 1)[:6], timestep, encoder_hidden_states.repeat(three, 1, 1)[:6], **kwargs)

    pipe.unet.forward = captured
    plain = call(pipe).images
    assert np.array_equal(call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6)))).images, plain)
    with pytest.raises(ValueError, match="gave 4 rows for 2, as a graph does that was captured for one shape"):
        read_prompts(pipe, PROMPTS[:1], [7])


class Named(NamedTuple):
    sample: Tensor
    rest: int


class Own(tuple[Any, ...]):
    """A tuple of a kind of its own."""


def test_a_denoiser_gives_out_what_kind_of_output_it_likes() -> None:
    zero = torch.zeros(1)
    kinds: list[Any] = [(zero, 2), [zero, 2], Named(zero, 2), Own([zero, 2])]
    for output in kinds:
        made = replace_prediction(output, torch.ones(1))
        assert type(made) is type(output)
        assert list(made) == [torch.ones(1), *output[1:]]
    made = replace_prediction(diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=zero), torch.ones(1))
    assert isinstance(made, BaseOutput)
    assert made[0] == made.sample == torch.ones(1)
