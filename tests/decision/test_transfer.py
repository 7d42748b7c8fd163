"""A profile after adapters or patches have come: kept where ordinary prompts read as before, dropped where they do not."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from sdguard.decision.calibration import calibrate
from sdguard.decision.identity import identity, same_model
from sdguard.decision.transfer import CHECKED_PROMPTS, ERROR, still_holds, without_extras

PROMPTS = [
    f"a {thing} in {place}" for thing in ("cat", "dog", "fox", "boat", "zebra") for place in ("snow", "fog", "forest", "sky", "canyon")
]


@pytest.fixture
def profile(tiny: Any) -> Any:
    return calibrate(tiny, PROMPTS * 2)


def test_a_patch_that_changes_nothing_keeps_the_profile(tiny: Any, profile: Any) -> None:
    original = tiny.unet.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    tiny.unet.forward = counted
    assert not same_model(identity(tiny), profile.model)
    assert same_model(without_extras(identity(tiny)), without_extras(profile.model))
    assert still_holds(tiny, profile, PROMPTS)


def test_one_that_changes_what_prompts_look_like_drops_it(tiny: Any, profile: Any) -> None:
    original = tiny.unet.forward

    def stronger(sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return original(sample, timestep, 6 * encoder_hidden_states, **kwargs)

    tiny.unet.forward = stronger
    assert not still_holds(tiny, profile, PROMPTS)


@pytest.mark.parametrize(
    ("shift", "against", "seen"), [(0.0, 55, 0.01), (0.5, 55, 0.20), (0.5, 192, 0.24), (1.0, 55, 0.82), (1.0, 192, 0.91)]
)
def test_what_so_few_prompts_can_show(shift: float, against: int, seen: float) -> None:
    """The figures of `still_holds`: how often a shift of a signal, in its standard deviations, is seen among five signals."""
    rng = np.random.default_rng(0)
    found = [ks_2samp(rng.normal(shift, 1, CHECKED_PROMPTS), rng.normal(0, 1, against)).pvalue < ERROR / 5 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(seen, abs=0.03)
