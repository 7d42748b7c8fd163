"""Schedulers and what they remember: a copy of one, its scaling, and one image's part of a batch's memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def clone_scheduler(scheduler: Any) -> Any:
    """A copy of a scheduler with a memory of its own, free of whatever stands on the instance in place of ``step`` and its like."""
    clone, wrapped = copy.copy(scheduler), ("step", "add_noise", "scale_noise")
    memory = {
        name: value for name, value in vars(scheduler).items() if name not in (*wrapped, "_internal_dict")
    }  # the latter is its config
    vars(clone).update(copy.deepcopy(memory))
    for name in wrapped:
        vars(clone).pop(name, None)
    return clone


def scale_input(scheduler: Any, x: Tensor, timestep: Tensor) -> Tensor:
    """The denoiser's input for latents ``x``; schedulers of flow matching scale nothing."""
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


def input_scale(scheduler: Any, timestep: Tensor) -> float:
    """The factor between a scheduler's latents and the denoiser's input at ``timestep``."""
    return float(scale_input(clone_scheduler(scheduler), torch.ones(1), timestep))


def insert_row(scheduler: Any, other: Any, row: int, shape: torch.Size) -> None:
    """Put ``other``'s memory of its one image in the place of ``row`` in ``scheduler``'s memory of a batch of latents of ``shape``."""

    def inserted(batch: Any, single: Any) -> Any:
        if isinstance(batch, Tensor) and isinstance(single, Tensor) and batch.shape == shape and single.shape[1:] == shape[1:]:
            batch = batch.clone()
            batch[row] = single[0]
        elif isinstance(batch, list) and isinstance(single, list):
            return [inserted(*pair) for pair in zip(batch, single, strict=True)]
        return batch

    for name, value in vars(scheduler).items():
        if name in vars(other):
            vars(scheduler)[name] = inserted(value, vars(other)[name])
