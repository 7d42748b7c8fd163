"""What a host would wait for, if a pipeline's modules and all that comes of them lay on a GPU; counted without one.

Tensors are told apart by where they come from: the weights, what the denoiser is given, and whatever is made of these or for a ``device``
lies on the GPU, all else on the host. Counted is what CUDA waits for: a value read (``item``, ``tolist``, ``cpu``, ``bool``), an operation
whose result's shape hangs on values (``nonzero``, a mask as an index), and a tensor of the host that goes to the GPU, as an index too.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sdguard.denoiser import record

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default)
SHAPED_BY_VALUES = (aten.nonzero.default, aten.masked_select.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
FACTORIES = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.linspace, torch.randn, torch.rand, torch.tensor)


class Device:
    """The tensors that lie on the GPU, and how often each place in the code made the host wait."""

    def __init__(self) -> None:
        self.held = WeakTensorKeyDictionary()
        self.waits: Counter[str] = Counter()

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self.held

    def take(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.held[value] = True

    def wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/sdguard/" in frame.filename and "/tests/" not in frame.filename]
        where = f"{frames[-1].filename.rpartition('/sdguard/')[2]}:{frames[-1].lineno}" if frames else "the pipeline"
        self.waits[f"{where} {what}"] += 1


class Operations(TorchDispatchMode):
    """Counts by operation, and has results lie where operands do."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [value for value in tree_leaves((args, kwargs or {})) if isinstance(value, Tensor)]
        here = [value for value in operands if self.device.has(value)]
        if here:
            masks = [index for index in args[1] if isinstance(index, Tensor) and index.dtype == torch.bool] if func in INDEXING else []
            host = [value for value in operands if value.ndim and not self.device.has(value)]
            if func in READS + SHAPED_BY_VALUES or masks or host:
                self.device.wait(str(func))
        found = func(*args, **(kwargs or {}))
        if here:
            self.device.take(found)
        return found


class Transfers(TorchFunctionMode):
    """Counts what is no operation between CPU tensors: reads of several values, and moves from one device to the other."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        first: Any = args[0] if args else None
        if func is Tensor.to and not device.has(first) and any(map(device.has, args[1:])):
            if first.ndim:
                device.wait("to the device")
            found = func(*args, **kwargs)
            found = found.view_as(found) if found is first else found
            device.take(found)
            return found
        if (func is Tensor.cpu or (func is Tensor.to and any(isinstance(to, str) and to == "cpu" for to in args[1:]))) and device.has(
            first
        ):
            device.wait("cpu")
            return apart(first)
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and device.has(first):
            device.wait(func.__name__)
            return func(apart(first), *args[1:], **kwargs)
        found = func(*args, **kwargs)
        if func in FACTORIES and kwargs.get("device") is not None:
            if func is torch.tensor:
                device.wait("torch.tensor")
            device.take(found)
        return found


def apart(value: Tensor) -> Tensor:
    """The same values where no mode sees them."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        return value.detach().clone()


@contextmanager
def counted(pipe: Any, denoiser: nn.Module) -> Iterator[Counter[str]]:
    """Within the block what makes the host wait is counted, by place and kind; cleared, it is counted from there on."""
    device = Device()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            device.take([*part.parameters(), *part.buffers()])

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device.take((args, kwargs, pipe.scheduler.timesteps))
        return nn.Module.__call__(module, *args, **kwargs)

    kind: Any = type(denoiser)
    kind.__call__ = call  # a hook on the denoiser would be part of the model that is judged
    try:
        with patch.object(record, "at_hand", lambda tensor: not device.has(tensor)), Transfers(device), Operations(device):
            yield device.waits
    finally:
        del kind.__call__
