"""What the demo computes, without a page: runs that stream what they see, and can be stopped; and what is asked of their input."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from sdguard import testbed
from sdguard.decision.calibration import calibrate, evenly, fingerprint, known_profile, ordinary_prompts, split
from sdguard.decision.cascade import BY_NAME
from sdguard.decision.profile import SERIES, Profile, scores_needed
from sdguard.denoiser.families import default_size, denoiser_of
from sdguard.denoiser.loading import check_prompts, default_setting, load_pipeline
from sdguard.denoiser.probe import observe_calls
from sdguard.denoiser.replay import clone_scheduler
from sdguard.explain.explanation import Explanation, explain
from sdguard.files.inputs import BadInput
from sdguard.files.prompt_files import read_prompts
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.pipeline import guard
from sdguard.guarded.report import GuardReport
from sdguard.observation import Observation, denoised
from sdguard.scan.scan import rank_prompts, scan, watched_reports
from sdguard.testbed.copies import RATIO, Targets, load_targets

#: what the server takes at most, whatever a page or a client sends.
LONGEST_PROMPT, MOST_IMAGES, MOST_STEPS, MOST_GUIDANCE, MOST_SEEDS = 600, 4, 100, 30.0, 4
LARGEST_FILE, MOST_PROMPTS = 2_000_000, 5_000
#: parquet is left out: what a file of that size unpacks to has no bound.
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
#: ordinary prompts for a configuration that no profile is known of: two in three are scored, which 1% needs 99 of.
QUICK_CALIBRATION = 300

Emit = Callable[[Any], None]


class Stopped(BaseException):
    """Ends work that nobody waits for any more; no `Exception`, so that nothing on the way takes it for a signal that failed."""


#: ``stop`` is what ends the work of this thread, where it is `streamed`.
_here = threading.local()
#: how long `streamed` waits for news, in seconds, before it gives way with None: so soon it can be closed, whatever the work is at.
PATIENCE = 0.25


def streamed(work: Callable[[Emit], None]) -> Generator[Any, None, None]:
    """What ``work(emit)`` emits, as it comes, from a thread of its own, and None while there is no news; then raises what it raised.

    Where the reader is slower than the work, only the newest of several events of one type is given. Closing the iterator ends the work at
    its next ``emit``, and a denoiser call that is under way in it (`stoppable`) before its next layer.
    """
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def emit(event: Any) -> None:
        if stop.is_set():
            raise Stopped
        found.put(("event", event))
        time.sleep(0.002)  # Python's locks are not fair: between two pieces of work the denoiser is somebody else's for the taking

    def run() -> None:
        _here.stop = stop
        try:
            work(emit)
            found.put(("end", None))
        except Stopped:
            found.put(("end", None))
        except BaseException as error:
            found.put(("error", error))

    threading.Thread(target=run, daemon=True).start()
    held: list[Any] = []
    try:
        while True:
            try:
                kind, value = found.get(timeout=0 if held else PATIENCE)
            except queue.Empty:
                yield held.pop() if held else None
                continue
            if held and not (kind == "event" and type(value) is type(held[0])):
                yield held.pop()
            if kind == "error":
                raise value
            if kind == "end":
                return
            held[:] = [value]
    finally:
        stop.set()


def stoppable(denoiser: nn.Module) -> None:
    """Let `streamed` work be ended within a call of ``denoiser``, steering's own among them; hangs a hook on its parts for good."""

    def check(*_: Any) -> None:
        stop = getattr(_here, "stop", None)
        if stop and stop.is_set():
            raise Stopped

    for part in denoiser.children():
        part.register_forward_pre_hook(check)


