"""What a user can choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdguard.steering import METHODS
from sdguard.steering.paraphrase import Rewriter

if TYPE_CHECKING:
    from sdguard.decision.profile import Profile
    from sdguard.guarded.report import GuardReport
    from sdguard.observation import Observation

Mode = Literal["steer", "observe", "block"]
OnFailure = Literal["withhold", "pass", "raise"]


@dataclass(frozen=True)
class GuardConfig:
    """How the guard behaves.

    Attributes:
        mode: ``"steer"`` turns a flagged sample away from the memorized picture and verifies that it worked; ``"block"``
            withholds it; ``"observe"`` reports it and changes nothing.
        false_positive_rate: share of ordinary prompts that may be flagged; the threshold is the conformal one for it.
        on_failure: what happens to a sample that could not be judged, or was steered and did not pass verification:
            ``"withhold"`` blanks its image, ``"pass"`` lets the unsteered sample through, ``"raise"`` raises
            `MemorizationError`. All three are in the report.
        profile: a `Profile` or the path of one. By default the profile that comes with the model, else the user's cached
            one, else the configuration is calibrated on first use. A profile that does not match the run is refused.
        calibrate: whether an unknown configuration may be calibrated on first use; if not, `ProfileError` is raised.
        steering: names of the methods to be tried, in order (`sdguard.steering.METHODS`). By default the order the profile has
            learnt, else rewording, then descent on the responsible tokens, then on the whole embedding.
        rewriter: gives paraphrases of a prompt, the most faithful first; they are tried, and verified, before sdguard's own.
        calibration_prompts: the ordinary prompts for that, by default those that come with the model or with sdguard.
        on_call: shown each denoiser call once the guard has acted on it, with the reports as they stand: what was judged, at the first
            call or a later one, and from then on a steered row under its steering. It moves nothing of the run and its evaluations
            are not counted; what it raises ends the run.

    Raises:
        ValueError: a field has a value it cannot have.
    """

    mode: Mode = "steer"
    false_positive_rate: float = 0.01
    on_failure: OnFailure = "withhold"
    profile: Profile | Path | str | None = None
    calibrate: bool = True
    steering: Sequence[str] | None = None
    rewriter: Rewriter | None = None
    calibration_prompts: Sequence[str] | None = None
    on_call: Callable[[Observation, list[GuardReport]], None] | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("steer", "observe", "block"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'steer', 'observe' or 'block'.")
        if self.on_failure not in ("withhold", "pass", "raise"):
            raise ValueError(f"on_failure is {self.on_failure!r}; it must be 'withhold', 'pass' or 'raise'.")
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(f"false_positive_rate is {self.false_positive_rate}; it must lie between 0 and 1.")
        if isinstance(self.calibration_prompts, str) or (self.calibration_prompts is not None and len(self.calibration_prompts) == 0):
            raise ValueError("calibration_prompts has to be a list of prompts, at least four.")
        if unknown := [name for name in self.steering or () if name not in METHODS]:
            raise ValueError(f"steering has {unknown[0]!r}; there are {', '.join(METHODS)}.")
