"""What the hook knows of a run so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdguard.denoiser.hidden_texts import Embeddings, HiddenTexts, is_alike
from sdguard.denoiser.latents import Patches
from sdguard.denoiser.schedulers import ScheduledCall, clone_scheduler, place_of, scheduled_calls
from sdguard.observation import NoiseLevel, Observation, noise_level

#: share of a timestep that bf16 may round away.
ROUNDED = 2**-8


def same_embedding(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two embeddings are the same."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one, other)


def version_of(tensor: Tensor | None) -> int | None:
    """How often a tensor was written into; None where that is not counted, as of tensors made in inference mode."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def at_hand(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a GPU."""
    return tensor.device.type == "cpu"


def untouched(one: tuple[Tensor | None, int | None], other: tuple[Tensor | None, int | None]) -> bool:
    """Whether two tensors, each with its version, are one that was surely not written into in between."""
    return one[0] is other[0] and one[1] == other[1] and (one[0] is None or one[1] is not None)


@dataclass
class RunRecord:
    """The denoiser calls of one run so far; of a step whose branches are two calls, the step.

    Attributes:
        scheduler: the run's own.
        initial_scheduler: a copy of it from before its first step.
        dtype: of the pipeline's latents.
        patches: rows and columns of the latents' patches where they travel as a sequence, else None.
        evaluations: ``[B]``, the extra denoiser evaluations spent on each image.
        origin: the clean latents that were noised to start from, as in image-to-image; None where it is noise alone.
        schedule: the calls that the scheduler has planned.
        timesteps: of each call, the scheduler's, on the CPU.
        levels: of each call, the noise level.
        guidance_scales: of each call; a callback may change it in mid-run.
        norms: of each call, the guidance norm of every image, ``[B]``.
        first: the observation of the first call that was observed.
        last_timestep: of the scheduler's list.
        noise: what the images are made from, at the guard's own reference call, ``[B, C, H, W]``.
        half_made: whether the run was handed over latents that are no noise any more.
        new_condition: whether the text condition of the call under way is another than that of the call before.
        hidden_texts: what it was where that is told by nothing but its values, of the calls since these were last asked for; None where
            none was looked for.
    """

    scheduler: Any = None
    initial_scheduler: Any = None
    dtype: torch.dtype = torch.float32
    patches: Patches = None
    evaluations: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    origin: Tensor | None = None
    schedule: list[ScheduledCall] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    levels: list[NoiseLevel] = field(default_factory=list)
    guidance_scales: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    first: Observation | None = None
    noise: Tensor = field(default_factory=lambda: torch.zeros(0))
    last_timestep: float | None = None
    half_made: bool = False
    new_condition: bool = False
    hidden_texts: HiddenTexts | None = None
    _embeddings: Embeddings | None = None
    _first_given: float | None = None
    _given: tuple[tuple[Tensor | None, int | None], ...] = ()
    _levels: dict[float, NoiseLevel] = field(default_factory=dict)

    def begin(self, scheduler: Any, images: int, dtype: torch.dtype, given: Tensor | float, places: Tensor | None = None) -> None:
        """Note what the first call says of the run: its scheduler, how many images it makes, and the ``places`` of patches, if any.

        ``given`` is its timestep, which is read here where `note_timestep` would have to; all at once, so that a GPU is waited for once.
        """
        self.scheduler, self.initial_scheduler = scheduler, clone_scheduler(scheduler)
        self.dtype = dtype
        with torch.inference_mode(False):  # it is counted in that mode and outside of it
            self.evaluations = torch.zeros(images, dtype=torch.long)
        timesteps, beside = scheduler.timesteps, []
        if places is not None:
            places = places[0] if places.ndim == 3 else places
            own = places[:, 0] == 0  # another picture's patches stand behind them
            beside += [(places[:, 1] * own).max(), own.sum()]
        if place_of(scheduler, given) is None:
            beside.append(torch.as_tensor(given).flatten()[0])
        told = torch.cat([timesteps.double(), *(value.to(timesteps.device, torch.double)[None] for value in beside)]).cpu()
        timesteps, values = told[: len(timesteps)].to(timesteps.dtype), told[len(timesteps) :].tolist()
        if places is not None:
            last_row, count, *values = values
            self.patches = int(last_row) + 1, int(count) // (int(last_row) + 1)
        self._first_given = next(iter(values), None)
        self.schedule = scheduled_calls(scheduler, timesteps)
        self._levels = {call.timestep.item(): call.level for call in self.schedule}
        self.last_timestep = next(reversed(self._levels), None)

    def note_timestep(self, given: Tensor | float, scale: float = 1.0) -> None:
        """Note the timestep and the noise level of the call under way, by the scheduler's own list.

        What is ``given`` to the denoiser, times ``scale``, lies on its device and may be rounded to its precision. It is read only where it
        is no part of the list, and where the scheduler does not count.
        """
        place = place_of(self.scheduler, given)
        if place is not None and place >= len(self.schedule):  # a loop of its own has planned more calls since
            self.schedule = scheduled_calls(self.scheduler, self.scheduler.timesteps.cpu())
        if place is not None:
            timestep, level = self.schedule[place]
        else:
            first, self._first_given = self._first_given, None
            value = (float(torch.as_tensor(given).flatten()[0]) if first is None else first) * scale
            timestep, level = min(self.schedule, key=lambda call: abs(call.timestep.item() - value))
            if abs(timestep.item() - value) > ROUNDED * value:
                timestep, level = torch.tensor(value), noise_level(self.scheduler, value)
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

    def note_embeddings(self, embeddings: Embeddings, unconditional: int) -> None:
        """Note the text embeddings of the call under way, ``[B, ...]`` each, whose first ``unconditional`` rows are not the prompts'.

        The very tensors of the call before, into which torch has counted no write, are taken for the same without asking a GPU: what may
        have been written past its count is noted in ``hidden_texts``. Others, and those that lie on the CPU, are compared by value at once,
        as a callback may write into them, or hand over equal ones.
        """
        tokens, pooled = embeddings
        before, self._given = self._given, tuple((e, version_of(e)) for e in embeddings)
        now = tokens[unconditional:], None if pooled is None else pooled[unconditional:]
        judged, self.new_condition = self._embeddings, False
        hidden = self.hidden_texts or (HiddenTexts(judged) if judged else None)
        if judged and hidden and not at_hand(tokens) and all(map(untouched, before, self._given)) and is_alike(now, judged, hidden.texts):
            self.hidden_texts = hidden
            hidden.note(judged, now, self.step)
            return
        self.new_condition = judged is not None and not all(map(same_embedding, judged, now))
        if self.new_condition or judged is None:
            self._embeddings = now[0].clone(), None if now[1] is None else now[1].clone()

    def note(self, observation: Observation) -> None:
        """Note the observation of the call under way."""
        self.first = self.first or observation
        self.norms.append(observation.guidance_norm)

    def rewrite_norms(self, row: int, here: Observation) -> None:
        """Put the past of a corrected row, as its observation ``here`` has it, in the place of the past that it would have had."""
        now = here.guidance_norm.to(here.past_norms)
        past = torch.cat([here.past_norms[0], now])
        self.norms = [
            norms.index_fill(0, torch.tensor(row, device=norms.device), norm) for norms, norm in zip(self.norms, past, strict=True)
        ]
