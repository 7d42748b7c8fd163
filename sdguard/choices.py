"""What is chosen by name, and numbers that stand where nobody chooses: importing them imports nothing else.

The command line and `GuardConfig` take them from here, so that asking a command for its help costs no import of torch.
"""

from __future__ import annotations

from typing import Literal

#: what the guard does to a flagged image (``GuardConfig.mode``).
Mode = Literal["steer", "observe", "block"]
#: what the false-positive rate is of (``GuardConfig.rate_per``).
RatePer = Literal["image", "prompt"]
#: what becomes of an image that could not be judged or steered (``GuardConfig.on_failure``).
OnFailure = Literal["withhold", "pass", "raise"]
#: what may be done where no profile of a model is known (``GuardConfig.on_unknown``).
OnUnknown = Literal["calibrate", "background", "first_call_only", "raise"]
#: what a pipeline's weights may be cast to.
Precision = Literal["float32", "float16", "bfloat16"]
#: what carries out a scan.
Engine = Literal["local", "ray"]

#: prompts in one denoiser batch, where a caller does not say.
BATCH_SIZE = 8
#: steps and guidance scale of a run, where a caller does not say: Stable Diffusion's customary ones.
STEPS, GUIDANCE_SCALE = 50, 7.5
