"""Scanning: the guard's own scores without pictures, whatever the order and the batches, resumed and shared; the command."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.stats import false_discovery_control
from torch.nn.modules.module import register_module_forward_hook
from typer.testing import CliRunner, Result

import sdguard
from sdguard import GuardConfig, Profile, testbed
from sdguard.cli.main import app
from sdguard.decision.profile import ProfileError
from sdguard.files.prompt_files import PromptFile, read_table, write_table
from sdguard.files.resumable import parts_folder
from sdguard.guarded.run import profile_of
from sdguard.scan import scan as scanning
from sdguard.scan import scan_file
from sdguard.scan.ranking import rank_prompts
from sdguard.scan.scan import combine_p_values, power_note, reports_of, scan, scan_batch, seed_of

SETTING: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
MEMORIZED, ORDINARY = 2, 4


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(testbed.path() / "sdguard" / "profile.json")


@pytest.fixture(scope="module")
def prompts() -> dict[int, str]:
    """Some captions of the development split: such as are copied from any noise, between ordinary ones."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    table = table[table.split == "development"]
    copied = table[table.copy_rate == 1].text.tolist()[:MEMORIZED]
    ordinary = table[table.kind == "ordinary"].text.tolist()[:ORDINARY]
    return dict(enumerate([*ordinary[:2], *copied, *ordinary[2:]]))


@pytest.fixture(scope="module")
def table(embedded: Any, profile: Profile, prompts: dict[int, str]) -> pd.DataFrame:
    """The scan that the others are compared with."""
    return scanned(embedded, profile, prompts)


def scanned(pipe: Any, profile: Profile, prompts: dict[int, str], **options: Any) -> pd.DataFrame:
    batches = scan(pipe, profile, prompts, **{"seeds": 2, "batch_size": 4, **options})
    return rank_prompts([row for rows in batches for row in rows], 0.05)


def same(one: pd.DataFrame, other: pd.DataFrame, ignore: tuple[str, ...] = ()) -> None:
    """Equal up to the order of reduction, which a difference of two finite differences makes larger."""
    coarse = [name for name in one.columns if name.startswith("lid_noisy")]
    apart = [*ignore, *coarse]
    pd.testing.assert_frame_equal(one.drop(columns=apart), other.drop(columns=apart), rtol=1e-3, atol=1e-4, check_dtype=False)
    pd.testing.assert_frame_equal(one[coarse], other[coarse], rtol=1e-3, atol=1e-2, check_dtype=False)


def test_memorized_captions_rank_over_ordinary_ones(table: pd.DataFrame, profile: Profile) -> None:
    assert set(table.row[:MEMORIZED]) == {2, 3}
    assert table.p_value[:MEMORIZED].tolist() == pytest.approx([2 / (1 + profile.prompts)] * MEMORIZED)
    assert table.discovered.tolist() == [True] * MEMORIZED + [False] * ORDINARY
    assert table.q_value.tolist() == pytest.approx(false_discovery_control(table.p_value))


@pytest.mark.parametrize("k", [0, 1])
def test_scores_are_those_of_a_guarded_run(k: int, table: pd.DataFrame, embedded: Any, profile: Profile) -> None:
    """Of one that is read at the very timestep, and to a difference that decides nothing of one whose own first call is taken for it."""
    own = sdguard.guard(embedded, GuardConfig(mode="observe", profile=profile))
    twin = copy.copy(embedded)
    twin.scheduler = DDIMScheduler.from_config(embedded.scheduler.config, timestep_spacing="leading")
    read = sdguard.guard(twin, GuardConfig(mode="observe", profile=profile))
    reports, others = (
        guarded(
            table.prompt.tolist(),
            generator=[torch.Generator().manual_seed(seed) for seed in table[f"seed_{k}"]],
            output_type="latent",
            **SETTING,
        ).guard
        for guarded in (read, own)
    )
    assert {report.verdict for report in reports} == {"clean", "flagged"}
    assert [report.verdict for report in others] == [report.verdict for report in reports]
    assert table[f"score_{k}"].tolist() == pytest.approx([report.score for report in reports], abs=1e-3)
    for name in profile.cascade.signals:
        values = [report.signals.get(name, {"value": math.nan})["value"] for report in reports]
        assert table[f"{name}_{k}"].tolist() == pytest.approx(values, rel=1e-2, abs=1e-2, nan_ok=True)


