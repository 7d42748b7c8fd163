"""Who is told of verdicts: the audit log, which is on disk before a picture is delivered, Python's logging, and the user's own function."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from families import PROMPTS, build, call, modular, profile_for, reworded

import sdguard
from sdguard import GuardConfig, GuardedGuidance, GuardReport, MemorizationError
from sdguard.decision.cache import model_name
from sdguard.decision.identity import identity
from sdguard.decision.store import OTHER_ADAPTERS
from sdguard.denoiser.probe import quiet
from sdguard.files.atomic import CannotWrite
from sdguard.guarded import guider as guider_module
from sdguard.guarded import pipeline as pipeline_module
from sdguard.guarded import run as run_module
from sdguard.guarded.audit_log import ENDED, audit_files, prompt_digest, record_of, schema
from sdguard.guarded.run import model_of

NONE, ALL = profile_for(1e6), profile_for(1e-6)


@pytest.fixture
def pipe(embedded: Any) -> Any:
    return build("StableDiffusionPipeline", embedded.tokenizer)


@pytest.fixture(autouse=True)
def _given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles that are given are taken for any run."""
    for module in (pipeline_module, guider_module):
        monkeypatch.setattr(module, "profile_of", lambda pipe, config, adapter_scale: config.profile)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def records(path: Path) -> list[dict[str, Any]]:
    """The records of an audit log, each of which is valid."""
    found = [json.loads(line) for file in audit_files(path) for line in file.read_bytes().splitlines()]
    for record in found:
        jsonschema.validate(record, schema(), jsonschema.Draft202012Validator)
    return found


def guarded(pipe: Any, **config: Any) -> Any:
    return sdguard.guard(pipe, GuardConfig(**config))


# the audit log


@pytest.mark.parametrize("rate", [np.float32(0.25), Fraction(1, 4)])
def test_a_rate_of_any_kind_of_number_can_be_written_down(rate: Any, pipe: Any, log: Path) -> None:
    (report,) = call(guarded(pipe, mode="observe", profile=NONE, audit_log=log, false_positive_rate=rate), ["a cat"]).guard
    assert records(log)[0]["false_positive_rate"] == json.loads(report.to_json())["false_positive_rate"] == 0.25


def test_of_what_is_no_text_the_pipeline_itself_complains(pipe: Any, log: Path) -> None:
    strange: Any = ["a cat", ["a dog", 5]]
    with pytest.raises(Exception) as plain:  # noqa: PT011
        call(pipe, strange)
    with pytest.raises(plain.type, match=re.escape(str(plain.value))):
        call(guarded(pipe, mode="observe", profile=NONE, audit_log=log), strange)
    assert [record["prompt_sha256"] is None for record in records(log)] == [False, True]


def test_the_two_logs_are_two_files(log: Path) -> None:
    with pytest.raises(ValueError, match="score_log and audit_log are one file"):
        GuardConfig(score_log=str(log), audit_log=log)


@pytest.mark.parametrize("name", ["audit_log", "score_log"])
def test_a_path_that_no_file_can_have_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*; no file's path has the character 0 in it"):
        guarded(None, **{name: "a\0b"})


def test_every_image_has_a_record_that_says_what_its_report_says(pipe: Any, log: Path) -> None:
    reports: list[GuardReport] = []
    for profile in (NONE, ALL):
        reports += call(guarded(pipe, mode="block", profile=profile, audit_log=log)).guard
    found = records(log)
    assert [record["verdict"] for record in found] == ["clean"] * len(PROMPTS) + ["withheld"] * len(PROMPTS)
    for record, report in zip(found, reports, strict=True):
        shared = {name: value for name, value in record.items() if hasattr(report, name) and name != "reason"}
        assert shared == {name: getattr(report, name) for name in shared}
        assert record["delivered"] == (report.verdict == "clean")
        assert record["prompt_sha256"] == hashlib.sha256(str(report.prompt).encode()).hexdigest()
    assert {record["model"] for record in found} == {model_name(NONE.model)}
    assert [record["seed"] for record in found] == [7 + i for i in range(len(PROMPTS))] * 2
    assert len({record["id"] for record in found}) == len(found)


def test_a_steered_image_is_delivered_and_nothing_of_its_prompt_is_logged(
    pipe: Any, log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "try_in_order", always_passes)
    (report,) = call(guarded(pipe, profile=ALL, audit_log=log), ["a heron in snow"]).guard
    assert report.verdict == "steered"
    (record,) = records(log)
    assert record["delivered"]
    assert record["reason"].endswith("; reworded, verified ahead and on the picture.")
    assert "heron" in report.reason
    assert "heron" not in log.read_text() + caplog.text


def always_passes(flagged: Any, methods: Any, outcomes: Any = None) -> Any:
    made = reworded(flagged, methods)
    for outcome, prompt in zip(made, flagged.prompts, strict=True):
        outcome.attempts[-1].update(wording=f"the {prompt}", dropped=["heron"])
    return made


