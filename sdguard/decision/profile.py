"""A profile: what ordinary prompts look like on one configuration, and the decision that follows from it."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, betabinom
from torch import Tensor

from sdguard.decision.cascade import BY_NAME, Cascade, Scale, Stage
from sdguard.decision.identity import differences, same_model
from sdguard.files.atomic import write_text
from sdguard.observation import Prediction
from sdguard.signals.denoised_norm import denoised_norm
from sdguard.signals.guidance_norm import guidance_norm

FORMAT = 9
#: correlation from which two pictures are one.
SAME_PICTURE = 0.9
#: what steering aims by, and steered samples are held to, beside the signals that decide.
HELD = ("guidance_norm", "guidance_detail", "reference_agreement", "recurrence", "alignment")
#: free signals whose course over a run is followed.
SERIES: dict[str, Callable[[Prediction], Tensor]] = {"guidance_norm": guidance_norm, "denoised_norm": denoised_norm}


class ProfileError(ValueError):
    """A profile is missing, damaged, made for another configuration, or too small for the rate asked of it."""


def quantile(values: Sequence[float], share: float) -> float:
    """The value that at least ``share`` of ascending ``values``, a new one counted in, lie at or under (the last, if they are too few)."""
    return values[min(len(values), math.ceil(share * (len(values) + 1))) - 1]


def digest_of(prompts: Sequence[str]) -> str:
    """A hash of a list of prompts, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def scores_needed(false_positive_rate: float) -> int:
    """How many scores of ordinary prompts a false-positive rate needs at least."""
    return math.ceil(min(1 / false_positive_rate, sys.float_info.max)) - 1  # the smallest floats have no finite inverse


@dataclass(frozen=True)
class MethodStatistics:
    """A steering method as measured on memorized prompts.

    Attributes:
        method: its name.
        cured: the share of prompts on which it passed verification.
        cost: mean evaluations a sample, verification included.
        moved: mean change of the prediction that is followed, as a share of what guidance adds.
        alignment: mean alignment of the pictures ahead of those that passed, with the subject of their prompt.
    """

    method: str
    cured: float
    cost: float
    moved: float
    alignment: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Ordinary prompts on one model, whatever its runs are set to.

    Attributes:
        model: the model it is of (`sdguard.decision.identity`); for any other the profile is refused.
        cascade: the stages of the decision, fitted on a part of the prompts.
        scores: the score of every other prompt, ascending; the threshold and the p-values rest on these.
        values: each of the cascade's signals, and what verification is held to, on prompts it was fitted on, ascending.
        series: ``(mean, standard deviation)`` of the signals in `SERIES` at every call of a short run.
        timesteps: those of the calls.
        words: how many of the prompts hold each word.
        methods: steering methods in the order in which they are tried, learnt from memorized prompts; empty where none were known.
        prompts_digest: a hash of the ordinary prompts it was made of (`digest_of`).
        set_aside: those of them that turned out to be memorized and stand behind nothing.
        note: what a report has to say of it beside its name.
        format: version of the file format.
    """

    model: dict[str, Any]
    cascade: Cascade
    scores: list[float]
    values: dict[str, list[float]]
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    words: dict[str, int] = field(default_factory=dict)
    methods: list[MethodStatistics] = field(default_factory=list)
    prompts_digest: str = ""
    set_aside: list[str] = field(default_factory=list)
    note: str = ""
    format: int = FORMAT

    @property
    def prompts(self) -> int:
        """How many ordinary prompts stand behind the threshold."""
        return len(self.scores)

    @property
    def frequency(self) -> dict[str, float]:
        """The share of all its ordinary prompts that holds each word."""
        count = self.prompts + len(self.values["guidance_norm"])
        return {word: holding / count for word, holding in self.words.items()}

    def p_value(self, score: float) -> float:
        """Conformal p-value: the share of ordinary prompts, the new one counted in, that score at least as high.

        Under exchangeability P(p <= alpha) <= alpha for an ordinary prompt (Vovk et al. 2005, ch. 2): the score is fixed by the
        cascade, and the cascade was fitted on other prompts.
        """
        at_least = self.prompts - bisect.bisect_left(self.scores, score)
        return (1 + at_least) / (1 + self.prompts)

    def threshold(self, false_positive_rate: float) -> float:
        """The smallest calibrated score above which ``p_value <= false_positive_rate``.

        Raises:
            ProfileError: the prompts are too few for this rate; the message says how many are needed.
        """
        return self.scores[self.prompts - self.allowed(false_positive_rate)]

    def allowed(self, false_positive_rate: float) -> int:
        """How many of ``prompts + 1`` exchangeable scores may be flagged; raises as `threshold` does if none."""
        allowed = math.floor(false_positive_rate * (1 + self.prompts))
        if not allowed:
            needed, have = scores_needed(false_positive_rate), f"this profile has {self.prompts}"
            raise ProfileError(f"A false-positive rate of {false_positive_rate:g} needs at least {needed} scored ordinary prompts; {have}.")
        return allowed

    def false_positive_interval(self, false_positive_rate: float, of: int | None = None, confidence: float = 0.95) -> tuple[float, float]:
        """Where the realised false-positive rate lies with this confidence, among ``of`` further ordinary prompts, or in the long run.

        With n scores and k allowed ones the long-run rate of a continuous score is Beta(k, n + 1 - k) distributed over draws of the
        calibration prompts (Vovk 2012, 1209.2673), and the count among m further prompts beta-binomial.
        """
        k, tails = self.allowed(false_positive_rate), [(1 - confidence) / 2, (1 + confidence) / 2]
        if of is None:
            low, high = beta.ppf(tails, k, self.prompts + 1 - k)
        else:
            low, high = betabinom.ppf(tails, of, k, self.prompts + 1 - k) / of
        return float(low), float(high)

    def agreement_limit(self, share: float = 0.99) -> float:
        """The agreement that ``share`` of ordinary prompts stay under: what a steered sample must reach."""
        return quantile(self.values["reference_agreement"], share)

    def detail_limit(self, share: float = 0.95) -> float:
        """The guidance detail that ``share`` of ordinary prompts stay under: what the condition of a steered sample must reach."""
        return quantile(self.values["guidance_detail"], share)

    def recurrence_limit(self, share: float = 0.99) -> float:
        """The recurrence above which a picture is a memorized one: `SAME_PICTURE`, or what ``share`` of ordinary prompts stay under."""
        return max(SAME_PICTURE, quantile(self.values["recurrence"], share))

    def alignment_limit(self, share: float = 0.99) -> float:
        """The alignment that ``share`` of ordinary prompts stay above: what a steered sample must reach."""
        return -quantile([-value for value in reversed(self.values["alignment"])], share)

    def limits(self) -> dict[str, float]:
        """What steered samples are held to, by name."""
        return {
            "detail": self.detail_limit(),
            "recurrence": self.recurrence_limit(),
            "agreement_with_uncorrected": self.agreement_limit(),
            "alignment": self.alignment_limit(),
        }

    def at(self, name: str, timestep: float) -> tuple[float, float]:
        """Mean and standard deviation of a signal of `SERIES` at ``timestep``, interpolated between the calls it was measured at."""
        order = np.argsort(self.timesteps)
        known = np.asarray(self.timesteps)[order]
        mean, std = (np.interp(timestep, known, column[order]) for column in np.asarray(self.series[name]).T)
        return float(mean), float(std)

    def check(self, model: dict[str, Any]) -> None:
        """Raise `ProfileError` naming what differs, if this profile is not of ``model``."""
        if not same_model(self.model, model):
            raise ProfileError(f"The profile is another model's: {'; '.join(differences(model, self.model))}.")

    def save(self, path: Path) -> None:
        """Write the profile as JSON with a hash of it, whole or not at all; raises `CannotWrite`."""
        fields = asdict(self)
        write_text(path, json.dumps({**fields, "digest": content_digest(fields)}))

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile; raises `ProfileError` in one sentence if the file is missing, damaged or of another format."""
        damaged = ProfileError(f"{path} is not a profile of sdguard, or it is damaged.")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"The profile {path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError):
            raise damaged from None
        found = fields.get("format") if isinstance(fields, dict) else None
        if type(found) is int and found != FORMAT:
            raise ProfileError(
                f"{path} was written by another version of sdguard (format {found}; this one reads {FORMAT}): calibrate again."
            )
        try:
            digest = fields.pop("digest", None)  # one that was written by hand has none
            if digest is not None and digest != content_digest(fields):
                raise damaged
            stages = tuple(Stage(tuple(stage["signals"]), tuple(stage["fused"]), stage["bound"]) for stage in fields["cascade"]["stages"])
            scales = {n: Scale(**{**scale, "slopes": tuple(scale["slopes"])}) for n, scale in fields["cascade"]["scales"].items()}
            series = {name: [(float(mean), float(std)) for mean, std in pairs] for name, pairs in fields["series"].items()}
            methods = [MethodStatistics(**method) for method in fields["methods"]]
            profile = cls(**{**fields, "cascade": Cascade(stages, scales), "series": series, "methods": methods})
            whole = is_whole(profile)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            raise damaged from None
        if not whole:
            raise damaged
        return profile


