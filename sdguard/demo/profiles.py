"""The profile that a run on the page goes by: a known one, the session’s own, or one made now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.fingerprint import fingerprint
from sdguard.decision.profile import Profile, scores_needed
from sdguard.decision.store import known_profile, ordinary_prompts
from sdguard.demo.model import Model
from sdguard.demo.settings import Setting
from sdguard.demo.streaming import Emit, Progress
from sdguard.denoiser.families import default_size
from sdguard.files.inputs import BadInput
from sdguard.guarded.calibrate_model import scored_and_needed

#: ordinary prompts for a configuration that no profile is known of: two in three are scored, which 1% needs 99 of.
QUICK_CALIBRATION = 300


#: profiles of one person's session, by steps and guidance scale; they come before those of the model and of the cache.
Profiles = Mapping[tuple[int, float], Profile]


def profile_known(model: Model, setting: Setting, mine: Profiles) -> Profile | None:
    """The profile a run would go by: of the session, of the model, or of the user's cache; None where none is known."""
    size = default_size(model.pipe)
    found = fingerprint(model.pipe, steps=setting.steps, guidance_scale=setting.guidance, height=size, width=size)
    return mine.get((setting.steps, float(setting.guidance))) or known_profile(model.pipe, found)


def make_profile(model: Model, setting: Setting, prompts: Sequence[str], emit: Emit, doing: str = "Calibrating") -> Profile:
    """A profile of a configuration from ordinary ``prompts``, at the cost of `calibrate`; raises `BadInput` if they are too few."""
    scored, needed = scored_and_needed(len(prompts), setting.rate)
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


def find_or_make_profile(model: Model, setting: Setting, mine: Profiles, emit: Emit) -> Profile:
    """The profile of a run: a known one, else made now from as many ordinary prompts as its rate asks for, and emitted."""
    profile = profile_known(model, setting, mine)
    if profile is None:
        enough = max(QUICK_CALIBRATION, 3 * scores_needed(setting.rate) // 2 + 3)
        doing = f"No profile is known for {setting.steps} steps at guidance {setting.guidance:g}: calibrating, once a session"
        profile = make_profile(model, setting, evenly(ordinary_prompts(model.pipe), enough), emit, doing)
        emit(profile)
    profile.threshold(setting.rate)  # refuses a rate that its prompts are too few for
    return profile
