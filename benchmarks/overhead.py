"""What the guard costs: wall time, evaluations and peak memory against the unguarded call, clean, gray and flagged paths apart.

``python -m benchmarks overhead SHAPE`` for ``embedded`` or a shape in ``benchmarks/shapes`` (``sd15``, ``sdxl``, ``sd3``): models of
those sizes are built from their configurations with random weights, for smaller pictures on a CPU; nothing is downloaded. A path and the
unguarded pipeline are called one right after the other, in either order, so that a noisy machine is noisy to both; the cost is the median
of these pairs' ratios with its 95% interval (by order statistics). The clean path's is the smallest, so that it has `CLEAN_PAIRS` pairs
where the others have one. On a CPU, memory is the peak of a process of its own for each path. Writes
``benchmarks/results/overhead-SHAPE.json``, the name with what is not usual: another precision, ``compiled``, another number of steps,
``cuda``.
"""

from __future__ import annotations

import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import diffusers
import pandas as pd
import torch
import transformers
import typer
from rich.progress import track
from scipy.stats import quantile_test

import sdguard
from sdguard import GuardConfig, Profile, testbed
from sdguard.decision.cascade import PLAN, Cascade, Scale, Stage
from sdguard.decision.identity import identity
from sdguard.denoiser.families import default_size, denoiser_of
from sdguard.files.atomic import write_text

SHAPES = Path(__file__).parent / "shapes"
PROMPT = "a zebra in snow"
PATHS = ("clean", "gray", "flagged")
CLEAN_PAIRS = 5
#: denoising steps of a run where nothing else is said.
STEPS = 10


def built(shape: str, dtype: torch.dtype, device: str) -> Any:
    """The embedded model, or a pipeline of a shape with random weights and the embedded model's tokenizer, on a device."""
    if shape == "embedded":
        return testbed.load().to(device, dtype)
    parts = json.loads((SHAPES / f"{shape}.json").read_text())
    tokenizer = transformers.CLIPTokenizer.from_pretrained(testbed.path() / "tokenizer", model_max_length=77)
    made: dict[str, Any] = {"tokenizer": tokenizer}
    pooled = "text_encoder_2" in parts
    with torch.device(device):  # random weights of this many are drawn on a GPU in no time
        made["vae"] = diffusers.AutoencoderKL(**parts["vae"])
        for name in ("text_encoder", "text_encoder_2"):
            if name in parts:
                config = transformers.CLIPTextConfig(**parts[name], eos_token_id=tokenizer.eos_token_id)
                projected = name == "text_encoder_2" or "transformer" in parts
                made[name] = (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)
        if "transformer" in parts:
            made["transformer"] = diffusers.SD3Transformer2DModel(**parts["transformer"])
        else:
            made["unet"] = diffusers.UNet2DConditionModel(**parts["unet"])
    if pooled:
        made["tokenizer_2"] = tokenizer
    if "transformer" in parts:
        made |= {"text_encoder_3": None, "tokenizer_3": None}
    if not pooled:
        made |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = dict(parts["scheduler"])
    made["scheduler"] = getattr(diffusers, scheduler.pop("class"))(**scheduler)
    return getattr(diffusers, parts["pipeline"])(**made).to(device, dtype)


def profile(path: str, model: dict[str, Any]) -> Profile:
    """A profile under which every sample takes a path: the free signals stop it, or it buys all evidence, or it is flagged as well."""
    gate, last = PLAN
    stages = (Stage(gate.signals, gate.fused, 1e9 if path == "clean" else -1e9), Stage(last.signals, last.fused, None))
    cascade = Cascade(stages, {name: Scale(False, 0.0, 1.0) for stage in PLAN for name in stage.signals})
    scores = [(-2e9 if path == "flagged" else 1e9) + i for i in range(200)]
    values = {name: [1e9] * 100 for name in cascade.signals} | {
        "guidance_norm": [0.0] * 99 + [1e9],
        "reference_agreement": [2.0] * 100,
        "recurrence": [2.0] * 100,
        "alignment": [-1e9] * 100,
    }
    return Profile(model, cascade, scores, values)


def caller(pipe: Any, path: str, setting: dict[str, Any], folder: Path) -> Callable[[], list[int]]:
    """Makes one picture along a path; gives the extra evaluations of each image."""
    call = {"num_inference_steps": setting["steps"], **{name: setting[name] for name in ("guidance_scale", "height", "width")}}
    extra = {"max_sequence_length": 77} if "3" in type(pipe).__name__ else {}
    file = folder / f"{path}.json"  # as users have it: looked up at every call
    profile(path, identity(pipe)).save(file)
    config = GuardConfig(profile=file, on_failure="pass", steering=["rewording", "padding damping"])
    target = pipe if path == "unguarded" else sdguard.guard(pipe, config)

    def run() -> list[int]:
        output = target(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **call, **extra)
        return [report.extra_evaluations for report in getattr(output, "guard", [])]

    return run


