"""Pipelines are loaded as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families import build

from sdguard.denoiser.loading import load_pipeline


def test_a_pipeline_that_was_saved_without_a_part_is_loaded_without_it(embedded: Any, tmp_path: Path) -> None:
    build("StableDiffusion3Pipeline", embedded.tokenizer).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    assert pipe.text_encoder_2 is not None
