"""One guarded run: judge each image at the first denoiser call, and wherever its text condition changes; steer what is flagged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor

from sdguard import __version__
from sdguard.correction import Correction
from sdguard.decision.cache import model_name, name_of
from sdguard.decision.calibration import same_picture
from sdguard.decision.cascade import judge
from sdguard.decision.profile import SAME_PICTURE, SERIES, Profile
from sdguard.decision.store import OTHER_ADAPTERS, identity_now, profile_now
from sdguard.decision.traffic import append_scores
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.text_encoding import Encoder
from sdguard.geometry.reference import LESS_NOISED_LOG_SNR, LOG_SNR, NOISED_LOG_SNR, recurrence, reference_end, timestep_at
from sdguard.geometry.rowwise import correlation
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.report import GuardReport
from sdguard.observation import Observation, Prediction, denoised
from sdguard.steering.fallback import Outcome, methods_of, try_in_order
from sdguard.steering.method import Method, SteeringInput

logger = logging.getLogger(__name__)


#: log signal-to-noise ratios from which on a steered run is looked at: timesteps 800 and 650 of Stable Diffusion's 1,000. The sooner a
#: correction is found wanting, the less of the run has to be made again; what the text draws is settled in outline at the second.
LOOKS_LOG_SNR = (-3.3, -2.0)
#: what a report says in place of a profile's name where there was none.
WITHOUT_PROFILE = "without a profile: whether two noises give one picture"


def profile_of(pipe: Any, config: GuardConfig, adapter_scale: float | None = None) -> Profile | None:
    """The profile that runs of a pipeline go by, LoRA scaled by ``adapter_scale`` where a call says so.

    None where none is known and ``config.on_unknown`` has it go on without; raises as `profile_now` does.
    """
    return profile_now(
        pipe, given=config.profile, on_unknown=config.on_unknown, prompts=config.calibration_prompts, adapter_scale=adapter_scale
    )


def model_of(pipe: Any, profile: Profile | None, adapter_scale: float | None = None) -> str:
    """The name of a pipeline's model, in any precision: its profile's, unless there is none or it was made with other adapters."""
    if profile and not profile.note.startswith(OTHER_ADAPTERS):
        return model_name(profile.model)
    return model_name(identity_now(pipe, adapter_scale))


class MemorizationError(RuntimeError):
    """With ``on_failure="raise"``: a sample could not be judged, or could not be steered away from a memorized picture.

    ``reports`` has what is known of every image of the call.
    """

    def __init__(self, message: str, reports: Sequence[GuardReport] = ()) -> None:
        super().__init__(message)
        self.reports = list(reports)


class GuardedRun:
    """The watcher of one guarded pipeline call; ``reports`` holds one `GuardReport` per image when it is over.

    Without a profile an image is flagged where two noises give one picture, and not steered.

    Args:
        model: the model's name (`model_of`); by default that of the profile's.
    """

    def __init__(
        self,
        config: GuardConfig,
        profile: Profile | None,
        prompts: list[str | None],
        encoder: Encoder,
        limits: Sequence[str] = (),
        model: str | None = None,
    ) -> None:
        self.config, self.profile, self.encoder = config, profile, encoder
        self.corrections: dict[int, Correction] = {}
        #: what was asked of steering and what it has tried, by row
        self.steering: dict[int, tuple[SteeringInput, Outcome]] = {}
        self.seen: Observation | None = None
        #: how many of `LOOKS_LOG_SNR` are over, and whether the picture was seen
        self.looks, self.ended = 0, False
        #: as the hook goes on counting them, ``[B]``
        self.evaluations = torch.zeros(len(prompts), dtype=torch.long)
        #: values of `SERIES` since the reports were last brought up to date, ``[calls, signals, B]`` each
        self.watched: list[Tensor] = []
        #: what the text of a steered row draws by itself, ``[C, H, W]``
        self.avoided: dict[int, Tensor] = {}
        name = name_of(profile) if profile else None
        judged_by = ", ".join(filter(None, [f"profile {name}", profile.note])) if profile else WITHOUT_PROFILE
        self.rates = [self.rate_of(prompt, prompts) for prompt in prompts]
        thresholds = [profile.threshold(rate) if profile else SAME_PICTURE for rate in self.rates]
        occasion: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "version": __version__,
            "model": model or (model_name(profile.model) if profile else None),
            "profile": name,
        }
        seeds = seeds_in(encoder.given.get("generator"), len(prompts))
        self._reports = [
            GuardReport(
                prompt,
                row,
                threshold=threshold,
                judged_by=judged_by,
                limits=list(limits),
                id=uuid4().hex,
                seed=seed,
                false_positive_rate=rate if profile else None,
                **occasion,
            )
            for row, (prompt, threshold, rate, seed) in enumerate(zip(prompts, thresholds, self.rates, seeds, strict=True))
        ]

    @property
    def reports(self) -> list[GuardReport]:
        """One `GuardReport` per image, its series up to date."""
        self.bring_up_to_date()
        return self._reports

    def bring_up_to_date(self, *beside: Tensor) -> list[float]:
        """Put the series as far as they have come into the reports; returns values of ``beside``. A GPU is waited for once for all."""
        (*watched,), self.watched = self.watched, []
        parts = [*watched, *beside]
        values = torch.cat([part.flatten().to(parts[0].device, torch.float) for part in parts]).tolist() if parts else []
        for (name, report), value in zip(list(product(SERIES, self._reports)) * sum(map(len, watched)), values, strict=False):
            report.series.setdefault(name, []).append(value)
        return values[sum(map(Tensor.numel, watched)) :]

    @property
    def withheld(self) -> list[int]:
        """The rows that nobody is to see."""
        return [report.row for report in self._reports if report.verdict == "withheld"]

    def rate_of(self, prompt: str | None, prompts: list[str | None]) -> float:
        """The false-positive rate of one of a prompt's images; of embeddings all that is known is how many images each makes."""
        each = int(self.encoder.given.get("num_images_per_prompt") or 1)
        count = each if prompt is None else prompts.count(prompt)
        return self.config.false_positive_rate / (count if self.config.rate_per == "prompt" else 1)

    def reads(self, step: int) -> bool:
        """The call that is judged whatever happens; one with another text condition is shown as well."""
        return step == 0

    def expects(self, rows: int, branches: int) -> bool:
        """Whether a call has a row for each branch of each image; what is made by any other is not judged, and none of it is clean."""
        if rows == branches * len(self._reports):
            return True
        told = f"a call of the denoiser had {rows} rows where {len(self._reports)} images with {branches} branches were expected"
        unjudged = [report for report in self._reports if not report.error and report.verdict != "withheld"]
        if unjudged:
            self.fail(unjudged, RuntimeError(f"{told}, so that it cannot be told what is whose"))
        for report in unjudged:
            self.settle(report)
        return False

    def follows(self, step: int) -> bool:
        """The call that is judged, and all where something is steered, or somebody else is to see them."""
        return step == 0 or bool(self.corrections) or self.config.on_call is not None

    def glance(self, prediction: Prediction, calls: int) -> None:
        """Note the free signals of calls of which nothing else is asked."""
        self.watch(prediction, calls)

    def observe(self, observation: Observation) -> None:
        """Look at one call: judge the first, and any whose text condition is another; steer what is flagged at the first."""
        self.watch(observation)
        self.seen = observation
        if observation.step == 0:
            for report in self._reports:
                report.limits += [f"patch {name}" for name in observation.patches]
            self.judge(observation, self._reports)
            self.log_scores()
        elif observation.new_condition:
            self.judge_again(observation, self._reports)
        self.watch_steered(observation)
        self.act(observation, [report for report in self._reports if report.verdict == "flagged" and report.flagged_at is None])
        self.evaluations = observation.evaluations
        self.count()
        if self.config.on_call:
            self.config.on_call(self.shown(observation), self.reports)

    def lost(self, row: int, error: Exception) -> None:
        """Note that an image cannot be steered because of ``error``; the pipeline goes on with it as it was."""
        report = self.reports[row]
        self.flag_again([row])
        self.fail([report], error)
        report.flagged_at = max(map(len, report.series.values()), default=1) - 1
        self.settle(report)

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        """Judge images whose text was written into unseen by what it was; of several texts that is known of the last only.

        Each is flagged at the call that had it first; nothing can be steered any more. Cost: 2 evaluations an image where there is one.
        """
        values = self.bring_up_to_date(hidden.found)
        places, several = values[: len(self._reports)], values[len(self._reports) :]
        steps = [hidden.steps[int(place)] if place >= 0 else -1 for place in places]
        reports = self.judge_again(observation, [report for report in self._reports if steps[report.row] >= 0])
        if unknown := [report for report in reports if several[report.row] and report.verdict != "flagged"]:
            self.fail(unknown, RuntimeError("its embeddings were written into at several calls, past torch's count of writes"))
        for step in sorted({steps[report.row] for report in reports}):
            flagged = [report for report in reports if report.verdict == "flagged" and steps[report.row] == step]
            self.act(replace(observation, step=step), flagged)
        self.evaluations = observation.evaluations
        self.count()

    def judge_again(self, observation: Observation, reports: list[GuardReport]) -> list[GuardReport]:
        """Judge those images of ``reports`` that a new text may change, and return them: not those flagged, nor those that have a text of
        steering's."""
        textless = [row for row in self.steered if self.corrections[row].condition is None]
        open_to_it = [report for report in reports if report.verdict == "clean" or report.row in textless]
        if open_to_it:
            self.judge(observation, open_to_it)
        for report in open_to_it:  # what was steered by something else than its text has another text now, and is what it was, or worse
            if report.verdict == "flagged":
                report.flagged_at = None
        return open_to_it

    def count(self) -> None:
        """Note what was spent on each image so far."""
        for report, evaluations in zip(self._reports, self.evaluations.tolist(), strict=True):
            report.extra_evaluations = evaluations

    def finish(self) -> None:
        """Settle the images of a run whose first call was never seen, wherever it was made: what was not read is not clean.

        Nor is that steered whose picture was not asked: where the scheduler's last step was not taken, it is what the last call promises.
        """
        if self.steered and not self.ended and self.seen is not None:
            if self.seen.level.log_snr < LOOKS_LOG_SNR[-1]:  # there is no outline yet that could be asked
                self.flag_again(self.steered)
            here = self.corrected(self.seen, list(range(len(self._reports))))
            self.made(denoised(here.x, here.prediction, here.level))
        self.count()
        unseen = [report for report in self._reports if report.score is None and not report.error]
        if unseen:
            self.fail(unseen, RuntimeError("the guard saw no call of the denoiser"))
            for report in unseen:
                self.settle(report)

    def abandon(self, error: BaseException) -> None:
        """Note in the reports of a run that an error has ended what was not judged by then; nothing of it was delivered."""
        for report in self._reports:
            if report.score is None and not report.error:
                report.verdict, report.error = "flagged", f"{type(error).__name__}: {error}"

    def shown(self, observation: Observation) -> Observation:
        """The observation for ``on_call``: under the rules that its rows follow, and with a memo and a count of evaluations of its own."""
        rules = tuple(self.corrections[row].rule if row in self.corrections else None for row in range(len(self._reports)))
        memo = None if any(rules) else dict(observation.memo or {})
        return replace(observation, rules=rules, evaluations=observation.evaluations.clone(), memo=memo)

    def watch(self, prediction: Prediction, calls: int = 1) -> None:
        """Note the free signals of as many calls; nothing is decided here, so an error is only logged.

        The values stay where they are until somebody asks for them: a GPU is not waited for at each call.
        """
        values = []
        for name, read in SERIES.items():
            try:
                values.append(read(prediction).float())
            except Exception as error:
                logger.warning("sdguard: %s could not be read of a call: %s: %s", name, type(error).__name__, error)
                values.append(prediction.x.new_full((len(prediction.x),), math.nan))
        self.watched.append(torch.stack(values).unflatten(1, (calls, -1)).movedim(1, 0))

    def judge(self, observation: Observation, reports: list[GuardReport]) -> None:
        """Score, p-value, signals and flag of images by the cascade, at the guard's own reference call.

        Without a profile the score is the correlation of what the text draws from two noises. Cost: that of `same_picture`.
        """
        rows = torch.tensor([report.row for report in reports], dtype=torch.long)
        try:
            seen = observation.at_reference.select(rows)
        except Exception as error:  # as in judge_seen
            self.fail(reports, error)
            return
        self.judge_seen(seen, reports)

    def judge_seen(self, seen: Observation, reports: list[GuardReport]) -> None:
        """`judge` images by the reference call of their rows; where that fails, each by its own, so that none fails for its neighbours."""
        try:
            if self.profile:
                scores, values = judge(seen, self.profile.cascade)
            else:
                scores, values = torch.tensor(same_picture(seen)["reference_agreement"]), {}
        except Exception as error:  # whatever fails in a signal must reach the report, and on_failure decides what it means
            if len(reports) == 1:
                self.fail(reports, error)
                return
            for place, report in enumerate(reports):
                self.judge_seen(seen.select(torch.tensor([place])), [report])
            return
        for place, (report, score) in enumerate(zip(reports, scores.tolist(), strict=True)):
            if report.score is not None and score <= report.score:
                continue
            for name, value in values.items():
                if self.profile and not math.isnan(found := value[place].item()):
                    z = self.profile.cascade.scales[name].z(torch.tensor(found), seen.level.log_snr).item()
                    report.signals[name] = {"value": found, "z": z}
            self.score(report, score)

    def log_scores(self) -> None:
        """Append what the first call gave each image to the user's log; what cannot be written is logged and stops nothing."""
        if not self.config.score_log or not self.profile:
            return
        rows, name = [], name_of(self.profile)
        for report in self._reports:
            if report.score is not None:
                prompt = {"prompt": report.prompt} if self.config.log_prompts else {}
                values = {signal: entry["value"] for signal, entry in report.signals.items()}
                rows.append({"time": time.time(), "profile": name, "score": report.score, "signals": values, **prompt})
        try:
            append_scores(Path(self.config.score_log), rows)
        except OSError as error:
            logger.warning("sdguard: the log of scores %s cannot be written to: %s", self.config.score_log, error.strerror)

    def score(self, report: GuardReport, score: float) -> None:
        """Score, p-value and flag of one image."""
        if not math.isfinite(score):
            self.fail([report], ArithmeticError(f"the score is {score}"))
            return
        report.score, report.p_value = score, self.profile.p_value(score) if self.profile else None
        if score > SAME_PICTURE if report.p_value is None else report.p_value <= self.rates[report.row]:
            report.verdict = "flagged"

    def fail(self, reports: list[GuardReport], error: Exception) -> None:
        """Note that images could not be judged or steered because of ``error``; they count as flagged."""
        logger.error("sdguard: %s: %s", type(error).__name__, error)
        for report in reports:
            report.verdict, report.error = "flagged", f"{type(error).__name__}: {error}"

    def act(self, observation: Observation, flagged: list[GuardReport]) -> None:
        """Steer images that have just been flagged, and settle what becomes of those that were not steered.

        Steering needs a profile, and is for the first call of a run from noise: what was drawn before, by another run or for another text,
        cannot be taken back.
        """
        judged = [report for report in flagged if not report.error]
        if judged and self.profile and self.config.mode == "steer" and observation.step == 0 and not observation.half_made:
            self.steer(observation, judged, self.profile)
        for report in flagged:
            report.flagged_at = observation.step
            self.settle(report)

    def steer(self, observation: Observation, reports: list[GuardReport], profile: Profile) -> None:
        """Try steering methods in order on images, from their own beginning; verified ones are corrected."""
        rows = torch.tensor([report.row for report in reports])
        prompts = [report.prompt for report in reports]
        try:
            with able_to_descend():
                flagged = SteeringInput.of(observation.select(rows), prompts, self.encoder, profile, self.config.rewriter)
                outcomes = try_in_order(flagged, self.methods)
                avoided = reference_end(flagged.observation, 0)
        except Exception as error:  # as in judge
            self.fail(reports, error)
            return
        for place, (report, outcome) in enumerate(zip(reports, outcomes, strict=True)):
            self.avoided[report.row] = avoided[place]
            self.steering[report.row] = flagged.select([place]), outcome
            self.take(report, outcome)

    @property
    def methods(self) -> list[Method]:
        """The steering methods in the order in which they are tried."""
        assert self.profile is not None
        return methods_of(self.profile, self.config.steering)

    def take(self, report: GuardReport, outcome: Outcome) -> None:
        """Put what steering has come to for an image into force, and into its report."""
        assert self.profile is not None
        report.steering = {**(report.steering or {}), **outcome.summary(), "limits": self.profile.limits()}
        if outcome.correction is not None:
            self.corrections[report.row] = outcome.correction
            report.verdict = "steered"

    def steer_again(self, rows: list[int]) -> None:
        """Go on with what has not been tried on steered rows that the run has shown to come back; their run is made again up to here."""
        for row in rows:
            flagged, outcome = self.steering[row]
            report, at = self._reports[row], self._reports[row].flagged_at
            self.flag_again([row])
            found = {name: value for name, value in (report.steering or {}).items() if name not in ("limits", *outcome.summary())}
            outcome.attempts[-1].update(found)
            report.steering = outcome.summary()
            try:
                with able_to_descend():
                    (outcome,) = try_in_order(flagged, self.methods, [outcome])
            except Exception as error:  # as in judge
                self.fail([report], error)
                continue
            self.steering[row] = flagged, outcome
            self.take(report, outcome)
            report.flagged_at = at if report.verdict == "steered" else None

    def flag_again(self, rows: list[int]) -> None:
        """Withdraw what was called steered."""
        for row in rows:
            report = self._reports[row]
            report.verdict, report.flagged_at, report.steering = "flagged", None, {**(report.steering or {}), "passed": None}

    @property
    def steered(self) -> list[int]:
        """The rows that count as steered."""
        return [report.row for report in self._reports if report.verdict == "steered"]

    def watch_steered(self, observation: Observation) -> None:
        """Hold steered rows against what they were steered away from, and against all that the denoiser knows by heart.

        Denoised estimates that are the avoided picture's, once there is as much signal as noise, withdraw the steering. Before, at the
        first calls from `LOOKS_LOG_SNR` on, what the text draws from there is asked to come back from noise; where it does, the next
        correction is tried. Cost: 1 evaluation an image and look, that of a rule, and of what is tried again.
        """
        if not observation.step:
            return
        over = sum(observation.level.log_snr >= look for look in LOOKS_LOG_SNR)
        due, self.looks, refuted = over > self.looks, over, []
        if (rows := self.steered) and due:
            here = self.corrected(observation, rows)
            ruled = torch.tensor([rule is not None for rule in here.rules], device=here.x.device).view(-1, 1, 1, 1)
            drawn = torch.where(ruled, here.prediction, here.eps_c)  # what a rule follows, and else the text alone
            refuted = self.memorized(rows, denoised(here.x, drawn, here.level))
            self.steer_again(refuted)
        if (rows := [row for row in self.steered if row not in refuted]) and observation.level.log_snr >= LOG_SNR:
            here = self.corrected(observation, rows)
            self.flag_again(self.resembling(rows, denoised(here.x, here.prediction, here.level)))

    def corrected(self, observation: Observation, rows: list[int]) -> Observation:
        """Rows of a call under the rules that they follow."""
        rules = [self.corrections[row].rule if row in self.corrections else None for row in rows]
        return replace(observation.select(torch.tensor(rows)), rules=tuple(rules))

    def made(self, latents: Tensor) -> None:
        """Withdraw steering where the run's own picture ``[B, C, H, W]`` is the avoided one, or any that comes back from noise.

        Cost: 2 evaluations for each steered image.
        """
        self.ended = True
        if rows := self.steered:
            self.flag_again(self.resembling(rows, latents[rows]))
        for log_snr in (NOISED_LOG_SNR, LESS_NOISED_LOG_SNR):
            if rows := self.steered:
                self.flag_again(self.memorized(rows, latents[rows], log_snr))
        self.count()
        for report in self.reports:
            if report.verdict == "flagged" and report.flagged_at is None:
                report.flagged_at = max(map(len, report.series.values()), default=1) - 1
                self.settle(report)

    def memorized(self, rows: list[int], pictures: Tensor, log_snr: float = NOISED_LOG_SNR) -> list[int]:
        """Which of the rows have a picture ``[n, C, H, W]`` that comes back from noise: one that is known by heart, whichever it is.

        It is asked at the reference call, under the text that the row follows: of a mask or a ControlNet everything would come back. From
        less noise, half as far from a perfect return is asked for. Where it cannot be asked, they are flagged. Cost: 1 evaluation.
        """
        assert self.profile is not None
        try:
            with torch.no_grad():
                values = [self.recurrence_of(row, picture, log_snr) for row, picture in zip(rows, pictures, strict=True)]
        except Exception as error:  # as in judge
            self.flag_again(rows)
            self.fail([self._reports[row] for row in rows], error)
            return []
        limit = self.profile.recurrence_limit()
        if log_snr == NOISED_LOG_SNR:
            return self.noted("recurrence_on_the_run", rows, values, limit)
        return self.noted("recurrence_from_less_noise", rows, values, (1 + limit) / 2)

    def recurrence_of(self, row: int, picture: Tensor, log_snr: float) -> float:
        """The recurrence of one row's picture ``[C, H, W]`` under the text that it follows. Cost: 1 evaluation."""
        here, held = self.steering[row][0].observation, self.corrections[row].condition
        if held is not None:
            here = replace(here, condition=held.unsqueeze(0).to(here.condition))
        picture = of_size(picture.unsqueeze(0).to(here.x), here.x)
        return recurrence(here, picture, timestep_at(here, log_snr)).item()

    def resembling(self, rows: list[int], pictures: Tensor) -> list[int]:
        """Which of the rows have a picture, ``[n, C, H, W]``, that their own text draws from another noise. Cost: none.

        What was verified ahead is verified on the run itself, by the limit of verification; a picture of another size is brought to the
        reference call's.
        """
        assert self.profile is not None
        avoided = torch.stack([self.avoided[row] for row in rows]).to(pictures)
        values = correlation(of_size(pictures, avoided), avoided).tolist()
        return self.noted("resemblance_on_the_run", rows, values, self.profile.agreement_limit())

    def noted(self, name: str, rows: list[int], values: list[float], limit: float) -> list[int]:
        """Which of the rows have a value that is not under ``limit``; the highest of a run is kept in the report."""
        for row, value in zip(rows, values, strict=True):
            steering = self._reports[row].steering or {}
            highest = max(value, steering.get(name) or -1.0) if math.isfinite(value) else None
            self._reports[row].steering = {**steering, name: highest}
        return [row for row, value in zip(rows, values, strict=True) if not value <= limit]

    def settle(self, report: GuardReport) -> None:
        """What becomes of an image that is still flagged; errors count as flagged."""
        if report.verdict != "flagged" or self.config.mode == "observe":
            return
        if self.config.on_failure == "raise":
            unsteered = "no steering passed verification" if self.profile else "without a profile it cannot be steered"
            why = "predicted to be memorized" + (f", and {unsteered}" if self.config.mode == "steer" else "")
            raise MemorizationError(f"Image {report.row}: {report.error or why}.", self.reports)
        if self.config.mode == "block" or self.config.on_failure == "withhold":
            report.verdict = "withheld"


def seeds_in(generators: Any, images: int) -> list[int | None]:
    """The seed of each image's noise, of the generators that a call is given; None where it has none, or one that was drawn from before."""
    each = generators if isinstance(generators, list) else [generators] * images
    seeds = {id(one): seed_of_fresh(one) for one in each}
    return [seeds[id(one)] for one in each] if len(each) == images else [None] * images


def seed_of_fresh(generator: Any) -> int | None:
    """The seed of a generator from which nothing was drawn since; of anything else None."""
    if not isinstance(generator, torch.Generator):
        return None
    seed = generator.initial_seed()
    return seed if torch.equal(generator.get_state(), torch.Generator(generator.device).manual_seed(seed).get_state()) else None


def of_size(pictures: Tensor, like: Tensor) -> Tensor:
    """``pictures`` ``[B, C, H, W]`` brought to the size of ``like``'s."""
    return pictures if pictures.shape[-2:] == like.shape[-2:] else F.interpolate(pictures, size=like.shape[-2:], mode="area")


@contextmanager
def able_to_descend() -> Iterator[None]:
    """No gradients are kept but those that are asked for, and they can be, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
