"""The profile that a run on the page goes by: the session’s own, a known one, or one made now."""

from __future__ import annotations

from collections.abc import Sequence

from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import known_profile
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.profile import Profile, scores_needed
from sdguard.demo.model import Model
from sdguard.demo.streaming import Emit, Progress
from sdguard.files.inputs import BadInput
from sdguard.guarded.calibrate_model import scored_and_needed

#: ordinary prompts for a model that no profile is known of: two in three are scored, which 1% needs 99 of.
QUICK_CALIBRATION = 300


def profile_known(model: Model, own: Profile | None) -> Profile | None:
    """The profile a run would go by: the session's ``own``, the model's, or one of the user's cache; None where none is known."""
    return own or known_profile(model.pipe, identity(model.pipe))


def make_profile(model: Model, prompts: Sequence[str], rate: float, emit: Emit, doing: str = "Calibrating") -> Profile:
    """A profile of the model from ordinary ``prompts``, at the cost of `calibrate`; raises `BadInput` if they are too few for ``rate``."""
    scored, needed = scored_and_needed(len(prompts), rate)
    if scored < needed:
        raise BadInput(f"A false-positive rate of {rate:g} needs {needed} scored prompts; of {len(prompts)} prompts {scored} are scored.")
    return calibrate(model.own(), prompts, progress=lambda done, total: emit(Progress(doing, done, total, rests=True)))


def find_or_make_profile(model: Model, rate: float, own: Profile | None, emit: Emit) -> Profile:
    """The profile of a run: a known one, else made now from as many ordinary prompts as ``rate`` asks for, and emitted."""
    profile = profile_known(model, own)
    if profile is None:
        enough = max(QUICK_CALIBRATION, 3 * scores_needed(rate) // 2 + 3)
        doing = "No profile is known for this model: calibrating, once a session"
        profile = make_profile(model, evenly(ordinary_prompts(model.pipe), enough), rate, emit, doing)
        emit(profile)
    profile.threshold(rate)  # refuses a rate that its prompts are too few for
    return profile
