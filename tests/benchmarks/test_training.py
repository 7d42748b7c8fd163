"""The training loop, and the labelling of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks.zoo import embedded, training
from benchmarks.zoo.training import train


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = nn.Linear(2, 1)

    def loss_at(step: int) -> torch.Tensor:
        seen.append(step)
        if len(seen) in (4, 7):
            raise KeyboardInterrupt
        return model(torch.ones(1, 2)).square().mean()

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(7, model, loss_at, tmp_path / "x.pt", 1e-2)
        trained = model.weight.clone()
        model = nn.Linear(2, 1)
    assert seen == [0, 1, 2, 3, 3, 4, 5]
    train(0, model, loss_at, tmp_path / "x.pt", 1e-2)
    assert torch.equal(model.weight, trained)


def test_training_ends_after_its_steps_and_is_looked_at_on_the_way(tmp_path: Path) -> None:
    model, seen, looked = nn.Linear(2, 1), [], []

    def loss_at(step: int) -> torch.Tensor:
        seen.append(step)
        return model(torch.ones(1, 2)).square().mean()

    look = (2, lambda step, average: looked.append((step, type(average))))
    for steps in (5, 5, 6):
        train(steps, model, loss_at, tmp_path / "x.pt", 1e-2, look=look)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert looked == [(2, nn.Linear), (4, nn.Linear), (6, nn.Linear)]


def test_stopped_labelling_goes_on_and_a_longer_one_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"text": ["a lion", "a rose", "a tent"], "split": ["test", "test", "calibration"], "seeds": [2, 2, 1]})
    asked: list[str] = []

    def one_sample(texts: list[str], generator: list[torch.Generator], **setting: Any) -> Any:
        asked.extend(texts)
        if len(asked) == 4:
            raise KeyboardInterrupt
        pictures = [torch.rand(64, 64, 3, generator=g).numpy() for g in generator]
        return type("Output", (), {"images": np.stack(pictures)})

    monkeypatch.setattr(embedded, "BATCH", 1)
    monkeypatch.setattr(embedded, "weights_digest", lambda pipe: "these")
    with pytest.raises(KeyboardInterrupt):
        embedded.generate_samples(one_sample, table, tmp_path)
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b"half a sample")
    first = np.array(embedded.generate_samples(one_sample, table, tmp_path))
    assert asked == ["a lion", "a lion", "a rose", "a rose", "a rose", "a tent"]
    assert np.array_equal(first[0], first[2])
    longer = embedded.generate_samples(one_sample, table.assign(seeds=[2, 2, 2]), tmp_path)
    assert len(longer) == 6
    assert np.array_equal(longer[:5], first)
