"""Every signal on the model that ships: how samples that are copies read against never-seen captions of the same make.

Signals that are weak on this model, or read the wrong way round, are bounded as that: whoever makes them better will have to say so here.
"""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from sdguard import testbed
from sdguard.denoiser.probe import probe_run
from sdguard.observation import Observation
from sdguard.signals import SIGNALS, Signal

PER_KIND = 12
#: of which nothing is claimed on this model; the last reads the wrong way round, if anything
WEAK = {"lid_unconditional", "output_density", "attention_entropy"}


@pytest.fixture(scope="module")
def values(embedded: Any) -> dict[str, np.ndarray]:
    """Each signal on copies, then on never-seen captions."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    table = table[table.split == "development"]
    copied = table[[0 in seeds for seeds in table.copied_seeds]].head(PER_KIND)
    never = table[table.kind == "unseen"].head(PER_KIND)
    found: dict[str, list[float]] = {signal.name: [] for signal in SIGNALS}

    def look(observation: Observation) -> None:
        for signal in SIGNALS:
            found[signal.name].extend(signal.read(observation).tolist())

    prompts = [*copied.text, *never.text]
    probe_run(embedded, prompts, [0] * len(prompts), look, num_inference_steps=testbed.STEPS, guidance_scale=testbed.GUIDANCE_SCALE)
    return {name: np.array(v) for name, v in found.items()}


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_copies_read_higher_than_never_seen_captions(signal: Signal, values: dict[str, np.ndarray]) -> None:
    copies, never = values[signal.name][:PER_KIND], values[signal.name][PER_KIND:]
    assert np.isfinite(values[signal.name]).all()
    auc = (copies[:, None] > never[None, :]).mean()
    if signal.name in WEAK:
        assert 0.2 < auc < 0.75
    else:
        assert auc > 0.75
