"""Code from elsewhere that keeps something from one call of the denoiser to the next: the guard's evaluations leave it as it was."""

from __future__ import annotations

import collections
import math
import random
import threading
import time
import weakref
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Queue, SimpleQueue
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from families import PROMPTS, build, call, profile_for, reworded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sdguard
from sdguard import GuardConfig
from sdguard.denoiser.kept_state import MOST, has_changed, kept_by, put_back, warn_of_much
from sdguard.denoiser.probe import read_prompts
from sdguard.guarded import run as run_module

CALLS = [0]
CALLED = 0


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for; what is flagged is reworded."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)


#: gives the next number
Count = Callable[[], float]


class Counter:
    """Counts in an attribute."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return self.count


class Slotted:
    """Counts in a slot."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return self.count


class OfClass:
    """Counts in its class."""

    count = 0

    def __call__(self) -> float:
        type(self).count += 1
        return self.count


class Inherited(OfClass):
    """Counts in the class that it is made from."""

    def __call__(self) -> float:
        OfClass.count += 1
        return OfClass.count


def in_closure() -> Count:
    count = 0

    def counted() -> float:
        nonlocal count
        count += 1
        return count

    return counted


def globally() -> float:
    global CALLED
    CALLED += 1
    return CALLED


def in_a_global_list() -> float:
    CALLS[0] += 1
    return CALLS[0]


def on_a_function() -> Count:
    def counted() -> float:
        counted.count += 1  # type: ignore[attr-defined]
        return counted.count  # type: ignore[attr-defined]

    counted.count = 0  # type: ignore[attr-defined]
    return counted


def in_a_default() -> Count:
    def counted(kept: list[int] = []) -> float:  # noqa: B006
        kept.append(1)
        return len(kept)

    return counted


def grown(kept: Any, add: Callable[[Any], Any]) -> Count:
    def counted() -> float:
        add(len(kept))
        return len(kept)

    return counted


def in_a_tensor() -> Count:
    kept = torch.zeros(())

    def counted() -> float:
        return kept.add_(1).item()

    return counted


def in_an_inference_tensor() -> Count:
    with torch.inference_mode():
        kept = torch.zeros(())

    def counted() -> float:
        with torch.inference_mode():
            return kept.add_(1).item()

    return counted


def in_an_array() -> Count:
    kept = np.zeros(1)

    def counted() -> float:
        kept[0] += 1
        return float(kept[0])

    return counted


def in_a_namespace() -> Count:
    kept = SimpleNamespace(inner={"count": (SimpleNamespace(count=0),)})

    def counted() -> float:
        kept.inner["count"][0].count += 1
        return float(kept.inner["count"][0].count)

    return counted


def drawn(generator: Any) -> Count:
    return lambda: 10 * float(torch.rand((), generator=generator) if isinstance(generator, torch.Generator) else generator.random())


def seeded(start: Callable[[int], Any], draw: Callable[[], float]) -> Callable[[], Count]:
    """A count by a library's own generator, which nobody gives to the patch."""

    def made() -> Count:
        start(3)
        return lambda: 10 * float(draw())

    return made


class Gain(torch.nn.Module):
    """Counts in an attribute of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self) -> float:
        self.count += 1
        return self.count


class Buffered(torch.nn.Module):
    """Counts in a buffer, which is another tensor each time."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self) -> float:
        self.count = self.count + 1
        return self.count.item()


