"""Modules inside the denoiser, and what they give out while it is evaluated."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def captured(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Within the block, the last outputs of ``modules`` in this thread, in the order in which they first ran; no hook is left."""
    found: dict[nn.Module, Tensor] = {}
    thread = threading.get_ident()

    def keep(module: nn.Module, arguments: tuple[object, ...], output: Tensor) -> None:
        if threading.get_ident() == thread:
            found[module] = output.detach()

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def cross_attentions(denoiser: nn.Module) -> list[nn.Module]:
    """The cross-attention layers of a U-Net of diffusers, which names them ``attn2``."""
    return [module for name, module in denoiser.named_modules() if name.endswith("attn2")]


def bottleneck(denoiser: nn.Module | None) -> nn.Module | None:
    """The block in the middle of a U-Net; None for a denoiser that has none, as transformers have none."""
    return getattr(denoiser, "mid_block", None)
