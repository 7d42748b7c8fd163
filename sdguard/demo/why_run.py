"""A prompt explained and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image

from sdguard.decision.profile import Profile
from sdguard.demo.model import Model
from sdguard.demo.profiles import find_or_make_profile
from sdguard.demo.settings import Setting
from sdguard.demo.streaming import Emit, Progress
from sdguard.denoiser.probe import probe_run
from sdguard.denoiser.text_encoding import Encoder
from sdguard.explain.explanation import Explanation, explain, unguarded_picture
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.pipeline import guard
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import GuardedRun
from sdguard.observation import Observation


@dataclass
class Why:
    """A prompt explained: its `Explanation`, the guard's report of it, the picture it gives, and the profile it was judged by.

    ``steered`` is the report of the same run steered; None where it is not flagged.
    """

    setting: Setting
    explanation: Explanation
    report: GuardReport
    picture: Image.Image
    profile: Profile
    steered: GuardReport | None = None


def judge_prompt(model: Model, setting: Setting, profile: Profile) -> GuardReport:
    """The guard's report of a setting's prompt and seed, without a picture. Cost: the run's first call, and what the guard reads."""
    pipe = model.own()
    run = GuardedRun(GuardConfig("observe", setting.rate, "pass"), profile, [setting.prompt], Encoder(pipe))

    def look(observation: Observation) -> None:
        # in the run itself, so that the score is that of a guarded run to the last digit
        run.observe(observation.at_reference)

    probe_run(pipe, [setting.prompt], [setting.seed], look, **setting.call)
    return run.reports[0]


def steer_prompt(model: Model, setting: Setting, profile: Profile) -> GuardReport:
    """The report of a run of a setting's prompt and seed that steers. Cost: the run, and what steering takes."""
    config = replace(setting, mode="steer").config(profile=profile)
    return guard(model.own(), config)(setting.prompt, generator=torch.Generator().manual_seed(setting.seed), **setting.call).guard[0]


def why(model: Model, setting: Setting, own: Profile | None, emit: Emit) -> None:
    """Emit progress, then the `Why` of a setting; raises as `compare` does."""
    setting = setting.checked(model)
    profile = find_or_make_profile(model, setting.rate, own, emit)
    emit(Progress("Judging the prompt", 0, 4))
    report = judge_prompt(model, setting, profile)
    emit(Progress("Making the picture", 1, 4, rests=True))
    picture = unguarded_picture(model.own(), setting.prompt, setting.seed, **setting.call)
    emit(Progress("Leaving out one word after the other", 2, 4, rests=True))
    explanation = explain(model.own(), setting.prompt, setting.seed, **setting.call)
    steered = None
    if report.verdict == "flagged":
        emit(Progress("Steering it away", 3, 4, rests=True))
        steered = steer_prompt(model, setting, profile)
    emit(Why(setting, explanation, report, picture, profile, steered))


def judge_edit(model: Model, setting: Setting, own: Profile | None, emit: Emit) -> None:
    """Emit the guard's report of a setting whose prompt somebody is editing; raises as `compare` does."""
    setting = setting.checked(model)
    emit(judge_prompt(model, setting, find_or_make_profile(model, setting.rate, own, emit)))