class Growing(torch.nn.Module):
    """Counts in how many modules it has."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList()

    def forward(self) -> float:
        self.parts.append(torch.nn.Identity())
        return len(self.parts)


class Private:
    """Counts in a slot of a private name, which is given as a text."""

    __slots__ = "__count"

    def __init__(self) -> None:
        self.__count = 0

    def __call__(self) -> float:
        self.__count += 1
        return self.__count


class Listed(list[int]):
    """A list with an attribute."""

    calls = 0


def on_a_list() -> Count:
    kept = Listed()

    def counted() -> float:
        kept.calls += 1
        return kept.calls

    return counted


def on_a_tensor() -> Count:
    kept: Any = torch.zeros(())
    kept.count = 0

    def counted() -> float:
        kept.count += 1
        return float(kept.count)

    return counted


def in_many_numbers() -> Count:
    kept = torch.zeros(1 << 17)

    def counted() -> float:
        return kept.add_(1)[0].item()

    return counted


def on_a_pipeline(part: str) -> Callable[[], Count]:
    """A count in a list that is put on a part of a pipeline."""

    def made() -> Count:
        pipe = diffusers.StableDiffusionPipeline(
            **dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor")),
            scheduler=diffusers.DDIMScheduler(),
            requires_safety_checker=False,
        )
        (pipe if part == "pipe" else pipe.scheduler).counts = []

        def counted() -> float:
            counts = (pipe if part == "pipe" else pipe.scheduler).counts
            counts.append(1)
            return len(counts)

        return counted

    return made


_list, _set, _dict, _deque = list[int](), set[int](), dict[int, int](), deque[int]()
_user, _bytes = UserDict[int, int](), bytearray()

#: where a patch may keep what it counts, by what makes a count that is kept there
PLACES: dict[str, Callable[[], Count]] = {
    "attribute": Counter,
    "slot": Slotted,
    "class": OfClass,
    "base class": Inherited,
    "bound method": lambda: Counter().__call__,
    "partial": lambda: partial(Counter.__call__, Counter()),
    "closure": in_closure,
    "global variable": lambda: globally,
    "global list": lambda: in_a_global_list,
    "function": on_a_function,
    "default": in_a_default,
    "list": lambda: grown(_list, _list.append),
    "set": lambda: grown(_set, _set.add),
    "dictionary": lambda: grown(_dict, lambda value: _dict.update({value: value})),
    "queue": lambda: grown(_deque, _deque.append),
    "tensor": in_a_tensor,
    "inference tensor": in_an_inference_tensor,
    "array": in_an_array,
    "namespace": in_a_namespace,
    "module in a list": lambda: torch.nn.ModuleList([Gain()])[0].forward,
    "modules that are held": lambda: partial(lambda held: held[0](), torch.nn.ModuleList([Gain()])),
    "buffer": Buffered,
    "modules that grow": Growing,
    "private slot": Private,
    "subclass of list": on_a_list,
    "attribute of a tensor": on_a_tensor,
    "many numbers": in_many_numbers,
    "list on the pipeline": on_a_pipeline("pipe"),
    "list on the scheduler": on_a_pipeline("scheduler"),
    "dictionary of a class": lambda: grown(_user, lambda value: _user.update({value: value})),
    "bytes": lambda: grown(_bytes, _bytes.append),
    "torch's generator": lambda: drawn(torch.Generator().manual_seed(3)),
    "numpy's generator": lambda: drawn(np.random.default_rng(3)),
    "numpy's old generator": lambda: drawn(np.random.RandomState(3)),
    "Python's generator": lambda: drawn(random.Random(3)),
    "torch itself": seeded(torch.manual_seed, lambda: torch.rand(()).item()),
    "numpy itself": seeded(np.random.seed, np.random.random),
    "Python itself": seeded(random.seed, random.random),
}


@pytest.fixture
def pipe(embedded: Any) -> Any:
    return build("StableDiffusionPipeline", embedded.tokenizer)


def patched(pipe: Any, count: Count) -> Any:
    """A pipeline whose middle block gives the more the higher the count of its calls is."""
    inner = pipe.unet.mid_block.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs) * (1 + 0.1 * count())

    pipe.unet.mid_block.forward = forward
    return pipe


def pictures(made: Callable[[], Any], guard: Callable[[Any], Any], **extra: Any) -> Any:
    """A run's output by a pipeline that is made anew for it, so that its patches begin with what they begin with."""
    global CALLED
    CALLED, CALLS[0], OfClass.count = 0, 0, 0
    for kept in (_list, _set, _dict, _deque, _user, _bytes):
        kept.clear()  # type: ignore[attr-defined]
    return call(guard(made()), **extra)


def guarded(threshold: float) -> Callable[[Any], Any]:
    return lambda pipe: sdguard.guard(pipe, GuardConfig(profile=profile_for(threshold)))


