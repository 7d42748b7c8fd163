"""Profiles: where they are found, made once, kept within bounds, and what a run goes by meanwhile."""

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

import sdguard
from sdguard import GuardConfig, testbed
from sdguard.decision import background, cache, model_folder, store
from sdguard.decision.cache import alone, cache_folder, cache_path, cached_profiles, keep_in_cache, name_of, remove_cached, why_unwritable
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import known_profile, load_profile, save_profiles
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.profile import Profile, ProfileError, digest_of
from sdguard.decision.store import find_or_make, profile_for, profile_now
from sdguard.files import resumable
from sdguard.files.atomic import CannotWrite
from sdguard.guarded import run as run_module
from sdguard.guarded.run import WITHOUT_PROFILE, MemorizationError

PROMPTS = [f"a cat number {i}" for i in range(8)]
MakeProfile = Callable[..., Profile]


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process of its own, in which nothing was made yet."""
    monkeypatch.setattr(cache, "_unsaved", {})
    monkeypatch.setattr(background, "_threads", {})
    yield
    for thread in background._threads.values():
        thread.join(60)


@pytest.fixture
def made_of(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The lists of prompts that were calibrated on, each of which gives a profile in no time."""
    lists: list[list[str]] = []
    lock = threading.Lock()

    def calibrate(pipe: Any, prompts: list[str], **options: Any) -> Profile:
        with lock:
            lists.append(list(prompts))
        time.sleep(0.2)
        options["progress"](len(prompts), len(prompts))
        return replace(profile_for(pipe, 1e6), model=identity(pipe), prompts_digest=digest_of(prompts))

    monkeypatch.setattr(store, "calibrate", calibrate)
    return lists


def filled(count: int, model: dict[str, Any], profile_for: MakeProfile, tiny: Any) -> list[Path]:
    """So many profiles in the cache, each a minute newer than the one before."""
    now = time.time()
    paths = [cache_folder() / f"made-{i:03d}.json" for i in range(count)]
    for i, path in enumerate(paths):
        replace(profile_for(tiny, 1e6), model=model).save(path)
        os.utime(path, (now, now - 60 * (count - i)))
    return paths


def call(guarded: Any, **options: Any) -> Any:
    return guarded("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np", **options)


# found