def test_evaluations_are_those_that_were_made(embedded: Any, profile: Profile, prompts: dict[int, str]) -> None:
    images = 0

    def count(module: Any, arguments: Any, output: Any) -> None:
        nonlocal images
        images += len(output) * (module is embedded.unet.conv_in)

    handle = register_module_forward_hook(count)  # one on the denoiser itself would be a patch of it
    table = scanned(embedded, profile, prompts)
    handle.remove()
    assert table.evaluations.sum() == images
    assert table.evaluations.min() == 2 * 2


def test_neither_batches_nor_order_matter(table: pd.DataFrame, embedded: Any, profile: Profile, prompts: dict[int, str]) -> None:
    same(scanned(embedded, profile, prompts, batch_size=3), table)
    backwards = dict(enumerate(reversed(prompts.values())))
    same(scanned(embedded, profile, backwards), table, ignore=("row",))


def test_seeds_differ_between_prompts_and_stay() -> None:
    assert seed_of("a cat", 0) == 3882755056
    assert len({seed_of(prompt, k) for prompt in ("a cat", "a dog") for k in range(3)}) == 6


def test_a_combined_p_value_is_valid_under_dependence() -> None:
    assert combine_p_values([0.3]) == 0.3
    assert combine_p_values([0.01, 0.03]) == pytest.approx(0.04)
    assert combine_p_values([0.9, 0.8]) == 1.0
    uniform = np.random.default_rng(0).random((20_000, 1))
    for partners in (uniform, 1 - uniform, (uniform + 0.5) % 1):
        found = np.array([combine_p_values(pair) for pair in np.hstack([uniform, partners]).tolist()])
        for level in (0.01, 0.1, 0.5):
            assert (found <= level).mean() <= level + 0.01


def test_a_profile_too_small_for_the_list_is_told(profile: Profile) -> None:
    assert profile.prompts == 958
    assert power_note(profile, 1, 47, 0.05) is None
    assert "unless 2 of these 48 prompts reach it; a single one needs a profile of 959 scores" in str(power_note(profile, 1, 48, 0.05))
    assert "nothing can be discovered at a false discovery rate of 0.001" in str(power_note(profile, 2, 10, 0.001))


def test_what_cannot_be_judged_is_told_and_tried_again(
    embedded: Any, profile: Profile, prompts: dict[int, str], table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*arguments: Any) -> None:
        raise ArithmeticError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr("sdguard.guarded.run.judge", fails)
        failed = scanned(embedded, profile, prompts, work=tmp_path / "work")
    assert set(failed.error) == {"ArithmeticError: no luck"}
    assert failed.p_value.isna().all()
    assert not failed.discovered.any()
    same(scanned(embedded, profile, prompts, work=tmp_path / "work"), table)


