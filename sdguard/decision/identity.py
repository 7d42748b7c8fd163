"""The identity of a model: everything that moves what ordinary prompts look like on it, read at a reference call of the guard's own.

The table of noise levels, what the network predicts and every bit of denoiser, text encoders and adapters are in it. A run's own setting
is not: its sampler, steps, size and guidance do not reach the reference call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from sdguard.decision.digests import hexed
from sdguard.decision.module_state import trees_of
from sdguard.denoiser.bare import uncompiled
from sdguard.denoiser.families import check_weights, default_size, denoiser_of, family_of
from sdguard.denoiser.reference_call import setup_of
from sdguard.observation import is_flow, prediction_type


def identity(pipe: Any, scale: float | None = None) -> dict[str, Any]:
    """What a profile of a pipeline's model hangs on, in values that JSON can hold.

    ``scale`` is what the call's ``cross_attention_kwargs`` or ``joint_attention_kwargs`` multiply LoRA with.

    All weights are hashed, once: a second or so of one core a gigabyte, twice that in float32, on as many cores as there are. What has
    been hashed is kept for as long as the module lives; later calls look whether a tensor is another object, has another shape, dtype,
    layout or version, or other values at `module_state.SAMPLED` places, whether a module came, went or changed its class, and what is set
    on modules: some milliseconds for SDXL, between which no memory of the weights is held. Moving a model to another device is no change.

    *Limits*: an edit through ``.data``, which leaves the version as it is, that touches none of those places is not seen, nor are one
    attribute of a module added and one removed at once. Of a module its class, its tensors and what adapters and FreeU set on it are
    looked at: another plain attribute, such as an epsilon or a factor, moves what it computes and nothing here; so does what is put in
    the place of torch's own functions.

    Raises:
        TypeError: sdguard does not support the pipeline's class, or cannot see or read its weights, as sparse ones.
    """
    readers, (height, width) = readers_of(pipe), default_size(pipe)
    check_weights(denoiser_of(pipe))
    read = dict(zip(readers, trees_of(list(readers.values())), strict=True))
    adapters = {name: found for name, tree in read.items() if (found := tree.adapters(1.0 if scale is None else float(scale)))}
    return {
        "denoiser": type(uncompiled(denoiser_of(pipe))).__name__,
        "prediction": prediction_type(pipe.scheduler),
        "noise_levels": noise_levels(pipe.scheduler),
        "size": height if height == width else [height, width],
        "encoding": setup_of(pipe),
        "weights": {name: dict(tree.weights) for name, tree in read.items()},
        "adapters": adapters,
        "patches": sorted(f"{name}: {patch}" for name, tree in read.items() for patch in tree.patches),
    }


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
        elif name == "encoding" and None in (mine.get(name), theirs.get(name)):  # the tokenizers may be gone too
            continue
        else:
            pairs = [(name, mine.get(name), theirs.get(name), equal)]
        found += [f"{what} is {short(a)}, the profile's is {short(b)}" for what, a, b, agree in pairs if not agree(a, b)]
    return found if needed else [*found, "no denoiser is known"]


def is_identity(model: Any) -> bool:
    """Whether what was read from a file is of the form of an `identity`, so that it can be compared and shown."""
    try:
        digests = list(model["weights"].values())
        for adapter in chain.from_iterable(model.get("adapters", {}).values()):
            digests.append(adapter["weights"])
            format(adapter.get("scale", 1), "g")
        texts = [*model.get("patches", []), *(digest for precisions in digests for digest in precisions.values())]
        return all(isinstance(text, str) for text in texts) and same_model(model, model)
    except (AttributeError, TypeError, KeyError, ValueError, OverflowError):
        return False


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
