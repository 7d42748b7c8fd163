"""Restarting one image of a running batch: its own way from the start, and into the scheduler's memory, past its neighbours."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def private_copy(scheduler: Any) -> Any:
    """A copy of a scheduler with a memory of its own, free of whatever has been hung on the instance in place of ``step``."""
    twin, hung = copy.copy(scheduler), ("step", "add_noise", "scale_noise")
    memory = {name: value for name, value in vars(scheduler).items() if name not in (*hung, "_internal_dict")}  # the latter is its config
    vars(twin).update(copy.deepcopy(memory))
    for name in hung:
        vars(twin).pop(name, None)
    return twin


def scaled(scheduler: Any, x: Tensor, timestep: Tensor) -> Tensor:
    """The denoiser's input for latents ``x``; schedulers of flow matching scale nothing."""
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


def input_scale(scheduler: Any, timestep: Tensor) -> float:
    """The factor between a scheduler's latents and the denoiser's input at ``timestep``."""
    return float(scaled(private_copy(scheduler), torch.ones(1), timestep))


def own_way(
    start: Any, x: Tensor, timesteps: list[Tensor], follow: Callable[[int, Tensor, Tensor], Tensor], arguments: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Where one image (unscaled latents ``[1, C, H, W]`` at the first timestep) is before the last of ``timesteps``.

    ``follow(call, input, timestep)`` gives what the denoiser's call and guidance give at the earlier ones. Returns the unscaled
    latents, and the scheduler that has seen them. Noise of a stochastic scheduler is drawn from a generator that hangs on ``x`` alone;
    no other generator is touched.
    """
    scheduler = private_copy(start)
    seed = int.from_bytes(hashlib.blake2b(x.float().cpu().contiguous().numpy().tobytes(), digest_size=7).digest(), "big")
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments = {**arguments, "generator": torch.Generator().manual_seed(seed)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for call, timestep in enumerate(timesteps[:-1]):
            output = follow(call, scaled(scheduler, x, timestep), timestep)
            x = scheduler.step(output, timestep, x, **{**arguments, "return_dict": False})[0].to(x.dtype)
    return x, scheduler


def splice(scheduler: Any, other: Any, row: int, shape: torch.Size) -> None:
    """Put ``other``'s memory of its one image in the place of ``row`` in ``scheduler``'s memory of a batch of latents of ``shape``."""

    def joined(mine: Any, its: Any) -> Any:
        if isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.shape == shape and its.shape[1:] == shape[1:]:
            mine = mine.clone()
            mine[row] = its[0]
        elif isinstance(mine, list) and isinstance(its, list):
            return [joined(*pair) for pair in zip(mine, its, strict=True)]
        return mine

    for name, value in vars(scheduler).items():
        if name in vars(other):
            vars(scheduler)[name] = joined(value, vars(other)[name])
