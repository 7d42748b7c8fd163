"""The processes among which work is shared, as ``accelerate launch`` or ``torchrun`` has started them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """accelerate's state: which of how many processes this one is, and its device.

    Accelerate counts processes that have no GPU each only where it is told that they are to use the CPU: otherwise, where there is none,
    each of them would take itself for the only one and do all of the work, and where there are fewer, some would find none. More processes
    than GPUs share one that they are told by name; left alone they use the CPU. They wait for each other as long as it takes.
    """
    gpus = next((each.device_count() for each in (torch.cuda, torch.xpu) if each.is_available()), 0)
    several_on_cpu = "LOCAL_RANK" in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus
    return PartialState(cpu=several_on_cpu, timeout=timedelta(days=7))
