"""A denoiser bare of what makes its calls fast: compilation, and what keeps parts of one call for the next.

The guard's own evaluations come in batches of other sizes, at other timesteps and with gradients: each would be compiled anew, and would
overwrite what the run under way has kept.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import Tensor, nn

from sdguard.denoiser.foreign import DEEP_CACHE, compiled_from, foreign_in, is_foreign_class, modules_in
from sdguard.denoiser.kept_state import Kept, changed_since, has_changed, hooks_of, kept_by, numbers_of, put_back
from sdguard.noise import generators_kept

#: the module of torch whose captured graphs hold what they stand for in their closure.
GRAPHS = "torch.cuda.graphs"


def is_cache(hook: ModelHook) -> bool:
    """Whether a hook is of a cache: its class, or another that is defined beside it, says that it has a state."""
    beside = vars(sys.modules[type(hook).__module__]).values()
    return any(isinstance(other, type) and getattr(other, "_is_stateful", False) for other in beside)


class Around(NamedTuple):
    """What has been put around a denoiser and the modules in it.

    Attributes:
        registries: of diffusers' hooks.
        references: what holds the forwards that hooks of caches have replaced.
        helpers: of DeepCache, which have replaced forwards.
        compiled: what holds a compiled call or forward of a module, under which name, and what stands there where nothing is compiled.
        trains: whether any is in training mode, where it may draw random numbers.
    """

    registries: list[Any]
    references: list[Any]
    helpers: list[Any]
    compiled: list[tuple[dict[str, Any], str, Callable[..., Any] | None]]
    trains: bool


def around(denoiser: nn.Module) -> Around:
    """What has been put around a denoiser and the modules in it. Cost: a millisecond for SDXL."""
    registries: list[Any] = []
    forwards: list[Callable[..., Any]] = []
    compiled: list[tuple[dict[str, Any], str, Callable[..., Any] | None]] = []
    trains = False
    for held in map(vars, modules_in(denoiser)):
        trains |= held.get("training", False)
        if "_diffusers_hook" in held:
            registries.append(held["_diffusers_hook"])
        if "forward" in held:
            forwards.append(held["forward"])
            if (plain := not_compiled(held["forward"])) is not held["forward"]:
                compiled.append((held, "forward", plain))
        if held.get("_compiled_call_impl") is not None:
            compiled.append((held, "_compiled_call_impl", None))
    hooked = (pair for of in registries for pair in zip(map(of.hooks.get, of._hook_order), of._fn_refs, strict=True))
    caches = [reference for hook, reference in hooked if is_cache(hook)]
    return Around(registries, caches, helpers_in(forwards), compiled, trains)


def not_compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass as it was before `torch.compile`, or `torch.cuda.make_graphed_callables`, wrapped it."""
    if isinstance(forward, partial):  # a hook's, which bears the marks of what it stands around
        return forward
    if getattr(forward, "__module__", None) == GRAPHS:
        return inspect.getclosurevars(forward).nonlocals.get("orig_fwd", forward)
    return compiled_from(forward) or forward


def helpers_in(forwards: list[Any]) -> list[Any]:
    """The helpers of DeepCache in the closures of forwards that it has replaced."""
    theirs = [of for of in forwards if getattr(of, "__module__", "").partition(".")[0] == DEEP_CACHE]
    held = [cell.cell_contents for forward in theirs for cell in getattr(forward, "__closure__", None) or ()]
    return list({id(helper): helper for helper in held if hasattr(helper, "cached_output")}.values())


def has_caches(denoiser: nn.Module, fresh: Iterable[Kept]) -> bool:
    """Whether parts of a denoiser's calls are kept for the next; ``fresh`` is what patches kept before the run under way."""
    found = around(denoiser)
    return bool(found.references or found.helpers) or has_changed(fresh)


@contextmanager
def weights_kept(registries: list[Any]) -> Iterator[None]:
    """Within the block gradients keep the weights as they were used, where hooks cast them to a storage precision after each forward."""
    casting = any(isinstance(hook, LayerwiseCastingHook) for registry in registries for hook in registry.hooks.values())
    if not casting or not torch.is_grad_enabled():
        yield
        return

    def keep(tensor: Tensor) -> Tensor:  # the cast replaces what a parameter holds; this goes on holding it
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


