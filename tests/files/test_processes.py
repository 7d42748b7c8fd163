"""Among which processes work is shared, told by what launched them and by the GPUs that there are."""

from typing import Any

import pytest
import torch

from sdguard.files import processes as module


@pytest.mark.parametrize(
    ("launched", "gpus", "on_cpu"),
    [
        ({}, 0, False),
        ({}, 1, False),
        ({"LOCAL_RANK": "0"}, 0, True),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 0, True),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, True),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, False),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 8, False),
    ],
)
def test_several_processes_without_a_gpu_each_are_told_to_use_the_cpu(
    launched: dict[str, str], gpus: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(module, "PartialState", lambda **given: asked.update(given))
    module.processes()
    assert asked["cpu"] is on_cpu