def content_digest(fields: Mapping[str, Any]) -> str:
    """A hash of a profile's fields as JSON, 16 hexadecimal digits; the same for what was written and for what is read of it."""
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def are_ascending(values: Any, least: int) -> bool:
    """Whether values are a list of at least so many numbers that do not fall."""
    return isinstance(values, list) and len(values) >= least and all(map(is_number, values)) and all(a <= b for a, b in pairwise(values))


def is_whole(profile: Profile) -> bool:
    """Whether all of a profile that was read is of the kind that it has to be; what is not may raise `TypeError` or `AttributeError`."""
    cascade, names = profile.cascade, profile.cascade.signals
    stages_fit = bool(cascade.stages) and all(
        stage.fused and {*stage.fused} <= {*names} and (stage.bound is None or is_number(stage.bound)) for stage in cascade.stages
    )
    scales_fit = all(
        type(scale.log) is bool and all(map(is_number, (scale.median, scale.deviation, scale.log_snr, *scale.slopes)))
        and scale.deviation > 0 and len(scale.slopes) == 2
        for scale in cascade.scales.values()
    )  # fmt: skip
    series_fit = all(
        len(pairs) == len(profile.timesteps) and all(map(is_number, chain.from_iterable(pairs))) for pairs in profile.series.values()
    )
    methods_fit = all(isinstance(m.method, str) and all(map(is_number, (m.cured, m.cost, m.moved, m.alignment))) for m in profile.methods)
    texts = [profile.prompts_digest, profile.note, *profile.words]
    return (
        profile.format == FORMAT
        and isinstance(profile.model, dict)
        and are_ascending(profile.scores, 2)
        and all(are_ascending(values, 1) for values in profile.values.values())
        and {*HELD, *names} <= {*profile.values}
        and {*names} <= {*cascade.scales} & {*BY_NAME}
        and stages_fit and scales_fit and series_fit and methods_fit
        and all(map(is_number, profile.timesteps))
        and all(isinstance(text, str) for text in texts)
        and all(map(is_number, profile.words.values()))
        and isinstance(profile.set_aside, list) and all(isinstance(prompt, str) for prompt in profile.set_aside)
    )  # fmt: skip