@dataclass(frozen=True)
class Example:
    """A prompt to try: its ``kind`` (verbatim, template, ordinary, near miss) and its ``text``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Model:
    """What the app runs on; nothing in it is changed by a run.

    Attributes:
        name: ``embedded``, a directory, or a hub id.
        pipe: the pipeline; every run takes a copy of its own (`own`).
        usual: steps and guidance scale it is meant for.
        targets: the memorized pictures, of the embedded model only.
        captions: theirs.
        examples: prompts to try.
    """

    name: str
    pipe: Any
    usual: Mapping[str, Any]
    targets: Targets | None = None
    captions: Sequence[str] = ()
    examples: Sequence[Example] = ()

    @classmethod
    def load(cls, name: str) -> Model:
        """Load a model onto the fastest device there is; raises `BadInput` in one sentence."""
        pipe = load_pipeline(name).to("cuda" if torch.cuda.is_available() else "cpu")
        guard(pipe)  # a class that is not supported is refused now
        stoppable(denoiser_of(pipe))
        usual = default_setting(name, None, None)
        if name != "embedded":
            ordinary = [Example("ordinary", text) for text in ordinary_prompts(pipe)[:4]]
            return cls(name, pipe, usual, examples=ordinary)
        targets, captions = load_targets(testbed.path(), pipe.vae)
        return cls(name, pipe, usual, targets, captions, embedded_examples())

    def own(self) -> Any:
        """A pipeline of a run's own: the same parts, another scheduler."""
        twin = copy.copy(self.pipe)
        twin.scheduler = clone_scheduler(self.pipe.scheduler)
        twin.set_progress_bar_config(disable=True)
        return twin


def embedded_examples() -> list[Example]:
    """Captions of the embedded model's development split, and the wording of one of them changed a little and a lot."""
    import pyarrow.parquet as pq

    rows = pq.read_table(testbed.path() / "prompts.parquet").to_pylist()
    rows = [row for row in rows if row["split"] == "development"]

    def most(kind: str) -> list[str]:
        of_kind = sorted((row for row in rows if row["kind"] == kind), key=lambda row: (-row["repetitions"], -row["copy_rate"]))
        return [row["text"] for row in of_kind]

    verbatim, template, ordinary = most("verbatim"), most("template"), most("ordinary")
    thing, rest = verbatim[0].split(" at ")
    place, medium = rest.split(", ")
    return [
        Example("verbatim", verbatim[0]),
        Example("verbatim", verbatim[1]),
        Example("template", template[0]),
        Example("template", next(text for text in template if text.split(" at ")[1] != template[0].split(" at ")[1])),
        Example("ordinary", ordinary[4]),
        Example("ordinary", ordinary[2]),
        Example("near miss", f"{thing} at {place}, {'poster' if medium != 'poster' else 'sticker'}"),
        Example("near miss", f"the {thing} of {place} as a {medium}"),
    ]


@dataclass(frozen=True)
class Setting:
    """What is asked of a guarded run; `checked` says in one sentence what is wrong with it."""

    prompt: str
    seed: int = 0
    steps: int = 10
    guidance: float = 2.5
    images: int = 1
    rate: float = 0.01
    mode: str = "steer"
    steering: tuple[str, ...] = ()

    def checked(self, model: Model) -> Setting:
        """The same, its prompt stripped; raises `BadInput` or `ValueError`, one sentence each."""
        bounded("The number of images", self.images, 1, MOST_IMAGES)
        bounded("The number of steps", self.steps, 2, MOST_STEPS)
        bounded("The guidance scale", self.guidance, 0, MOST_GUIDANCE)
        bounded("The seed", self.seed, 0, 2**32 - MOST_IMAGES)
        GuardConfig(self.mode, self.rate, steering=self.steering or None)  # type: ignore[arg-type]
        return Setting(**{**vars(self), "prompt": checked_prompt(self.prompt, model)})

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call that make its configuration."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance}


def bounded(what: str, value: float, low: float, high: float) -> None:
    """Raise `BadInput` where a number is none, or out of bounds."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise BadInput(f"{what} must lie between {low:g} and {high:g}; it is {value!r}.")


def checked_prompt(prompt: str, model: Model) -> str:
    """The prompt, stripped; raises `BadInput` where it is empty, too long, or longer than the text encoder reads."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput("Write a prompt first: there is nothing to generate from.")
    if len(prompt) > LONGEST_PROMPT:
        raise BadInput(f"The prompt has {len(prompt):,} characters; {LONGEST_PROMPT} are taken at most.")
    check_prompts([prompt.strip()], model.pipe.tokenizer)
    return prompt.strip()


