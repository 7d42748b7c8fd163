"""What was found out about a module, kept for as long as it lives, and the cheap look that says whether it still holds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, groupby, pairwise
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdguard.decision.adapters import adapters_in, scales_on
from sdguard.decision.digests import digests_of, joined
from sdguard.decision.module_parts import Attributes, parts_of, tensors_of
from sdguard.decision.patches import FREEU, patches_in, patches_on
from sdguard.denoiser.kept_state import same_objects

#: values of each tensor that are looked at in every call.
SAMPLED = 16

#: attributes of a module's own that can change what it computes.
SETTINGS = frozenset({*FREEU, "forward", "_old_forward", "processor", "base_layer", "scaling", "_diffusers_hook", "_hf_hook"})

versions_of, dtype_of, modules_in = attrgetter("_version"), attrgetter("dtype"), itemgetter("_modules")
parameters_in, buffers_in = itemgetter("_parameters"), itemgetter("_buffers")
hooks_in, pre_hooks_in = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


class Look(NamedTuple):
    """What a look at tensors found; equal looks are of equal tensors, but for the limit that `identity` names."""

    versions: list[int]
    sizes: list[torch.Size]
    strides: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    samples: list[bytes]


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

    def as_it_was(self) -> list[Tensor] | None:
        """The tensors that are to be looked at, to tell whether the module is as it was; None where it is another already."""
        modules = [module() for module in self.modules]
        if None in modules:
            return None
        attributes = list(map(vars, modules))
        if list(map(len, attributes)) != self.sizes or list(map(type, modules)) != self.kinds:
            return None
        below = [child for child in chain.from_iterable(map(dict.values, map(modules_in, attributes))) if child is not None]
        if not same_objects(below, modules[1:]) or hooked(attributes) != self.hooked:
            return None
        held = held_by(attributes)
        if not same_objects(held, [tensor() for tensor in self.held]):
            return None
        tensors = [tensor() for tensor in self.tensors]
        if any(map(partial(is_, None), tensors)) or settings_at(attributes, self.marked) != self.settings:
            return None
        return tensors


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


class Looked(NamedTuple):
    """What is to be looked at: tensors, how many there are of each device and dtype together, and where in their memory (see `Tree`)."""

    tensors: list[Tensor]
    groups: list[int]
    places: tuple[list[tuple[int]], list[tuple[int]]]

    def samples(self) -> list[Tensor] | None:
        """Some values of each group; None if one's tensors are on different devices, or shrank."""
        try:
            # views are made anew each time: kept ones would keep the memory of a model that is moved or offloaded
            views = list(map(torch.as_strided, self.tensors, *self.places))
            return [torch.cat(views[start:end]) for start, end in pairwise(accumulate(self.groups, initial=0))]
        except RuntimeError:
            return None

    def look(self, samples: list[bytes]) -> Look:
        """Versions, shapes, layouts and dtypes beside ``samples``."""
        try:
            versions = list(map(versions_of, self.tensors))
        except RuntimeError:  # tensors made in inference mode have none
            versions = list(map(version, self.tensors))
        sizes, strides = list(map(Tensor.size, self.tensors)), list(map(Tensor.stride, self.tensors))
        return Look(versions, sizes, strides, list(map(dtype_of, self.tensors)), samples)


def bytes_of(tensors: Sequence[Tensor]) -> list[bytes]:
    """The bytes of vectors, of those on one device read at once, so that a GPU is waited for once; none of those without values."""
    raw = [tensor.new_empty(0, dtype=torch.uint8, device="cpu") if tensor.is_meta else tensor.view(torch.uint8) for tensor in tensors]
    found = [b""] * len(raw)
    for device in {of.device for of in raw}:
        there = [place for place, of in enumerate(raw) if of.device == device]
        whole = torch.cat([raw[place] for place in there]).cpu().numpy().tobytes()
        for place, (start, end) in zip(there, pairwise(accumulate((len(raw[place]) for place in there), initial=0)), strict=True):
            found[place] = whole[start:end]
    return found


@torch.inference_mode()
def looks_at(asked: Sequence[Looked | None]) -> list[Look | None]:
    """A look at each of some tensors; None where nothing is asked, or where it cannot be."""
    sampled = [None if of is None else of.samples() for of in asked]
    seen = iter(bytes_of(list(chain.from_iterable(filter(None, sampled)))))
    return [
        None if of is None or samples is None else of.look([next(seen) for _ in samples])
        for of, samples in zip(asked, sampled, strict=True)
    ]


_trees: weakref.WeakKeyDictionary[nn.Module, Tree] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def trees_of(roots: Sequence[nn.Module]) -> list[Tree]:
    """What there is to know of modules, found out anew where one changed. Of several threads that ask, one finds out."""
    # quantised tensors are looked at as what they are made of
    with _lock, torch._C.DisableTorchFunctionSubclass():
        known = [_trees.get(root) for root in roots]
        asked = [tree.as_it_was() if tree else None for tree in known]
        to_look_at = [
            Looked(tensors, tree.groups, tree.places) if tree and tensors is not None else None
            for tree, tensors in zip(known, asked, strict=True)
        ]
        found = []
        for root, tree, look in zip(roots, known, looks_at(to_look_at), strict=True):
            if tree is None or look != tree.look:
                _trees[root] = tree = grown(root, tree)
            found.append(tree)
        return found


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
    (look,) = looks_at([Looked(tensors, groups, places)])
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
