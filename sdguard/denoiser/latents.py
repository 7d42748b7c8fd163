"""Latents and text conditions, between the one shape that the guard knows and the shapes that a denoiser takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdguard.denoiser.families import TEXT, Family

#: rows and columns of the patches of 2 x 2 that latents travel as, in a sequence; None where they travel as they are.
Patches = tuple[int, int] | None


def patches_of(latents: Tensor, family: Family) -> Patches:
    """The patches that latents ``[B, C, H, W]`` travel as in a family."""
    return (latents.shape[2] // 2, latents.shape[3] // 2) if family.packed_latents else None


def unpack_latents(sample: Tensor, patches: Patches) -> Tensor:
    """A denoiser's sample or output as latents ``[B, C, H, W]``.

    Patches are ``[B, h w, 4 C]``; those behind them in the sequence are another picture's, and left out.
    """
    if patches is None:
        return sample
    rows, columns = patches
    own = sample[:, : rows * columns].unflatten(1, patches).unflatten(-1, (-1, 2, 2))
    return own.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def dtype_taken(sample: Tensor) -> torch.dtype:
    """The precision in which a denoiser computes with its sample: the sample's own, or autocast's."""
    device = sample.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sample.dtype


def pack_latents(latents: Tensor, patches: Patches) -> Tensor:
    """Latents as the denoiser takes them: the inverse of `unpack_latents`."""
    if patches is None:
        return latents
    own = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return own.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def with_latents(sample: Tensor, latents: Tensor, patches: Patches) -> Tensor:
    """A denoiser's sample or output with other latents ``[B, C, H, W]`` in it; what is behind them, in channels or sequence, stays."""
    packed = pack_latents(latents.to(sample), patches)
    if patches is None:
        return torch.cat([packed, sample[:, packed.shape[1] :]], dim=1)
    length, width = packed.shape[1:]
    return torch.cat([torch.cat([packed, sample[:, :length, width:]], dim=2), sample[:, length:]], dim=1)


def pack_condition(tokens: Tensor, beside: Tensor | None) -> Tensor:
    """Token embeddings and, as a last row, what stands beside them, ``[n, T (+ 1), E]``; the narrower are filled up with zeros."""
    if beside is None:
        return tokens
    rows = max(len(tokens), len(beside))  # one text beside several, which denoisers spread over the batch
    tokens, beside = tokens.expand(rows, -1, -1), beside.expand(rows, -1)
    width = max(tokens.shape[-1], beside.shape[-1])
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (tokens, beside.unsqueeze(1))], dim=1)


def pack_embeddings(tokens: Tensor, beside: Tensor | None, family: Family) -> Tensor:
    """The text condition, as of `pack_condition`, of what `embeddings_of` gives."""
    # a mask of joint attention goes on over the picture
    return pack_condition(tokens, beside[:, : tokens.shape[1]] if family.masks and beside is not None else beside)


def condition_of(kwargs: dict[str, Any], family: Family) -> Tensor:
    """The text condition in a call's arguments, as of `pack_condition`."""
    return pack_embeddings(*embeddings_of(kwargs, family), family)


def embeddings_of(kwargs: dict[str, Any], family: Family) -> tuple[Tensor, Tensor | None]:
    """The token embeddings and what stands beside them, where anything does, in a call's arguments."""
    beside: Any = functools.reduce(lambda found, name: found[name], family.beside, kwargs) if family.beside else None
    return kwargs[TEXT], beside


def with_condition(kwargs: dict[str, Any], condition: Tensor, family: Family) -> dict[str, Any]:
    """A call's arguments with another text condition in them, unpacked; whether a token counts is rounded to yes or no."""
    _, length, width = kwargs[TEXT].shape

    def beside(found: Tensor) -> Tensor:
        if family.masks:
            return torch.cat([(condition[:, length, :length] > 0.5).to(found.dtype), found[:, length:]], dim=1)
        return condition[:, length, : found.shape[-1]].contiguous()

    changed = {**kwargs, TEXT: condition[:, :length, :width].contiguous()}  # half precision rounds slices otherwise
    match family.beside:
        case (name,):
            changed[name] = beside(kwargs[name])
        case (name, entry):
            changed[name] = {**kwargs[name], entry: beside(kwargs[name][entry])}
    return changed
