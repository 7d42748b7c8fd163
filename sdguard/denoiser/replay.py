"""Replaying one image of a running batch from its start, as its correction says, up to the call under way."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdguard.correction import Correction, corrected
from sdguard.denoiser.guidance import apply_guidance, to_model_output
from sdguard.denoiser.latents import pack_latents, unpack_latents
from sdguard.denoiser.record import RunRecord
from sdguard.denoiser.schedulers import clone_scheduler, input_scale, scale_input
from sdguard.observation import Observation, prediction_type


class Replayed(NamedTuple):
    """Where a replayed image is: its unscaled latents, a batch of one as the pipeline holds them, and the scheduler that has seen them."""

    latents: Tensor
    scheduler: Any


def replay_trajectory(
    initial_scheduler: Any,
    x: Tensor,
    timesteps: list[Tensor],
    predict: Callable[[int, Tensor, Tensor], Tensor],
    step_arguments: dict[str, Any],
) -> Replayed:
    """Where one image (unscaled latents ``[1, C, H, W]`` at the first timestep) is before the last of ``timesteps``.

    ``predict(call, input, timestep)`` gives what the denoiser's call and guidance give at the earlier ones. Noise of a stochastic scheduler
    is drawn from a generator that hangs on ``x`` alone; no other generator is touched.
    """
    scheduler = clone_scheduler(initial_scheduler)
    seed = int.from_bytes(hashlib.blake2b(x.float().cpu().contiguous().numpy().tobytes(), digest_size=7).digest(), "big")
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_arguments = {**step_arguments, "generator": torch.Generator().manual_seed(seed)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for call, timestep in enumerate(timesteps[:-1]):
            output = predict(call, scale_input(scheduler, x, timestep), timestep)
            x = scheduler.step(output, timestep, x, **{**step_arguments, "return_dict": False})[0].to(x.dtype)
    return Replayed(x, scheduler)


def activate_correction(
    here: Observation, correction: Correction, record: RunRecord, rescale: float, step_arguments: dict[str, Any]
) -> tuple[Observation, Replayed | None]:
    """One row at the call under way under its correction; and where its latents are, if it starts elsewhere or late and was replayed.

    ``here`` is the row's observation without the correction, ``step_arguments`` are those of ``scheduler.step``. Cost: that of `corrected`,
    and where the row is replayed 2 evaluations for each call after the first, and its rule's.
    """
    if not here.step and correction.x is None:
        return corrected(here, [correction]), None
    assert record.first is not None
    kind, patches = prediction_type(record.scheduler), record.patches
    there = corrected(record.first.select(here.rows), [correction])

    def moved(x: Tensor, timestep: float, call: int) -> Observation:
        return replace(there.at(unpack_latents(x.float(), patches), timestep), guidance_scale=record.guidance_scales[call])

    def predict(call: int, x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal there
        if call:
            there = moved(x, float(timestep), call)
        guided = apply_guidance(*to_model_output(there, kind), there.guidance_scale, rescale)
        return pack_latents(guided, patches).to(x.dtype)

    start = there.x / input_scale(record.initial_scheduler, record.timesteps[0])
    latents = pack_latents(start, patches).to(record.dtype)
    replayed = replay_trajectory(record.initial_scheduler, latents, record.timesteps, predict, step_arguments)
    if here.step:
        there = moved(scale_input(replayed.scheduler, replayed.latents, record.timesteps[-1]), here.timestep, -1)
    return there, replayed