def test_prompts_are_logged_where_that_is_asked_for(pipe: Any, log: Path) -> None:
    call(guarded(pipe, mode="observe", profile=NONE, audit_log=log, log_prompts=True))
    assert [record["prompt"] for record in records(log)] == list(PROMPTS)
    assert all(record["prompt_sha256"] == prompt_digest(record["prompt"]) for record in records(log))


def test_of_embeddings_there_is_no_prompt_to_hash(pipe: Any, log: Path) -> None:
    text, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    given = {"prompt_embeds": text, "negative_prompt_embeds": null, "num_inference_steps": 2, "output_type": "np"}
    guarded(pipe, mode="observe", profile=NONE, audit_log=log)(**given)
    assert [record["prompt_sha256"] for record in records(log)] == [None] * len(PROMPTS)
    assert [record["seed"] for record in records(log)] == [None] * len(PROMPTS)


def test_a_schema_that_is_sound_names_every_field_of_a_record_and_no_other() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    record = record_of(GuardReport("a cat", 0), delivered=True, with_prompt=True)
    assert list(record) == list(schema()["properties"])
    assert [*schema()["required"], "prompt"] == list(record)
    record |= {"id": "0" * 32, "time": "2026-01-01T00:00:00.000Z", "version": "1", "model": "m"}
    jsonschema.validate(record, schema())
    for name in record:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**record, name: []}, schema())


def test_a_call_that_an_error_ends_is_in_the_log_and_nothing_of_it_was_delivered(pipe: Any, log: Path) -> None:
    with pytest.raises(MemorizationError):
        call(guarded(pipe, mode="block", on_failure="raise", profile=ALL, audit_log=log))
    found = records(log)
    assert len(found) == len(PROMPTS)
    assert not any(record["delivered"] for record in found)
    assert all(record["reason"].endswith(ENDED) for record in found)


def test_an_error_names_its_kind_alone_where_prompts_are_not_logged() -> None:
    report = GuardReport("a heron", 0, "withheld", error="ValueError: no heron")
    assert record_of(report, True, False)["reason"] == "Could not be judged (ValueError); withheld."
    assert record_of(report, True, True)["reason"] == "Could not be judged (ValueError: no heron); withheld."


