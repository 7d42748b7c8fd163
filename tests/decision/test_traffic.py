"""A profile of real traffic: the log, and what the promise becomes with memorized pictures among it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sdguard
from sdguard import GuardConfig, Profile, testbed
from sdguard.cli.main import app
from sdguard.decision.cache import cache_folder, keep_in_cache, name_of
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import known_profile
from sdguard.decision.profile import ProfileError
from sdguard.decision.traffic import append_scores, logged_scores, profile_of_traffic


@pytest.fixture
def profile(tiny: Any, profile_for: Callable[..., Profile]) -> Profile:
    return profile_for(tiny, 1.0)


def run(tiny: Any, **config: Any) -> None:
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    sdguard.guard(tiny, GuardConfig("observe", **config))(["a cat", "a dog"], generator=generator, num_inference_steps=3, output_type="np")


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_run_appends_its_scores_and_no_prompts_unless_asked(log_prompts: bool, tiny: Any, profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    for _ in range(2):
        run(tiny, profile=profile, score_log=path, log_prompts=log_prompts)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4
    assert {row["profile"] for row in rows} == {name_of(profile)}
    assert all(row["score"] == row["signals"]["guidance_norm"] for row in rows)
    assert [row.get("prompt") for row in rows] == (["a cat", "a dog"] * 2 if log_prompts else [None] * 4)
    assert ("a cat" in path.read_text()) == log_prompts


def test_a_log_that_cannot_be_written_stops_nothing(tiny: Any, profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tiny, profile=profile, score_log=tmp_path)
    assert "cannot be written to" in caplog.text


@pytest.mark.parametrize("memorized", [0.0, 0.005, 0.01, 0.02])
def test_the_promise_holds_up_to_the_stated_share(profile: Profile, memorized: float) -> None:
    """Ordinary scores are normal, memorized ones lie above; 1% promised, at most 1% said to be memorized."""
    rng, rates = np.random.default_rng(0), []
    for _ in range(200):
        scores = rng.normal(size=2000)
        scores[: int(memorized * 2000)] += 10
        made = profile_of_traffic(profile, scores.tolist(), 0.01)
        rates.append(float((rng.normal(size=2000) > made.threshold(0.01)).mean()))
    if memorized <= 0.01:
        assert 0.009 <= np.mean(rates) <= 0.0205
    else:
        assert np.mean(rates) < 0.001  # more than was said: the threshold lies among them, and says so by flagging nobody


def test_scores_of_another_profile_and_lines_that_are_none_are_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with pytest.raises(ProfileError, match="cannot be read"):
        logged_scores(path, [profile])
    append_scores(path, [{"profile": "another", "score": 1.0}] * 200)
    with pytest.raises(
        ProfileError, match=r"holds 0 scores that profile .* gave, and 200 that another profile gave; 100 by one profile are needed"
    ):
        logged_scores(path, [profile])
    append_scores(path, [{"profile": name_of(profile), "score": float(i)} for i in range(100)])
    assert logged_scores(path, [profile])[1] == [float(i) for i in range(100)]
    path.write_text(path.read_text() + "null\n")
    with pytest.raises(ProfileError, match="line 301 is no line"):
        logged_scores(path, [profile])


def test_a_log_is_of_the_first_profile_that_gave_enough_of_it(profile: Profile, tmp_path: Path) -> None:
    path, newer = tmp_path / "log", replace(profile, prompts_digest="newer")
    append_scores(path, [{"profile": name_of(newer), "score": 1.0}] * 99)
    append_scores(path, [{"profile": name_of(profile), "score": 2.0}] * 100)
    assert logged_scores(path, [newer, profile]) == (profile, [2.0] * 100)
    append_scores(path, [{"profile": name_of(newer), "score": 1.0}])
    assert logged_scores(path, [newer, profile]) == (newer, [1.0] * 100)


@pytest.mark.parametrize(
    "line", [b"\xff\xfe\x00", b"[" * 100_000, b'{"profile": "a", "score": 1e999}', b'{"profile": "a", "score": 1' + b"0" * 999 + b"}"]
)
def test_hostile_lines_are_refused_by_number(line: bytes, profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(line + b"\n")
    with pytest.raises(ProfileError, match=rf"^{path}: line 1 is no line of a log of scores: remove it, and try again\.$"):
        logged_scores(path, [profile])


def test_a_line_that_a_full_disk_cut_off_spoils_no_other(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_scores(path, [{"profile": name_of(profile), "score": float(i)} for i in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    append_scores(path, [{"profile": name_of(profile), "score": 100.0}])
    with pytest.raises(ProfileError, match="line 101 is no line"):
        logged_scores(path, [profile])
    path.write_bytes(b"".join(line for i, line in enumerate(path.read_bytes().splitlines(True)) if i != 100))
    assert logged_scores(path, [profile])[1] == [float(i) for i in range(101)]


def test_the_command_makes_a_profile_that_a_run_can_name(embedded: Any, tmp_path: Path) -> None:
    shipped = Profile.load(testbed.path() / "sdguard" / "profile.json")
    log, out = tmp_path / "log.jsonl", tmp_path / "traffic.json"
    append_scores(log, [{"profile": name_of(shipped), "score": score / 100} for score in range(500)])
    result = CliRunner().invoke(
        app, ["calibrate", "--from-log", str(log), "--memorized-share", "0.02", "--out", str(out)], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 0, result.stderr
    made = Profile.load(out)
    assert made.prompts == 490
    assert made.threshold(0.01) == 4.86
    assert f"--profile {out}" in result.stdout
    short = CliRunner().invoke(app, ["calibrate", "--from-log", str(log), "--fpr", "0.001", "--out", str(out)])
    assert short.exit_code == 1
    assert "needs at least 999 scored" in " ".join(short.stderr.split())


def test_the_command_says_whether_the_guard_takes_what_it_made_and_can_be_given_another_share(
    tiny: Any, profile: Profile, tmp_path: Path
) -> None:
    log, model = tmp_path / "log", tmp_path / "model"
    append_scores(log, [{"profile": name_of(profile), "score": float(i)} for i in range(200)])
    tiny.save_pretrained(model)
    keep_in_cache(profile, cache_folder() / f"{name_of(profile)}.json")
    for share, kept in (("0.3", 140), ("0.1", 180)):
        made = CliRunner().invoke(app, ["calibrate", "--model", str(model), "--from-log", str(log), "--memorized-share", share])
        assert made.exit_code == 0, made.stderr
        assert "does not take it" not in made.stdout
        taken = known_profile(tiny, identity(tiny))
        assert taken is not None
        assert taken.prompts == kept
