"""The processes among which work is shared, as ``accelerate launch`` or ``torchrun`` has started them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """accelerate's state: which of how many processes this one is, and its device.

    Accelerate counts processes without a GPU only where it is told that they are to use the CPU: otherwise each of them would take itself
    for the only one, and do all of the work. They wait for each other as long as it takes.
    """
    several_on_cpu = "LOCAL_RANK" in os.environ and not (torch.cuda.is_available() or torch.xpu.is_available())
    return PartialState(cpu=several_on_cpu, timeout=timedelta(days=7))
