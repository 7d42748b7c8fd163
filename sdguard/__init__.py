"""sdguard: the guard between a text-to-image model and the pictures it has memorized."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

#: which module each of these is imported from when it is first asked for: importing the package alone imports no torch.
_MODULES = {
    "GuardConfig": "guarded.config",
    "GuardReport": "guarded.report",
    "GuardedGuidance": "guarded.guider",
    "GuardedPipeline": "guarded.pipeline",
    "MemorizationError": "guarded.run",
    "Profile": "decision.profile",
    "ProfileError": "decision.profile",
    "calibrate": "decision.calibration",
    "guard": "guarded.pipeline",
    "unguard": "guarded.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
