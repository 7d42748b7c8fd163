"""What the hook knows of a run so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.denoiser.schedulers import clone_scheduler
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
        timesteps: of each call, the scheduler's.
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
    guidance_scales: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    first: Observation | None = None
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    last_timestep: float | None = None
    half_made: bool = False
    new_condition: bool = False
    _embeddings: tuple[Tensor | None, ...] = ()
    _levels: dict[float, NoiseLevel] = field(default_factory=dict)

    def begin(self, scheduler: Any, images: int, dtype: torch.dtype, patch_rows: int) -> None:
        """Note what the first call says of the run: its scheduler, how many images it makes, and how its latents travel."""
        self.scheduler, self.initial_scheduler = scheduler, clone_scheduler(scheduler)
        self.dtype, self.patch_rows = dtype, patch_rows
        with torch.inference_mode(False):  # it is counted in that mode and outside of it
            self.evaluations = torch.zeros(images, dtype=torch.long)
        # all at once: one by one, between calls of the network, each would take several times as long
        self._levels = {t: noise_level(scheduler, t) for t in scheduler.timesteps.tolist()}
        self.last_timestep = next(reversed(self._levels), None)

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
        """The noise level of any timestep of the run's scheduler."""
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