@pytest.mark.parametrize("place", PLACES)
def test_what_a_patch_keeps_is_not_moved_by_the_guards_own_evaluations(place: str, embedded: Any) -> None:
    def made() -> Any:
        return patched(build("StableDiffusionPipeline", embedded.tokenizer), PLACES[place]())

    extra = {"negative_prompt": ["a cow"] * 3}  # so that the reading is a call of the guard's own
    plain = pictures(made, sdguard.unguard, **extra)
    clean = pictures(made, guarded(1e6), **extra)
    assert np.array_equal(clean.images, plain.images)
    assert [report.error for report in clean.guard] == [None] * 3
    assert all(report.extra_evaluations for report in clean.guard)
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = pictures(made, guarded(bound), **extra)
    assert [(report.verdict, report.error) for report in steered.guard] == [("steered" if i == row else "clean", None) for i in range(3)]
    assert [np.array_equal(steered.images[i], plain.images[i]) for i in range(3)] == [i != row for i in range(3)]


def test_the_guard_reads_as_a_run_begins_whatever_a_patch_has_kept_since(pipe: Any) -> None:
    patched(pipe, Counter())
    alone, seen = read_prompts(pipe, PROMPTS, [7, 8, 9]), []
    config = GuardConfig("observe", profile=profile_for(1e6), on_call=lambda observation, reports: seen.append(observation.at_reference))
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    call(sdguard.guard(pipe, config))  # whose first timestep is another than the guard reads at
    assert seen[0].timestep == alone.timestep
    torch.testing.assert_close(seen[0].eps_c, alone.eps_c, atol=1e-5, rtol=1e-4)


class TeaCache:
    """A forward in the place of a class's, that gives at every second call what it gave at the last, and counts in the class."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
        inner = kind.forward

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if type(self).cnt % 2 == 0:
                self.previous_residual = inner(self, hidden_states, *args, **kwargs)[0] - hidden_states
            type(self).cnt = (type(self).cnt + 1) % type(self).num_steps
            return (hidden_states + self.previous_residual,)

        monkeypatch.setattr(kind, "cnt", 0, raising=False)
        monkeypatch.setattr(kind, "num_steps", 4, raising=False)
        monkeypatch.setattr(kind, "forward", forward)


def test_teacache_by_hand_keeps_what_it_keeps_without_the_guard(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("FluxPipeline", embedded.tokenizer)
    before = call(pipe).images
    TeaCache(monkeypatch, diffusers.FluxTransformer2DModel)
    plain = call(pipe).images
    assert not np.array_equal(plain, before)
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    assert [report.error for report in clean.guard] == [None] * 3
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e-9))))
    assert [report.verdict for report in steered.guard] == ["steered"] * 3
    assert np.array_equal(call(pipe).images, plain)


def test_a_steered_row_finds_nothing_of_its_own_text_in_what_a_patch_keeps(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what it is without the patch, which gives others what it gave before: all of it is evaluated under the new text."""
    pipe, config = build("FluxPipeline", embedded.tokenizer), GuardConfig(profile=profile_for(1e-9))
    plain = call(sdguard.guard(pipe, config)).images
    TeaCache(monkeypatch, diffusers.FluxTransformer2DModel)
    np.testing.assert_allclose(call(sdguard.guard(pipe, config)).images, plain, atol=1e-5)


class Controlled:
    """An attention processor that hands what it computes to a controller, as prompt-to-prompt's."""

    def __init__(self, controller: Any, inner: Any) -> None:
        self.controller, self.inner = controller, inner

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.controller(self.inner(attn, hidden_states, *args, **kwargs))


class Controller:
    """Keeps what it is given and mixes in the mean of it, at the first half of the steps alone."""

    def __init__(self, layers: int) -> None:
        self.step, self.layer, self.layers = 0, 0, layers
        self.store: dict[str, list[Tensor]] = {"all": []}

    def __call__(self, given: Tensor) -> Tensor:
        self.store["all"].append(given)
        self.layer += 1
        if self.layer == self.layers:
            self.step, self.layer = self.step + 1, 0
        mean = torch.stack([kept.mean() for kept in self.store["all"]]).mean()
        return given + mean if self.step < 2 else given


def test_a_controller_counts_the_pipelines_calls_alone(embedded: Any) -> None:
    def run(guard: Callable[[Any], Any]) -> tuple[Any, Controller]:
        pipe = build("StableDiffusionPipeline", embedded.tokenizer)
        controller = Controller(len(pipe.unet.attn_processors))
        pipe.unet.set_attn_processor({name: Controlled(controller, inner) for name, inner in pipe.unet.attn_processors.items()})
        return call(guard(pipe), negative_prompt=["a cow"] * 3), controller

    (plain, untouched), (clean, controller) = run(sdguard.unguard), run(guarded(1e6))
    assert np.array_equal(clean.images, plain.images)
    assert (controller.step, controller.layer, len(controller.store["all"])) == (4, 0, len(untouched.store["all"]))


