"""One guarded run: judge each image at the first denoiser call, steer the flagged ones there, watch the rest for free."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdguard.correction import Correction
from sdguard.decision.cascade import BY_NAME, judge, judge_later
from sdguard.decision.profile import SERIES, Profile
from sdguard.decision.store import profile_for
from sdguard.denoiser.text_encoding import Encoder
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport
from sdguard.observation import Observation
from sdguard.steering.fallback import methods_of, try_in_order
from sdguard.steering.method import SteeringInput

logger = logging.getLogger(__name__)


def profile_of(pipe: Any, config: GuardConfig, **setting: Any) -> Profile:
    """The profile that runs of a configuration (`fingerprint`'s ``setting``) go by; raises as `profile_for` does."""
    return profile_for(pipe, given=config.profile, may_calibrate=config.calibrate, prompts=config.calibration_prompts, **setting)


class MemorizationError(RuntimeError):
    """With ``on_failure="raise"``: a sample could not be judged, or could not be steered away from a memorized picture."""


class GuardedRun:
    """The watcher of one guarded pipeline call; ``reports`` holds one `GuardReport` per image when it is over."""

    def __init__(
        self, config: GuardConfig, profile: Profile, prompts: list[str | None], encoder: Encoder, restartable: bool = True
    ) -> None:
        self.config, self.profile, self.encoder, self.restartable = config, profile, encoder, restartable
        self.corrections: dict[int, Correction] = {}
        self.first: Observation | None = None
        threshold = profile.threshold(config.false_positive_rate)
        self.reports = [GuardReport(prompt, row, threshold=threshold) for row, prompt in enumerate(prompts)]

    def reads(self, step: int) -> bool:
        """The calls that are judged."""
        return step == 0 or (self.restartable and step <= len(self.profile.cascade.later))

    def observe(self, observation: Observation) -> None:
        """Look at one call: judge what is still clean, at the first by the cascade, at later ones for free; steer what is flagged."""
        self.first = self.first or observation
        if observation.step == 0:
            self.judge_first(observation)
        self.watch(observation)
        if observation.step and self.reads(observation.step):
            self.judge_later(observation)
        self.act([report for report in self.reports if report.verdict == "flagged" and report.flagged_at is None], observation.step)
        for report, evaluations in zip(self.reports, observation.evaluations.tolist(), strict=True):
            report.extra_evaluations = evaluations
        if self.config.on_call:
            self.config.on_call(self.shown(observation), self.reports)

    def shown(self, observation: Observation) -> Observation:
        """The observation for ``on_call``: under the rules that its rows follow, and with a memo and a count of evaluations of its own."""
        rules = tuple(self.corrections[row].rule if row in self.corrections else None for row in range(len(self.reports)))
        memo = None if any(rules) else dict(observation.memo or {})
        return replace(observation, rules=rules, evaluations=observation.evaluations.clone(), memo=memo)

    def watch(self, observation: Observation) -> None:
        """Note the free signals of one call; nothing is decided here, so an error is only logged."""
        for name in SERIES:
            try:
                values = BY_NAME[name].read(observation).tolist()
            except Exception as error:
                logger.warning("sdguard: step %d could not be watched: %s: %s", observation.step, type(error).__name__, error)
                values = [math.nan] * len(self.reports)
            for report, value in zip(self.reports, values, strict=True):
                report.series.setdefault(name, []).append(value)

    def judge_first(self, observation: Observation) -> None:
        """Score, p-value, signals and flag of every image by the cascade."""
        try:
            scores, values = judge(observation, self.profile.cascade)
        except Exception as error:  # whatever fails in a signal must reach the report, and on_failure decides what it means
            self.fail(self.reports, error)
            return
        for report, score in zip(self.reports, scores.tolist(), strict=True):
            for name, value in values.items():
                if not math.isnan(found := value[report.row].item()):
                    z = self.profile.cascade.scales[name].z(torch.tensor(found)).item()
                    report.signals[name] = {"value": found, "z": z}
            self.score(report, score)

    def judge_later(self, observation: Observation) -> None:
        """Flag an image that was clean so far where its guidance norm at this call says otherwise."""
        clean = [report for report in self.reports if report.verdict == "clean"]
        norms = torch.tensor([report.series["guidance_norm"][-1] for report in self.reports])
        scores = judge_later(norms, observation.step, self.profile.cascade).tolist()
        for report in clean:
            self.score(report, max(report.score if report.score is not None else -math.inf, scores[report.row]))

    def score(self, report: GuardReport, score: float) -> None:
        """Score, p-value and flag of one image."""
        if not math.isfinite(score):
            self.fail([report], ArithmeticError(f"the score is {score}"))
            return
        report.score, report.p_value = score, self.profile.p_value(score)
        if report.p_value <= self.config.false_positive_rate:
            report.verdict = "flagged"

    def fail(self, reports: list[GuardReport], error: Exception) -> None:
        """Note that images could not be judged or steered because of ``error``; they count as flagged."""
        logger.error("sdguard: %s: %s", type(error).__name__, error)
        for report in reports:
            report.verdict, report.error = "flagged", f"{type(error).__name__}: {error}"

    def act(self, flagged: list[GuardReport], step: int) -> None:
        """Steer the images that have just been flagged, and settle what becomes of those that could not be steered."""
        judged = [report for report in flagged if not report.error]
        if judged and self.config.mode == "steer":
            self.steer(judged)
        for report in flagged:
            report.flagged_at = step
            self.settle(report)

    def steer(self, reports: list[GuardReport]) -> None:
        """Try steering methods in order on images, from their own beginning; verified ones are corrected."""
        assert self.first is not None
        observation = self.first.select(torch.tensor([report.row for report in reports]))
        flagged = SteeringInput.of(observation, [report.prompt for report in reports], self.encoder, self.profile, self.config.rewriter)
        try:
            outcomes = try_in_order(flagged, methods_of(self.profile, self.config.steering))
        except Exception as error:  # as in judge_first
            self.fail(reports, error)
            return
        for report, outcome in zip(reports, outcomes, strict=True):
            report.steering = outcome.summary()
            if outcome.correction is not None:
                self.corrections[report.row] = outcome.correction
                report.verdict = "steered"

    def settle(self, report: GuardReport) -> None:
        """What becomes of an image that is still flagged; errors count as flagged."""
        if report.verdict != "flagged" or self.config.mode == "observe":
            return
        if self.config.mode == "steer" and self.config.on_failure == "raise":
            raise MemorizationError(
                f"Image {report.row}: {report.error or 'predicted to be memorized, and no steering passed verification'}."
            )
        if self.config.mode == "block" or self.config.on_failure == "withhold":
            report.verdict = "withheld"


def blank(images: Any, withheld: list[int]) -> Any:
    """The pipeline's images with the withheld ones blanked, whatever form they were asked for in."""
    from PIL import Image

    if not withheld:
        return images
    if isinstance(images, list):
        return [Image.new(image.mode, image.size) if i in withheld else image for i, image in enumerate(images)]
    images = images.clone() if isinstance(images, Tensor) else images.copy()
    images[withheld] = 0
    return images
