"""The same prompt and noise without and with the guard, as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdguard.decision.cascade import BY_NAME
from sdguard.decision.profile import SERIES, Profile
from sdguard.demo.model import Model
from sdguard.demo.profiles import find_or_make_profile
from sdguard.demo.settings import Setting
from sdguard.demo.streaming import Emit
from sdguard.denoiser.probe import observe_calls
from sdguard.guarded.pipeline import guard
from sdguard.guarded.report import GuardReport
from sdguard.observation import Observation, denoised
from sdguard.testbed.copies import RATIO


@torch.no_grad()
def decode_latents(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Latents ``[B, C, H, W]`` as pictures, as the pipeline itself decodes them."""
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    images = pipe.vae.decode((latents / pipe.vae.config.scaling_factor + shift).to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(images, output_type="pil")


@dataclass
class Course:
    """One run as it goes.

    Attributes:
        name: ``unguarded`` or ``guarded``.
        timesteps: of the calls so far.
        estimates: the denoised estimate of the first image at the calls it was decoded at, by call.
        series: each free signal at every call, ``[images][calls]``.
        images: the pictures, once they are there.
        evaluations: denoiser evaluations of each image, steering's and verification's included.
        seconds: how long the run took without what was done to show it.
    """

    name: str
    timesteps: list[float] = field(default_factory=list)
    estimates: dict[int, Image.Image] = field(default_factory=dict)
    series: dict[str, list[list[float]]] = field(default_factory=dict)
    images: list[Image.Image] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Comparison:
    """The same prompt and noise without and with the guard, as far as they have come.

    Attributes:
        nearest, ratios_before, ratios_after: for each image, which target its unguarded twin is nearest to and the distance ratio of the
            copy criterion of both; empty where the model's training pictures are not known.
    """

    setting: Setting
    profile: Profile
    unguarded: Course = field(default_factory=lambda: Course("unguarded"))
    guarded: Course = field(default_factory=lambda: Course("guarded"))
    reports: list[GuardReport] = field(default_factory=list)
    nearest: list[int] = field(default_factory=list)
    ratios_before: list[float] = field(default_factory=list)
    ratios_after: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return bool(self.guarded.images)

    def copied(self, row: int) -> tuple[bool, bool]:
        """Whether an image is a copy by the distance ratio, unguarded and guarded; a withheld one is none."""
        withheld = self.reports[row].verdict == "withheld"
        return self.ratios_before[row] < RATIO, self.ratios_after[row] < RATIO and not withheld

    def identical(self, row: int) -> bool:
        """Whether an image is the same without and with the guard, bit by bit."""
        return bool(np.array_equal(np.asarray(self.unguarded.images[row]), np.asarray(self.guarded.images[row])))


#: latents up to this size are decoded at every call; of larger ones, whose decoding would cost as much as the run, five a run.
SMALL_LATENTS = 32


def follow(pipe: Any, course: Course, steps: int, notify: Callable[[], None]) -> Callable[[Observation], None]:
    """A look at each call that notes timestep, signals and denoised estimate in ``course``; its time is taken off the run's."""

    def look(observation: Observation) -> None:
        began = time.monotonic()
        course.timesteps.append(observation.timestep)
        for name in SERIES:
            values = BY_NAME[name].read(observation).tolist()
            for row, value in enumerate(values):
                course.series.setdefault(name, [[] for _ in values])[row].append(value)
        call = observation.step
        if observation.x.shape[-1] <= SMALL_LATENTS or call % max(1, steps // 4) == 0:
            here = observation.select(torch.tensor([0]))
            if here.x.shape[1] == getattr(pipe.vae.config, "latent_channels", -1):
                course.estimates[call] = decode_latents(pipe, denoised(here.x, here.prediction, here.level))[0]
        notify()
        course.seconds -= time.monotonic() - began

    return look


def compare(model: Model, setting: Setting, own: Profile | None, emit: Emit) -> None:
    """Run a setting without and with the guard from the same noise, emitting a `Comparison` after every call of the denoiser.

    Raises:
        ValueError: the setting cannot be; one sentence.
    """
    setting = setting.checked(model)
    profile = find_or_make_profile(model, setting.rate, own, emit)
    found = Comparison(setting, profile)

    def call(pipe: Any) -> Any:
        generators = [torch.Generator().manual_seed(setting.seed + i) for i in range(setting.images)]
        return pipe([setting.prompt] * setting.images, generator=generators, **setting.call)

    pipe, course = model.own(), found.unguarded
    emit(found)
    began = time.monotonic()
    with observe_calls(pipe, setting.call, follow(pipe, course, setting.steps, lambda: emit(found))):
        images = list(call(pipe).images)
    course.seconds += time.monotonic() - began
    branches = 2 if setting.guidance > 1 else 1
    course.evaluations = [branches * len(course.timesteps)] * setting.images
    note_ratios(model, images, found, "ratios_before")
    course.images = images
    emit(found)

    pipe, course = model.own(), found.guarded
    look = follow(pipe, course, setting.steps, lambda: emit(found))

    def watch(observation: Observation, reports: list[GuardReport]) -> None:
        found.reports = reports
        look(observation)

    began = time.monotonic()
    output = call(guard(pipe, setting.config(profile=profile, on_call=watch)))
    course.seconds += time.monotonic() - began
    found.reports = output.guard
    # the guard is not shown every call of a run without guidance
    course.evaluations = [plain + report.extra_evaluations for plain, report in zip(found.unguarded.evaluations, output.guard, strict=True)]
    note_ratios(model, list(output.images), found, "ratios_after")
    course.images = list(output.images)
    emit(found)


def note_ratios(model: Model, images: list[Image.Image], found: Comparison, name: str) -> None:
    """Note the distance ratios of images, and of unguarded ones which memorized picture is the nearest."""
    if model.targets is None:
        return
    nearest, ratios = model.targets.nearest(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    setattr(found, name, ratios.tolist())
    found.nearest = found.nearest or nearest.tolist()