def test_hooks_on_the_denoiser_itself_keep_what_they_keep_of_the_pipelines_calls_alone(pipe: Any) -> None:
    heard: list[int] = []
    pipe.unet.register_forward_hook(lambda module, given, output: heard.append(1))
    call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))), negative_prompt=["a cow"] * 3)
    assert len(heard) == 4
    read_prompts(pipe, PROMPTS, [7, 8, 9])
    assert len(heard) == 4


class PackedAtFirst(torch.nn.Module):
    """A layer that packs its weight at its first call, as those of quantisers do."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.weight: Any = inner.weight
        self.bias, self.packed = inner.bias, dict[str, Tensor]()

    def forward(self, given: Tensor, *args: Any) -> Tensor:
        if not self.packed:
            self.packed["values"], self.weight = self.weight.detach() * 1, None
        return torch.nn.functional.linear(given, self.packed["values"], self.bias)


def test_what_packs_its_weights_at_its_first_call_stays_packed(embedded: Any) -> None:
    def made() -> Any:
        pipe = build("StableDiffusionPipeline", embedded.tokenizer)
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        attention.to_q = PackedAtFirst(attention.to_q)
        pipe.unet.conv_in.register_forward_hook(lambda *_: None)
        return pipe

    pipe = made()
    plain, found = call(made()).images, call(guarded(1e6)(pipe))
    assert [report.verdict for report in found.guard] == ["clean"] * 3
    assert np.array_equal(found.images, plain)
    assert np.array_equal(call(pipe).images, plain)


def test_what_is_set_up_once_is_not_set_up_again(pipe: Any) -> None:
    class Lazy:
        """Makes what it needs at its first call, and switches itself on."""

        network, is_ready = None, False

        def __call__(self) -> float:
            if self.network is None:
                self.network = torch.nn.Identity()  # type: ignore[assignment]
                loads.put(1)
            if not self.is_ready:
                self.is_ready = True
                loads.put(1)
            return 1.0

    loads = SimpleQueue[int]()
    patched(pipe, Lazy())
    call(guarded(1e6)(pipe), negative_prompt=["a cow"] * 3)
    call(guarded(1e-9)(pipe), negative_prompt=["a cow"] * 3)
    assert loads.qsize() == 2


def test_hooks_behind_the_denoiser_are_called_by_the_pipelines_calls_alone(pipe: Any) -> None:
    """One may take the weights away, which the call under way still needs."""
    calls = SimpleQueue[int]()
    pipe.unet.register_forward_hook(lambda module, given, output: calls.put(1))
    call(guarded(1e6)(pipe), negative_prompt=["a cow"] * 3)
    assert calls.qsize() == 4


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    "put",
    [
        lambda unet, hook: unet.mid_block.register_forward_hook(lambda module, given, output: hook(output)),
        lambda unet, hook: unet.mid_block.register_forward_pre_hook(lambda module, given: hook(given[0])),
        lambda unet, hook: unet.register_forward_pre_hook(lambda module, given, named: hook(given[0]), with_kwargs=True),
        lambda unet, hook: unet.register_forward_hook(lambda module, given, output: hook(output[0])),
    ],
    ids=["behind a block", "before a block", "before the denoiser", "behind the denoiser"],
)
def test_a_hook_that_takes_itself_away_at_its_first_call_sees_the_pipelines_first_call(put: Any, ahead: bool, pipe: Any) -> None:
    def caught(of: Any) -> list[Tensor]:
        seen: list[Tensor] = []

        def once(found: Tensor) -> None:
            seen.append(found.clone())
            handle.remove()

        handle = put(pipe.unet, once)
        if ahead and of is not pipe:
            read_prompts(pipe, PROMPTS, [7, 8, 9])
        call(of, negative_prompt=["a cow"] * 3)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in (pipe.unet, pipe.unet.mid_block))
        return seen

    (plain,), (found,) = caught(pipe), caught(guarded(1e-9)(pipe))
    assert torch.equal(plain[:3], found[:3])  # without the text, which is steered in one row


@pytest.mark.parametrize("side", [16, 24])
def test_a_hook_may_tell_a_patch_of_what_size_the_latents_are(side: int, pipe: Any) -> None:
    """As tomesd and HiDiffusion do; the guard reads at the model's own size."""
    info: dict[str, Any] = {"size": None}
    pipe.unet.register_forward_pre_hook(lambda module, given: info.update(size=given[0].shape[2:]))
    inner = pipe.unet.mid_block.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert info["size"][0] == 2 * hidden_states.shape[2]
        return inner(hidden_states, *args, **kwargs)

    pipe.unet.mid_block.forward = forward
    extra: dict[str, Any] = {"negative_prompt": ["a cow"] * 3, "height": side, "width": side}
    plain = call(pipe, **extra)
    for threshold, verdict in ((1e6, "clean"), (1e-9, "steered")):
        found = call(guarded(threshold)(pipe), **extra)
        assert [(report.verdict, report.error) for report in found.guard] == [(verdict, None)] * 3
        assert np.array_equal(found.images, plain.images) == (verdict == "clean")
    assert len(read_prompts(pipe, PROMPTS, [7, 8, 9]).eps_c) == 3


