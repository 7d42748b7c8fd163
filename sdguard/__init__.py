"""sdguard: the guard between a text-to-image model and the pictures it has memorized."""

from sdguard.calibration import calibrate
from sdguard.config import GuardConfig
from sdguard.guider import GuardedGuidance
from sdguard.pipeline import GuardedPipeline, guard, unguard
from sdguard.profile import Profile, ProfileError
from sdguard.report import GuardReport
from sdguard.run import MemorizationError

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
