"""The benchmark of diffusers' own tests: what it makes of a checkout's tests, and that a call that differs is seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from benchmarks import upstream
from benchmarks.upstream import ROOT, compared, table
from benchmarks.upstream_tests import clip_tokenizer, digest, t5_tokenizer
from sdguard import testbed

#: tests as a checkout has them, one of which fails where calls are guarded
TESTS = f"""
import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
import pytest
from diffusers import StableDiffusionPipeline
from families import build, call
from transformers import CLIPTokenizer


class TestOfPipeline:
    pipeline_class = StableDiffusionPipeline

    def pipe(self):
        return build("StableDiffusionPipeline", CLIPTokenizer.from_pretrained({str(testbed.path() / "tokenizer")!r}))

    def test_output(self):
        assert call(self.pipe()).images.shape == (3, 16, 16, 3)

    def test_nothing_is_added(self):
        assert not hasattr(call(self.pipe()), "guard")

    def test_error(self):
        with pytest.raises(ValueError, match="callback_steps"):
            call(self.pipe(), callback_steps=-1)

    def test_numbers(self):
        assert call(self.pipe()).images.sum() == 0

    @pytest.mark.skip
    def test_gpu(self):
        pass


class TestOfAnother:
    pipeline_class = int

    def test_output(self):
        raise AssertionError
"""


def test_the_tests_of_a_checkout_are_run_both_ways_and_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, library, readme = tmp_path / "tests" / "pipelines" / "some", tmp_path / "src" / "diffusers", tmp_path / "README.md"
    folder.mkdir(parents=True)
    library.mkdir(parents=True)
    (folder / "test_some.py").write_text(TESTS)
    (library / "__init__.py").write_text('__version__ = "1.2.3"\n')
    readme.write_text("<!-- upstream: ... -->\n<!-- /upstream -->\n")
    for _ in range(2):  # the second time nothing is left to be run
        with pytest.raises(typer.Exit):
            upstream.main(checkout=tmp_path, only=None, out=tmp_path, root=tmp_path)
        monkeypatch.setattr(upstream, "outcomes", None)
    written = json.loads((tmp_path / "upstream.json").read_text())
    row = written["pipelines"]["StableDiffusionPipeline"]
    assert written["versions"]["checkout"] == "1.2.3"
    counts = {"tests": 4, "skipped": 1, "passed_unguarded": 3, "passed_guarded": 2, "calls": 4, "identical": 4, "not_repeatable": 0}
    assert {name: row[name] for name in counts} == counts
    (test,) = row["fail_guarded"]
    assert test == "test_some.py::TestOfPipeline::test_nothing_is_added"
    assert list(row["fail_unguarded"]) == ["test_some.py::TestOfPipeline::test_numbers"]
    assert row["differ"] == {}
    assert "| `StableDiffusionPipeline` | 4 | 3 | 2 | 4 | 4 |" in readme.read_text()
    assert "* `TestOfPipeline::test_nothing_is_added`: " in readme.read_text()


def found(*calls: str, outcome: str = "passed") -> dict[str, Any]:
    return {"x.py::T::test": {"outcome": outcome, "reason": "why", "calls": list(calls)}}


def counted(plain: Any, guarded: Any, again: Any = None) -> tuple[int, int, int]:
    row = compared(plain, guarded, again or plain)
    return row["calls"], row["identical"], row["not_repeatable"]


def test_calls_that_differ_or_are_missing_are_seen() -> None:
    assert counted(found("a", "b"), found("a", "b")) == (2, 2, 0)
    assert counted(found("a", "b"), found("a", "c")) == (2, 1, 0)
    assert counted(found("a", "b"), found("a")) == (2, 1, 0)
    assert counted(found("a"), found("a", "b")) == (2, 1, 0)
    assert compared(found("a"), found("b"), found("a"))["differ"] == {"x.py::T::test": [["a", "b"]]}


def test_a_call_that_does_not_repeat_itself_is_not_compared() -> None:
    assert counted(found("a", "b"), found("a", "c"), found("a", "d")) == (1, 1, 1)


def test_a_test_that_fails_guarded_alone_is_told_with_its_reason() -> None:
    row = compared(found("a"), found("a", outcome="failed"), found("a"))
    assert (row["passed_unguarded"], row["passed_guarded"], row["fail_guarded"]) == (1, 0, {"x.py::T::test": "why"})
    assert table({"P": row}).endswith("Pass unguarded and fail guarded:\n\n* `T::test`: why")
    assert compared(found(outcome="failed"), found(outcome="failed"), found(outcome="failed"))["fail_guarded"] == {}


def test_a_digest_has_every_bit_of_an_output() -> None:
    outputs: list[Any] = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 1e-45])]
    outputs += [np.zeros(2, np.float32), [Image.new("L", (2, 1))], [Image.new("L", (1, 2))], torch.zeros(2, dtype=torch.bfloat16), None]
    assert len({digest((output,)) for output in outputs}) == len(outputs)
    assert digest((torch.zeros(2),)) == digest((torch.zeros(2),))


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_what_stands_in_for_tokenizers_tells_texts_apart(make: Any) -> None:
    one, other = make()(["a cat", "a dog"], padding="max_length", max_length=20).input_ids
    assert len(one) == len(other) == 20
    assert one != other
    assert max(*one, *other) < 1000
