"""Pipelines are loaded as they were saved; names and prompts that cannot be used are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import build
from typer.testing import CliRunner

from sdguard.cli.main import app
from sdguard.denoiser.loading import check_prompts, load_pipeline
from sdguard.files.inputs import BadInput


def test_a_pipeline_that_was_saved_without_a_part_is_loaded_without_it(embedded: Any, tmp_path: Path) -> None:
    build("StableDiffusion3Pipeline", embedded.tokenizer).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path))
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    assert pipe.text_encoder_2 is not None


@pytest.mark.parametrize("name", ["a" * 300, "a/" + "b" * 300, "embedded" * 99])
def test_a_name_too_long_for_a_path_is_one_sentence(name: str) -> None:
    with pytest.raises(BadInput, match=r"^(There is no model at|The model) a?"):
        load_pipeline(name)
    for arguments in (["profiles", "list", "--model", name], ["profiles", "show", name], ["explain", "a cat", "--model", name]):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "5000"})
        assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("prompt", ["a \ud83d cat", b"a c\xe9t".decode(errors="surrogateescape")])
def test_a_prompt_that_is_no_text_is_one_sentence(prompt: str, embedded: Any) -> None:
    with pytest.raises(BadInput, match=r"^The prompt holds half a character: its text is not valid Unicode\.$"):
        check_prompts([prompt], embedded.tokenizer)
