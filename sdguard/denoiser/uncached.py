"""Evaluations of a denoiser beside what keeps parts of one call for the next: diffusers' caches and DeepCache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from diffusers.hooks import ModelHook
from torch import nn

#: the package of DeepCache, whose helper stands in the closures of forwards that it has replaced.
DEEP_CACHE = "DeepCache"


def is_cache(hook: ModelHook) -> bool:
    """Whether a hook is of a cache: its class, or another that is defined beside it, says that it has a state."""
    beside = vars(sys.modules[type(hook).__module__]).values()
    return any(isinstance(other, type) and getattr(other, "_is_stateful", False) for other in beside)


def registries_of(denoiser: nn.Module) -> list[Any]:
    """The registries of diffusers' hooks on a denoiser and in it."""
    return [registry for module in denoiser.modules() if (registry := vars(module).get("_diffusers_hook")) is not None]


def references_of(denoiser: nn.Module) -> list[Any]:
    """What holds the forwards that the hooks of caches have replaced."""
    return [
        reference
        for registry in registries_of(denoiser)
        for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True)
        if is_cache(registry.hooks[name])
    ]


def helpers_of(denoiser: nn.Module) -> list[Any]:
    """The helpers of DeepCache that have replaced forwards of a denoiser."""
    forwards = [vars(module).get("forward") for module in denoiser.modules()]
    theirs = [of for of in forwards if getattr(of, "__module__", "").partition(".")[0] == DEEP_CACHE]
    held = [cell.cell_contents for forward in theirs for cell in getattr(forward, "__closure__", None) or ()]
    return list({id(helper): helper for helper in held if hasattr(helper, "cached_output")}.values())


def has_caches(denoiser: nn.Module) -> bool:
    """Whether parts of a denoiser's calls are kept for the next."""
    return bool(references_of(denoiser) or helpers_of(denoiser))


class AnyTimestep:
    """What equals every timestep, so that DeepCache finds each in its schedule, as the first."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


@contextmanager
def uncached(denoiser: nn.Module) -> Iterator[None]:
    """Within the block a denoiser computes all that it is asked for; what is kept of other calls is neither used nor changed."""
    references, helpers = references_of(denoiser), helpers_of(denoiser)
    before = [(of, dict(vars(of))) for of in (*references, *helpers)]
    for reference in references:
        reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        reference.post_forward = lambda module, output: output
        reference.forward = reference.original_forward or reference.forward
    for helper in helpers:
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[AnyTimestep()]))
        vars(helper).update(pipe=pipe, start_timestep=None, cached_output={})
    try:
        yield
    finally:
        for of, was in before:
            vars(of).update(was)


def forget(denoiser: nn.Module) -> None:
    """Empty the caches, as a pipeline does at the end of its run; for one that does not come to it."""
    for registry in registries_of(denoiser):
        registry.reset_stateful_hooks(recurse=False)
