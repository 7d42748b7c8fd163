"""What modules inside the denoiser give out while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def captured(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, the outputs of ``modules`` in the order in which they run; afterwards no hook is left on them."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[object, ...], output: Tensor) -> None:
        found.append(output.detach())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
