"""Whether a model's profile still holds once adapters or patches are on the model: a test on ordinary prompts, with a stated error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import ks_2samp

from sdguard.choices import BATCH_SIZE
from sdguard.decision.calibration import deciding_values, evenly, joined
from sdguard.decision.profile import Profile
from sdguard.denoiser.probe import read_prompts

#: ordinary prompts that are read, and the chance that a profile is dropped which does hold.
CHECKED_PROMPTS, ERROR = 24, 0.05
#: seed of the first of them: none that calibration has used.
SEED = 1_000_000


def without_extras(model: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of a model as it would be without adapters and patches."""
    return {**model, "adapters": {}, "patches": []}


@torch.no_grad()
def still_holds(pipe: Any, profile: Profile, prompts: Sequence[str], adapter_scale: float | None = None) -> bool:
    """Whether ordinary prompts read on ``pipe`` as they did on the profile's model.

    Two-sample Kolmogorov-Smirnov tests of each signal that decides, against the profile's own values, with Bonferroni's correction: a
    profile that holds is dropped with probability `ERROR` at most. What passes may still differ by what so few prompts cannot show: of
    normal values, a shift by a standard deviation is seen in 82 to 91% of cases, by half of one in 20 to 24% (simulated, against 55
    and 192 values). Cost: 6 denoiser evaluations for each of `CHECKED_PROMPTS`.

    Args:
        prompts: ordinary ones of the kind that the profile was made of; others make it look as if it did not hold.
        adapter_scale: what the calls scale LoRA by, where they do.
    """
    chosen = evenly(list(prompts), CHECKED_PROMPTS)
    batches = [chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)]
    seeds = [range(SEED + start, SEED + start + len(batch)) for start, batch in enumerate(batches)]
    read = (read_prompts(pipe, batch, list(some), adapter_scale) for batch, some in zip(batches, seeds, strict=True))
    found = joined([deciding_values(observation) for observation in read])
    known = [name for name in found if profile.values.get(name)]
    return all(ks_2samp(found[name], profile.values[name]).pvalue >= ERROR / len(known) for name in known)