def test_an_interrupted_scan_goes_on(
    embedded: Any, profile: Profile, prompts: dict[int, str], table: pd.DataFrame, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[int] = []

    def counted(pipe: Any, profile: Profile, batch: Any, **options: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.extend(row for row, _ in batch)
        return scan_batch(pipe, profile, batch, **options)

    monkeypatch.setattr(scanning, "scan_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        scanned(embedded, profile, prompts, work=tmp_path / "work")
    assert done == [0, 1, 2, 3]
    done.append(-1)
    same(scanned(embedded, profile, prompts, work=tmp_path / "work", batch_size=2), table)
    assert done == [0, 1, 2, 3, -1, 4, 5]
    same(scanned(embedded, profile, prompts, work=tmp_path / "work"), table)
    assert len(done) == 7
    other = {**prompts, 0: "another cat"}
    assert len(scanned(embedded, profile, other, work=tmp_path / "work")) == 6
    assert len(done) == 13


def test_the_profile_of_another_model_and_one_that_is_too_small_are_refused(tiny: Any, embedded: Any) -> None:
    made = profile_of(tiny, GuardConfig(calibration_prompts=[f"a lion number {i}" for i in range(9)]))
    assert made is not None
    assert made.prompts == 6
    with pytest.raises(ProfileError, match="another model's"):
        next(scan(embedded, made, {0: "a cat"}))
    with pytest.raises(ProfileError, match="needs at least 99 scored ordinary prompts; this profile has 6"):
        next(scan(tiny, made, {0: "a cat"}))


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["scan", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def listed(prompts: dict[int, str], tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    write_table(pd.DataFrame({"url": ["u"] * len(prompts), "TEXT": prompts.values()}), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_command_ranks_a_file_into_a_file(suffix: str, prompts: dict[int, str], table: pd.DataFrame, tmp_path: Path) -> None:
    path, out = tmp_path / f"in.{suffix}", tmp_path / "out" / f"scan.{suffix}"
    write_table(pd.DataFrame({"url": ["u"] * len(prompts), "TEXT": prompts.values()}), path)
    result = command(path, "--out", out, "--seeds", "2", "--batch-size", "4")
    assert result.exit_code == 0, result.stderr
    same((pd.read_csv if suffix == "csv" else read_table)(out).assign(error=""), table)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert "2 of 6 prompts discovered at a false discovery rate of 0.05" in result.stdout
    assert "scanning" in result.stderr


def test_a_text_file_is_ranked_by_line(prompts: dict[int, str], tmp_path: Path) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "scan.jsonl"
    path.write_text(f"{prompts[0]}\n\n{prompts[3]}\n{'tall ' * 40}cat\n")
    result = command(path, "--out", out)
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["row"] == 2
    assert rows[0]["prompt"] == prompts[3]
    assert "1 prompts are longer than the 32 tokens that the text encoder reads" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{folder}/none.txt"], "none.txt cannot be read: No such file or directory."),
        (["{prompts}", "--column", "caption"], "has no column 'caption': it has url, TEXT."),
        (["{prompts}", "--out", "{folder}/out/scan.xlsx"], "cannot be written: its suffix must be one of .csv, .jsonl, .parquet."),
        (["{prompts}", "--fdr", "0"], "--fdr is 0; it must lie between 0 and 1."),
        (["{prompts}", "--fpr", "1"], "false_positive_rate is 1.0; it must lie between 0 and 1."),
        (["{prompts}", "--fpr", "0.0001"], "needs at least 9999 scored ordinary prompts; this profile has 958."),
        (["{prompts}", "--model", "/no/such/model"], "There is no model at /no/such/model"),
        (["{prompts}", "--profile", "{other}"], "another model's: weights of unet"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, listed: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.json"
    shipped = Profile.load(testbed.path() / "sdguard" / "profile.json")
    shipped.model["weights"]["unet"] = {"float32": "0"}
    shipped.save(other)
    filled = [argument.format(folder=tmp_path, prompts=listed, other=other) for argument in arguments]
    result = command("--out", out / "scan.csv", *filled)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not out.is_dir() or not list(out.iterdir())


def test_rows_without_text_are_left_out_on_request_and_counted(
    listed: Path, prompts: dict[int, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, out = tmp_path / "in.NDJSON", tmp_path / "scan.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (None, prompts[0], " ", prompts[3])))
    result = command(path, "--out", out)
    assert result.exit_code == 1
    assert "holds no text in row 0 of column 'prompt', the first of 2 such rows: --skip-empty leaves such rows out." in result.stderr
    result = command(path, "--out", out, "--skip-empty")
    assert result.exit_code == 0, result.stderr
    assert {row["row"]: row["prompt"] for row in map(json.loads, out.read_text().splitlines())} == {1: prompts[0], 3: prompts[3]}
    assert "2 of 4 rows hold no text in column 'prompt' and are left out" in caplog.text


def test_what_could_not_be_judged_is_told_on_the_terminal(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdguard.guarded.run.judge", None)
    result = command(listed, "--out", tmp_path / "scan.csv")
    assert result.exit_code == 0, result.stderr
    assert "6 prompts could not be judged; the first of them, row 0: TypeError: 'NoneType' object is not callable" in result.stdout


def test_without_ray_one_sentence_says_what_to_install(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = command(listed, "--engine", "ray", "--out", tmp_path / "scan.csv")
    assert result.exit_code == 1
    assert "pip install 'sdguard[ray]'" in result.stderr


def test_a_killed_command_goes_on(
    listed: Path, table: pd.DataFrame, prompts: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scan.parquet"
    options = [str(listed), "--out", str(out), "--seeds", "2", "--batch-size", "1"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside this process's threads
    process = subprocess.Popen([sys.executable, "-m", "sdguard.cli", "scan", *options], stderr=subprocess.DEVNULL, env=alone)
    work = parts_folder(out)
    until = time.monotonic() + 120
    while len(list(work.glob("*/*.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(list(work.glob("*/*.json")))
    assert 2 <= kept < len(prompts)
    done: list[int] = []

    def counted(pipe: Any, profile: Profile, batch: Any, **given: Any) -> Any:
        done.extend(row for row, _ in batch)
        return scan_batch(pipe, profile, batch, **given)

    monkeypatch.setattr(scanning, "scan_batch", counted)
    assert command(*options).exit_code == 0
    assert done == list(range(kept, len(prompts)))
    same(read_table(out), table)
    assert not work.exists()


def test_what_is_kept_of_another_scan_stays(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "scan.csv", tmp_path / "other.txt"
    other.write_text("a tower\na bridge\n")

    def stopped(pipe: Any, profile: Profile, batch: Any, **given: Any) -> Any:
        if batch[0][0]:
            raise KeyboardInterrupt
        return scan_batch(pipe, profile, batch, **given)

    with monkeypatch.context() as patched:
        patched.setattr(scanning, "scan_batch", stopped)
        assert command(other, "--out", out, "--batch-size", "1").exit_code != 0
    kept = sorted(parts_folder(out).rglob("*.json"))
    assert kept
    assert command(listed, "--out", out).exit_code == 0
    assert sorted(parts_folder(out).rglob("*.json")) == kept
    assert command(other, "--out", out).exit_code == 0
    assert not parts_folder(out).exists()


def test_what_a_killed_ranking_left_goes(prompts: dict[int, str], listed: Path, tmp_path: Path) -> None:
    left = parts_folder(tmp_path / "scan.csv") / "ranking-0"
    left.mkdir(parents=True)
    assert command(listed, "--out", tmp_path / "scan.csv").exit_code == 0
    assert not parts_folder(tmp_path / "scan.csv").exists()


@pytest.mark.parametrize(
    "of_a_batch", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_into_memory_is_halved(
    of_a_batch: Exception, table: pd.DataFrame, embedded: Any, profile: Profile, prompts: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, whole = list[int](), scanning.read_prompts

    def small(pipe: Any, some: Any, seeds: Any) -> Any:
        sizes.append(len(some))
        if len(some) > 2:
            raise of_a_batch
        return whole(pipe, some, seeds)

    monkeypatch.setattr(scanning, "read_prompts", small)
    found = pd.DataFrame([row for rows in scan(embedded, profile, prompts, seeds=2, batch_size=6) for row in rows])
    known = table.columns.intersection(found.columns)
    same(found[known], table.sort_values("row", ignore_index=True)[known])
    assert max(sizes) == 6


def test_what_fits_into_no_memory_is_told_in_one_sentence(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(scanning, "read_prompts", none)
    result = command(listed, "--out", tmp_path / "scan.csv")
    assert result.exit_code == 1
    assert "There is not enough memory" in result.stderr


def test_a_file_of_prompts_is_not_written_over_nor_a_directory(listed: Path, tmp_path: Path) -> None:
    csv, content = tmp_path / "mine.csv", "prompt,size\na cat,1\n"
    csv.write_text(content)
    (tmp_path / "folder.csv").mkdir()
    for out, says in ((csv, "is read, and would be written over"), (tmp_path / "folder.csv", "is a directory")):
        result = command(csv, "--out", out)
        assert result.exit_code == 1
        assert says in " ".join(result.stderr.split())
    assert csv.read_text() == content


def test_a_name_that_is_too_long_for_a_result_is_one_sentence(listed: Path, tmp_path: Path) -> None:
    result = command(listed, "--out", tmp_path / f"{'a' * 300}.csv")
    assert result.exit_code == 1
    assert "cannot be written" in " ".join(result.stderr.split())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in pieces of two rows."""
    monkeypatch.setattr(scan_file, "PromptFile", partial(PromptFile, rows=2))


@pytest.mark.usefixtures("small_pieces")
def test_a_file_of_many_pieces_goes_on_after_the_last_whole_one(
    listed: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, done = tmp_path / "scan.parquet", list[int]()
    options = [str(listed), "--out", str(out), "--seeds", "2", "--batch-size", "1"]

    def counted(pipe: Any, profile: Profile, batch: Any, **given: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.extend(row for row, _ in batch)
        return scan_batch(pipe, profile, batch, **given)

    monkeypatch.setattr(scanning, "scan_batch", counted)
    assert command(*options).exit_code != 0
    assert not out.exists()
    pieces = sorted(parts_folder(out).glob("pieces-*/*.parquet"))
    assert [path.name[:12] for path in pieces] == [f"{0:012d}", f"{2:012d}"]
    assert len(list(parts_folder(out).glob("*/*.json"))) == 1  # of the third; those of whole pieces are gone
    pieces[1].write_bytes(pieces[1].read_bytes()[:-9])
    done.append(-1)
    assert command(*options).exit_code == 0
    assert done == [0, 1, 2, 3, 4, -1, 2, 3, 5]
    assert f"{pieces[1]} is damaged" in caplog.text
    same(read_table(out), table)
    assert not parts_folder(out).exists()


@pytest.mark.usefixtures("small_pieces")
def test_what_failed_in_a_whole_piece_is_tried_again(
    listed: Path, table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "scan.parquet", list[int]()
    options = [str(listed), "--out", str(out), "--seeds", "2", "--batch-size", "1"]

    def unlucky(pipe: Any, profile: Profile, batch: Any, **given: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.extend(row for row, _ in batch)
        return [row | {"error": "no luck"} if row["row"] == 1 else row for row in scan_batch(pipe, profile, batch, **given)]

    with monkeypatch.context() as patched:
        patched.setattr(scanning, "scan_batch", unlucky)
        assert command(*options).exit_code != 0
    again: list[int] = []

    def counted(pipe: Any, profile: Profile, batch: Any, **given: Any) -> Any:
        again.extend(row for row, _ in batch)
        return scan_batch(pipe, profile, batch, **given)

    monkeypatch.setattr(scanning, "scan_batch", counted)
    assert command(*options).exit_code == 0
    assert again == [1, 3, 4, 5]
    same(read_table(out), table)


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_changes_while_it_is_scanned_is_refused(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_file, "load_for_runs", lambda *_: listed.write_text(f'{listed.read_text()}"u","a cat"\n') and testbed.load())
    result = command(listed, "--out", tmp_path / "scan.csv")
    assert result.exit_code == 0, result.stderr  # what has come behind is left for another scan
    assert len(pd.read_csv(tmp_path / "scan.csv")) == 6
    monkeypatch.setattr(scan_file, "load_for_runs", lambda *_: listed.write_text("url,TEXT\nu,a cat\n") and testbed.load())
    result = command(listed, "--out", tmp_path / "other.csv")
    assert result.exit_code == 1
    assert f"{listed} has changed while it was scanned" in result.stderr
    assert not (tmp_path / "other.csv").exists()


def test_two_processes_scan_to_the_same_table_as_one(
    listed: Path, table: pd.DataFrame, tmp_path: Path, launch: Callable[..., None]
) -> None:
    launch("scan", str(listed), "--out", str(tmp_path / "two" / "scan.parquet"), "--seeds", "2", "--batch-size", "2")
    same(read_table(tmp_path / "two" / "scan.parquet"), table)
    assert [file.name for file in (tmp_path / "two").iterdir()] == ["scan.parquet"]


def test_reports_without_a_run_have_the_free_signals_of_their_one_call(tiny: Any, profile_for: Callable[..., Profile]) -> None:
    reports = reports_of(tiny, profile_for(tiny, 1e6), ["a cat", "a dog in forest"], [7, 8], 0.01)
    norms = [report.series["guidance_norm"] for report in reports]
    assert norms == [[pytest.approx(report.signals["guidance_norm"]["value"])] for report in reports]
