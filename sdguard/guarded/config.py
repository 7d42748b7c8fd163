"""What a user can choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sdguard.choices import Mode, OnFailure, OnUnknown, RatePer
from sdguard.decision.profile import Profile
from sdguard.files.inputs import are_texts, shown
from sdguard.steering import METHODS
from sdguard.steering.wording import Rewriter

if TYPE_CHECKING:
    from sdguard.guarded.report import GuardReport
    from sdguard.observation import Observation


@dataclass(frozen=True)
class GuardConfig:
    """How the guard behaves.

    Attributes:
        mode: ``"steer"`` turns a flagged sample away from the memorized picture and verifies that it worked; ``"block"``
            withholds it; ``"observe"`` reports it and changes nothing.
        false_positive_rate: share of ordinary prompts that may be flagged; the threshold is the conformal one for it.
        on_failure: what happens to a sample that could not be judged, or was steered and did not pass verification:
            ``"withhold"`` blanks its image, ``"pass"`` lets the sample through as it stands, ``"raise"`` raises
            `MemorizationError`. All three are in the report. With ``mode="block"`` nothing passes; ``"raise"`` raises there for whatever
            is flagged.
        profile: a `Profile`, the path of one, or the name of one in the user's cache. By default the profile that comes with the
            model, else the newest cached one of this model. A profile of another model is refused.
        on_unknown: what happens where no profile of the model is known. ``"calibrate"`` makes one before the first run goes on;
            ``"background"`` makes it in a thread beside the runs; ``"first_call_only"`` makes none; ``"raise"`` raises `ProfileError`.
            An image is judged without a profile meanwhile: flagged if two noises give one picture, which the first call alone
            is read for, and never steered. The report says so.
        rate_per: what the false-positive rate is of: ``"image"``, so that of several pictures of one ordinary prompt each may be flagged
            at it; or ``"prompt"``: the chance that any is, by Bonferroni's correction for the pictures that a call makes of a prompt.
        steering: names of the methods to be tried, in order (`sdguard.steering.METHODS`). By default the order the profile has
            learnt, else that of `sdguard.steering.fallback.DEFAULT`.
        rewriter: gives wordings of a prompt, the most faithful first; they are tried, and verified, before sdguard's own.
        calibration_prompts: the ordinary prompts that the profile has to be made of, which then goes before one that came with the
            model. By default any; where one is made, those that come with the model or with sdguard.
        score_log: a file that the score of each image is appended to, a JSON line each, without its prompt: what ``sdguard calibrate
            --from-log`` makes a profile of. What cannot be written is logged and stops nothing.
        log_prompts: whether prompts stand there too, in the audit log and in the log record of a verdict.
        audit_log: a file that a record of each image is appended to, a JSON line each (`sdguard.guarded.audit_log`), whatever its
            verdict. Where it cannot be written, nothing is delivered: a call raises `CannotWrite`, before it begins where it can be told.
        audit_log_bytes: the size that it does not grow beyond: it is put aside before, as ``NAME.1``, ``NAME.2`` and so on.
        on_verdict: called with the report of each image once its verdict is final, also of a call that an error ends. What it raises is
            logged, and changes neither pictures nor verdicts.
        on_call: shown each denoiser call once the guard has acted on it, with the reports as they stand: what was judged, at the first
            call or a later one, and from then on a steered row under its steering. It moves nothing of the run and its evaluations
            are not counted; what it raises ends the run.

    Raises:
        ValueError: a field has a value it cannot have.
        TypeError: a field has a value of a kind it cannot have.
    """

    mode: Mode = "steer"
    false_positive_rate: float = 0.01
    on_failure: OnFailure = "withhold"
    profile: Profile | Path | str | None = None
    on_unknown: OnUnknown = "calibrate"
    rate_per: RatePer = "image"
    steering: Sequence[str] | None = None
    rewriter: Rewriter | None = None
    calibration_prompts: Sequence[str] | None = None
    score_log: Path | str | None = None
    log_prompts: bool = False
    audit_log: Path | str | None = None
    audit_log_bytes: int = 100_000_000
    on_verdict: Callable[[GuardReport], None] | None = None
    on_call: Callable[[Observation, list[GuardReport]], None] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("steer", "observe", "block"):
            raise ValueError(f"mode is {shown(self.mode)}; it must be 'steer', 'observe' or 'block'.")
        if self.on_failure not in ("withhold", "pass", "raise"):
            raise ValueError(f"on_failure is {shown(self.on_failure)}; it must be 'withhold', 'pass' or 'raise'.")
        if self.on_unknown not in get_args(OnUnknown):
            raise ValueError(f"on_unknown is {shown(self.on_unknown)}; it must be 'calibrate', 'background', 'first_call_only' or 'raise'.")
        if self.rate_per not in ("image", "prompt"):
            raise ValueError(f"rate_per is {shown(self.rate_per)}; it must be 'image' or 'prompt'.")
        if not isinstance(self.false_positive_rate, Real):
            raise TypeError(f"false_positive_rate is {shown(self.false_positive_rate)}; it must be a number.")
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(f"false_positive_rate is {shown(self.false_positive_rate)}; it must lie between 0 and 1.")
        object.__setattr__(self, "false_positive_rate", float(self.false_positive_rate))  # numpy's numbers do not go into JSON
        prompts = self.calibration_prompts
        if isinstance(prompts, str) or (isinstance(prompts, Sized) and len(prompts) == 0):
            raise ValueError("calibration_prompts has to be a list of prompts, at least four.")
        if prompts is not None and not are_texts(prompts):
            raise TypeError("calibration_prompts has something among it that is no text; it must be a list of prompts.")
        if isinstance(self.steering, str):
            raise TypeError(f"steering is {shown(self.steering)}; it must be a list of names, as [{shown(self.steering)}].")
        if not isinstance(self.profile, Profile | Path | str | None):
            raise TypeError(f"profile is {shown(self.profile)}; it must be a Profile, or the path or name of one.")
        if self.steering is not None and not are_texts(self.steering):
            raise TypeError(f"steering is {shown(self.steering)}; it must be a list of names.")
        for name in ("score_log", "audit_log"):
            if not isinstance(getattr(self, name), Path | str | None):
                raise TypeError(f"{name} is {shown(getattr(self, name))}; it must be the path of a file.")
            if "\0" in str(getattr(self, name)):
                raise ValueError(f"{name} is {shown(getattr(self, name))}; no file's path has the character 0 in it.")
        if self.score_log and self.audit_log and Path(self.score_log).resolve() == Path(self.audit_log).resolve():
            raise ValueError(f"score_log and audit_log are one file, {shown(str(self.audit_log))}; their lines are not of one kind.")
        if not isinstance(self.audit_log_bytes, int) or isinstance(self.audit_log_bytes, bool):
            raise TypeError(f"audit_log_bytes is {shown(self.audit_log_bytes)}; it must be a whole number.")
        if self.audit_log_bytes < 1:
            raise ValueError(f"audit_log_bytes is {shown(self.audit_log_bytes)}; it must be at least 1.")
        if not isinstance(self.log_prompts, bool):
            raise TypeError(f"log_prompts is {shown(self.log_prompts)}; it must be True or False.")
        for name in ("rewriter", "on_call", "on_verdict"):
            if not (callable(getattr(self, name)) or getattr(self, name) is None):
                raise TypeError(f"{name} is {shown(getattr(self, name))}; it must be something to call.")
        if self.steering is not None and not self.steering:
            raise ValueError("steering is empty: leave it out for the profile's order, or use mode='block' to withhold what is flagged.")
        if unknown := [name for name in self.steering or () if name not in METHODS]:
            raise ValueError(f"steering has {shown(unknown[0])}; there are {', '.join(METHODS)}.")


def check_config(config: Any) -> None:
    """Raise `TypeError`, in one sentence, for what is no `GuardConfig`; None stands for the default."""
    if config is not None and not isinstance(config, GuardConfig):
        raise TypeError(f"A guard is configured by a GuardConfig, as GuardConfig(mode='observe'), and not by {shown(config)}.")
