"""The parts of a module and the tensors in them, by the names that they have without adapters, wrappers and offloading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: what `vars` gives of a module.
Attributes = Mapping[str, Any]

#: the adapter that whatever belongs to an IP-Adapter goes by.
IP_ADAPTER = "IP-Adapter"


class Part(NamedTuple):
    """A module of a tree."""

    #: as the base model names it.
    name: str
    #: the path within a LoRA's layer, or of an IP-Adapter's module.
    inner: str
    module: nn.Module


class Named(NamedTuple):
    """A tensor and where it belongs."""

    #: among the base model's, as that names it; or within an adapter.
    name: str
    #: "" for the base model.
    adapter: str
    #: the layer that a LoRA is on.
    layer: str
    tensor: Tensor


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


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hold a tensor's values: itself, or those that a quantised one is made of, and those attached to it."""
    if type(tensor) in (Tensor, nn.Parameter):
        yield name, tensor
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for key in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}/{key}", getattr(tensor, key))
        return
    held = {key: value for key, value in vars(tensor).items() if isinstance(value, Tensor)}
    if held and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a wrapper, without memory of its own
        for key, inner in held.items():
            yield from plain_tensors(f"{name}/{key}", inner)
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