def test_a_log_that_cannot_be_written_is_told_of_before_anything_is_evaluated(pipe: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(CannotWrite, match=rf"^{tmp_path} cannot be written: Is a directory\. Make room or give another place"):
        call(guarded(pipe, profile=NONE, audit_log=tmp_path))
    assert calls == []


def test_no_picture_is_delivered_whose_record_is_not_on_disk(tmp_path: Path, pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    log, told = tmp_path / "folder" / "audit.jsonl", list[str]()

    def lost(*_: Any) -> None:
        shutil.rmtree(log.parent, ignore_errors=True)
        log.parent.write_text("in its place")

    config: dict[str, Any] = {"mode": "block", "profile": ALL, "audit_log": log, "on_verdict": lambda report: told.append(report.verdict)}
    with pytest.raises(CannotWrite, match=rf"^{log} cannot be written"):
        call(guarded(pipe, on_call=once(lost), **config))
    assert told == ["withheld"] * len(PROMPTS)
    assert sum("sdguard: withheld: image" in record.getMessage() for record in caplog.records) == len(PROMPTS)


def once(function: Callable[..., None]) -> Callable[..., None]:
    """A function that does what ``function`` does when it is called first, and nothing after."""
    left = [function]
    return lambda *arguments: left.pop()(*arguments) if left else None


def test_what_ended_a_call_is_raised_even_where_the_log_cannot_be_written(
    tmp_path: Path, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "audit.jsonl"

    def fails(*_: Any) -> None:
        log.unlink()
        log.mkdir()
        raise RuntimeError("of the caller's own")

    with pytest.raises(RuntimeError, match="of the caller's own"):
        call(guarded(pipe, profile=NONE, audit_log=log, on_call=fails))
    assert f"{log} cannot be written" in caplog.text


# Python's log


def test_each_verdict_that_is_not_clean_is_one_record_of_the_logger_of_the_package(
    pipe: Any, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call(guarded(pipe, mode="observe", profile=NONE))
    assert caplog.records == []
    call(guarded(pipe, mode="observe", profile=ALL, audit_log=log))
    assert [(record.name, record.levelno) for record in caplog.records] == [("sdguard", logging.WARNING)] * len(PROMPTS)
    assert [vars(record)["sdguard"] for record in caplog.records] == records(log)
    assert not any(prompt in caplog.text for prompt in PROMPTS)
    assert caplog.records[0].getMessage().startswith(f"sdguard: flagged: image {records(log)[0]['id']}, row 0 of its call: Predicted to be")


# the user's own function


def test_on_verdict_is_called_with_every_report_once(pipe: Any) -> None:
    told: list[GuardReport] = []
    for profile in (NONE, ALL):
        told.clear()
        output = call(guarded(pipe, mode="block", profile=profile, on_verdict=told.append))
        assert all(one is other for one, other in zip(told, output.guard, strict=True))


def test_what_on_verdict_raises_is_logged_and_changes_no_picture(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = call(pipe).images

    def fails(report: GuardReport) -> None:
        raise KeyError("a counter of its own")

    for profile, expected in ((NONE, plain), (ALL, np.zeros_like(plain))):
        output = call(guarded(pipe, mode="block", profile=profile, on_verdict=fails))
        assert np.array_equal(output.images, expected)
    assert sum("on_verdict failed" in record.getMessage() for record in caplog.records) == 2 * len(PROMPTS)


def test_on_verdict_cannot_let_a_withheld_picture_through(pipe: Any, log: Path) -> None:
    def forgive(report: GuardReport) -> None:
        report.verdict = "clean"

    output = call(guarded(pipe, mode="block", profile=ALL, on_verdict=forgive, audit_log=log))
    assert output.images.max() == 0
    assert {record["verdict"] for record in records(log)} == {"withheld"}


# modular pipelines


@pytest.mark.parametrize("scheduler", [None, "HeunDiscreteScheduler"])
def test_a_guider_tells_of_each_image_once_when_its_run_is_over(scheduler: str | None, embedded: Any, log: Path) -> None:
    import diffusers

    pipe, told = modular("StableDiffusionXLModularPipeline", embedded.tokenizer), list[GuardReport]()
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    for profile in (NONE, ALL):
        config = GuardConfig("block", profile=profile, audit_log=log, on_verdict=told.append)
        guider = GuardedGuidance(pipe, guard=config, guidance_scale=4.0)
        pipe.update_components(guider=guider)
        run(pipe)
        assert told[-len(PROMPTS) :] == guider.reports
    assert [record["verdict"] for record in records(log)] == ["clean"] * len(PROMPTS) + ["withheld"] * len(PROMPTS)
    assert len(told) == 2 * len(PROMPTS)


def run(pipe: Any) -> Any:
    with quiet(pipe):
        return pipe(prompt=list(PROMPTS), num_inference_steps=3, height=16, width=16, output_type="latent", output="images")


def test_a_guider_tells_of_a_run_that_an_error_ends(embedded: Any, log: Path) -> None:
    pipe = modular("StableDiffusionXLModularPipeline", embedded.tokenizer)
    config = GuardConfig("block", on_failure="raise", profile=ALL, audit_log=log)
    pipe.update_components(guider=GuardedGuidance(pipe, guard=config, guidance_scale=4.0))
    with pytest.raises(MemorizationError):
        run(pipe)
    assert [record["delivered"] for record in records(log)] == [False] * len(PROMPTS)


# what a report knows of its occasion


def test_the_seed_is_known_of_a_generator_that_nothing_was_drawn_from(pipe: Any) -> None:
    def seeds(generator: Any) -> list[int | None]:
        output = guarded(pipe, mode="observe", profile=NONE)(
            ["a cat", "a dog"], num_inference_steps=1, output_type="np", generator=generator
        )
        return [report.seed for report in output.guard]

    used = torch.Generator().manual_seed(5)
    assert seeds(used) == [5, 5]
    assert seeds(used) == [None, None]
    assert seeds(None) == [None, None]
    assert seeds([torch.Generator().manual_seed(2**64 - 1), used]) == [2**64 - 1, None]


def test_a_model_has_one_name_in_any_precision_and_by_any_profile_of_it(pipe: Any) -> None:
    own = replace(NONE, model=identity(pipe))
    name = model_name(own.model)
    pipe.to(torch.float16)
    assert [model_of(pipe, profile) for profile in (own, replace(own, note="of 9 scores of real traffic"))] == [name, name]


def test_a_model_with_other_adapters_than_its_profile_has_its_own_name(pipe: Any) -> None:
    carried = replace(NONE, model=identity(pipe), note=f"{OTHER_ADAPTERS}; 24 ordinary prompts read alike with these")
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(2)
    assert model_of(pipe, carried) == model_name(identity(pipe)) != model_name(carried.model)


def test_a_rate_is_that_of_the_image_and_is_promised_by_a_profile_alone(pipe: Any) -> None:
    output = call(guarded(pipe, mode="observe", profile=NONE, false_positive_rate=0.1, rate_per="prompt"), ["a cat", "a cat", "a dog"])
    assert [report.false_positive_rate for report in output.guard] == [0.05, 0.05, 0.1]
    output = call(guarded(pipe, mode="observe", on_unknown="first_call_only"))
    assert {(report.false_positive_rate, report.profile, report.model) for report in output.guard} == {
        (None, None, model_name(identity(pipe)))
    }
