"""One profile, any setting: the embedded model's profile under samplers, steps, guidance, negative prompts, sizes and precisions.

``python -m benchmarks settings`` reads, in each setting, the first denoiser call of runs of held-out ordinary captions and of the test
split's verbatim copies, as the guard does, all by the profile that ships: of all copies in the setting the model is meant for, else of two
seeds a copied caption. It writes ``results/settings.json`` and the docs' table, and fails where a setting would have been calibrated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import pandas as pd
import torch
import typer

from benchmarks.detection import held_out
from benchmarks.documents import ROOT, markdown, put
from benchmarks.running import profile_digest, versions
from sdguard import testbed
from sdguard.decision.calibration import calibrate, evenly
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import known_profile
from sdguard.decision.ordinary_prompts import ordinary_prompts
from sdguard.decision.profile import Profile
from sdguard.decision.store import FIRST_USE_PROMPTS
from sdguard.denoiser.probe import probe_run
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.atomic import write_text
from sdguard.files.resumable import measured
from sdguard.guarded.config import GuardConfig
from sdguard.guarded.run import GuardedRun

NAME, RESULTS = "settings", Path(__file__).parent / "results"
RATE, BATCH, ORDINARY = 0.01, 25, 400
#: seeds a copied caption, where not all that are copied are read.
SEEDS = 2
#: samplers by name: diffusers' class, and what of its configuration is changed.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"timestep_spacing": "leading"}),
    "DDIM trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "PNDM": ("PNDMScheduler", {"timestep_spacing": "leading", "skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
STEPS = (4, 10, 20, 50)
SIZES = ((64, 96), (96, 64), (128, 128))
GUIDANCE = (1.0, 1.5, 4.0, 7.5, 12.0)
NEGATIVES = (
    "blurry", "low quality, jpeg artifacts", "text, watermark, signature", "ugly, deformed, extra limbs", "a dog", "monochrome",
    "dark forest, fog", "cartoon, 3d render", "crowd of people", "worst quality, lowres, bad anatomy, out of frame",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A setting: its name, its sampler, the precision of the model, and the other arguments of the call.

    ``negatives`` are negative prompts: one for all images, or one after the other; ``embedded``: handed over as embeddings.
    """

    name: str
    sampler: str = "DPM++ 2M"
    dtype: torch.dtype = torch.float32
    call: dict[str, Any] = field(default_factory=dict)
    negatives: tuple[str, ...] = ()
    embedded: bool = False


#: the setting that the model is meant for, in which all copies of the split are read.
DEFAULT = Case("guidance 2.5")


def cases() -> list[Case]:
    """Every setting that is measured."""
    made = [Case(f"{sampler}, {steps} steps", sampler, call={"num_inference_steps": steps}) for sampler in SAMPLERS for steps in STEPS]
    made.append(DEFAULT)
    made += [Case(f"guidance {scale:g}", call={"guidance_scale": scale}) for scale in GUIDANCE]
    made += [Case(f"negative prompt: {text}", negatives=(text,)) for text in NEGATIVES]
    made += [Case(f"negative embeddings: {text}", negatives=(text,), embedded=True) for text in NEGATIVES]
    made.append(Case("another negative prompt for each image", negatives=NEGATIVES))
    made += [
        Case(f"{height} x {width} pixels", call={"height": height, "width": width}) for height, width in ((64, 96), (96, 64), (128, 128))
    ]
    for sampler in ("DPM++ 2M", "DDIM"):
        made.append(Case(f"bfloat16, {sampler}", sampler, torch.bfloat16))
    return made


def pipeline(case: Case) -> Any:
    """The embedded model with the case's sampler and precision."""
    pipe = testbed.load()
    name, changes = SAMPLERS[case.sampler]
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    accepted = getattr(diffusers, name)
    pipe.scheduler = accepted.from_config(config, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(case.dtype)


def read(pipe: Any, profile: Profile, case: Case, part: pd.DataFrame) -> pd.DataFrame:
    """What the guard makes of the first call of a batch of runs: p-value, verdict, extra evaluations."""
    call: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE, **case.call}
    if case.negatives:
        texts = [case.negatives[i % len(case.negatives)] for i in range(len(part))]
        encoded = Encoder(pipe)(texts) if case.embedded else None
        call |= {"negative_prompt": texts} if encoded is None else {"negative_prompt_embeds": encoded}
    run = GuardedRun(GuardConfig("observe", RATE), profile, part.text.tolist(), Encoder(pipe, call))
    probe_run(pipe, part.text.tolist(), part.seed.tolist(), run.observe, 1, **call)
    reports = run.reports
    return part.assign(
        p_value=[np.nan if report.p_value is None else report.p_value for report in reports],
        flagged=[report.verdict == "flagged" for report in reports],
        evaluations=[report.extra_evaluations for report in reports],
        error=[report.error or "" for report in reports],
    )


