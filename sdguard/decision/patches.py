"""What changes the output of a module beside its weights and adapters: FreeU, processors, hooks, and code from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sdguard.decision.digests import hexed
from sdguard.decision.module_parts import Attributes, Part
from sdguard.denoiser.bare import is_cache
from sdguard.denoiser.foreign import code_of, forwards_on, is_foreign, is_foreign_class
from sdguard.denoiser.install import HOOK_NAME

#: FreeU's factors, as diffusers sets them on a block.
FREEU = ("s1", "s2", "b1", "b2")


def names_of(functions: Iterable[Any]) -> Iterator[str]:
    """Names of the callables that come from elsewhere than the libraries whose work the weights describe."""
    return (code_of(function)[1] for function in functions if is_foreign(function))


def class_patches(kind: type) -> Iterator[str]:
    """Whether a module's class comes from elsewhere, or its forward was replaced there."""
    if is_foreign_class(kind):
        yield f"{kind.__module__}.{kind.__qualname__}"
    else:
        yield from names_of([kind.forward])  # type: ignore[attr-defined]


def patches_on(held: Attributes) -> Iterator[str]:
    """What changes a module's output beside weights, class and adapters, by name; ``held`` are the module's attributes."""
    factors = {name: held[name] for name in FREEU if held.get(name) is not None}
    if factors:
        yield "FreeU " + " ".join(f"{name}={float(value):g}" for name, value in factors.items())
    if (processor := held.get("processor")) is not None and is_foreign_class(kind := type(processor)):
        yield f"{kind.__module__}.{kind.__qualname__}"
    if (registry := held.get("_diffusers_hook")) is not None:
        # group offloading moves weights and changes none, caches stand aside; a hook of any other kind may do anything
        moving, others = "diffusers.hooks.group_offloading", {name: hook for name, hook in registry.hooks.items() if name != HOOK_NAME}
        yield from (name for name, hook in others.items() if type(hook).__module__ != moving and not is_cache(hook))
    yield from names_of(forwards_on(held))


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