class AnyTimestep:
    """What equals every timestep, so that DeepCache finds each in its schedule, as the first."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def uncompiled(module: nn.Module) -> nn.Module:
    """A module as it was before `torch.compile` wrapped it."""
    return module._modules.get("_orig_mod") or module


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """The call of a module that is compiled in place, None of any other."""
    return vars(module).get("_compiled_call_impl")


class Patches(NamedTuple):
    """Code from elsewhere on a denoiser.

    Attributes:
        code: as `foreign_in` finds it.
        kept: what it keeps between calls, as it is now; and the numbers that modules of classes of its own count in.
        hooks: those of torch's on the modules, where there is such code.
    """

    code: list[Any]
    kept: list[Kept]
    hooks: list[Kept]


def patches_of(denoiser: nn.Module) -> Patches:
    """The code from elsewhere on a denoiser. Cost: some two milliseconds for SDXL where there is none."""
    modules = modules_in(denoiser)
    foreign, kinds = foreign_in(modules), {kind for kind in set(map(type, modules)) if is_foreign_class(kind)}
    counting = [numbers_of(module) for module in modules if type(module) in kinds] if kinds else []
    # such code is given the denoiser, and puts what it keeps there
    kept = [*(kept_by([denoiser, *foreign], modules) if foreign else ()), *counting]
    return Patches(foreign, kept, hooks_of(modules) if foreign else [])


@contextmanager
def unmoved(denoiser: nn.Module) -> Iterator[None]:
    """After the block the patches on a denoiser keep what they kept before, whatever run was made in it."""
    patches = patches_of(denoiser)
    try:
        yield
    finally:
        put_back([*patches.kept, *patches.hooks])


@contextmanager
def restored(instance: Any, names: Collection[str]) -> Iterator[None]:
    """After the block the attributes ``names`` of ``instance`` itself, not those of its class, are what they were before, or are none."""
    before = {name: vars(instance)[name] for name in names if name in vars(instance)}
    try:
        yield
    finally:
        for name in names:
            vars(instance).pop(name, None)
        vars(instance).update(before)


def hooked(denoiser: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass of a denoiser with the hooks of torch's before it, which may tell what is in it of what it is called with.

    Those behind it may end the pipeline's own call (by taking its weights away, for one), which is still under way.
    """
    if not vars(denoiser)["_forward_pre_hooks"]:
        return forward

    def called(*args: Any, **kwargs: Any) -> Any:
        with restored(denoiser, ("forward", "_forward_hooks")):
            vars(denoiser).update(forward=forward, _forward_hooks=OrderedDict())
            return denoiser(*args, **kwargs)

    return called


@contextmanager
def bare(denoiser: nn.Module, fresh: Iterable[Kept] = ()) -> Iterator[None]:
    """Within the block a denoiser computes all that it is asked for, by its own code; what is kept of other calls is not used or changed.

    Nor is where torch's generators are, of which the run's own calls may draw.
    Of one that `torch.compile` has wrapped, `uncompiled` is to be called.

    Args:
        fresh: what patches kept before the run under way: what they have kept of it since is not used either.
    """
    registries, references, helpers, compiled, trains = around(denoiser)
    patches = patches_of(denoiser)
    kept = [*patches.kept, *patches.hooks, *changed_since(fresh)]  # of code that is gone by now too
    before = [(of, dict(vars(of))) for of in (*references, *helpers)]
    put_back(fresh)  # before the caches' own, which may be reached from code from elsewhere
    for reference in references:
        reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        reference.post_forward = lambda module, output: output
        reference.forward = reference.original_forward or reference.forward
    for helper in helpers:
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[AnyTimestep()]))
        vars(helper).update(pipe=pipe, start_timestep=None, cached_output={})
    calls = [held[name] for held, name, _ in compiled]
    for held, name, plain in compiled:
        held[name] = plain
    try:
        with weights_kept(registries), generators_kept(trains or bool(patches.code)):
            yield
    finally:
        put_back(fresh)  # what nobody reaches any more was as it began
        put_back(kept)
        for (held, name, _), call in zip(compiled, calls, strict=True):
            held[name] = call
        for of, was in before:
            vars(of).update(was)


def forget(denoiser: nn.Module) -> None:
    """Empty the caches, as a pipeline does at the end of its run; for one that does not come to it."""
    for registry in around(denoiser).registries:
        registry.reset_stateful_hooks(recurse=False)
