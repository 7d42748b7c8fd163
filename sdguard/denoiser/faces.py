"""IP-Adapters of faces (FaceID Plus), which are told what an encoder makes of a picture by an attribute, beside the arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def told_of_faces(denoiser: nn.Module, told: Callable[[Any], Tensor | None]) -> Iterator[None]:
    """Within the block each layer that projects faces has what ``told`` makes of it in the place of what the caller has told it."""
    layers = getattr(getattr(denoiser, "encoder_hid_proj", None), "image_projection_layers", ())
    before = [(layer, layer.clip_embeds) for layer in layers if hasattr(layer, "clip_embeds")]
    for layer, _ in before:
        layer.clip_embeds = told(layer)
    try:
        yield
    finally:
        for layer, faces in before:
            layer.clip_embeds = faces


def no_faces(count: int) -> Callable[[Any], Tensor | None]:
    """A face of nothing for each of ``count`` rows."""
    return lambda layer: layer.proj_in.weight.new_zeros(count, 1, 1, layer.proj_in.in_features)


def faces_at(rows: Tensor, count: int) -> Callable[[Any], Tensor | None]:
    """The faces of some ``rows`` of a call of ``count``."""

    def chosen(layer: Any) -> Tensor | None:
        faces: Tensor | None = layer.clip_embeds
        return faces if faces is None or len(faces) != count else faces[rows.to(faces.device)]

    return chosen
