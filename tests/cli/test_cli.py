"""The command line: what it writes, what it refuses, and with which exit code."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from typer.testing import CliRunner, Result

from sdguard import testbed
from sdguard.cli.main import app
from sdguard.decision import cache, known_profiles, model_folder
from sdguard.decision.cache import prompts_in
from sdguard.decision.identity import identity
from sdguard.decision.profile import Profile
from sdguard.files.prompt_files import prompts_by_row
from sdguard.files.resumable import parts_folder
from sdguard.guarded import calibrate_model as calibrate_module
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.generate import SHEET_SIDE
from sdguard.guarded.report import GuardReport

SHIPPED = Profile.load(testbed.path() / model_folder.PROFILE_FILE)


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["generate", *arguments])


def refused(result: Result, out: Path) -> str:
    """One sentence, exit code 1, no traceback, nothing written."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert not list(out.glob("*")) if out.is_dir() else True
    text = " ".join(result.stderr.split())
    assert text
    assert "Traceback" not in text
    return text


def test_an_ordinary_prompt_gives_picture_and_report(tmp_path: Path) -> None:
    result = generate("a cat in snow", "--out", str(tmp_path), "--compare", "--n", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {
        "00.png", "01.png", "00-unguarded.png", "01-unguarded.png", "compare.png", "report.json",
    }  # fmt: skip
    with Image.open(tmp_path / "compare.png") as sheet:
        assert sheet.width >= 2 * SHEET_SIDE
        assert sheet.height >= 2 * SHEET_SIDE
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [row["seed"] for row in rows] == [5, 6]
    assert {row["verdict"] for row in rows} == {"clean"}
    assert (tmp_path / "00.png").read_bytes() == (tmp_path / "00-unguarded.png").read_bytes()


def test_json_goes_to_standard_output(tmp_path: Path) -> None:
    result = generate("a cat", "--out", str(tmp_path), "--json")
    assert json.loads(result.stdout)[0]["prompt"] == "a cat"


def test_what_is_raised_in_place_of_a_memorized_image_has_that_exit_code_too(tmp_path: Path, memorized: dict[str, Any]) -> None:
    seed = str(memorized["copied_seeds"][0])
    result = generate(memorized["text"], "--out", str(tmp_path), "--mode", "block", "--on-failure", "raise", "--seed", seed)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == "Image 0: predicted to be memorized."
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "report.json").exists()