def test_a_profile_is_found_by_the_models_identity_among_others_in_its_folder(tiny: Any, profile_for: MakeProfile, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    pipe = type(tiny).from_pretrained(tmp_path)
    other = replace(profile_for(tiny, 1.0), model={**identity(pipe), "size": 999})
    mine = profile_for(pipe, 2.0)
    other.save(tmp_path / "sdguard" / "profile.json")
    mine.save(tmp_path / "sdguard" / "whatever.json")
    assert known_profile(pipe, identity(pipe)) == mine


def test_the_models_own_profile_goes_before_the_cached_one_unless_its_prompts_are_asked_for(
    tiny: Any, profile_for: MakeProfile, tmp_path: Path
) -> None:
    tiny.save_pretrained(tmp_path)
    pipe = type(tiny).from_pretrained(tmp_path)
    shipped, own = profile_for(pipe, 1.0), replace(profile_for(pipe, 2.0), prompts_digest=digest_of(PROMPTS))
    shipped.save(tmp_path / "sdguard" / "profile.json")
    keep_in_cache(own, cache_path(own.model, PROMPTS))
    assert known_profile(pipe, identity(pipe)) == shipped
    assert known_profile(pipe, identity(pipe), PROMPTS) == own


@pytest.mark.parametrize("content", ["{", '{"format": 5}', "[]", "model"])
def test_what_is_damaged_is_passed_over_and_said_once(
    content: str, tiny: Any, profile_for: MakeProfile, caplog: pytest.LogCaptureFixture
) -> None:
    mine = profile_for(tiny, 2.0)
    mine.save(cache_folder() / "mine.json")
    damaged = cache_folder() / "damaged.json"
    if content == "model":
        replace(mine, model={"weights": ["unet"]}).save(damaged)
    else:
        damaged.write_text(content)
    os.utime(damaged, (time.time() + 60,) * 2)  # looked at first
    for _ in range(2):
        assert known_profile(tiny, identity(tiny)) == mine
    assert len([record for record in caplog.records if "passed over" in record.message]) == 1


def test_a_hub_id_is_looked_up_in_the_snapshot_that_it_was_loaded_from(tiny: Any, profile_for: MakeProfile, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abc"
    tiny.save_pretrained(snapshot)
    pipe = type(tiny).from_pretrained(snapshot)
    pipe.register_to_config(_name_or_path="somebody/something")  # as diffusers does for an id
    mine = profile_for(pipe, 2.0)
    mine.save(snapshot / "sdguard" / "anything.json")
    assert known_profile(pipe, identity(pipe)) == mine


def test_what_diffusers_left_on_the_hub_is_fetched_before_anything_is_calibrated(
    tiny: Any, profile_for: MakeProfile, tmp_path: Path, made_of: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abd"
    tiny.save_pretrained(snapshot)
    pipe = type(tiny).from_pretrained(snapshot)
    pipe.register_to_config(_name_or_path="somebody/something")
    mine, asked = profile_for(pipe, 2.0), []

    def download(repository: str, **options: Any) -> None:
        asked.append((repository, options))
        mine.save(snapshot / "sdguard" / "anything.json")

    monkeypatch.setattr(model_folder, "snapshot_download", download)
    for _ in range(2):
        assert profile_now(pipe) == mine
    assert asked == [("somebody/something", {"revision": "abd", "cache_dir": tmp_path, "allow_patterns": "sdguard/*"})]
    assert made_of == []


def test_a_hub_that_does_not_answer_is_asked_once_and_is_no_reason_not_to_calibrate(
    tiny: Any, tmp_path: Path, made_of: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abe"
    tiny.save_pretrained(snapshot)
    pipe = type(tiny).from_pretrained(snapshot)
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(_name_or_path="somebody/something")

    asked = []

    def download(repository: str, **options: Any) -> None:
        asked.append(repository)
        raise ConnectionError("no network")

    monkeypatch.setattr(model_folder, "snapshot_download", download)
    for prompts in (PROMPTS, PROMPTS[:6]):
        profile_now(pipe, prompts=prompts)
    assert made_of == [PROMPTS, PROMPTS[:6]]
    assert asked == ["somebody/something"]


# made


def test_threads_that_ask_at_once_calibrate_once(tiny: Any, made_of: list[list[str]]) -> None:
    found: list[Profile] = []
    threads = [threading.Thread(target=lambda: found.append(profile_for(tiny, prompts=PROMPTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert made_of == [PROMPTS]


ASK = """
import logging, sys, time
from pathlib import Path
logging.disable()
sys.path.insert(0, "tests")
from families import build
from sdguard import testbed
from sdguard.decision import store
from transformers import CLIPTokenizer

pipe = build("StableDiffusionPipeline", CLIPTokenizer.from_pretrained(testbed.path() / "tokenizer"))
made, go = store.calibrate, Path(sys.argv[1])

def calibrate(*arguments, **options):
    print("calibrates")
    time.sleep(1)
    return made(*arguments, **options)

store.calibrate = calibrate
go.with_name(sys.argv[2]).touch()
while not go.exists():
    time.sleep(0.01)
store.profile_for(pipe, prompts=[f"a cat number {i}" for i in range(8)])
"""


def test_processes_that_ask_at_once_calibrate_once(tmp_path: Path) -> None:
    go, names = tmp_path / "go", ["one", "two"]
    processes = [
        subprocess.Popen([sys.executable, "-c", ASK, str(go), name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in names
    ]
    until = time.monotonic() + 120
    while not all((tmp_path / name).exists() for name in names):
        assert all(process.poll() is None for process in processes), [process.communicate()[1] for process in processes]
        assert time.monotonic() < until
        time.sleep(0.05)
    go.touch()
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(printed) == ["", "calibrates\n"]
    assert len(cached_profiles()) == 1


def test_the_lock_is_free_again_after_a_failure(tiny: Any, made_of: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    working = store.calibrate

    def failing(*arguments: Any, **options: Any) -> Profile:
        raise MemoryError("too large")

    monkeypatch.setattr(store, "calibrate", failing)
    with pytest.raises(MemoryError):
        profile_for(tiny, prompts=PROMPTS)
    monkeypatch.setattr(store, "calibrate", working)
    thread = threading.Thread(target=lambda: profile_for(tiny, prompts=PROMPTS), daemon=True)
    thread.start()
    thread.join(30)
    assert made_of == [PROMPTS]


def test_a_model_that_is_changed_while_it_is_calibrated_gets_no_profile(tiny: Any, monkeypatch: pytest.MonkeyPatch, made_of: Any) -> None:
    working = store.calibrate

    def changing(pipe: Any, *arguments: Any, **options: Any) -> Profile:
        made = working(pipe, *arguments, **options)
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(2)
        return made

    monkeypatch.setattr(store, "calibrate", changing)
    with pytest.raises(ProfileError, match="was changed while it was calibrated: weights of unet"):
        profile_for(tiny, prompts=PROMPTS)
    assert cached_profiles() == []


def test_a_cache_that_cannot_be_written_to_is_said_and_the_profile_is_not_lost(
    tiny: Any, tmp_path: Path, made_of: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDGUARD_CACHE", str(tmp_path / "file"))
    first = profile_for(tiny, prompts=PROMPTS)
    assert profile_for(tiny, prompts=PROMPTS) is first
    assert made_of == [PROMPTS]
    assert [record for record in caplog.records if "SDGUARD_CACHE" in record.message and "Not a directory" in record.message]


def test_a_disk_that_fills_up_during_a_calibration_is_one_sentence_and_what_was_measured_is_kept(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, prompts = resumable.write_bytes, [f"a cat number {i}" for i in range(40)]

    def full(path: Path, content: bytes) -> None:
        if len(list(path.parent.glob("*"))) == 2:
            raise CannotWrite(28, "No space left on device", str(path))
        written(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(resumable, "write_bytes", full)
        says = (
            rf"^The cache {cache_folder()} cannot be written to \(No space left on device\): make room, or let SDGUARD_CACHE name another"
        )
        with pytest.raises(ProfileError, match=says):
            profile_for(tiny, prompts=prompts)
    assert len(list(cache_folder().glob("*.parts/*/*"))) == 2
    assert profile_for(tiny, prompts=prompts) == calibrate(tiny, prompts)


def test_a_cache_that_is_there_to_be_read_alone_serves_its_profiles(
    tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch, made_of: list[list[str]]
) -> None:
    """As in a container whose home was filled when it was built."""
    mine = profile_for(tiny, 1e6)
    keep_in_cache(mine, cache_path(mine.model, PROMPTS))
    before = {path: path.read_bytes() for path in cache_folder().parent.rglob("*") if path.is_file()}

    def refused(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    for owner, name in ((os, "open"), (os, "mkdir"), (tempfile, "TemporaryFile"), (Path, "touch"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, refused)
    assert known_profile(tiny, identity(tiny)) == mine
    assert call(sdguard.guard(tiny)).guard[0].judged_by == f"profile {name_of(mine)}"
    assert why_unwritable(cache_folder()) == "Read-only file system"
    monkeypatch.undo()
    assert made_of == []
    assert {path: path.read_bytes() for path in before} == before


HASHED = """
import hashlib, logging, sys
from pathlib import Path
logging.disable()
sys.path.insert(0, "tests")
import torch
from families import build
from sdguard import calibrate, testbed
from transformers import CLIPTokenizer

torch.set_num_threads(1)
pipe = build("StableDiffusionPipeline", CLIPTokenizer.from_pretrained(testbed.path() / "tokenizer"))
calibrate(pipe, [f"a {thing} in {place}" for thing in ("cat", "dog", "fox") for place in ("fog", "snow", "sky")]).save(Path(sys.argv[1]))
"""


def test_a_profiles_bytes_are_the_same_whatever_the_seed_of_hashes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.json" for seed in (0, 1)]
    for path in paths:
        environment = {**os.environ, "PYTHONHASHSEED": path.stem}
        subprocess.run([sys.executable, "-c", HASHED, str(path)], check=True, env=environment, capture_output=True, timeout=120)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_the_bar_says_what_the_profile_is_made_of_and_is_the_pipelines_own(
    tiny: Any, made_of: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.set_progress_bar_config(disable=False)
    profile_for(tiny, prompts=PROMPTS)
    shown = capsys.readouterr().err
    assert "calibrating on 8 ordinary prompts of your own: 100%" in shown
    tiny.set_progress_bar_config(disable=True)
    profile_for(tiny, prompts=PROMPTS[:6])
    assert capsys.readouterr().err == ""


# kept


def test_a_profiles_name_says_what_it_is_of(tiny: Any, made_of: list[list[str]]) -> None:
    shipped = evenly(ordinary_prompts(tiny), 5)
    shipped_path, own_path = cache_path(identity(tiny), shipped), cache_path(identity(tiny), PROMPTS)
    assert shipped_path.stem.startswith("UNet2DConditionModel-")
    assert shipped_path.stem.endswith("-5")
    assert own_path.stem.startswith(shipped_path.stem.removesuffix("5") + "8-list-")
    assert cache_path({"denoiser": "../../x"}, PROMPTS).parent == cache_folder()


def test_a_profile_is_named_in_the_cache_as_what_is_in_it_is(tiny: Any) -> None:
    made = profile_for(tiny, prompts=PROMPTS)
    assert [path.stem for path in cached_profiles()] == [name_of(made)]


def test_those_not_used_for_longest_go_once_the_cache_is_full(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT_PROFILES", 4)
    oldest, second, *others = filled(4, {**identity(tiny), "size": 999}, profile_for, tiny)
    mine = profile_for(tiny, 2.0)
    mine.save(oldest)
    os.utime(oldest, (1.0, 1.0))
    assert known_profile(tiny, identity(tiny)) == mine  # used now, though made first
    keep_in_cache(mine, cache_folder() / "new.json")
    assert {path.name for path in cached_profiles()} == {path.name for path in (oldest, *others, cache_folder() / "new.json")}
    assert not second.exists()


def test_the_use_of_a_profile_is_noted_once_a_process(tiny: Any, profile_for: MakeProfile) -> None:
    path = cache_folder() / "mine.json"
    profile_for(tiny, 2.0).save(path)
    known_profile(tiny, identity(tiny))
    os.utime(cache.mark_of(path), (1.0, 1.0))
    known_profile(tiny, identity(tiny))
    assert cache.mark_of(path).stat().st_mtime == 1.0
    remove_cached(path)
    assert not [entry for entry in cache_folder().iterdir() if entry.suffix in (".json", ".used")]


def test_work_that_was_given_up_is_bounded_too(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT_PROFILES", 2)
    for i in range(4):
        folder = cache_folder() / f"{i}.json.parts"
        folder.mkdir(parents=True)
        os.utime(folder, (i, i))
    keep_in_cache(profile_for(tiny, 2.0), cache_folder() / "new.json")
    assert sorted(path.name for path in cache_folder().glob("*.parts")) == ["2.json.parts", "3.json.parts"]


def test_many_profiles_of_other_models_are_read_once(tiny: Any, profile_for: MakeProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(40, {**identity(tiny), "size": 999}, profile_for, tiny)
    profile_for(tiny, 2.0).save(cache_folder() / "mine.json")
    os.utime(cache_folder() / "mine.json", (1.0, 1.0))  # looked at last
    read: list[Path] = []
    load = Profile.load

    def counted(path: Path) -> Profile:
        read.append(path)
        return load(path)

    monkeypatch.setattr(Profile, "load", counted)
    known_profile(tiny, identity(tiny))
    before = len(read)
    assert before >= 41
    known_profile(tiny, identity(tiny))
    assert len(read) == before


def test_a_cached_profile_can_be_given_by_its_name(tiny: Any, profile_for: MakeProfile) -> None:
    mine = profile_for(tiny, 2.0)
    keep_in_cache(mine, cache_folder() / f"{name_of(mine)}.json")
    assert profile_now(tiny, given=name_of(mine)) == mine
    assert profile_now(tiny, given=Path(name_of(mine))) == mine
    with pytest.raises(ProfileError, match="cannot be read"):
        profile_now(tiny, given="no-such-profile")


# what happens where none is known


def test_what_cannot_be_done_with_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="on_unknown is 'guess'; it must be 'calibrate', 'background', 'first_call_only' or 'raise'"):
        GuardConfig(on_unknown="guess")  # type: ignore[arg-type]


def test_with_raise_nothing_is_made(tiny: Any, made_of: list[list[str]]) -> None:
    with pytest.raises(ProfileError, match="No profile is known"):
        call(sdguard.guard(tiny, GuardConfig(on_unknown="raise")))
    assert made_of == []


def test_with_first_call_only_nothing_is_made_and_the_report_says_how_it_was_judged(tiny: Any, made_of: list[list[str]]) -> None:
    plain = call(tiny).images
    output = call(sdguard.guard(tiny, GuardConfig(on_unknown="first_call_only")))
    report = output.guard[0]
    assert (report.verdict, report.judged_by, report.p_value, report.threshold) == ("clean", WITHOUT_PROFILE, None, run_module.SAME_PICTURE)
    assert -1 <= report.score <= run_module.SAME_PICTURE
    assert "correlate by" in report.reason
    assert (output.images == plain).all()
    assert made_of == []


@pytest.mark.parametrize(("options", "verdict"), [({}, "withheld"), ({"on_failure": "pass"}, "flagged"), ({"mode": "observe"}, "flagged")])
def test_one_picture_from_two_noises_is_flagged_without_a_profile_and_not_steered(
    options: dict[str, Any], verdict: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "same_picture", lambda seen: {"reference_agreement": [0.95] * len(seen.x)})
    output = call(sdguard.guard(tiny, GuardConfig(on_unknown="first_call_only", **options)))
    report = output.guard[0]
    assert (report.verdict, report.steering, report.error, report.signals) == (verdict, None, None, {})
    assert report.score == pytest.approx(0.95)
    assert (output.images == 0).all() == (verdict == "withheld")


def test_without_a_profile_on_failure_raise_says_why(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "same_picture", lambda seen: {"reference_agreement": [0.95] * len(seen.x)})
    with pytest.raises(MemorizationError, match="without a profile it cannot be steered"):
        call(sdguard.guard(tiny, GuardConfig(on_unknown="first_call_only", on_failure="raise")))


def test_in_the_background_the_first_call_is_judged_without_a_profile_and_a_later_one_with(tiny: Any, made_of: list[list[str]]) -> None:
    guarded = sdguard.guard(tiny, GuardConfig(on_unknown="background"))
    first, second = (call(guarded).guard[0] for _ in range(2))
    assert {first.judged_by, second.judged_by} == {WITHOUT_PROFILE}
    (thread,) = background._threads.values()
    thread.join(60)
    assert call(guarded).guard[0].judged_by.startswith("profile UNet2DConditionModel-")
    assert len(made_of) == 1


def test_runs_and_a_calibration_in_the_background_do_not_disturb_each_other(embedded: Any) -> None:
    quiet, busy = (build("StableDiffusionPipeline", embedded.tokenizer) for _ in range(2))
    alone_made = profile_for(quiet, prompts=PROMPTS)
    remove_cached(cached_profiles()[0])
    plain = call(busy).images
    guarded = sdguard.guard(
        busy, GuardConfig(false_positive_rate=0.2, on_unknown="background", calibration_prompts=PROMPTS, mode="observe")
    )
    reports = []
    for _ in range(200):
        output = call(guarded)
        assert (output.images == plain).all()
        reports.append(output.guard[0])
        if reports[-1].judged_by != WITHOUT_PROFILE:
            break
    assert reports[0].judged_by == WITHOUT_PROFILE
    assert reports[-1].judged_by == f"profile {name_of(alone_made)}"
    assert load_profile(cached_profiles()[0]).scores == pytest.approx(alone_made.scores)


def test_what_fails_in_the_background_is_logged_and_not_tried_again(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def failing(*arguments: Any, **options: Any) -> Profile:
        tried.append(arguments)
        raise MemoryError("too large")

    monkeypatch.setattr(store, "calibrate", failing)
    for _ in range(3):
        assert profile_now(tiny, on_unknown="background") is None
        next(iter(background._threads.values())).join(30)
    assert len(tried) == 1
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1


ENDS = """
import sys, time
sys.path.insert(0, "tests")
from families import build
from sdguard import testbed
from sdguard.decision import cache, store
from transformers import CLIPTokenizer

pipe = build("StableDiffusionPipeline", CLIPTokenizer.from_pretrained(testbed.path() / "tokenizer"))
store.profile_now(pipe, on_unknown="background", prompts=[f"a cat number {i}" for i in range(1200)])
while not list(cache.cache_folder().glob("*.parts/*/*")):
    time.sleep(0.01)
print("ends")
"""


def test_a_process_ends_in_the_middle_of_a_calibration_in_the_background() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert cached_profiles() == []


# on the pipeline


def test_a_saved_pipeline_carries_its_profiles(tiny: Any, profile_for: MakeProfile, tmp_path: Path) -> None:
    mine, own = profile_for(tiny, 1.0), replace(profile_for(tiny, 2.0), prompts_digest="another")
    other = replace(profile_for(tiny, 3.0), model={**identity(tiny), "size": 999})
    for number, profile in enumerate((mine, own, other)):
        profile.save(cache_folder() / f"{number}.json")
        os.utime(cache_folder() / f"{number}.json", (number, number))
    sdguard.guard(tiny).save_pretrained(tmp_path)
    assert {path.stem for path in (tmp_path / "sdguard").iterdir()} == {name_of(mine), "profile"}
    for path in cached_profiles():
        remove_cached(path)
    guarded = sdguard.GuardedPipeline.from_pretrained(tmp_path, guard=GuardConfig(on_unknown="raise"))
    assert call(guarded).guard[0].judged_by == f"profile {name_of(own)}"  # the newest, as before


def test_a_cache_that_is_named_needs_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setenv("SDGUARD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "profiles"


@pytest.mark.parametrize(
    ("content", "expected"), [("\ufeffa cat\na\u2028dog\n\n", ["a cat", "a\u2028dog"]), ("a caf\xe9", None)], ids=["utf-8", "latin-1"]
)
def test_the_prompts_that_come_with_a_model_are_lines_of_utf_8(content: str, expected: list[str] | None, tiny: Any, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    file = tmp_path / model_folder.PROMPTS_FILE
    file.parent.mkdir()
    file.write_bytes(content.encode("utf-8" if expected else "latin-1"))
    pipe = type(tiny).from_pretrained(tmp_path)
    if expected:
        assert ordinary_prompts(pipe) == expected
    else:
        with pytest.raises(ValueError, match=f"{file} is no .txt file that can be read"):
            ordinary_prompts(pipe)


def test_nothing_known_leaves_no_folder(tiny: Any, tmp_path: Path) -> None:
    assert save_profiles(tiny, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_is_calibrated_ahead_of_its_calls(tiny: Any, made_of: list[list[str]]) -> None:
    guarded = sdguard.guard(tiny)
    made = guarded.calibrate(PROMPTS)
    assert guarded.calibrate() == made
    assert call(guarded).guard[0].judged_by == f"profile {name_of(made)}"
    assert made_of == [PROMPTS]


def test_own_prompts_go_before_a_profile_that_came_with_the_model(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = known_profile(embedded, identity(embedded))
    assert shipped is not None
    own = replace(shipped, prompts_digest=digest_of(PROMPTS))
    monkeypatch.setattr(store, "calibrate", lambda *arguments, **options: own)
    guarded = sdguard.guard(embedded)
    assert guarded.calibrate() == shipped
    assert guarded.calibrate(PROMPTS) == own
    assert call(guarded).guard[0].judged_by == f"profile {name_of(own)}"


def test_the_embedded_models_profile_is_called_by_its_content() -> None:
    assert name_of(load_profile(testbed.path() / "sdguard" / "profile.json")).startswith("UNet2DConditionModel-")


def test_whoever_waits_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "made.json"
    lock = str(cache.lock_file(path))
    program = f"import filelock; lock = filelock.FileLock({lock!r}); lock.acquire(); print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    threading.Timer(0.3, lambda: holder.communicate("\n")).start()
    with alone(path):
        assert holder.wait(10) == 0
    assert "another process makes" in caplog.text


def test_a_stopped_calibration_keeps_what_was_measured(tiny: Any) -> None:
    calls: list[None] = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise background.Stopped

    with pytest.raises(background.Stopped):
        find_or_make(tiny, identity(tiny), [f"a cat number {i}" for i in range(40)], None, stop)
    (work,) = cache_folder().glob("*.parts/*")
    assert len(list(work.iterdir())) == 2
    kept = [resumable.unsealed(path.read_bytes()) for path in work.iterdir()]
    assert all(content and json.loads(content) for content in kept)