def unusual(about: dict[str, Any]) -> list[str]:
    """What is not usual of a measured run, beside its device; older results do not say that nothing was compiled."""
    found = {
        about["dtype"]: about["dtype"] != "float32",
        "compiled": about.get("compiled"),
        f"{about['steps']} steps": about["steps"] != STEPS,
    }
    return [name for name, is_so in found.items() if is_so]


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak(shape: str, path: str, options: list[str]) -> int:
    """Peak resident memory in bytes of a process that takes one path once."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks", "overhead", shape, "--alone", path, *options], check=True, capture_output=True, text=True
    )
    return int(found.stdout.split()[-1])


def peak_on_gpu(call: Callable[[], Any]) -> int:
    """Peak memory in bytes that torch holds on the GPU in a call."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def main(
    shape: Annotated[str, typer.Argument(help="embedded, sd15, sdxl or sd3.")],
    size: Annotated[
        int | None, typer.Option(help="Height and width in pixels. [default: 64 embedded, 128 else on a CPU, the model's on a GPU]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
    rounds: Annotated[int, typer.Option(help="Rounds: one pair of a gray and a flagged call, five of a clean one.")] = 9,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compiled", help="With a compiled denoiser (fullgraph=True), the clean path alone.")] = False,
    alone: Annotated[str | None, typer.Option(help="Take this path once and print the peak memory in bytes.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path(__file__).parent / "results",
) -> None:
    """Measure the guard's overhead on a shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = built(shape, getattr(torch, dtype), device)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        denoiser_of(pipe).compile(fullgraph=True)
    measured = PATHS[:1] if compiled else PATHS
    side = size or (None if device == "cuda" else 64 if shape == "embedded" else 128) or default_size(pipe)[0]
    # a reduced size is the model's own, at which the guard reads; another would cost what a picture of the full size does
    pipe.default_sample_size = side // pipe.vae_scale_factor
    denoiser_of(pipe).register_to_config(sample_size=side // pipe.vae_scale_factor)
    setting = {"steps": steps, "guidance_scale": testbed.GUIDANCE_SCALE if shape == "embedded" else 7.5, "height": side, "width": side}
    with tempfile.TemporaryDirectory() as folder:
        if alone:
            caller(pipe, alone, setting, Path(folder))()
            typer.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return
        calls = {path: caller(pipe, path, setting, Path(folder)) for path in ("unguarded", *measured)}
        evaluations = {path: call() for path, call in calls.items()}  # also warms everything up
        seconds: dict[str, list[tuple[float, float]]] = {path: [] for path in measured}  # of the path, and of the unguarded call beside it
        shuffle, order = random.Random(0), ["clean"] * CLEAN_PAIRS + list(measured[1:])
        for path in track([path for _ in range(rounds) for path in shuffle.sample(order, len(order))], shape):
            pair = {name: timed(calls[name]) for name in shuffle.sample([path, "unguarded"], 2)}
            seconds[path].append((pair[path], pair["unguarded"]))
        options = ["--size", str(side), "--steps", str(steps), "--dtype", dtype]
        memory = {path: peak_on_gpu(call) if device == "cuda" else peak(shape, path, options) for path, call in calls.items()}
    unguarded = {"path": "unguarded", "seconds": statistics.median(base for pairs in seconds.values() for _, base in pairs)}
    rows = [{**unguarded, "ratio": 1.0, "extra evaluations": 0, "peak gigabytes": memory["unguarded"] / 2**30, "memory ratio": 1.0}]
    for path, pairs in seconds.items():
        ratios = [here / base for here, base in pairs]
        interval = quantile_test(ratios).confidence_interval(0.95)
        low, high = (float(end) if math.isfinite(end) else None for end in interval)  # few pairs have none
        rows.append(
            {
                "path": path,
                "seconds": statistics.median(here for here, _ in pairs),
                "ratio": statistics.median(ratios),
                "low": low,
                "high": high,
                "pairs": len(pairs),
                "extra evaluations": sum(evaluations[path]),
                "peak gigabytes": memory[path] / 2**30,
                "memory ratio": memory[path] / memory["unguarded"],
            }
        )
    about = {
        "shape": shape,
        "pipeline": type(pipe).__name__,
        **setting,
        "rounds": rounds,
        "dtype": dtype,
        "compiled": compiled,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    name = "-".join(["overhead", shape, *unusual(about), *([device] if device != "cpu" else [])]).replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.json", json.dumps({"about": about, "rows": rows}, indent=1))
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}"))
