"""One guarded run: judge each image at the first denoiser call, steer the flagged ones there, watch the rest for free."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from sdguard.attribution import Encode
from sdguard.config import GuardConfig
from sdguard.decision import judge
from sdguard.observation import Observation
from sdguard.profile import Profile
from sdguard.report import GuardReport
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.steering.ladder import climb

logger = logging.getLogger(__name__)


class MemorizationError(RuntimeError):
    """With ``on_failure="raise"``: a sample could not be judged, or could not be steered away from a memorized picture."""


class GuardedRun:
    """The watcher of one guarded pipeline call; ``reports`` holds one `GuardReport` per image when it is over."""

    def __init__(self, config: GuardConfig, profile: Profile, prompts: list[str | None], encode: Encode) -> None:
        self.config, self.profile, self.encode = config, profile, encode
        self.conditions: dict[int, Tensor] = {}
        threshold = profile.threshold(config.false_positive_rate)
        self.reports = [GuardReport(prompt, row, threshold=threshold) for row, prompt in enumerate(prompts)]

    def observe(self, observation: Observation) -> None:
        """Look at one call: at the first decide and steer, at every one note the free signals."""
        if observation.step == 0:
            self.decide(observation)
        self.watch(observation)
        for report, evaluations in zip(self.reports, observation.evaluations.tolist(), strict=True):
            report.extra_evaluations = evaluations

    def watch(self, observation: Observation) -> None:
        """Note the guidance norm of one call; after the first it decides nothing, so an error is only logged."""
        try:
            norms = guidance_norm(observation).tolist()
        except Exception as error:
            logger.warning("sdguard: step %d could not be watched: %s: %s", observation.step, type(error).__name__, error)
            norms = [math.nan] * len(self.reports)
        for report, norm in zip(self.reports, norms, strict=True):
            report.series.setdefault("guidance_norm", []).append(norm)

    def decide(self, observation: Observation) -> None:
        """Judge every image, steer the flagged ones, and settle what becomes of those that could not be steered."""
        try:
            scores, values = judge(observation, self.profile.cascade)
        except Exception as error:  # whatever fails in a signal must reach the report, and on_failure decides what it means
            self.fail(self.reports, error)
        else:
            for report, score in zip(self.reports, scores.tolist(), strict=True):
                self.judge(report, score, {name: value[report.row].item() for name, value in values.items()})
        flagged = [report.row for report in self.reports if report.verdict == "flagged" and not report.error]
        if flagged and self.config.mode == "steer":
            self.steer(observation.select(torch.tensor(flagged)))
        for report in self.reports:
            self.settle(report)

    def fail(self, reports: list[GuardReport], error: Exception) -> None:
        """Note that images could not be judged or steered because of ``error``; they count as flagged."""
        logger.error("sdguard: %s: %s", type(error).__name__, error)
        for report in reports:
            report.verdict, report.error = "flagged", f"{type(error).__name__}: {error}"

    def judge(self, report: GuardReport, score: float, values: dict[str, float]) -> None:
        """Score, p-value, signals and flag of one image."""
        scales = self.profile.cascade.scales
        for name, value in values.items():
            if not math.isnan(value):
                report.signals[name] = {"value": value, "z": scales[name].z(torch.tensor(value)).item()}
        if not math.isfinite(score):
            self.fail([report], ArithmeticError(f"the score is {score}"))
            return
        report.score, report.p_value = score, self.profile.p_value(score)
        if report.p_value <= self.config.false_positive_rate:
            report.verdict = "flagged"

    def steer(self, observation: Observation) -> None:
        """Send the rows of ``observation`` up the ladder; verified ones are redirected."""
        reports = [self.reports[row] for row in observation.rows.tolist()]
        try:
            outcomes = climb(observation, self.profile, [report.prompt for report in reports], self.encode)
        except Exception as error:  # as in decide
            self.fail(reports, error)
            return
        for report, outcome in zip(reports, outcomes, strict=True):
            report.steering = outcome.summary()
            if outcome.condition is not None:
                self.conditions[report.row] = outcome.condition
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