def copies(seeds: int | None) -> pd.DataFrame:
    """The test split's verbatim captions with the seeds whose pictures are copies, so many of them or all; ``text`` and ``seed``."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    table = table[(table.split == "test") & (table.kind == "verbatim")]
    return pd.DataFrame([{"text": row.text, "seed": int(seed)} for row in table.itertuples() for seed in row.copied_seeds[:seeds]])


def row(case: Case, profile: Profile, ordinary: pd.DataFrame, copied: pd.DataFrame) -> dict[str, Any]:
    """A setting's line of the table."""
    low, high = profile.false_positive_interval(RATE, of=len(ordinary))
    realised = float(ordinary.flagged.mean())
    return {
        "setting": case.name,
        "ordinary flagged": realised,
        "interval": (low, high),
        "inside": bool(low <= realised <= high),
        "copies flagged": float(copied.flagged.mean()),
        "copies": len(copied),
        "evaluations an ordinary sample": float(ordinary.evaluations.mean()),
        "pays none": float((ordinary.evaluations == 0).mean()),
        "errors": int((ordinary.error != "").sum() + (copied.error != "").sum()),
    }


def first_use() -> dict[str, int]:
    """What a calibration on first use costs: prompts, denoiser evaluations, and pictures of 50 steps that cost as much."""
    pipe, evaluations = testbed.load(), 0
    forward = pipe.unet.forward

    def counted(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal evaluations
        evaluations += len(sample)
        return forward(sample, *args, **kwargs)

    pipe.unet.forward = counted
    prompts = evenly(ordinary_prompts(pipe), FIRST_USE_PROMPTS)
    made = calibrate(pipe, prompts)
    return {"prompts": len(prompts), "scored": made.prompts, "evaluations": evaluations, "pictures": round(evaluations / 100)}


def brief_table(rows: Sequence[dict[str, Any]]) -> str:
    """The documentation's table: settings in groups, the range of each figure over a group."""

    def group(name: str) -> str:
        kinds = ("negative embeddings", "negative prompt", "another negative", "guidance", "bfloat16")
        if found := next((kind for kind in kinds if name.startswith(kind)), None):
            return "negative prompt" if found == "another negative" else found
        return "another size" if "pixels" in name else f"9 samplers, {name.split(', ')[1]}"

    table = pd.DataFrame(rows)
    lines = []
    for name, part in table.groupby(table.setting.map(group), sort=False):
        rates, cost = part["ordinary flagged"], part["evaluations an ordinary sample"]
        lines.append([
            str(name), str(len(part)), f"{rates.min():.2%} to {rates.max():.2%}", f"{part.inside.sum()} of {len(part)}",
            f"{part['copies flagged'].min():.1%}", f"{cost.min():.1f} to {cost.max():.1f}",
        ])  # fmt: skip
    header = [
        "settings",
        "how many",
        "ordinary captions flagged",
        "inside the promised interval",
        "copies flagged, at least",
        "evaluations",
    ]
    return markdown(header, lines)


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose tables are written.")] = ROOT,
) -> None:
    """Measure the shipped profile in every setting."""
    ordinary = held_out().rename(columns={"prompt": "text"})
    ordinary = ordinary.iloc[np.linspace(0, len(ordinary) - 1, min(ORDINARY, len(ordinary))).astype(int)]
    rows = []
    for number, case in enumerate(cases()):
        pipe = pipeline(case)
        profile = known_profile(pipe, identity(pipe))
        if profile is None:
            raise SystemExit(f"{case.name}: the profile of the model does not serve this setting.")
        key = {"profile": profile_digest(), "case": repr(case), **versions()}
        measure = partial(read, pipe, profile, case)
        tables = {"ordinary": ordinary, "copies": copies(None if case == DEFAULT else SEEDS)}
        found = [measured(f"{NAME}-{number:03d}-{what}", table, measure, work, key, BATCH) for what, table in tables.items()]
        rows.append(row(case, profile, *found))
        typer.echo(json.dumps(rows[-1]))
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"profile": profile_digest(), "rate": RATE, "first use": first_use(), **versions()}
    typer.echo(about["first use"])
    write_text(out / f"{NAME}.json", json.dumps({"about": about, "rows": rows}, indent=1))
    shown = brief_table(rows)
    typer.echo(shown)
    put(NAME, shown, root)