CONTEXT: dict[str, int] | None = None


def test_what_the_pipelines_call_sets_up_for_its_patch_is_there_when_the_guard_reads(embedded: Any) -> None:
    """As ParaAttention's cache does; it is read within a run where it cannot be read outside of one."""

    class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            global CONTEXT
            CONTEXT = {"step": 0}
            try:
                return super().__call__(*args, **kwargs)
            finally:
                CONTEXT = None

    def made() -> Any:
        pipe = build("StableDiffusionPipeline", embedded.tokenizer)
        pipe.__class__ = StableDiffusionPipeline
        inner = pipe.unet.mid_block.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            assert CONTEXT is not None
            CONTEXT["step"] += 1
            return inner(*args, **kwargs) * (1 + 0.1 * CONTEXT["step"])

        pipe.unet.mid_block.forward = forward
        return pipe

    plain = call(made(), negative_prompt=["a cow"] * 3)
    clean = call(guarded(1e6)(made()), negative_prompt=["a cow"] * 3)
    assert np.array_equal(clean.images, plain.images)
    assert [(report.verdict, report.error) for report in clean.guard] == [("clean", None)] * 3
    assert len(read_prompts(made(), PROMPTS, [7, 8, 9]).eps_c) == 3
    assert CONTEXT is None


class InPairs:
    """An attention processor that mixes what the images of each half have, as StyleAligned's: it wants whole halves of some size."""

    def __init__(self, inner: Any, images: int) -> None:
        self.inner, self.images = inner, images

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        halves = self.inner(attn, hidden_states, *args, **kwargs).unflatten(0, (2, self.images))
        return (halves + 0.1 * halves.mean(1, keepdim=True)).flatten(0, 1)


def in_pairs(pipe: Any) -> Any:
    pipe.unet.set_attn_processor({name: InPairs(inner, 3) for name, inner in pipe.unet.attn_processors.items()})
    return pipe


def test_a_patch_that_wants_whole_batches_is_read_in_whole_batches(pipe: Any) -> None:
    extra = {"negative_prompt": ["a cow"] * 3}
    plain, clean = call(in_pairs(pipe), **extra), call(guarded(1e6)(pipe), **extra)
    assert np.array_equal(clean.images, plain.images)
    assert [(report.verdict, report.error) for report in clean.guard] == [("clean", None)] * 3


def test_code_from_elsewhere_costs_a_whole_batch_where_half_of_one_would_do(pipe: Any) -> None:
    def spent() -> list[int]:
        return [report.extra_evaluations for report in call(guarded(1e6)(pipe), negative_prompt=["a cow"] * 3).guard]

    assert spent() == [1] * 3
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    assert spent() == [2] * 3


