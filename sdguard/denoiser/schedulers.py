"""Schedulers and what they remember: a copy of one, its scaling, and one image's part of a batch's memory."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdguard.observation import NoiseLevel, is_flow, level_of_sigma, noise_level


class ScheduledCall(NamedTuple):
    """A call of the denoiser as a scheduler has planned it.

    Attributes:
        timestep: as it stands in the scheduler's list, a scalar on the CPU.
        level: the noise level of the latents then.
    """

    timestep: Tensor
    level: NoiseLevel


def scheduled_calls(scheduler: Any, timesteps: Tensor) -> list[ScheduledCall]:
    """The denoiser's calls of a run, one for each of a scheduler's ``timesteps``, which are on the CPU.

    Noise levels are those of the scheduler's own sigmas where it has them, since some round the timesteps that go with these: by 4% with
    Karras sigmas, by a third with exponential ones. Schedulers that evaluate between their sigmas round nothing, nor
    do those made for flow matching, whose sigmas may lie on a GPU.
    """
    flow, sigmas = is_flow(scheduler), getattr(scheduler, "sigmas", None)
    exact = flow and timesteps.is_floating_point()
    known = not exact and sigmas is not None and len(sigmas) > len(timesteps) and not hasattr(scheduler, "sigmas_interpol")
    of_calls = torch.as_tensor(sigmas)[: len(timesteps)].tolist() if known else [0.0] * len(timesteps)
    # all at once: one by one, between calls of the network, each would take several times as long
    return [
        ScheduledCall(timestep, level_of_sigma(sigma, flow) if sigma > 0 else noise_level(scheduler, t))
        for timestep, t, sigma in zip(timesteps.unbind(), timesteps.tolist(), of_calls, strict=True)
    ]


def place_of(scheduler: Any, timestep: Any) -> int | None:
    """Which of its timesteps a scheduler is at, from 0, where ``timestep`` is one of the very list or else where the scheduler counts them.

    None where neither is so. No value is read.
    """
    listed = scheduler.timesteps
    index = getattr(scheduler, "step_index", None)
    index = getattr(scheduler, "begin_index", None) if index is None else index
    if index is None and isinstance(timestep, Tensor) and timestep.untyped_storage().data_ptr() == listed.untyped_storage().data_ptr():
        index = (timestep.storage_offset() - listed.storage_offset()) // listed.stride(0)
    return index if index is not None and 0 <= index < len(listed) else None


def deep_copies(values: dict[str, Any]) -> dict[str, Any]:
    """Deep copies of values by name; what cannot be copied, such as a lock, is shared."""
    with contextlib.suppress(Exception):
        return copy.deepcopy(values)
    found = dict(values)
    for name, value in values.items():
        with contextlib.suppress(Exception):
            found[name] = copy.deepcopy(value)
    return found


def clone_scheduler(scheduler: Any) -> Any:
    """A copy of a scheduler with a memory of its own, free of whatever stands on the instance in place of ``step`` and its like."""
    clone, wrapped = copy.copy(scheduler), ("step", "add_noise", "scale_noise")
    memory = {
        name: value for name, value in vars(scheduler).items() if name not in (*wrapped, "_internal_dict")
    }  # the latter is its config
    vars(clone).update(deep_copies(memory))
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