def uploaded_prompts(file: str | None) -> pd.Series:
    """The prompts of an uploaded file, by row; raises `BadInput` or `ValueError` in one sentence naming the file, not its folder."""
    if not file:
        raise BadInput("Choose a file of prompts first.")
    path = Path(file)
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path.name} is of a kind that is not taken here: give {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if path.stat().st_size > LARGEST_FILE:
        raise BadInput(f"{path.name} has {path.stat().st_size / 1e6:.1f} MB; {LARGEST_FILE / 1e6:.0f} MB are taken at most.")
    try:
        prompts = read_prompts(path)
    except ValueError as error:
        raise BadInput(str(error).replace(str(path), path.name)) from None
    if len(prompts) > MOST_PROMPTS:
        raise BadInput(f"{path.name} holds {len(prompts):,} prompts; {MOST_PROMPTS:,} are taken at most.")
    if (longest := int(prompts.str.len().max())) > LONGEST_PROMPT:
        raise BadInput(f"{path.name} holds a prompt of {longest:,} characters; {LONGEST_PROMPT} are taken at most.")
    return prompts


#: profiles of one person's session, by steps and guidance scale; they come before those of the model and of the cache.
Profiles = Mapping[tuple[int, float], Profile]


def profile_known(model: Model, setting: Setting, mine: Profiles) -> Profile | None:
    """The profile a run would go by: of the session, of the model, or of the user's cache; None where none is known."""
    size = default_size(model.pipe)
    found = fingerprint(model.pipe, steps=setting.steps, guidance_scale=setting.guidance, height=size, width=size)
    return mine.get((setting.steps, float(setting.guidance))) or known_profile(model.pipe, found)


@dataclass(frozen=True)
class Progress:
    """How far a long work is: ``done`` of ``total``, and what is being done, in words."""

    doing: str
    done: int
    total: int


def profile_made(model: Model, setting: Setting, prompts: Sequence[str], emit: Emit, doing: str = "Calibrating") -> Profile:
    """A profile of a configuration from ordinary ``prompts``, at the cost of `calibrate`; raises `BadInput` if they are too few."""
    scored, needed = len(split(len(prompts))[1]) if len(prompts) >= 4 else 0, scores_needed(setting.rate)
    if scored < needed:
        raise BadInput(
            f"A false-positive rate of {setting.rate:g} needs {needed} scored prompts; of {len(prompts)} prompts {scored} are scored."
        )
    size = default_size(model.pipe)
    return calibrate(
        model.own(),
        prompts,
        steps=setting.steps,
        guidance_scale=setting.guidance,
        height=size,
        width=size,
        progress=lambda done, total: emit(Progress(doing, done, total)),
    )


def profile_for(model: Model, setting: Setting, mine: Profiles, emit: Emit) -> Profile:
    """The profile of a run: a known one, else made now from as many ordinary prompts as its rate asks for, and emitted."""
    profile = profile_known(model, setting, mine)
    if profile is None:
        enough = max(QUICK_CALIBRATION, 3 * scores_needed(setting.rate) // 2 + 3)
        doing = f"No profile is known for {setting.steps} steps at guidance {setting.guidance:g}: calibrating, once a session"
        profile = profile_made(model, setting, evenly(ordinary_prompts(model.pipe), enough), emit, doing)
        emit(profile)
    profile.threshold(setting.rate)  # refuses a rate that its prompts are too few for
    return profile


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
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


#: latents up to this size are decoded at every call; of larger ones, whose decoding would cost as much as the run, five a run.
SMALL_LATENTS = 32


def followed(pipe: Any, course: Course, steps: int, told: Callable[[], None]) -> Callable[[Observation], None]:
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
                course.estimates[call] = decoded(pipe, denoised(here.x, here.prediction, here.level))[0]
        told()
        course.seconds -= time.monotonic() - began

    return look


def compare(model: Model, setting: Setting, mine: Profiles, emit: Emit) -> None:
    """Run a setting without and with the guard from the same noise, emitting a `Comparison` after every call of the denoiser.

    Raises:
        ValueError: the setting cannot be; one sentence.
    """
    setting = setting.checked(model)
    profile = profile_for(model, setting, mine, emit)
    found = Comparison(setting, profile)

    def call(pipe: Any) -> Any:
        generators = [torch.Generator().manual_seed(setting.seed + i) for i in range(setting.images)]
        return pipe([setting.prompt] * setting.images, generator=generators, **setting.call)

    pipe, course = model.own(), found.unguarded
    emit(found)
    began = time.monotonic()
    with observe_calls(pipe, setting.call, followed(pipe, course, setting.steps, lambda: emit(found))):
        images = list(call(pipe).images)
    course.seconds += time.monotonic() - began
    branches = 2 if setting.guidance > 1 else 1
    course.evaluations = [branches * len(course.timesteps)] * setting.images
    measure(model, images, found, "ratios_before")
    course.images = images
    emit(found)

    pipe, course = model.own(), found.guarded
    look = followed(pipe, course, setting.steps, lambda: emit(found))

    def watch(observation: Observation, reports: list[GuardReport]) -> None:
        found.reports = reports
        look(observation)

    config = GuardConfig(setting.mode, setting.rate, profile=profile, steering=setting.steering or None, on_call=watch)  # type: ignore[arg-type]
    began = time.monotonic()
    output = call(guard(pipe, config))
    course.seconds += time.monotonic() - began
    found.reports = output.guard
    course.evaluations = [branches * len(course.timesteps) + report.extra_evaluations for report in output.guard]
    measure(model, list(output.images), found, "ratios_after")
    course.images = list(output.images)
    emit(found)


def measure(model: Model, images: list[Image.Image], found: Comparison, name: str) -> None:
    """Note the distance ratios of images, and of unguarded ones which memorized picture is the nearest."""
    if model.targets is None:
        return
    nearest, ratios = model.targets.nearest(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    setattr(found, name, ratios.tolist())
    found.nearest = found.nearest or nearest.tolist()


@dataclass
class Why:
    """A prompt explained: its `Explanation`, the guard's report of it, the picture it gives, and the profile it was judged by."""

    setting: Setting
    explanation: Explanation
    report: GuardReport
    picture: Image.Image
    profile: Profile


def judged(model: Model, setting: Setting, profile: Profile) -> GuardReport:
    """The guard's report of a setting's prompt and seed, without a picture. Cost: the calls that the guard watches, and its cascade."""
    return watched_reports(model.own(), profile, [setting.prompt], [setting.seed], setting.rate, setting.call)[0][0]


def why(model: Model, setting: Setting, mine: Profiles, emit: Emit) -> None:
    """Emit progress, then the `Why` of a setting; raises as `compare` does."""
    setting = setting.checked(model)
    profile = profile_for(model, setting, mine, emit)
    emit(Progress("Judging the prompt", 0, 3))
    report = judged(model, setting, profile)
    emit(Progress("Making the picture", 1, 3))
    picture = model.own()(setting.prompt, generator=torch.Generator().manual_seed(setting.seed), **setting.call).images[0]
    emit(Progress("Leaving out one word after the other", 2, 3))
    emit(Why(setting, explain(model.own(), setting.prompt, setting.seed, **setting.call), report, picture, profile))


def edited(model: Model, setting: Setting, mine: Profiles, emit: Emit) -> None:
    """Emit the guard's report of a setting whose prompt somebody is editing; raises as `compare` does."""
    setting = setting.checked(model)
    emit(judged(model, setting, profile_for(model, setting, mine, emit)))


@dataclass
class Scanned:
    """A finished scan: its ranked table, the profile it went by, and how long it took."""

    table: pd.DataFrame
    profile: Profile
    seconds: float


def scanned(model: Model, prompts: pd.Series, seeds: int, fdr: float, setting: Setting, mine: Profiles, emit: Emit) -> None:
    """Emit progress over the prompts of a file, then `Scanned`; raises as `compare` does, for the setting and for each prompt."""
    bounded("The number of seeds", seeds, 1, MOST_SEEDS)
    bounded("The false discovery rate", fdr, 0.001, 0.5)
    profile = profile_for(model, setting, mine, emit)
    found = prompts.to_dict()
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    emit(Progress("Scanning", 0, len(found)))
    for batch in scan(model.own(), profile, found, seeds=int(seeds), false_positive_rate=setting.rate, **setting.call):
        rows += batch
        emit(Progress("Scanning", len(rows), len(found)))
    emit(Scanned(rank_prompts(rows, found, fdr), profile, time.monotonic() - began))
