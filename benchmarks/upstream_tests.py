"""A pytest plugin within diffusers' own tests: those of one pipeline class, its calls guarded or not, and what every call gave.

Loaded by `benchmarks.upstream`. In a guarded run a pipeline's ``__call__`` goes through ``sdguard.guard`` in a mode in which nothing is
steered: the model is identified, each image is judged without a profile by evaluations beside the run's own, and let through.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

import sdguard
from sdguard import GuardConfig
from sdguard.denoiser.families import FAMILIES

GUARD = GuardConfig("observe", on_unknown="first_call_only")


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of single bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """A T5 tokenizer of single characters."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters], model_max_length=512)


def t5_config() -> Any:
    return transformers.T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)


CLIP, T5 = "hf-internal-testing/tiny-random-clip", "hf-internal-testing/tiny-random-t5"
#: what stands in for the small files that the tests take from a hub, where these have not been downloaded: (class, name) -> what makes it.
STAND_INS: dict[tuple[str, str], Callable[[], Any]] = {
    ("CLIPTokenizer", CLIP): clip_tokenizer,
    ("AutoTokenizer", T5): t5_tokenizer,
    ("T5Tokenizer", T5): t5_tokenizer,
    ("AutoConfig", T5): t5_config,
    ("T5EncoderModel", T5): lambda: transformers.T5EncoderModel(t5_config()),
}


def digest(output: Any) -> str:
    """A hash of all pictures, arrays and tensors in a pipeline's output, with their shapes and types."""
    held = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            held.update(
                f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(value, np.ndarray | Image.Image):
            array = np.asarray(value)
            held.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif isinstance(value, list | tuple):
            held.update(f"{len(value)}".encode())
            for part in value:
                add(part)
        else:
            held.update(str(value).encode())

    add(output if isinstance(output, tuple) else output.to_tuple())
    return held.hexdigest()[:16]


class Calls:
    """Stands around the ``__call__`` of pipeline classes and notes what each call gave, or what it raised."""

    def __init__(self, guarded: bool) -> None:
        self.guarded, self.within, self.seen = guarded, False, list[str]()

    def around(self, cls: type) -> None:
        original = vars(cls)["__call__"]

        @functools.wraps(original)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            if self.within or type(pipe) is not cls:
                return original(pipe, *args, **kwargs)
            self.within = True
            try:
                output = sdguard.guard(pipe, GUARD)(*args, **kwargs) if self.guarded else original(pipe, *args, **kwargs)
            except Exception as error:
                self.seen.append(f"{type(error).__name__}: {error}")
                raise
            finally:
                self.within = False
            self.seen.append(digest(output))
            return output

        setattr(cls, original.__name__, call)

    def taken(self) -> list[str]:
        """What was noted since the last time."""
        seen, self.seen = self.seen, []
        return seen


def with_stand_ins(cls: Any) -> None:
    """Have a class load what `STAND_INS` has of it."""
    original = cls.from_pretrained

    def from_pretrained(kind: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        stand_in = STAND_INS.get((kind.__name__, str(name)))
        if stand_in is None or isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            return original.__func__(kind, name, *args, **kwargs)
        return stand_in()

    cls.from_pretrained = classmethod(from_pretrained)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line that a failure or skip is told in."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip()


class Plugin:
    """Runs the tests of one class and writes what became of them.

    Args:
        pipeline: the name of the pipeline class.
        guarded: whether its calls, and those of any other supported class, are guarded.
        path: the JSON file that is written: by test its outcome, the reason of any but "passed", and what its calls gave.
    """

    def __init__(self, pipeline: str, guarded: bool, path: Path) -> None:
        self.pipeline, self.path, self.calls = pipeline, path, Calls(guarded)
        self.tests: dict[str, dict[str, Any]] = {}
        for cls in {getattr(transformers, name) for name, _ in STAND_INS}:
            with_stand_ins(cls)
        for name in FAMILIES:
            if "Modular" not in name:
                self.calls.around(getattr(diffusers, name))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read counts as a test that fails."""
        if report.failed:
            self.tests[report.nodeid] = {"outcome": "failed", "reason": reason_of(report), "calls": []}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the tests of this pipeline."""
        items[:] = [item for item in items if name_of_pipeline(getattr(item, "cls", None)) == self.pipeline]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """The same random numbers in each run, whatever was drawn before."""
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a stage of a test: its outcome is that of the first that did not pass."""
        found = self.tests.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "calls": []})
        found["calls"] += self.calls.taken()
        if report.outcome != "passed" and found["outcome"] == "passed":
            found["outcome"], found["reason"] = report.outcome, reason_of(report)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.tests))


def name_of_pipeline(cls: Any) -> str:
    """The name of the pipeline class that a class of tests is of; empty where it is of none."""
    pipeline = getattr(cls, "pipeline_class", None)
    return pipeline.__name__ if isinstance(pipeline, type) else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pipeline", help="Name of the pipeline class whose tests run.")
    parser.addoption("--guarded", action="store_true", help="Whether its calls are guarded.")
    parser.addoption("--outcomes", type=Path, help="The file that what became of the tests is written to.")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.pipeline:
        config.pluginmanager.register(Plugin(config.option.pipeline, config.option.guarded, config.option.outcomes))
