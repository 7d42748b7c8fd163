"""The adapters of a module: LoRA and its kin with their scales, and IP-Adapters."""

from __future__ import annotations

from typing import Any

from sdguard.decision.digests import Digests, joined
from sdguard.decision.module_parts import IP_ADAPTER, Attributes, Named


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
