"""sdguard: the guard between a text-to-image model and the pictures it has memorized."""

from sdguard.decision.calibration import calibrate
from sdguard.decision.profile import Profile, ProfileError
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.guider import GuardedGuidance
from sdguard.guarded.pipeline import GuardedPipeline, guard, unguard
from sdguard.guarded.report import GuardReport
from sdguard.guarded.run import MemorizationError

__version__ = "0.1.0"

__all__ = [
    "GuardConfig",
    "GuardReport",
    "GuardedGuidance",
    "GuardedPipeline",
    "MemorizationError",
    "Profile",
    "ProfileError",
    "calibrate",
    "guard",
    "unguard",
]
