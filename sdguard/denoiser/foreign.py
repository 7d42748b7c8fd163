"""Code from elsewhere on a denoiser: classes, forwards, processors and hooks of none of the libraries whose work the weights describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, NoneType
from typing import Any

from torch import nn

#: the package of DeepCache, whose helper stands in the closures of forwards that it has replaced.
DEEP_CACHE = "DeepCache"

#: packages whose module classes, forwards and hooks compute what the weights say, or stand aside wherever the guard reads.
TRUSTED = frozenset(
    {"torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "huggingface_hub", DEEP_CACHE, __name__.partition(".")[0]}
)

#: attributes of a module's own under which forwards and hooks are put on it.
MARKS = frozenset({"forward", "_old_forward", "_diffusers_hook"})


def code_of(function: Any) -> tuple[str, str]:
    """The package and the full name of what a callable runs, also where it bears another's name."""
    while under := compiled_from(function) or (function.func if isinstance(function, partial) else None):
        function = under
    function = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(function, FunctionType):
        return type(function).__module__.partition(".")[0], f"{type(function).__module__}.{type(function).__qualname__}"
    # the globals and the code, since functools.wraps copies __module__ and the names
    module, code = str(function.__globals__.get("__name__")), function.__code__
    return module.partition(".")[0], f"{module}.{code.co_qualname}"


def compiled_from(function: Any) -> Callable[..., Any] | None:
    """What `torch.compile` made a function of, None for any other; of objects that answer to every name nothing is asked."""
    found: Callable[..., Any] | None = vars(function).get("_torchdynamo_orig_callable") if isinstance(function, FunctionType) else None
    return found


def is_foreign(function: Any) -> bool:
    """Whether a callable runs code from elsewhere."""
    return code_of(function)[0] not in TRUSTED


def layers(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function and those that it is wrapped around, from without; of objects that answer to every name nothing is asked."""
    found: Callable[..., Any] | None = function
    while found is not None:
        yield found
        under = found.__func__ if isinstance(found, MethodType) else found
        found = vars(under).get("__wrapped__") if isinstance(under, (FunctionType, partial)) else None


def is_foreign_class(kind: type) -> bool:
    """Whether a class comes from elsewhere."""
    return kind.__module__.partition(".")[0] not in TRUSTED


def forwards_on(held: Mapping[str, Any]) -> Iterator[Callable[..., Any]]:
    """Forwards that were put on a module, those under hooks too, and hooks of torch's; ``held`` are the module's attributes."""
    registry = held.get("_diffusers_hook")
    # a forward replaced first lies under the hooks
    under = [] if registry is None else [of for kept in registry._fn_refs for of in (kept.forward, kept.original_forward) if of]
    own = [held[name] for name in ("forward", "_old_forward") if name in held]
    return chain(own, under, held["_forward_hooks"].values(), held["_forward_pre_hooks"].values())


def foreign_on(held: Mapping[str, Any]) -> Iterator[Any]:
    """Hooks and forwards that were put on a module from elsewhere; ``held`` are the module's attributes."""
    hooks = () if (registry := held.get("_diffusers_hook")) is None else registry.hooks.values()
    yield from (hook for hook in hooks if is_foreign_class(type(hook)))
    yield from filter(is_foreign, forwards_on(held))


def modules_in(root: nn.Module) -> list[nn.Module]:
    """A module and all inside it; by hand, since ``nn.Module.modules`` takes several times as long."""
    modules = [root]
    for module in modules:
        modules.extend(filter(None, vars(module)["_modules"].values()))
    return modules


def foreign_in(modules: Sequence[nn.Module]) -> list[Any]:
    """Code from elsewhere that acts on modules: forwards, processors and hooks. Cost: a millisecond for SDXL.

    What modules of somebody's own class hold is the model's (weights that are packed at the first call, among others), and is none of it,
    but for the first of ``modules`` itself.
    """
    attributes, kinds = list(map(vars, modules)), set(map(type, modules))
    of_class: list[Any] = [modules[0]] if modules and is_foreign_class(type(modules[0])) else []
    of_class += [kind.forward for kind in kinds if not is_foreign_class(kind) and is_foreign(kind.forward)]  # type: ignore[attr-defined]
    processors = [held["processor"] for held in attributes if "processor" in held]
    marked = [held for held in attributes if held["_forward_hooks"] or held["_forward_pre_hooks"] or not MARKS.isdisjoint(held)]
    elsewhere = {kind for kind in set(map(type, processors)) if kind is not NoneType and is_foreign_class(kind)}
    of_attention = [processor for processor in processors if type(processor) in elsewhere]
    return [*of_class, *of_attention, *chain.from_iterable(map(foreign_on, marked))]
