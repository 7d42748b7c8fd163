"""Digests of tensors: what stands for every bit of them, by the precisions that their values may be held in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

#: precisions that a profile made in float32 serves.
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)

#: values of a tensor that are hashed at once: what is copied of a model at a time.
CHUNK = 1 << 20

#: what tensors were hashed to, by name and precision.
Digests = dict[str, dict[str, str]]


def hexed(*values: bytes | str) -> str:
    """16 digits that stand for some bytes and texts."""
    # SHA-256 because processors have instructions for it: nearly twice as fast as BLAKE2b where this was measured
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() + b"\0" if isinstance(value, str) else value)
    return digest.hexdigest()[:16]


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
