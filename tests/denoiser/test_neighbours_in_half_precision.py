"""Of every family, in half precision and on a GPU where there is one: a flagged image's neighbours are those of the unguarded pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import PIPELINES, build, call, profile_for, reworded

import sdguard
from sdguard import GuardConfig
from sdguard.guarded import run as run_module

#: (device, precision): full precision on a CPU is the other tests'
PLACES = [
    ("cpu", torch.float16),
    ("cpu", torch.bfloat16),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]


@pytest.fixture(autouse=True)
def _given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration's profile is taken as it is, whatever model it was made for; what is flagged is reworded."""
    monkeypatch.setattr(sdguard.GuardedPipeline, "profile", lambda self, given: self.guard_config.profile)
    monkeypatch.setattr(run_module, "try_in_order", reworded)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_flagged_row_alone_is_another(name: str, device: str, dtype: torch.dtype, embedded: Any) -> None:
    pipe = build(name, embedded.tokenizer).to(device, dtype)
    call(pipe)  # on a GPU the first run of some pipelines rounds otherwise than all later ones
    plain = call(pipe).images
    clean = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(1e6))))
    assert np.array_equal(clean.images, plain)
    assert [report.error for report in clean.guard] == [None] * 3
    norms = [report.signals["guidance_norm"]["value"] for report in clean.guard]
    row, bound = norms.index(max(norms)), sum(sorted(norms)[-2:]) / 2
    steered = call(sdguard.guard(pipe, GuardConfig(profile=profile_for(bound), on_failure="pass")))
    assert [report.error for report in steered.guard] == [None] * 3
    assert [np.array_equal(steered.images[i], plain[i]) for i in range(3)] == [i != row for i in range(3)]
