"""Shared fixtures: a tiny random Stable Diffusion, the embedded model, and denoisers whose answer is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from families import LENIENT
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sdguard import testbed
from sdguard.decision import store
from sdguard.decision.calibration import calibrate
from sdguard.decision.cascade import Cascade, Scale, Stage
from sdguard.decision.identity import identity
from sdguard.decision.profile import Profile
from sdguard.observation import NoiseLevel, Observation, noise_level
from sdguard.testbed.copies import Targets, load_targets

SIZE = 16


#: modules that one worker runs, one after the other: those that start processes, which would wait for each other's cores, and share two
#: of them; and those that read the targets of the embedded model. They begin, and modules that take long, so that the workers end together;
#: every other module is a group of its own.
GROUPS = {
    "processes": (
        "test_scan",
        "test_scan_ray",
        "test_detection",
        "test_cli",
        "test_store",
        "test_benchmarks",
        "test_audit_memorization",
        "test_upstream",
        "test_imports",
        "test_appending",
        "test_audit_log",
    ),
    "targets": ("test_demo", "test_embedded", "test_testbed"),
    "signals": ("test_embedded_signals",),
    "families": ("test_families",),
    "running": ("test_running",),
    "notebooks": ("test_notebooks",),
}


def group_of(module: str) -> str:
    """What `GROUPS` has a test module in, given as its path; else the module itself."""
    return next((name for name, modules in GROUPS.items() if Path(module).stem in modules), module)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each group stays with one worker, which builds what its tests share once. (xdist's own marks of groups do nothing in pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by number of tests
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = list(GROUPS)
    items.sort(key=lambda item: order.index(group) if (group := group_of(str(item.path))) in order else len(order))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The same on every machine, since the order of a reduction, and so its bits, hang on it; one, since each core has a worker."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded model, plain."""
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def targets(embedded: Any) -> tuple[Targets, list[str]]:
    """The pictures that the embedded model was trained on, and their captions."""
    return load_targets(testbed.path(), embedded.vae)


@pytest.fixture(scope="session")
def memorized() -> dict[str, Any]:
    """A verbatim caption of the embedded model that training showed most often and that is copied for its first seeds."""
    rows = pq.read_table(testbed.path() / "prompts.parquet").to_pylist()
    copied = [row for row in rows if row["kind"] == "verbatim" and row["split"] == "development" and row["copied_seeds"]]
    return max(copied, key=lambda row: (row["repetitions"], row["copy_rate"]))


@pytest.fixture
def tiny(embedded: Any) -> Any:
    """A Stable Diffusion of a few thousand random parameters, 16 pixels, predicting noise."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=SIZE,
    )
    text = CLIPTextConfig(
        vocab_size=len(embedded.tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=embedded.tokenizer.eos_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=embedded.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Two CPU processes under ``accelerate launch`` that wait for programs, see `launched`: their folder, and what launched them."""
    folder = tmp_path_factory.mktemp("launched")
    # without a GPU, this flag means no more than several processes; --cpu would start a single one
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(Path(__file__).with_name("launched.py")), str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield folder, process
            ask(folder, (), ())
            assert process.wait(60) == 0, (folder / "log").read_text()[-2000:]
        finally:
            process.terminate()


def ask(folder: Path, program: tuple[str, ...], arguments: tuple[str, ...]) -> int:
    """Have the two processes run a program, in the environment that is now; its number."""
    number = len(list(folder.glob("*.asked")))
    (folder / f"{number}.asked").write_text(json.dumps({"program": program, "arguments": arguments, "environment": dict(os.environ)}))
    os.link(folder / f"{number}.asked", folder / f"{number}.json")  # whole at once
    return number


@pytest.fixture
def launch(two_processes: tuple[Path, subprocess.Popen[bytes]]) -> Callable[..., str]:
    """Runs a command of sdguard, or another program, in two CPU processes under ``accelerate launch``; gives what they print.

    The processes are the same for all tests, since most of the time that a program takes is that of its imports.
    """

    def run(*arguments: str, program: tuple[str, ...] = ("-m", "sdguard.cli")) -> str:
        folder, process = two_processes
        number = ask(folder, program, arguments)
        paths = [folder / f"{number}-{rank}.json" for rank in range(2)]
        until = time.monotonic() + 300
        while not all(path.exists() for path in paths):
            failed = [path.read_text()[-2000:] for path in paths if path.exists() and json.loads(path.read_text())["failed"]]
            assert not failed, failed
            running = process.poll() is None and time.monotonic() < until
            assert running, (folder / "log").read_text()[-2000:]
            time.sleep(0.05)
        answers = [json.loads(path.read_text()) for path in paths]
        assert [answer["failed"] for answer in answers] == [""] * 2
        return "".join(answer["printed"] for answer in answers)

    return run


@pytest.fixture
def profile_for() -> Callable[..., Profile]:
    """Makes a profile for `tiny` whose score is the guidance norm, with the threshold at a chosen one."""

    def make(pipe: Any, threshold: float, agreement: float = 0.99) -> Profile:
        norms = sorted(threshold * (0.5 + 0.5 * i / 199) for i in range(200))
        stage = Stage(("guidance_norm",), ("guidance_norm",), None)
        cascade = Cascade((stage,), {"guidance_norm": Scale(False, 0.0, 1.0)})
        values = {**LENIENT, "guidance_norm": norms, "reference_agreement": [agreement] * 100}
        return Profile(identity(pipe), cascade, norms, values)

    return make


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """The profiles that runs have made on first use, in their order."""
    made: list[Profile] = []

    def counted(*args: Any, **kwargs: Any) -> Profile:
        made.append(calibrate(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(store, "calibrate", counted)
    return made


@pytest.fixture
def observe() -> Callable[..., Observation]:
    """Makes an observation of a model given as a noise prediction ``eps(x, level, condition)``."""

    def make(eps: Callable[[Tensor, NoiseLevel, Tensor], Tensor], x: Tensor, condition: Tensor, **fields: Any) -> Observation:
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        timestep = fields.pop("timestep", 981.0)
        level = noise_level(scheduler, timestep)
        null = fields.pop("null_condition", torch.zeros_like(condition))

        def level_at(t: float) -> NoiseLevel:
            return noise_level(scheduler, t)

        values = {
            "step": 0,
            "timestep": timestep,
            "level": level,
            "x": x,
            "eps_c": eps(x, level, condition),
            "eps_u": eps(x, level, null),
            "condition": condition,
            "null_condition": null,
            "guidance_scale": 1.0,
            "level_at": level_at,
            "denoise": lambda y, t, text, places: eps(y, level_at(t), text),
            "evaluations": torch.zeros(len(x), dtype=torch.long),
            "rows": torch.arange(len(x)),
        }
        return Observation(**{**values, **fields})

    return make
