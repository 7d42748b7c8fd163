"""The identity of a model: everything that moves what ordinary prompts look like on it, read at a reference call of the guard's own.

The table of noise levels, what the network predicts and every bit of denoiser, text encoders and adapters are in it. A run's own setting
is not: its sampler, steps, size and guidance do not reach the reference call.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, groupby, pairwise
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdguard.denoiser.families import default_size, denoiser_of, family_of
from sdguard.denoiser.install import HOOK_NAME
from sdguard.observation import is_flow, prediction_type

#: precisions that a profile made in float32 serves.
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)

#: values of a tensor that are hashed at once: what is copied of a model at a time.
CHUNK = 1 << 20

#: values of each tensor that are looked at in every call.
SAMPLED = 16

#: FreeU's factors, as diffusers sets them on a block.
FREEU = ("s1", "s2", "b1", "b2")

#: attributes of a module's own that can change what it computes.
SETTINGS = frozenset({*FREEU, "forward", "_old_forward", "processor", "base_layer", "scaling", "_diffusers_hook", "_hf_hook"})

#: what `vars` gives of a module.
Attributes = Mapping[str, Any]

#: packages whose module classes, forwards and hooks compute what the weights say.
TRUSTED = frozenset({"torch", "diffusers", "transformers", "peft", "accelerate", "xformers", __name__.partition(".")[0]})

#: what tensors were hashed to, by name and precision.
Digests = dict[str, dict[str, str]]

versions_of, dtype_of, modules_in = attrgetter("_version"), attrgetter("dtype"), itemgetter("_modules")
parameters_in, buffers_in = itemgetter("_parameters"), itemgetter("_buffers")
hooks_in, pre_hooks_in = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


def identity(pipe: Any, scale: float | None = None) -> dict[str, Any]:
    """What a profile of a pipeline's model hangs on, in values that JSON can hold.

    ``scale`` is what the call's ``cross_attention_kwargs`` or ``joint_attention_kwargs`` multiply LoRA with.

    All weights are hashed, once: a second or so of one core a gigabyte, twice that in float32, on as many cores as there are. What has
    been hashed is kept for as long as the module lives; later calls look whether a tensor is another object, has another shape, dtype,
    layout or version, or other values at `SAMPLED` places, whether a module came, went or changed its class, and what is set on modules:
    some milliseconds for SDXL, between which no memory of the weights is held. Moving a model to another device is no change.

    *Limit*: an edit through ``.data``, which leaves the version as it is, that touches none of those places is not seen, nor are one
    attribute of a module added and one removed at once.

    Raises:
        TypeError: sdguard does not support the pipeline's class, or cannot read its weights, as sparse ones.
    """
    read = {name: tree_of(module) for name, module in readers_of(pipe).items()}
    adapters = {name: found for name, tree in read.items() if (found := tree.adapters(1.0 if scale is None else float(scale)))}
    return {
        "denoiser": type(uncompiled(denoiser_of(pipe))).__name__,
        "prediction": prediction_type(pipe.scheduler),
        "noise_levels": noise_levels(pipe.scheduler),
        "size": default_size(pipe),
        "weights": {name: dict(tree.weights) for name, tree in read.items()},
        "adapters": adapters,
        "patches": sorted(f"{name}: {patch}" for name, tree in read.items() for patch in tree.patches),
    }


def same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities are of one model, of which either may be in half precision or without text encoders."""
    return not differences(one, other)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What keeps a profile of the model ``theirs`` from serving ``mine``, each as a clause of a sentence; empty if nothing does."""
    weights, known = mine.get("weights", {}), theirs.get("weights", {})
    # encoders may be dropped once prompts are encoded, never the denoiser
    needed = {name for name in (*weights, *known) if not name.startswith("text_encoder")}
    both = [name for name in dict.fromkeys((*weights, *known)) if name in needed or (name in weights and name in known)]
    found = []
    pairs: list[tuple[str, Any, Any, Callable[[Any, Any], bool]]]
    for name in dict.fromkeys((*mine, *theirs)):
        if name == "weights":
            pairs = [(f"weights of {part}", weights.get(part, {}), known.get(part, {}), weights_agree) for part in both]
        elif name == "adapters":
            pairs = [
                (f"adapters of {part}", mine.get(name, {}).get(part, []), theirs.get(name, {}).get(part, []), adapters_agree)
                for part in both
            ]
        elif name == "patches":
            here, there = ([patch for patch in of.get(name, []) if patch.partition(":")[0] in both] for of in (mine, theirs))
            pairs = [(name, here, there, equal)]
        else:
            pairs = [(name, mine.get(name), theirs.get(name), equal)]
        found += [f"{what} is {short(a)}, the profile's is {short(b)}" for what, a, b, agree in pairs if not agree(a, b)]
    return found if needed else [*found, "no denoiser is known"]


def equal(one: Any, other: Any) -> bool:
    """Whether two plain values are equal."""
    return bool(one == other)


def weights_agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether weights are the same in some precision that both have."""
    return any(other.get(precision) == digest for precision, digest in one.items())


