"""What the hook knows of a run so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.denoiser.schedulers import ScheduledCall, clone_scheduler, next_call, scheduled_calls
from sdguard.observation import NoiseLevel, Observation, noise_level


def same_embedding(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two embeddings are the same."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


@dataclass
class RunRecord:
    """The denoiser calls of one run so far; of a step whose branches are two calls, the step.

    Attributes:
        scheduler: the run's own.
        initial_scheduler: a copy of it from before its first step.
        dtype: of the pipeline's latents.
        patch_rows: height of the latents in patches where they travel as a sequence, else 0.
        evaluations: ``[B]``, the extra denoiser evaluations spent on each image.
        origin: the clean latents that were noised to start from, as in image-to-image; None where it is noise alone.
        timesteps: of each call, the scheduler's, on the CPU.
        levels: of each call, the noise level.
        guidance_scales: of each call; a callback may change it in mid-run.
        norms: of each call, the guidance norm of every image, ``[B]``.
        first: the observation of the first call that was observed.
        last_timestep: of the scheduler's list.
        noise: what the images are made from, at the guard's own reference call, ``[B, C, H, W]``.
        half_made: whether the run was handed over latents that are no noise any more.
        new_condition: whether the text condition of the call under way is another than that of the call before.
    """

    scheduler: Any = None
    initial_scheduler: Any = None
    dtype: torch.dtype = torch.float32
    patch_rows: int = 0
    evaluations: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    origin: Tensor | None = None
    timesteps: list[Tensor] = field(default_factory=list)
    levels: list[NoiseLevel] = field(default_factory=list)
    guidance_scales: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    first: Observation | None = None
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    last_timestep: float | None = None
    half_made: bool = False
    new_condition: bool = False
    _embeddings: tuple[Tensor | None, ...] = ()
    _schedule: list[ScheduledCall] = field(default_factory=list)
    _listed: list[float] = field(default_factory=list)
    _place: int = -1
    _levels: dict[float, NoiseLevel] = field(default_factory=dict)

    def begin(self, scheduler: Any, images: int, dtype: torch.dtype, patch_rows: int) -> None:
        """Note what the first call says of the run: its scheduler, how many images it makes, and how its latents travel."""
        self.scheduler, self.initial_scheduler = scheduler, clone_scheduler(scheduler)
        self.dtype, self.patch_rows = dtype, patch_rows
        with torch.inference_mode(False):  # it is counted in that mode and outside of it
            self.evaluations = torch.zeros(images, dtype=torch.long)
        self._schedule = scheduled_calls(scheduler)
        self._listed = [call.timestep.item() for call in self._schedule]
        self._levels = {timestep: call.level for timestep, call in zip(self._listed, self._schedule, strict=True)}
        self.last_timestep = self._listed[-1] if self._listed else None

    def note_timestep(self, given: Callable[[], float]) -> None:
        """Note the timestep and the noise level of the call under way, by the scheduler's own list, or as ``given`` beyond its end.

        What is ``given`` to the denoiser lies on its device and may be rounded to its precision. It is asked for only where the scheduler
        does not say how far it has come: at the first call, and after a timestep that its list repeats.
        """
        listed, counted = self._listed, next_call(self.scheduler)
        if counted is not None:
            self._place = counted
        elif 0 <= self._place < len(listed) and listed.count(listed[self._place]) == 1:
            self._place += 1
        else:
            asked = given()
            self._place = min(range(len(listed)), key=lambda place: abs(listed[place] - asked))
        if self._place < len(listed):
            timestep, level = self._schedule[self._place]
        else:
            timestep = torch.tensor(given())
            level = noise_level(self.scheduler, timestep.item())
        self.timesteps.append(timestep)
        self.levels.append(level)
        self._levels[timestep.item()] = level  # of several calls at one rounded timestep, the one under way

    @property
    def images(self) -> int:
        """How many images the run makes."""
        return len(self.evaluations)

    @property
    def step(self) -> int:
        """Index of the call under way."""
        return len(self.timesteps) - 1

    @property
    def past_norms(self) -> Tensor:
        """The guidance norms of the calls noted so far, ``[B, calls]``."""
        return torch.stack(self.norms, 1) if self.norms else torch.zeros(self.images, 0)

    def level_at(self, timestep: float) -> NoiseLevel:
        """The noise level of any timestep of the run's scheduler; of one that is in its list, that of the latents at the call."""
        if timestep not in self._levels:
            self._levels[timestep] = noise_level(self.scheduler, timestep)
        return self._levels[timestep]

    def note_embeddings(self, embeddings: tuple[Tensor | None, ...], unconditional: int) -> None:
        """Note the text embeddings of the call under way, ``[B, ...]`` each, whose first ``unconditional`` rows are not the prompts'.

        By value: a callback may write into the very tensors of the call before.
        """
        now = tuple(None if e is None else e[unconditional:] for e in embeddings)
        self.new_condition = bool(self._embeddings) and not all(map(same_embedding, self._embeddings, now))
        if self.new_condition or not self._embeddings:
            self._embeddings = tuple(None if e is None else e.clone() for e in now)

    def note(self, observation: Observation) -> None:
        """Note the observation of the call under way."""
        self.first = self.first or observation
        self.norms.append(observation.guidance_norm.cpu())

    def rewrite_norms(self, row: int, here: Observation) -> None:
        """Put the past of a corrected row, as its observation ``here`` has it, in the place of the past that it would have had."""
        now = here.guidance_norm.to(here.past_norms)
        for norms, norm in zip(self.norms, [*here.past_norms[0], now[0]], strict=True):
            norms[row] = norm
