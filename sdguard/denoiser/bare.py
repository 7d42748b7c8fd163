"""A denoiser bare of what makes its calls fast: compilation, and what keeps parts of one call for the next.

The guard's own evaluations come in batches of other sizes, at other timesteps and with gradients: each would be compiled anew, and would
overwrite what the run under way has kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


def uncompiled(module: nn.Module) -> nn.Module:
    """A module as it was before `torch.compile` wrapped it."""
    return module._modules.get("_orig_mod") or module


def compiled_calls(denoiser: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """The calls of modules that have been compiled in place, by ``module.compile()``."""
    found = ((module, vars(module).get("_compiled_call_impl")) for module in denoiser.modules())
    return {module: call for module, call in found if call is not None}


@contextmanager
def bare(denoiser: nn.Module) -> Iterator[None]:
    """Within the block a denoiser computes all that it is asked for, by its own code; what is kept of other calls is not used or changed.

    Of one that `torch.compile` has wrapped, `uncompiled` is to be called.
    """
    compiled = compiled_calls(denoiser)
    references, helpers = references_of(denoiser), helpers_of(denoiser)
    before = [(of, dict(vars(of))) for of in (*references, *helpers)]
    for reference in references:
        reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
        reference.post_forward = lambda module, output: output
        reference.forward = reference.original_forward or reference.forward
    for helper in helpers:
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[AnyTimestep()]))
        vars(helper).update(pipe=pipe, start_timestep=None, cached_output={})
    for module in compiled:
        vars(module)["_compiled_call_impl"] = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            vars(module)["_compiled_call_impl"] = call
        for of, was in before:
            vars(of).update(was)


def forget(denoiser: nn.Module) -> None:
    """Empty the caches, as a pipeline does at the end of its run; for one that does not come to it."""
    for registry in registries_of(denoiser):
        registry.reset_stateful_hooks(recurse=False)