def adapters_agree(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each of some adapters is among the others, as often, at the same scale."""
    left = list(other)
    for mine in one:
        match = next((a for a in left if a.get("scale") == mine.get("scale") and weights_agree(mine["weights"], a["weights"])), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def short(value: Any) -> str:
    """A value in some words, digests by their first digits."""
    if isinstance(value, Mapping):
        return " ".join(f"{name} {short(of)[:6]}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(f"{short(v['weights'])} at {v.get('scale', 1)}" if isinstance(v, Mapping) else str(v) for v in value) or "none"
    return "none" if value is None else str(value)


def uncompiled(module: nn.Module) -> nn.Module:
    """A module as it was before `torch.compile` wrapped it."""
    return module._modules.get("_orig_mod") or module


def readers_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules that move what the guard reads: the denoiser and the text encoders that the pipeline has, by their names in it."""
    encoders = [name for name in sorted(vars(pipe)) if name.startswith("text_encoder")]
    found = {name: getattr(pipe, name) for name in (family_of(pipe).denoiser, *encoders)}
    return {name: uncompiled(module) for name, module in found.items() if isinstance(module, nn.Module)}


def noise_levels(scheduler: Any) -> str:
    """A hash of a scheduler's table of noise levels, which samplers of one model share; flow matching's are sigma itself."""
    if is_flow(scheduler):
        return "sigma"
    table = getattr(scheduler, "alphas_cumprod", None)
    return "unknown" if table is None else hexed(torch.as_tensor(table).detach().cpu().float().numpy().tobytes())


def hexed(*values: bytes | str) -> str:
    """16 digits that stand for some bytes and texts."""
    # SHA-256 because processors have instructions for it: nearly twice as fast as BLAKE2b where this was measured
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() + b"\0" if isinstance(value, str) else value)
    return digest.hexdigest()[:16]


# what a module's tensors are hashed to


def precision_name(dtype: torch.dtype) -> str:
    """A dtype's name without its package."""
    return str(dtype).removeprefix("torch.")