def test_where_a_patch_lets_nothing_be_steered_the_flagged_row_alone_is_withheld(pipe: Any) -> None:
    plain = call(in_pairs(pipe))
    norms = [report.signals["guidance_norm"]["value"] for report in call(guarded(1e6)(pipe)).guard]
    row = norms.index(max(norms))
    found = call(guarded(sum(sorted(norms)[-2:]) / 2)(pipe))
    assert [report.verdict for report in found.guard] == ["withheld" if i == row else "clean" for i in range(3)]
    assert "Error" in (found.guard[row].error or "")
    assert [np.array_equal(found.images[i], plain.images[i]) for i in range(3)] == [i != row for i in range(3)]


def test_what_a_patched_text_encoder_keeps_is_not_moved_by_the_guards_own_encodings(embedded: Any) -> None:
    def made() -> Any:
        pipe, generator = build("StableDiffusionPipeline", embedded.tokenizer), torch.Generator().manual_seed(3)
        noise = lambda module, given, output: output + torch.rand(output.shape, generator=generator)  # noqa: E731
        pipe.text_encoder.get_input_embeddings().register_forward_hook(noise)
        return pipe

    one, other = made(), made()
    found = [(call(one).images, call(guarded(1e6)(other)).images) for _ in range(2)]
    assert all(np.array_equal(*pair) for pair in found)


VALUES = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


def spoiled(value: Any) -> None:
    """Change whatever can be changed of nested values, from within."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        spoiled(inner)
    if isinstance(value, dict):
        value.clear()
    if isinstance(value, list):
        value[:] = [None]


@given(VALUES)
def test_nested_values_are_put_back_into_the_very_objects(value: Any) -> None:
    holder = {"value": value}
    before, kept = repr(holder), kept_by([holder])
    assert not has_changed(kept)
    spoiled(holder)
    assert has_changed(kept)
    put_back(kept)
    assert repr(holder) == before
    assert holder["value"] is value


def test_what_came_since_goes_and_what_was_there_is_put_back() -> None:
    class Kind:
        known = 1

    thing = Kind()
    thing.kept = [thing]  # type: ignore[attr-defined]
    kept = kept_by([thing])
    Kind.known, Kind.new, thing.new = 2, 3, 4  # type: ignore[attr-defined]
    del thing.kept  # type: ignore[attr-defined]
    put_back(kept)
    assert (Kind.known, thing.kept, vars(thing).keys()) == (1, [thing], {"kept"})  # type: ignore[attr-defined]
    assert not hasattr(Kind, "new")


class Odd:
    """What tells nothing of itself."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        return 1


def test_what_cannot_be_read_or_written_keeps_nothing_else_from_being_put_back() -> None:
    held: dict[str, Any] = {"odd": Odd(), "set": {Odd()}, "frozen": Frozen(1), "data": list(range(200_000)), "count": [0]}
    kept = kept_by([held])
    held["count"][0], held["set"] = 1, {Odd()}
    object.__setattr__(held["frozen"], "count", 2)
    put_back(kept)
    assert (held["count"], held["frozen"].count) == ([0], 1)


@dataclass(frozen=True, slots=True)
class Frozen:
    """What is not written to by attribute, but past its class."""

    count: int


class Refusing(dict[str, int]):
    """Takes nothing away."""

    def __delitem__(self, key: str) -> None:
        raise TypeError

    clear = update = __delitem__  # type: ignore[assignment]


class Appending(list[int]):
    """Is appended to alone."""

    def __setitem__(self, *_: Any) -> None:
        raise TypeError


class Recent(OrderedDict[str, int]):
    """Puts behind what is read."""

    def __getitem__(self, key: str) -> int:
        self.move_to_end(key)
        return super().__getitem__(key)


OF_THEIR_OWN = [collections.Counter(calls=3), Refusing(calls=3), Appending([3]), Recent(calls=3, others=4), deque([3], 2), {3}]


@pytest.mark.parametrize("held", OF_THEIR_OWN, ids=lambda of: type(of).__name__)
def test_containers_that_have_ways_of_their_own_are_put_back_past_them(held: Any) -> None:
    before, kept = list(held.items()) if isinstance(held, dict) else list(held), kept_by([held])
    for _ in range(3):
        if isinstance(held, dict):
            held["calls"], held["more"] = 5, 6
        else:
            (held.add if isinstance(held, set) else held.append)(5)
        put_back(kept)
        assert (list(held.items()) if isinstance(held, dict) else list(held)) == before


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_a_tensor_that_is_as_it_was_is_not_written_to(value: float) -> None:
    held = torch.tensor([value, 2.0])
    kept = kept_by([held])
    put_back(kept)
    assert held._version == 0
    held[1] = 3
    put_back(kept)
    assert held[1] == 2