def test_a_withheld_image_has_its_own_exit_code(tmp_path: Path, memorized: dict[str, Any]) -> None:
    result = generate(memorized["text"], "--out", str(tmp_path), "--mode", "block", "--seed", str(memorized["copied_seeds"][0]))
    assert result.exit_code == 3
    assert (
        GuardReport(**{k: v for k, v in json.loads((tmp_path / "report.json").read_text())[0].items() if k != "seed"}).verdict == "withheld"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a cat", "--model", "/no/such/model"], "There is no model at /no/such/model"),
        (["a cat", "--model", "{folder}"], "is no diffusers pipeline: it has no model_index.json"),
        (["", "--model", "embedded"], "There is no prompt"),
        (["cat " * 40], "this part would be cut: 'cat cat cat"),
        (["a cat", "--profile", "/no/profile.json"], "cannot be read: No such file"),
        (["a cat", "--profile", "{damaged}"], "is not a profile of sdguard, or it is damaged"),
        (["a cat", "--profile", "{another}"], "The profile is another model's: size is 64, the profile's is 999"),
        (["a cat", "--fpr", "0.0001"], "needs at least 9999 scored ordinary prompts"),
        (["a cat", "--steering", "prayer"], "steering has 'prayer'; there are rewording,"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str, tmp_path: Path) -> None:
    folder, out, damaged, another = (tmp_path / name for name in ("empty", "out", "damaged.json", "another.json"))
    folder.mkdir()
    damaged.write_text("{")
    replace(SHIPPED, model={**SHIPPED.model, "size": 999}).save(another)
    filled = [argument.format(folder=folder, damaged=damaged, another=another) for argument in arguments]
    assert says in refused(generate(*filled, "--out", str(out)), out)


def test_an_unwritable_output_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(generate("a cat", "--out", str(tmp_path / "file")), tmp_path / "file")


def test_every_config_field_is_documented() -> None:
    for name in GuardConfig.__dataclass_fields__:
        assert f"        {name}: " in str(GuardConfig.__doc__)


def test_usage_errors_are_typers_own() -> None:
    assert generate().exit_code == 2
    assert os.path.exists(testbed.path())


def test_explain_writes_a_sheet_and_names_the_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "a zebra at beach", "--steps", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert "zebra" in result.stdout
    assert json.loads((tmp_path / "explain.json").read_text())["words"] == ["a", "zebra", "at", "beach"]
    assert (tmp_path / "explain.png").exists()


def test_calibrate_says_how_many_prompts_a_rate_needs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--n", "30", "--out", str(tmp_path / "p.json")])
    assert result.exit_code == 1
    assert "needs 99 prompts to score; of 30 prompts 20 are scored" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def ordinary(folder: Path, count: int) -> Path:
    """A file of so many prompts."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"a lion number {i}" for i in range(count)))
    return file


def profiles(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profiles", *arguments], env={"COLUMNS": "400"})


def test_calibrate_keeps_a_profile_of_own_prompts_and_says_how_to_use_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2"])
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "6 scores of ordinary prompts" in said
    name = said.split("--profile ")[1].split(",")[0]
    assert f"GuardConfig(profile='{name}')" in said
    guarded = generate("a lion", "--profile", name, "--steps", "2", "--fpr", "0.2", "--out", str(tmp_path / "out"))
    assert guarded.exit_code in (0, 3)
    assert json.loads((tmp_path / "out" / "report.json").read_text())[0]["judged_by"] == f"profile {name}"


def test_a_profile_that_the_guard_finds_needs_no_word_of_how(tmp_path: Path) -> None:
    model = shutil.copytree(testbed.path(), tmp_path / "model", ignore=shutil.ignore_patterns("targets", "sdguard"))
    options = ["--model", str(model), "--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2"]
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert result.exit_code == 0, result.stderr
    assert "--profile" not in result.stdout


def test_prompts_that_were_set_aside_do_not_count_towards_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibrate_module.calibrate

    def fewer(*arguments: Any, **options: Any) -> Profile:
        found = made(*arguments, **options)
        return replace(found, scores=found.scores[:-3], set_aside=["a lion number 1"] * 3)

    monkeypatch.setattr(calibrate_module, "calibrate", fewer)
    result = CliRunner().invoke(app, ["calibrate", "--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2"])
    assert result.exit_code == 1
    assert "needs 4 scored prompts, and 3 of 9 are left: 3 are memorized themselves" in " ".join(result.stderr.split())
    assert cache.cached_profiles() == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "abacus"], "The model cannot be put on the device 'abacus'"),
        (["--lora", "/no/such/lora"], "The LoRA /no/such/lora could not be loaded"),
    ],
)
def test_calibrate_refuses_what_it_cannot_load(options: list[str], says: str, tmp_path: Path) -> None:
    assert says in refused(CliRunner().invoke(app, ["calibrate", *options, "--out", str(tmp_path / "p.json")]), tmp_path)


def test_a_profile_in_half_precision_is_of_the_weights_as_cast(tmp_path: Path) -> None:
    options = ["--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2", "--dtype", "bfloat16", "--out", str(tmp_path / "half.json")]
    assert CliRunner().invoke(app, ["calibrate", *options]).exit_code == 0
    found, whole = Profile.load(tmp_path / "half.json").model["weights"]["unet"], SHIPPED.model["weights"]["unet"]
    assert found == {"bfloat16": whole["bfloat16"]}


def test_a_lora_and_its_scale_are_in_the_profile_that_a_call_with_them_finds(tmp_path: Path) -> None:
    pipe = testbed.load()
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.unet))
    options = ["--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2", "--lora", str(tmp_path / "lora"), "--lora-scale", "0.5"]
    result = CliRunner().invoke(app, ["calibrate", *options])
    assert result.exit_code == 0, result.output
    fresh = testbed.load()
    fresh.load_lora_weights(tmp_path / "lora")
    assert known_profiles.known_profile(fresh, identity(fresh, 0.5)) is not None
    assert known_profiles.known_profile(fresh, identity(fresh)) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from-log", "log", "--prompts", "a.txt"], "--prompts moves nothing with --from-log"),
        (["--from-log", "log", "--seed", "0"], "--seed moves nothing with --from-log"),
        (["--from-log", "log", "--skip-empty"], "--skip-empty moves nothing with --from-log"),
        (["--memorized-share", "0.1"], "--memorized-share moves nothing without --from-log"),
        (["--lora-scale", "0.5"], "--lora-scale moves nothing without --lora"),
    ],
)
def test_an_option_that_moves_nothing_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert says in refused(CliRunner().invoke(app, ["calibrate", *words, "--out", str(out / "profile.json")]), out)


def test_a_profile_does_not_take_the_place_of_a_directory_or_of_its_prompts(tmp_path: Path) -> None:
    prompts = ordinary(tmp_path, 9)
    text = prompts.read_text()
    for out, says in ((tmp_path, "is a directory"), (prompts, "is read, and would be written over")):
        result = CliRunner().invoke(app, ["calibrate", "--prompts", str(prompts), "--fpr", "0.2", "--out", str(out)])
        assert result.exit_code == 1
        assert says in " ".join(result.stderr.split())
    assert prompts.read_text() == text
    assert not list(tmp_path.glob("*.parts"))


def test_the_column_of_prompts_to_calibrate_on_can_be_named(tmp_path: Path) -> None:
    table, lines = tmp_path / "prompts.csv", ordinary(tmp_path, 9).read_text().splitlines()
    table.write_text("\n".join(["titel,beschreibung", *(f"x,{line}" for line in lines)]) + "\n")
    options = ["calibrate", "--prompts", str(table), "--fpr", "0.2", "--out", str(tmp_path / "made.json")]
    assert "name one" in " ".join(CliRunner().invoke(app, options).stderr.split())
    assert CliRunner().invoke(app, [*options, "--column", "beschreibung"]).exit_code == 0
    assert prompts_in(Profile.load(tmp_path / "made.json")) == 9


def test_the_kept_work_of_another_calibration_to_the_same_file_stays(tmp_path: Path) -> None:
    out = tmp_path / "made.json"
    kept = parts_folder(out) / "another" / "calibration-0" / "fit-000000.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    options = ["--prompts", str(ordinary(tmp_path, 9)), "--fpr", "0.2", "--out", str(out)]
    assert CliRunner().invoke(app, ["calibrate", *options]).exit_code == 0
    assert [path for path in parts_folder(out).rglob("*") if path.is_file()] == [kept]


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_model_whose_weights_are_cut_is_refused_in_one_sentence(part: str, tmp_path: Path) -> None:
    shutil.copytree(testbed.path(), tmp_path / "model")
    for weights in (tmp_path / "model" / part).glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    out = tmp_path / "out"
    assert "could not be loaded" in refused(generate("a lion", "--model", str(tmp_path / "model"), "--out", str(out)), out)


def test_a_device_where_nothing_is_computed_is_refused(tmp_path: Path) -> None:
    assert "cannot be put on the device 'meta'" in refused(generate("a cat", "--device", "meta", "--out", str(tmp_path)), tmp_path)


def test_what_there_is_no_guard_for_is_not_explained_either(tmp_path: Path) -> None:
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["explain", "a cat", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert "DDPMPipeline" in refused(result, tmp_path / "out")


def test_a_path_is_printed_as_it_is(tmp_path: Path) -> None:
    SHIPPED.save(tmp_path / "mine.json")
    profiles("import", str(tmp_path / "mine.json"))
    assert profiles("export", cache.name_of(SHIPPED), str(tmp_path / "q[x].json")).stdout.strip().endswith("q[x].json")


def test_profiles_are_listed_shown_carried_elsewhere_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, name = tmp_path / "mine.json", cache.name_of(SHIPPED)
    SHIPPED.save(file)
    assert name in profiles("import", str(file)).stdout
    for listed in (profiles(), profiles("list")):
        assert {name, "UNet2DConditionModel", "cache", str(SHIPPED.prompts)} <= set(listed.stdout.replace(",", " ").split())
    shown = profiles("show", name).stdout
    assert SHIPPED.model["weights"]["unet"]["float32"][:8] in shown
    assert f"{SHIPPED.threshold(0.01):.3f}" in shown
    assert profiles("export", name, str(tmp_path / "out" / "exported.json")).exit_code == 0
    assert profiles("rm", name).exit_code == 0
    assert cache.cached_profiles() == []
    monkeypatch.setenv("SDGUARD_CACHE", str(tmp_path / "elsewhere"))
    assert profiles("import", str(tmp_path / "out" / "exported.json")).exit_code == 0
    assert known_profiles.load_profile(cache.cached_profiles()[0]) == SHIPPED


def test_profiles_that_came_with_a_model_are_listed_with_it() -> None:
    listed = profiles("list", "--model", "embedded").stdout
    assert str(testbed.path() / "sdguard" / "profile.json") in listed
    assert cache.name_of(SHIPPED) in listed
    assert "There is no model at /no/such" in profiles("list", "--model", "/no/such").stderr


@pytest.mark.parametrize("content", ["{", '{"format": 5}'])
def test_what_is_damaged_or_old_is_listed_as_such_and_can_be_removed(content: str) -> None:
    cache.cache_folder().mkdir(parents=True)
    (cache.cache_folder() / "broken.json").write_text(content)
    listed = profiles("list").stdout
    assert "broken" in listed
    assert ("damaged" if content == "{" else "another version of sdguard") in listed
    assert profiles("show", "broken").exit_code == 1
    assert profiles("rm", "broken").exit_code == 0
    assert cache.cached_profiles() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nothing"], "There is no profile 'nothing'"),
        (["rm", "{kept}", "nothing"], "There is no profile 'nothing'"),
        (["rm", "../profiles/{kept}"], "There is no profile '../profiles/"),
        (["export", "nothing", "{folder}/out.json"], "There is no profile 'nothing'"),
        (["export", "{kept}", "{folder}"], "is a directory"),
        (["import", "{damaged}"], "is not a profile of sdguard, or it is damaged"),
        (["import", "{folder}/none.json"], "cannot be read"),
    ],
)
def test_profiles_refuses_in_one_sentence_and_does_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({**json.loads((testbed.path() / model_folder.PROFILE_FILE).read_text()), "model": []}))
    kept = cache.cache_folder() / f"{cache.name_of(SHIPPED)}.json"
    SHIPPED.save(kept)
    result = profiles(*(argument.format(kept=kept.stem, folder=tmp_path, damaged=damaged) for argument in arguments))
    assert says in refused(result, tmp_path / "out")
    assert cache.cached_profiles() == [kept]
    assert not (tmp_path / "out.json").exists()


def test_prompts_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "--prompts", str(tmp_path / "none.txt")])
    assert result.exit_code == 1
    assert "cannot be read" in " ".join(result.stderr.split())


def test_empty_rows_are_left_out_on_request_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = tmp_path / "prompts.CSV"
    prompts.write_text("id,caption\n" + "".join(f"{i},{'' if i == 3 else f'a lion number {i}'}\n" for i in range(10)))
    options = ["calibrate", "--prompts", str(prompts), "--fpr", "0.2", "--out", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert "holds no text in row 3 of column 'caption': --skip-empty leaves such rows out." in result.stderr
    assert CliRunner().invoke(app, [*options, "--skip-empty"]).exit_code == 0
    assert "1 of 10 rows hold no text in column 'caption' and are left out" in caplog.text
    assert prompts_in(Profile.load(tmp_path / "p.json")) == 9


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = CliRunner().invoke(app, ["explain", "a zebra", "--steps", "2", "--out", str(tmp_path)], env={"COLUMNS": "400"})
    assert result.exit_code == 1
    assert f"{tmp_path}/explain.png cannot be written: No space left on device. Make room" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_processes_calibrate_to_the_same_profile_as_one(tmp_path: Path, launch: Callable[..., None]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a lion number {i}" for i in range(24)))
    options = ["calibrate", "--prompts", str(prompts), "--fpr", "0.2", "--out"]
    assert CliRunner().invoke(app, [*options, str(tmp_path / "one.json")]).exit_code == 0
    launch(*options, str(tmp_path / "two.json"))
    one, two = (Profile.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two.model == one.model
    assert two.scores == pytest.approx(one.scores, abs=1e-3)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "--fpr", "0"], "false_positive_rate is 0.0; it must lie between 0 and 1"),
    ],
)
def test_every_command_refuses_what_cannot_be_judged(arguments: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert says in " ".join(result.stderr.split())
    assert not list(tmp_path.rglob("*.json"))


def test_tables_need_the_extra_files_and_text_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, text = tmp_path / "prompts.csv", tmp_path / "prompts.txt"
    table.write_text("prompt\na cat\n")
    text.write_text("a cat\n\na dog\n")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert prompts_by_row(text) == {0: "a cat", 2: "a dog"}
    for arguments in (["scan", str(text)], ["calibrate", "--prompts", str(table)]):
        result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out" / "o.csv")])
        assert result.exit_code == 1
        assert "pip install 'sdguard[files]'" in " ".join(result.stderr.split())