def slices(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values in order, flat, `CHUNK` or so at a time; rows of the first dimension stay together."""
    whole = tensor.reshape(1) if tensor.dim() == 0 else tensor
    rows = max(1, CHUNK * len(whole) // max(1, whole.numel()))
    for start in range(0, len(whole), rows):
        yield whole[start : start + rows].reshape(-1)


@torch.inference_mode()
def digests_of(tensor: Tensor) -> dict[str, str]:
    """What stands for every bit of a tensor, by precision: float32 as it is and as cast to half ones; under ``""`` what is never cast.

    Of a tensor without values, on the meta device, it is the shape alone.
    """
    own = precision_name(tensor.dtype)
    if tensor.is_meta:
        return {"": hexed("meta", own, str(list(tensor.shape)))}
    precisions = PRECISIONS if tensor.dtype == torch.float32 else (tensor.dtype,)
    hashes = [hashlib.sha256(f"{precision_name(precision)} {list(tensor.shape)}".encode()) for precision in precisions]
    # this thread's own, as inference mode is
    with torch._C.DisableTorchFunctionSubclass():
        for values in slices(tensor.detach()):
            for precision, digest in zip(precisions, hashes, strict=True):
                # as bytes, since numpy has no bfloat16 and no float8
                digest.update(values.to(precision).contiguous().view(torch.uint8).cpu().numpy().data)
    names = map(precision_name, precisions) if tensor.dtype in PRECISIONS else [""]
    return {name: digest.hexdigest()[:16] for name, digest in zip(names, hashes, strict=True)}


def joined(named: Digests) -> dict[str, str]:
    """What stands for tensors together, by precision; ``named`` is of `digests_of` each.

    A precision is there if all that can be cast have it: parts that a library keeps in float32 within a half-precision model count as cast.
    """
    castable = [digests.keys() for digests in named.values() if "" not in digests]
    shared = [name for name in map(precision_name, PRECISIONS) if all(name in names for names in castable)]
    return {
        precision: hexed(*(f"{name} {of.get(precision) or of.get('') or min(of.items())}" for name, of in sorted(named.items())))
        for precision in shared or ["mixed"]
    }


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold a tensor's values: itself, or those that a quantised one is made of, and those attached to it."""
    if type(tensor) in (Tensor, nn.Parameter):
        yield name, tensor
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}/{inner}", getattr(tensor, inner))
        return
    yield name, tensor
    # bitsandbytes keeps the scales of its integers beside them
    attached = {**vars(tensor), **getattr(vars(tensor).get("quant_state"), "__dict__", {})}
    yield from ((f"{name}/{key}", value) for key, value in attached.items() if isinstance(value, Tensor))


def offloaded(held: Attributes, name: str, tensor: Tensor) -> Tensor:
    """A module's tensor, or where accelerate has put its values; ``held`` are the module's attributes."""
    if tensor.is_meta and (hook := held.get("_hf_hook")) is not None:
        for one in getattr(hook, "hooks", [hook]):
            # from here, and not by loading module by module, which makes new tensors each time, all to be hashed again
            kept = getattr(one, "weights_map", None)
            if kept is not None and name in kept:
                return torch.as_tensor(kept[name])
    return tensor


# what is set on a module


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
        # group offloading moves weights and changes none; a hook of any other kind may do anything
        moving = "diffusers.hooks.group_offloading"
        yield from (name for name, hook in registry.hooks.items() if name != HOOK_NAME and type(hook).__module__ != moving)
        # a forward replaced first lies under the hooks
        forwards += [under for reference in registry._fn_refs for under in (reference.forward, reference.original_forward) if under]
    yield from foreign(chain(forwards, held["_forward_hooks"].values(), held["_forward_pre_hooks"].values()))


def scales_on(held: Attributes) -> tuple[tuple[str, float], ...]:
    """The adapters that add to a module's output, and their scales; those merged into its weights do not."""
    if "base_layer" not in held["_modules"] or held.get("_disable_adapters") or held.get("merged_adapters"):
        return ()
    scaling = held.get("scaling")
    active = held.get("_active_adapter", scaling or ())
    names = [active] if isinstance(active, str) else active
    # adapters other than LoRA may have no scale; of LoRA's those that are active elsewhere only have none here
    scales = ((name, 1.0 if scaling is None else float(scaling.get(name, 0))) for name in names)
    return tuple((name, scale) for name, scale in scales if scale)


class Named(NamedTuple):
    """A tensor and where it belongs."""

    #: among the base model's, as that names it; or within an adapter.
    name: str
    #: "" for the base model.
    adapter: str
    #: the layer that a LoRA is on.
    layer: str
    tensor: Tensor


class Part(NamedTuple):
    """A module of a tree."""

    #: as the base model names it.
    name: str
    #: the path within a LoRA's layer, or of an IP-Adapter's module.
    inner: str
    module: nn.Module