def test_what_threads_wait_for_each_other_by_is_not_wound_back(pipe: Any) -> None:
    class Saving(AttnProcessor):
        """Has another thread keep what it sees."""

        def __init__(self) -> None:
            super().__init__()
            self.pool, self.futures, self.queue = ThreadPoolExecutor(1), list[Any](), Queue[Any]()
            self.worker = threading.Thread(target=self.work, daemon=True)
            self.worker.start()

        def work(self) -> None:
            for _ in iter(self.queue.get, None):
                self.queue.task_done()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.futures.append(self.pool.submit(time.sleep, 0.001))
            self.queue.put(1)
            return super().__call__(*args, **kwargs)

    processor = Saving()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor
    call(guarded(1e-9)(pipe), negative_prompt=["a cow"] * 3)
    assert [future.result(timeout=10) for future in processor.futures] == [None] * 4
    waiting = threading.Thread(target=processor.queue.join, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert processor.worker.is_alive()


@pytest.mark.parametrize("needs_a_run", [False, True])
def test_a_run_after_prompts_were_read_is_as_without(needs_a_run: bool, embedded: Any) -> None:
    """Also where they could be read within a run alone, as where a patch asks the pipeline how many steps there are."""

    def made() -> Any:
        pipe, counts = build("StableDiffusionPipeline", embedded.tokenizer), [0]
        inner = pipe.unet.mid_block.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            counts[0] += 1 if not needs_a_run or pipe._num_timesteps else 0
            return inner(*args, **kwargs) * (1 + 0.1 * counts[0])

        pipe.unet.mid_block.forward = forward
        return pipe

    read, plain = made(), made()
    read_prompts(read, PROMPTS, [7, 8, 9])
    for _ in range(2):
        assert np.array_equal(call(read).images, call(plain).images)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_module_of_somebodys_own_class_counts_the_pipelines_calls_alone(hooked: bool, embedded: Any) -> None:
    """In an attribute that is its class's until it is first written to."""

    def made() -> Any:
        pipe = build("StableDiffusionPipeline", embedded.tokenizer)

        class Counting(type(pipe.unet.mid_block)):  # type: ignore[misc]
            count = 0

            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                self.count += 1
                found: Tensor = super().forward(*args, **kwargs)
                return found * (1 + 0.1 * self.count)

        pipe.unet.mid_block.__class__ = Counting
        if hooked:
            pipe.unet.conv_in.register_forward_hook(lambda *_: None)
        return pipe

    pipe, plain = made(), call(made(), negative_prompt=["a cow"] * 3).images
    read_prompts(pipe, PROMPTS, [7, 8, 9])
    assert np.array_equal(call(guarded(1e6)(pipe), negative_prompt=["a cow"] * 3).images, plain)


class Switched:
    """Sets itself up at its first call by a switch, with the number that it then counts in."""

    ready: bool = False

    def __call__(self) -> float:
        if not self.ready:
            self.ready, self.count = True, 0
        self.count += 1
        return self.count


class Turning:
    """Tells the first of two calls from the second."""

    second = False

    def __call__(self) -> float:
        self.second = not self.second
        return float(self.second)


class Tally:
    """Counts, and may be called."""

    count = 0

    def __call__(self) -> float:
        self.count += 1
        return self.count


class OfItsClass:
    """Counts in what its class holds."""

    controller = Tally()

    class Inner:
        count = 0

    def __call__(self) -> float:
        self.Inner.count += 1
        return self.controller() + self.Inner.count


class WeaklyHeld:
    """Counts in what somebody else holds."""

    def __init__(self, controller: Tally) -> None:
        self.reference, self.named = weakref.ref(controller), weakref.WeakValueDictionary(controller=controller)

    def __call__(self) -> float:
        controller = self.reference()
        assert controller is not None
        return controller() + self.named["controller"]()


class Unfilled:
    """Counts in a slot that is filled at the first call."""

    __slots__ = ("count",)

    def __call__(self) -> float:
        self.count = getattr(self, "count", 0) + 1
        return self.count


@pytest.mark.parametrize("kind", [Switched, Turning, OfItsClass, WeaklyHeld, Unfilled])
def test_what_is_set_up_at_the_first_call_is_as_without_the_guard(kind: Any, embedded: Any) -> None:
    def made() -> Any:
        OfItsClass.controller, OfItsClass.Inner.count = Tally(), 0
        pipe, controller = build("StableDiffusionPipeline", embedded.tokenizer), Tally()
        held.append(controller)
        return patched(pipe, kind(controller) if kind is WeaklyHeld else kind())

    held: list[Tally] = []
    plain, pipe = call(made(), negative_prompt=["a cow"] * 3).images, made()
    read_prompts(pipe, PROMPTS, [7, 8, 9])
    assert np.array_equal(call(guarded(1e6)(pipe), negative_prompt=["a cow"] * 3).images, plain)


def test_a_hook_that_puts_its_successor_in_its_place_stays_one_hook(pipe: Any) -> None:
    seen: list[int] = []

    def put() -> None:
        def hook(module: Any, given: Any, output: Tensor) -> None:
            seen.append(1)
            handle.remove()
            put()

        handle = pipe.unet.mid_block.register_forward_hook(hook)

    put()
    call(guarded(1e-9)(pipe), negative_prompt=["a cow"] * 3)
    assert (len(seen), len(pipe.unet.mid_block._forward_hooks)) == (4, 1)


def test_what_is_taken_from_a_patch_is_of_the_pipelines_calls_alone(pipe: Any) -> None:
    class Storing(AttnProcessor):
        """Keeps what it sees until somebody takes it."""

        def __init__(self) -> None:
            super().__init__()
            self.store = SimpleNamespace(maps=[])

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.store.maps.append(hidden_states.clone())
            return super().__call__(attn, hidden_states, *args, **kwargs)

    def taken(of: Any) -> Tensor:
        processor, found = Storing(), list[list[Tensor]]()
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = processor

        def take(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            found.append(processor.store.maps)
            processor.store.maps = []
            return values

        call(of, negative_prompt=["a cow"] * 3, callback_on_step_end=take)
        assert [len(maps) for maps in found] == [1] * 4
        assert {maps[0].shape for maps in found} == {found[0][0].shape}
        return found[0][0]

    assert torch.equal(taken(guarded(1e-9)(pipe)), taken(pipe))


@pytest.mark.parametrize("put", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_that_answers_to_every_name_is_a_hook_like_another(put: str, pipe: Any) -> None:
    hook = MagicMock(return_value=None)
    plain = call(pipe).images
    getattr(pipe.unet.mid_block, put)(hook)
    assert np.array_equal(call(guarded(1e6)(pipe)).images, plain)
    assert hook.call_count == 4


def test_much_that_a_patch_holds_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_much.cache_clear()
    rows = [{"id": number} for number in range(20_000)]
    held: dict[str, Any] = {"rows": rows, "count": [0]}
    assert len(kept_by([held])) == 3  # rows as a list, none by itself
    assert not caplog.records
    held["groups"] = [[[number] for number in range(200)] for _ in range(200)]
    kept = kept_by([held])
    assert len(kept) <= MOST
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    held["count"][0] = 1
    put_back(kept)
    assert held["count"] == [0]


def test_weights_in_a_form_of_somebodys_own_are_not_copied() -> None:
    class Quantised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("packed", torch.zeros(1 << 20, dtype=torch.uint8))
            self.register_buffer("count", torch.zeros(1, dtype=torch.uint8))

    module = Quantised()
    kept = kept_by([module])
    for buffer in module.buffers():
        buffer.add_(1)
    put_back(kept)
    assert [int(buffer[0]) for buffer in module.buffers()] == [1, 0]


def test_a_report_names_the_patches_that_are_read_as_the_run_begins(pipe: Any) -> None:
    patched(pipe, Counter())
    seen = MagicMock(return_value=None)
    pipe.unet.conv_in.register_forward_hook(seen)
    pipe.unet.conv_out.register_forward_hook(seen)
    limits = [report.limits for report in call(guarded(1e6)(pipe), callback_on_step_end=lambda *_: {}).guard]
    mine, other = f"patch {__name__}.patched.<locals>.forward", "patch unittest.mock.MagicMock"
    assert [sorted(of) for of in limits] == [["callback_on_step_end", mine, other]] * 3
