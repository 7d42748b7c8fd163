"""What changes the output of a module beside its weights and adapters: FreeU, processors, hooks, and code from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from sdguard.decision.digests import hexed
from sdguard.decision.module_parts import Attributes, Part
from sdguard.denoiser.bare import DEEP_CACHE, is_cache
from sdguard.denoiser.install import HOOK_NAME

#: FreeU's factors, as diffusers sets them on a block.
FREEU = ("s1", "s2", "b1", "b2")

#: packages whose module classes, forwards and hooks compute what the weights say, or stand aside wherever the guard reads.
TRUSTED = frozenset({"torch", "diffusers", "transformers", "peft", "accelerate", "xformers", DEEP_CACHE, __name__.partition(".")[0]})


def code_of(function: Any) -> tuple[str, str]:
    """The package and the full name of what a callable runs, also where it bears another's name."""
    while under := getattr(function, "_torchdynamo_orig_callable", None) or (function.func if isinstance(function, partial) else None):
        function = under
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    # the globals, since functools.wraps copies __module__ and the name
    module = str(function.__globals__.get("__name__")) if code is not None else type(function).__module__
    return module.partition(".")[0], f"{module}.{code.co_qualname if code is not None else type(function).__qualname__}"


def foreign(functions: Iterator[Any]) -> Iterator[str]:
    """Names of the callables that come from elsewhere than the libraries whose work the weights describe."""
    return (name for package, name in map(code_of, functions) if package not in TRUSTED)


def class_patches(kind: type) -> Iterator[str]:
    """Whether a module's class comes from elsewhere, or its forward was replaced there."""
    if kind.__module__.partition(".")[0] not in TRUSTED:
        yield f"{kind.__module__}.{kind.__qualname__}"
    else:
        yield from foreign(iter([kind.forward]))  # type: ignore[attr-defined]


def patches_on(held: Attributes) -> Iterator[str]:
    """What changes a module's output beside weights, class and adapters, by name; ``held`` are the module's attributes."""
    factors = {name: held[name] for name in FREEU if held.get(name) is not None}
    if factors:
        yield "FreeU " + " ".join(f"{name}={float(value):g}" for name, value in factors.items())
    if (processor := held.get("processor")) is not None:
        kind = type(processor)
        if kind.__module__.partition(".")[0] not in TRUSTED:
            yield f"{kind.__module__}.{kind.__qualname__}"
    forwards = [held[name] for name in ("forward", "_old_forward") if name in held]
    if (registry := held.get("_diffusers_hook")) is not None:
        # group offloading moves weights and changes none, caches stand aside; a hook of any other kind may do anything
        moving, others = "diffusers.hooks.group_offloading", {name: hook for name, hook in registry.hooks.items() if name != HOOK_NAME}
        yield from (name for name, hook in others.items() if type(hook).__module__ != moving and not is_cache(hook))
        # a forward replaced first lies under the hooks
        forwards += [under for reference in registry._fn_refs for under in (reference.forward, reference.original_forward) if under]
    yield from foreign(chain(forwards, held["_forward_hooks"].values(), held["_forward_pre_hooks"].values()))


def patches_in(parts: Sequence[Part], attributes: Sequence[Attributes], settings: Mapping[int, tuple[str, ...]]) -> list[str]:
    """What changes the output of modules beside weights and adapters, each with where it is."""
    at: dict[str, list[str]] = {}
    of_class = {kind: list(class_patches(kind)) for kind in {type(part.module) for part in parts}}
    for place, (part, held) in enumerate(zip(parts, attributes, strict=True)):
        stored = (*held["_parameters"].values(), *held["_buffers"].values())
        quantised = {type(t).__name__ for t in stored if t is not None and type(t) not in (Tensor, nn.Parameter)}
        for patch in (*of_class[type(part.module)], *settings.get(place, ()), *sorted(quantised)):
            at.setdefault(patch, []).append(part.name)
    return [
        f"{patch} in {(names[0] or 'the whole') if len(names) == 1 else f'{len(names)} modules ({hexed(*names)[:6]})'}"
        for patch, names in sorted(at.items())
    ]