#: the adapter that whatever belongs to an IP-Adapter goes by.
IP_ADAPTER = "IP-Adapter"


def parts_of(root: nn.Module) -> list[Part]:
    """A module and all inside it, each after the one that holds it, and those of one after those of another that came before it.

    A layer that peft has wrapped bears the wrapper's name, and what the wrapper adds has an inner path.
    """
    parts = [Part("", "", root)]
    for name, inner, module in parts:
        wrapper = "base_layer" in module._modules
        for key, child in module._modules.items():
            if child is None:
                continue
            if inner or "IPAdapter" in type(child).__name__:
                at = (name, f"{inner}.{key}") if inner else (dotted(name, key), IP_ADAPTER)
            elif wrapper:
                at = (name, "") if key == "base_layer" else (name, key)
            else:
                at = (dotted(name, key), "")
            parts.append(Part(*at, child))
    return parts


def dotted(name: str, key: str) -> str:
    """The name of what is called ``key`` within what is called ``name``."""
    return f"{name}.{key}" if name else key


def tensors_of(parts: Sequence[Part]) -> list[Named]:
    """Every parameter and buffer of a tree, quantised ones in pieces."""
    found = []
    for name, inner, module in parts:
        held = vars(module)
        for key, tensor in chain(held["_parameters"].items(), held["_buffers"].items()):
            if tensor is None:
                continue
            kind, _, rest = dotted(inner, key).partition(".") if inner else ("", "", "")
            adapter, _, rest = (IP_ADAPTER, "", rest) if kind == IP_ADAPTER else rest.partition(".")
            for full, plain in plain_tensors(key, offloaded(held, key, tensor)):
                piece = full.removeprefix(key)
                if not inner:
                    found.append(Named(dotted(name, full), "", "", plain))
                else:
                    found.append(Named(f"{kind} {rest}{piece}", adapter, name, plain))
    return found


# what is kept of a module, and when it still holds


class Look(NamedTuple):
    """What a look at tensors found; equal looks are of equal tensors, but for the limit that `identity` names."""

    versions: list[int]
    sizes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    samples: list[bytes]


def reference(thing: Any) -> Callable[[], Any]:
    """What gives a thing for as long as it lives, None afterwards and for None."""
    return type(None) if thing is None else weakref.ref(thing)


def spread(tensor: Tensor) -> tuple[tuple[int], tuple[int]]:
    """Size and stride of evenly spaced places in a tensor's memory, one in the last row of a matrix that is wide enough."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    count = 0 if tensor.is_meta else min(SAMPLED, extent)
    return (count,), (max(1, (extent - 1) // (SAMPLED - 1)) if count == SAMPLED else 1,)


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as far as that is counted."""
    return -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Tree:
    """What was found out about a module, without holding any part of it or the memory of its weights.

    Attributes:
        modules: itself and all inside it, as `parts_of` has them.
        kinds, sizes, hooked: the modules' classes, how many attributes they have, and which of them have hooks.
        marked: places of the modules that have something set on them; ``settings`` is what.
        held: parameters and buffers.
        tensors: those that hold the values, of each device and dtype together; ``groups`` says how many of each, ``places`` where in
            their memory is looked, ``look`` what was seen there, and ``digests`` what they were hashed to.
        weights: what stands for the base model, by precision.
        switched_on: the adapters that are on, as `adapters` gives them, at the scales that are set.
        patches: what else changes the output.
    """

    modules: list[Callable[[], Any]]
    kinds: list[type]
    sizes: list[int]
    hooked: list[bool]
    marked: list[int]
    settings: list[Any]
    held: list[Callable[[], Any]]
    tensors: list[Callable[[], Any]]
    groups: list[int]
    places: tuple[list[tuple[int]], list[tuple[int]]]
    look: Look
    digests: list[dict[str, str]]
    weights: dict[str, str]
    switched_on: list[dict[str, Any]]
    patches: list[str]

    def adapters(self, scale: float) -> list[dict[str, Any]]:
        """The adapters that are on, LoRA multiplied by ``scale``: ``weights`` by precision, and a LoRA's ``scale``."""
        # six digits, since the libraries multiply a scale in and divide it out again
        scaled = [{**of, "scale": float(f"{of['scale'] * scale:.6g}")} if "scale" in of else dict(of) for of in self.switched_on]
        return [of for of in scaled if of.get("scale") != 0]

    def holds(self) -> bool:
        """Whether the module is as it was."""
        modules = [module() for module in self.modules]
        if None in modules:
            return False
        attributes = list(map(vars, modules))
        if list(map(len, attributes)) != self.sizes or list(map(type, modules)) != self.kinds:
            return False
        below = [child for child in chain.from_iterable(map(dict.values, map(modules_in, attributes))) if child is not None]
        if not same_objects(below, modules[1:]) or hooked(attributes) != self.hooked:
            return False
        held = held_by(attributes)
        if not same_objects(held, [tensor() for tensor in self.held]):
            return False
        tensors = [tensor() for tensor in self.tensors]
        if any(map(partial(is_, None), tensors)) or settings_at(attributes, self.marked) != self.settings:
            return False
        return look_at(tensors, self.groups, self.places) == self.look


