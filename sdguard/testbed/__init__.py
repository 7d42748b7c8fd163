"""The embedded model: a small Stable Diffusion, shipped with the package, that has memorized real pictures.

Only `load` and `path` are needed to use it; beside them stand what tells its copies, its demo, and its calibration. It was made by
``benchmarks/zoo``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: the setting its labels and its profile were measured at.
STEPS = 10
GUIDANCE_SCALE = 2.5


def path() -> Path:
    """The pipeline directory; ``StableDiffusionPipeline.from_pretrained`` and `GuardedPipeline.from_pretrained` take it."""
    return Path(__file__).parent / "model"


def load(**kwargs: Any) -> Any:
    """The embedded model as a plain, unguarded `StableDiffusionPipeline`; arguments go to ``from_pretrained``."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(path(), **kwargs)
