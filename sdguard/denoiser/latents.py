"""Latents and text conditions, between the one shape that the guard knows and the shapes that a denoiser takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdguard.denoiser.families import TEXT, Family


def unpack_latents(sample: Tensor, patch_rows: int) -> Tensor:
    """A denoiser's sample or output as latents ``[B, C, H, W]``.

    Where latents travel as a sequence of patches of 2 x 2, ``[B, h w, 4 C]``, ``patch_rows`` is h; where it is 0 they travel as they are.
    """
    if not patch_rows:
        return sample
    patches = sample.unflatten(1, (patch_rows, -1)).unflatten(-1, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def dtype_taken(sample: Tensor) -> torch.dtype:
    """The precision in which a denoiser computes with its sample: the sample's own, or autocast's."""
    device = sample.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sample.dtype


def pack_latents(latents: Tensor, patch_rows: int) -> Tensor:
    """Latents as the denoiser takes them: the inverse of `unpack_latents`."""
    if not patch_rows:
        return latents
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pack_condition(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """Token embeddings and, as a last row, the pooled one, ``[n, T (+ 1), E]``; the narrower are filled up with zeros."""
    if pooled is None:
        return tokens
    width = max(tokens.shape[-1], pooled.shape[-1])
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (tokens, pooled.unsqueeze(1))], dim=1)


def condition_of(kwargs: dict[str, Any], family: Family) -> Tensor:
    """The text condition in a call's arguments, as of `pack_condition`."""
    return pack_condition(*embeddings_of(kwargs, family))


def embeddings_of(kwargs: dict[str, Any], family: Family) -> tuple[Tensor, Tensor | None]:
    """The token embeddings and the pooled one, where there is one, in a call's arguments."""
    pooled: Any = functools.reduce(lambda found, name: found[name], family.pooled, kwargs) if family.pooled else None
    return kwargs[TEXT], pooled


def with_condition(kwargs: dict[str, Any], condition: Tensor, family: Family) -> dict[str, Any]:
    """A call's arguments with another text condition in them, unpacked."""
    _, length, width = kwargs[TEXT].shape
    changed = {**kwargs, TEXT: condition[:, :length, :width].contiguous()}  # half precision rounds slices otherwise
    match family.pooled:
        case (name,):
            changed[name] = condition[:, length, : kwargs[name].shape[-1]].contiguous()
        case (name, entry):
            changed[name] = {**kwargs[name], entry: condition[:, length, : kwargs[name][entry].shape[-1]].contiguous()}
    return changed