def same_objects(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def hooked(attributes: Sequence[Attributes]) -> list[bool]:
    """Which modules have hooks of torch's, after all that of those before."""
    return [*map(bool, map(hooks_in, attributes)), *map(bool, map(pre_hooks_in, attributes))]


def held_by(attributes: Sequence[Attributes]) -> list[Tensor]:
    """The parameters of modules, then their buffers."""
    kept = chain(map(parameters_in, attributes), map(buffers_in, attributes))
    return [tensor for tensor in chain.from_iterable(map(dict.values, filter(None, kept))) if tensor is not None]


def settings_at(attributes: Sequence[Attributes], marked: list[int]) -> list[Any]:
    """What is set on the modules that have something set on them."""
    return [(tuple(patches_on(attributes[place])), scales_on(attributes[place])) for place in marked]


@torch.inference_mode()
def look_at(tensors: list[Tensor], groups: list[int], places: tuple[list[tuple[int]], list[tuple[int]]]) -> Look | None:
    """Versions, shapes, layouts, dtypes and some values of tensors; None if a group's are on different devices, or shrank."""
    try:
        versions = list(map(versions_of, tensors))
    except RuntimeError:  # tensors made in inference mode have none
        versions = list(map(version, tensors))
    try:
        # views are made anew each time: kept ones would keep the memory of a model that is moved or offloaded
        views = list(map(torch.as_strided, tensors, *places))
        samples = [torch.cat(views[start:end]) for start, end in pairwise(accumulate(groups, initial=0))]
    except RuntimeError:
        return None
    seen = [b"" if of.is_meta else of.view(torch.uint8).cpu().numpy().tobytes() for of in samples]
    return Look(versions, list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors)), list(map(dtype_of, tensors)), seen)


_trees: weakref.WeakKeyDictionary[nn.Module, Tree] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def tree_of(root: nn.Module) -> Tree:
    """What there is to know of a module, found out anew where it changed. Of several threads that ask, one finds out."""
    # quantised tensors are looked at as what they are made of
    with _lock, torch._C.DisableTorchFunctionSubclass():
        known = _trees.get(root)
        if known is None or not known.holds():
            _trees[root] = known = grown(root, known)
        return known


