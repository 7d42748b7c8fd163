"""A training loop: progress bar, loss log, checkpoints, resumption."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from sdguard.files.atomic import atomic_write

CHECKPOINT_SECONDS = 120.0
WARMUP_STEPS = 100
LOG_STEPS = 50


def ema_update(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Exponential moving average of the parameters, with the usual ramp so that early steps are forgotten."""
    rate = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - rate)


def train(
    steps: int,
    model: nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    checkpoint: Path,
    learning_rate: float,
    ema_decay: float = 0.998,
    look: tuple[int, Callable[[int, nn.Module], None]] | None = None,
) -> nn.Module:
    """Minimise ``loss_at(step)`` over ``model`` for so many steps; returns the averaged model.

    The learning rate warms up and then follows a cosine to 2% of its peak. State goes to ``checkpoint`` every two minutes and at the end; a
    run that finds one there continues it. ``look`` is a count of steps and what is done with the step and the averaged model after each.
    """
    average = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]

    def save() -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_write(checkpoint) as partial:
            torch.save({**state, "step": step, "seconds": spent}, partial)

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    log_path = checkpoint.with_suffix(".csv")
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()]
    saved, losses = spent, list[torch.Tensor]()
    with log_path.open("a", newline="") as log_file, Progress(*columns) as progress:
        log = csv.writer(log_file)
        task = progress.add_task(checkpoint.stem, total=steps, completed=step, note="")
        while step < steps:
            started = time.monotonic()
            rate = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_at(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema_update(average, model, step, ema_decay)
            step += 1
            spent += time.monotonic() - started
            losses.append(loss.detach())
            if step % LOG_STEPS == 0:  # reading a loss waits for the GPU
                running = torch.stack(losses).mean().item()
                losses.clear()
                log.writerow([step, round(spent, 1), f"{running:.5f}", f"{rate:.2e}"])
                log_file.flush()
                progress.update(task, note=f"step {step}  loss {running:.4f}")
            progress.update(task, completed=step)
            if look and step % look[0] == 0:
                look[1](step, average)
            if spent - saved > CHECKPOINT_SECONDS:
                save()
                saved = spent
    save()
    return average
