"""Hostile arguments of everything that takes some: `GuardConfig`, `guard`, `calibrate`, a guarded call, the command line, the page's API.

What a guarded call and the API take is read off their signatures, the options of the command line off its commands. A guarded call is
judged beside the pipeline's own: it makes the same pictures where nothing is flagged, and refuses in its own words or in one sentence.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from typer.testing import CliRunner

from benchmarks.outcomes import READ, REFUSED, STRANGE, Misread, Needless, NoSentence, checked_sentence, expect, is_sentence
from benchmarks.running import commands_of
from sdguard import GuardConfig, GuardedPipeline, Profile, calibrate, guard, testbed, unguard
from sdguard.cli.main import app
from sdguard.decision.model_folder import PROFILE_FILE
from sdguard.steering import METHODS

#: for each field of `GuardConfig` values that it takes, and some that it refuses.
CONFIG: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "mode": (("steer", "observe", "block"), ("Steer", "", None, 5, ["steer"])),
    "false_positive_rate": (
        (0.01, 0.5, 1e-9, 5e-324, np.float32(0.5), Fraction(1, 2)),
        (0, 1, -1, 2.5, float("nan"), float("inf"), "0.01", None, 10**400, 10**5000, 1j, True, [0.1]),
    ),
    "on_failure": (("withhold", "pass", "raise"), ("", None, 0, {"pass"})),
    "on_unknown": (("calibrate", "background", "first_call_only", "raise"), ("ask", None, ())),
    "rate_per": (("image", "prompt"), ("batch", None, 1)),
    "profile": ((None, "name", Path("a.json")), (5, ["name"], b"name")),
    "steering": ((None, [*METHODS][:2], tuple(METHODS)), ([], "rewording", ["nothing"], 5, [5], [["rewording"]], [None])),
    "rewriter": ((None, str), ("a", 5)),
    "calibration_prompts": ((None, ["a", "b", "c", "d"]), ("a cat", [], 5, [1, 2, 3, 4], [None] * 4)),
    "score_log": ((None, "log", Path("log")), (5, ["log"], "a\0b")),
    "log_prompts": ((True, False), ("no", None, 2)),
    "audit_log": ((None, "audit", Path("audit")), (5, ["audit"], Path("a\0b"))),
    "audit_log_bytes": ((1, 10**12), (0, -1, 1.5, True, None, "1", 1j)),
    "on_verdict": ((None, print), ("print", 5)),
    "on_call": ((None, print), ("print", 5)),
}


def config_arguments(folder: Path, rng: Random) -> str:
    """Arguments of `GuardConfig`: taken where all of them can be, and refused with the name of one that cannot."""
    chosen = {name: rng.random() < 0.15 for name in rng.sample(list(CONFIG), rng.randint(1, len(CONFIG)))}
    given = {name: rng.choice(CONFIG[name][strange]) for name, strange in chosen.items()}
    try:
        config = GuardConfig(**given)
    except (ValueError, TypeError) as error:
        expect(any(strange and name in str(error) for name, strange in chosen.items()), True)
        return checked_sentence(error)
    expect(any(chosen.values()), False)
    return expect({name: getattr(config, name) for name in given}, given)


# guarding


@functools.cache
def pipelines() -> tuple[Any, ...]:
    """Three supported pipelines of the embedded model's parts."""
    transformers.logging.set_verbosity_error()
    plain = testbed.load()
    made = plain, *(kind.from_pipe(plain) for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return made


class Unsupported(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline of a class that nobody has decided about."""

    def __call__(self) -> None:
        """Makes nothing."""


def guarding(folder: Path, rng: Random) -> str:
    """Arguments of `guard`: a pipeline is guarded, and gives itself back; all else is refused."""
    pipe = rng.choice(pipelines())
    sound = rng.random() < 0.3
    strange = (Unsupported(), pipe.unet, type(pipe), print, folder, GuardConfig(), "embedded", *STRANGE)
    given = pipe if sound or rng.random() < 0.5 else rng.choice(strange)
    given = rng.choice((given, guard(given))) if given is pipe else given
    configs = (None, GuardConfig(), GuardConfig("block"))
    config = rng.choice(configs if sound else ({}, GuardConfig, "steer", shipped(), *STRANGE))
    refused = config is not None and not isinstance(config, GuardConfig)
    try:
        guarded = guard(given, config)
    except TypeError as error:
        if unguard(given) is pipe and not refused:
            raise Needless(str(error)) from None
        return checked_sentence(error)
    expect((unguard(guarded) is pipe, refused), (True, False))
    return expect(guarded.guard_config, config or GuardConfig())


def calibrating(folder: Path, rng: Random) -> str:
    """Arguments of `calibrate` and `GuardedPipeline.calibrate` that are no list of prompts: they are refused."""
    prompts = rng.choice([value for value in (*STRANGE, ["a", "b", "c"], ["a", "b", "c", 5], [""], {"a": 1, "b": 2}) if value is not None])
    guarded = GuardedPipeline(pipelines()[0])
    try:
        rng.choice((functools.partial(calibrate, pipelines()[0]), guarded.calibrate))(prompts)
    except (ValueError, TypeError) as error:
        return checked_sentence(error)
    raise Misread(f"calibrated on {str(prompts)[:100]}")


def shipped() -> Profile:
    """The embedded model's profile."""
    return Profile.load(testbed.path() / PROFILE_FILE)


# a guarded call


@functools.cache
def ordinary() -> tuple[Any, Any, Image.Image]:
    """Embeddings of a prompt and of the empty one, and a picture."""
    pipe = pipelines()[0]
    positive, negative = pipe.encode_prompt("a dog in forest", "cpu", 1, True)
    return positive, negative, Image.effect_noise((64, 64), 60).convert("RGB")


def sound_values(name: str) -> tuple[Any, ...]:
    """What a parameter of the pipelines' calls can be given beside the prompt, here; none where it goes with others alone."""
    picture = ordinary()[2]
    values: dict[str, tuple[Any, ...]] = {
        "prompt": ("a cat", ["a zebra in fog", "a dog"], "\u200f قطة 🐱"),
        "height": (64, 72, None),
        "width": (64, 56, None),
        "num_inference_steps": (1, 2, 3),
        "timesteps": (None,),
        "sigmas": (None,),
        "guidance_scale": (2.5, 1.0, 7, np.float32(3.0)),
        "negative_prompt": ("a dog", None),
        "num_images_per_prompt": (1, 2),
        "eta": (0.0, 0.5),
        "generator": (torch.Generator().manual_seed(5),),
        "latents": (None,),
        "prompt_embeds": (None,),
        "negative_prompt_embeds": (None,),
        "ip_adapter_image": (None,),
        "ip_adapter_image_embeds": (None,),
        "output_type": ("np", "latent", "pt", "pil"),
        "return_dict": (True, False),
        "cross_attention_kwargs": (None, {}, {"scale": None}),
        "guidance_rescale": (0.0, 0.7),
        "clip_skip": (None, 1),
        "callback_on_step_end": (None, lambda pipe, step, timestep, tensors: tensors),
        "callback_on_step_end_tensor_inputs": (["latents"], ["latents", "prompt_embeds"]),
        "image": (picture, np.asarray(picture)[None] / 255.0),
        "strength": (0.6, 1.0),
        "mask_image": (picture.convert("L"),),
        "masked_image_latents": (None,),
        "padding_mask_crop": (None,),
    }
    return values[name]


def strange_values(name: str) -> tuple[Any, ...]:
    """What a parameter does not expect, besides `STRANGE`."""
    positive, _, picture = ordinary()
    hole = torch.full((1, 4, 16, 16), float("nan"))
    return (
        *STRANGE,
        {"scale": "a"},
        {"scale": [1]},
        {5: 1},
        10**5000,
        hole,
        positive,
        positive * float("nan"),
        positive[:, :3],
        np.float64(2),
        picture,
        [picture] * 3,
        print,
        "🐱" * 300,
    )


def call_arguments(folder: Path, rng: Random) -> str:
    """Arguments of a guarded call, as its signature names them: what comes out is what comes out unguarded, or one sentence."""
    pipe = rng.choice(pipelines())
    names = [name for name in inspect.signature(type(pipe).__call__).parameters if name not in ("self", "kwargs")]
    needed = {"prompt", "num_inference_steps", "generator", "output_type", *({"image", "mask_image", "strength"} & {*names})}
    sound = {name: rng.choice(sound_values(name)) for name in names if name in needed or rng.random() < 0.15}
    unknown = rng.choice(("negativ_prompt", "guard", "self", "Prompt"))
    count = rng.choice((0, 0, 1, 1, 2))
    strange = {name: rng.choice(strange_values(name)) for name in rng.sample([*names, unknown], count)}
    config = GuardConfig(rng.choice(("observe", "observe", "block", "steer")), profile=shipped())
    given = {**sound, **strange}
    plain, guarded = attempt(pipe, given), attempt(guard(pipe, config), given)
    if isinstance(guarded, Exception):
        if isinstance(plain, Exception) and (type(plain), str(plain)) == (type(guarded), str(guarded)):
            return REFUSED
        if not isinstance(guarded, ValueError | TypeError):
            raise guarded
        if not strange:
            raise Needless(f"{guarded} {sorted(given)}")
        return checked_sentence(guarded)
    if isinstance(plain, Exception):
        raise Misread(f"it ran, and unguarded there is {type(plain).__name__}: {plain}")
    return same_output(plain, guarded)


def attempt(pipe: Any, given: Mapping[str, Any]) -> Any:
    """The images of a call and the reports of a guarded one, or what it raised."""
    torch.manual_seed(0)
    values = {name: value.clone_state() if isinstance(value, torch.Generator) else copy.copy(value) for name, value in given.items()}
    try:
        output = pipe(**values)
    except Exception as error:  # judged by whoever asks
        return error
    images = output[0] if isinstance(output, tuple) else output.images
    return images, pipe.guard_reports if isinstance(pipe, GuardedPipeline) else None


def same_output(plain: Any, guarded: Any) -> str:
    """The outcome `READ`; raises `Misread` where an image that nothing was done to is not what it is unguarded."""
    (before, _), (after, reports) = plain, guarded
    expect((type(after), len(after)), (type(before), len(before)))
    if not len(before):  # no step was taken, and nothing seen
        return expect({report.verdict for report in reports} & {"clean"}, set())
    expect(len(reports), len(before))
    for one, other, report in zip(before, after, reports, strict=True):
        if report.verdict in ("clean", "flagged"):
            was, found = np.asarray(one), np.asarray(other)
            expect(np.array_equal(was, found, equal_nan=was.dtype.kind == "f"), True)
    return READ


# the command line


#: what an option is given that expects something else; ``{...}`` are files and folders.
TEXTS = (
    "", " ", "0", "1", "-1", "0.5", "nan", "inf", "1e400", "1e-400", "9" * 23, "true", "None", "🐱", "e\u0301", "a" * 300, "file:///etc/passwd",
    "http://127.0.0.1:1/x", "[red]x[/]", "[/]", "%s%n", "a/b", "embedded", "/dev/null", "/proc/nowhere/x", "{prompts}", "{profile}",
    "{damaged}", "{folder}", "steer", "pixels", "ray",
)  # fmt: skip
#: for each command what it needs to be quick where nothing strange is given; of long ones something that they refuse in the end.
QUICK: dict[str, tuple[str, ...]] = {
    "generate": ("a cat", "--steps", "1", "--out", "{folder}/out"),
    "scan": ("{prompts}", "--out", "{folder}/scan.csv"),
    "explain": ("a cat", "--steps", "1", "--out", "{folder}/out"),
    "calibrate": ("--prompts", "{prompts}", "--n", "3"),
    "demo": ("--model", "{folder}"),
    "audit score": ("nothing",),
    "audit density": ("nothing",),
    "audit lid": ("nothing",),
    "audit neighbours": ("nothing",),
    "profiles list": (),
    "profiles show": ("{profile}",),
    "profiles rm": ("nothing",),
    "profiles export": ("nothing", "{folder}/exported.json"),
    "profiles import": ("{profile}",),
}


@contextlib.contextmanager
def offline() -> Any:
    """Within the block nothing is looked up on a hub."""
    before, huggingface_hub.constants.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def command_line(folder: Path, rng: Random) -> str:
    """Options of a command: it does its work and ends with 0 or 3, or refuses with 1 or 2 and a sentence."""
    places = {"folder": folder, "prompts": folder / "prompts.txt", "profile": folder / "profile.json", "damaged": folder / "damaged.json"}
    places["prompts"].write_text("a cat\na dog in forest\n")
    shipped().save(places["profile"])
    places["damaged"].write_bytes(places["profile"].read_bytes()[:-99])
    commands = commands_of(app)
    name = rng.choice(list(commands))
    options = [parameter for parameter in commands[name].params if parameter.param_type_name == "option" and "--help" not in parameter.opts]
    strange: list[str] = []
    for option in rng.sample(options, min(len(options), rng.randint(0, 3))):
        strange += [option.opts[0], *([] if getattr(option, "is_flag", False) else [rng.choice(TEXTS)])]
    given = [*QUICK[name], *strange] if name not in ("calibrate", "demo") else [*strange, *QUICK[name]]
    if rng.random() < 0.1:
        given = rng.choices(TEXTS, k=rng.randint(0, 2)) if name not in ("calibrate", "demo") else given
    words = [*name.split(), *(word.format(**places) if word.startswith("{") else word for word in given)]
    environment = {"COLUMNS": "5000", "SDGUARD_CACHE": str(folder / "cache")}
    with contextlib.chdir(folder), offline():
        result = CliRunner().invoke(app, words, env=environment)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code in (0, 3):
        return READ
    last = (result.stderr.strip().splitlines() or [""])[-1]
    if result.exit_code == 1 and not is_sentence(last):
        raise NoSentence(f"{words}: {last}")
    return REFUSED


# the page's API


@functools.cache
def api() -> Callable[..., Any]:
    """The function behind ``/generate``, on the embedded model."""
    import gradio as gr

    from sdguard.demo import clients, generate_tab
    from sdguard.demo.model import Model

    clients.GRACE = float("inf")  # there is no connection that could be listened to
    with gr.Blocks(analytics_enabled=False) as page:
        generate_tab.endpoint(Model.load("embedded"))
    (function,) = (event.fn for event in page.fns.values())
    found: Callable[..., Any] = function
    return found


#: for each parameter of ``/generate`` values that it takes.
API: dict[str, tuple[Any, ...]] = {
    "prompt": ("a zebra in fog", " a cat ", "🐱"),
    "seed": (0, 7, 2.0),
    "images": (1, 2),
    "steps": (2, 3),
    "guidance": (2.5, 1, 0),
    "false_positive_rate": (0.01, 0.1),
    "mode": ("steer", "observe", "block"),
    "steering": (None, [], [*METHODS][:1]),
}


def api_arguments(folder: Path, rng: Random) -> str:
    """Arguments of ``/generate``: it answers with a report and two pictures an image, as JSON, or refuses in one sentence."""
    import gradio as gr

    names = [name for name in inspect.signature(api()).parameters if name != "request"]
    request = SimpleNamespace(client=SimpleNamespace(host="127.0.0.1"), session_hash="fuzz")
    given = {name: rng.choice(API[name]) for name in names if name in ("prompt", "steps") or rng.random() < 0.3}
    strange = {
        name: rng.choice((*STRANGE, "🐱" * 700, 1.5, [1, 2], "0" * 5000, 10**5000)) for name in rng.sample(names, rng.choice((0, 1, 1, 2)))
    }
    try:
        answer = api()(request, **{**given, **strange})
    except gr.Error as error:
        if not strange:
            raise Needless(error.message) from None
        return checked_sentence(ValueError(error.message))
    json.dumps(answer)
    count = int({**given, **strange}.get("images", 1))
    return expect([len(answer[name]) for name in ("reports", "unguarded", "guarded")], [count] * 3)


KINDS: dict[str, Callable[[Path, Random], str]] = {
    "GuardConfig": config_arguments,
    "guard": guarding,
    "calibrate": calibrating,
    "a guarded call": call_arguments,
    "the command line": command_line,
    "the page's API": api_arguments,
}