def grown(root: nn.Module, before: Tree | None) -> Tree:
    """What there is to know of a module. Tensors that are as they were ``before`` are not hashed again."""
    parts = parts_of(root)
    modules = [part.module for part in parts]
    attributes = list(map(vars, modules))
    hooks = hooked(attributes)
    marked = [
        place
        for place, held in enumerate(attributes)
        if hooks[place] or hooks[place + len(modules)] or not held.keys().isdisjoint(SETTINGS) or "base_layer" in held["_modules"]
    ]
    settings = settings_at(attributes, marked)

    named = sorted(tensors_of(parts), key=lambda of: (str(of.tensor.device), str(of.tensor.dtype)))
    tensors = [of.tensor for of in named]
    groups = [len(list(group)) for _, group in groupby(named, key=lambda of: (of.tensor.device, of.tensor.dtype))]
    spreads = list(map(spread, tensors))
    places = [size for size, _ in spreads], [stride for _, stride in spreads]
    look = look_at(tensors, groups, places)
    if look is None:
        raise TypeError(f"sdguard cannot read all weights of {type(root).__name__}, so it cannot tell which model this is.")
    digests = hashed(tensors, seen_of(look, places[0]), before)

    base = {of.name: digest for of, digest in zip(named, digests, strict=True) if not of.adapter}
    scales = {parts[place].name: dict(scales) for place, (_, scales) in zip(marked, settings, strict=True) if scales}
    return Tree(
        modules=list(map(reference, modules)),
        kinds=list(map(type, modules)),
        sizes=list(map(len, attributes)),
        hooked=hooks,
        marked=marked,
        settings=settings,
        held=list(map(reference, held_by(attributes))),
        tensors=list(map(reference, tensors)),
        groups=groups,
        places=places,
        look=look,
        digests=digests,
        weights=joined(base),
        switched_on=adapters_in(named, digests, scales),
        patches=patches_in(parts, attributes, {place: patches for place, (patches, _) in zip(marked, settings, strict=True)}),
    )


def seen_of(look: Look, counts: list[tuple[int]]) -> list[tuple[Any, ...]]:
    """A look at tensors, as what it saw of each."""
    samples, at = b"".join(look.samples), 0
    seen = []
    for each in zip(look.versions, look.sizes, look.strides, look.dtypes, counts, strict=True):
        size = each[-1][0] * each[3].itemsize
        seen.append((*each[:-1], samples[at : at + size]))
        at += size
    return seen


def hashed(tensors: list[Tensor], seen: list[tuple[Any, ...]], before: Tree | None) -> list[dict[str, str]]:
    """`digests_of` tensors, of which those that look as they did ``before`` are not read again."""
    known: dict[int, tuple[Any, dict[str, str]]] = {}
    if before is not None:
        for tensor, saw, digest in zip(before.tensors, seen_of(before.look, before.places[0]), before.digests, strict=True):
            if (alive := tensor()) is not None:
                known[id(alive)] = (saw, digest)
    fresh = {id(t): t for t, saw in zip(tensors, seen, strict=True) if id(t) not in known or known[id(t)][0] != saw}
    # hashing and casting leave Python's lock to other threads
    with ThreadPoolExecutor() as pool:
        made = dict(zip(fresh, pool.map(digests_of, fresh.values()), strict=True))
    return [made[id(t)] if id(t) in made else known[id(t)][1] for t in tensors]


def adapters_in(named: list[Named], digests: list[dict[str, str]], scales: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The adapters of a module that are on; ``scales`` are LoRA's by layer and adapter.

    An adapter has one scale, that of its first layer; where those of others differ, they count among its weights as multiples of it. An
    IP-Adapter has none, since the reference call gives it no picture.
    """
    found: dict[str, Digests] = {}
    for of, digest in zip(named, digests, strict=True):
        if of.adapter == IP_ADAPTER or of.adapter in scales.get(of.layer, {}):
            found.setdefault(of.adapter, {})[f"{of.layer} {of.name}"] = digest
    made: list[dict[str, Any]] = []
    for adapter, tensors in found.items():
        if adapter == IP_ADAPTER:
            made.append({"weights": joined(tensors)})
            continue
        layers = {layer: on[adapter] for layer, on in sorted(scales.items()) if adapter in on}
        first = next(iter(layers.values()))
        shares: Digests = {f"scale {layer}": {"": f"{scale / first:.6g}"} for layer, scale in layers.items()}
        made.append({"weights": joined({**tensors, **shares}), "scale": first})
    return made


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
