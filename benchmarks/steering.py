"""Steering on the embedded model: every method alone and the guard's fallback sequence, gated and always on.

``python -m benchmarks steering`` makes each sample unguarded, then once under every method (always on, nothing verified) and once under the
fallback sequence; what is done is kept as it comes (`sdguard.files.resumable`). A gated method's picture is the always-on one where the
guard flags the sample and the unguarded one elsewhere: rows do not depend on their neighbours, so that nothing has to be run twice. Writes
``results/steering-SPLIT.parquet`` (one row a sample and method), ``.json`` (the tables), and a contact sheet per method under
``results/steering-SPLIT/``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import transformers
import typer
from PIL import Image
from rich.progress import track
from scipy.stats import binomtest
from sklearn.metrics.pairwise import polynomial_kernel

from benchmarks.object_classifier import CLASSIFIER_FILE, ObjectClassifier
from benchmarks.running import as_png, from_png, profile_digest, versions
from sdguard import GuardConfig, GuardedPipeline, Profile, testbed
from sdguard.correction import Correction, corrected, movement
from sdguard.decision.model_folder import PROFILE_FILE
from sdguard.denoiser.hidden_texts import HiddenTexts
from sdguard.denoiser.install import watched
from sdguard.denoiser.text_encoding import Encoder
from sdguard.files.atomic import write_text
from sdguard.files.processes import processes
from sdguard.files.prompt_files import write_table
from sdguard.files.resumable import measured
from sdguard.observation import Observation, Prediction
from sdguard.steering import BASELINES, METHODS, Method, SteeringInput
from sdguard.steering.fallback import methods_of, try_in_order
from sdguard.testbed.copies import SSCD, Targets, find_copies, load_targets, shipped_cut

BATCH = 16
LADDER, NONE = "ladder", "none"
SETTING: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE, "output_type": "np"}


def pictures(pipe: Any, texts: Sequence[str], seeds: Sequence[int]) -> Any:
    """The pipeline's output for one seed a text."""
    return pipe(list(texts), generator=[torch.Generator().manual_seed(int(seed)) for seed in seeds], **SETTING)


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as uint8."""
    return (images * 255).round().astype(np.uint8)


@dataclass
class Always:
    """The watcher that corrects every image at the first call; ``correct`` gives corrections, None where it has none."""

    correct: Callable[[Observation], list[Correction | None]]

    def __post_init__(self) -> None:
        self.corrections: dict[int, Correction] = {}
        self.moved: list[dict[str, float]] = []
        self.applied: list[bool] = []
        self.evaluations = torch.zeros(0)

    def reads(self, step: int) -> bool:
        return step == 0

    def expects(self, rows: int, branches: int) -> bool:
        return True

    def follows(self, step: int) -> bool:
        return True

    def glance(self, prediction: Prediction, calls: int) -> None:
        """Each call is observed."""

    def made(self, latents: torch.Tensor) -> None:
        """Nothing is asked of the picture here."""

    def lost(self, row: int, error: Exception) -> None:
        raise error

    def rewritten(self, observation: Observation, hidden: HiddenTexts) -> None:
        """Nobody writes into the benchmark's texts."""

    def observe(self, observation: Observation) -> None:
        if observation.step == 0:
            found = self.correct(observation)
            self.applied = [correction is not None for correction in found]
            self.corrections = {row: correction for row, correction in enumerate(found) if correction}
            spent = observation.evaluations.clone()
            self.moved = movement(observation, corrected(observation, [c or Correction({}) for c in found]))
            observation.evaluations.copy_(spent)  # looking at how far it moved is the benchmark's expense
        self.evaluations = observation.evaluations


def alone(method: Method, pipe: Any, profile: Profile, texts: list[str], observation: Observation) -> list[Correction | None]:
    """What one method gives each image, whether it would pass verification or not."""
    return method.correct(SteeringInput.of(observation, list(texts), Encoder(pipe), profile))


def in_order(pipe: Any, profile: Profile, texts: list[str], observation: Observation) -> list[Correction | None]:
    """What the guard's fallback sequence gives each image, None where no method passed."""
    flagged = SteeringInput.of(observation, list(texts), Encoder(pipe), profile)
    return [outcome.correction for outcome in try_in_order(flagged, methods_of(profile))]


def guarded(pipe: Any, part: pd.DataFrame) -> pd.DataFrame:
    """Unguarded pictures of a batch of samples, and what the guard says of each."""
    started = time.perf_counter()
    output = pictures(GuardedPipeline(pipe, GuardConfig(mode="observe")), part.text, part.seed)
    return pd.DataFrame(
        {
            "flagged": [report.verdict == "flagged" for report in output.guard],
            "p_value": [report.p_value for report in output.guard],
            "decision": [report.extra_evaluations for report in output.guard],
            "seconds": (time.perf_counter() - started) / len(part),
            "picture": as_png(as_bytes(output.images)),
        }
    )


def steered(pipe: Any, correct: Callable[[list[str], Observation], list[Correction | None]], part: pd.DataFrame) -> pd.DataFrame:
    """Pictures of a batch of samples under a method, and for each whether it applied, how far it moved, evaluations and seconds."""
    watcher = Always(partial(correct, part.text.tolist()))
    started = time.perf_counter()
    with watched(Encoder(pipe), watcher):
        images = as_bytes(pictures(pipe, part.text, part.seed).images)
    return pd.DataFrame(
        {
            "applied": watcher.applied,
            "moved": [moved["prediction"] for moved in watcher.moved],
            "evaluations": watcher.evaluations.tolist(),
            "seconds": (time.perf_counter() - started) / len(part),
            "picture": as_png(images),
        }
    )


class RememberingSSCD(SSCD):
    """SSCD that embeds no picture twice: the same ones are looked at for every method, and by copy criterion and alignment score."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, np.ndarray] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        keys = [image.tobytes() for image in images]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            self.known.update(zip(new, super().__call__(images[list(new.values())]), strict=True))
        return np.stack([self.known[key] for key in keys])


def kernel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two sets of unit embeddings, unbiased, cubic kernel (KID, Binkowski et al. 2018), times 1000."""

    def within(x: np.ndarray) -> float:
        kernel = polynomial_kernel(x, degree=3, gamma=1.0)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return 1000 * (within(one) + within(other) - 2 * float(polynomial_kernel(one, other, degree=3, gamma=1.0).mean()))


def diversity(embedded: np.ndarray, texts: pd.Series) -> float:
    """Mean SSCD distance (1 - cosine) of pairs of pictures of one caption."""
    found = []
    for group in texts.groupby(texts.to_numpy()).indices.values():
        similar = embedded[group] @ embedded[group].T
        found += (1 - similar[np.triu_indices(len(group), 1)]).tolist()
    return float(np.mean(found)) if found else float("nan")


def rate(found: Any) -> dict[str, Any]:
    """A share with its exact 95% interval."""
    hits = np.asarray(found, bool)
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci() if len(hits) else (float("nan"), float("nan"))
    return {"share": float(hits.mean()), "of": len(hits), "low": float(interval[0]), "high": float(interval[1])}


def compare(samples: pd.DataFrame, embedded: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row a method, gated and always on: copies left, alignment, quality, diversity, cost.

    What alignment is to be expected is that of never-seen captions of the same make *and object*: objects differ in how well the model
    draws them and the classifier knows them. ``alignment_comparable`` is of the steered samples whose object such captions have.
    """
    base = samples[samples.method == NONE].reset_index(drop=True)
    matched, ordinary = (base.kind == "unseen").to_numpy(), (base.kind == "ordinary").to_numpy()
    was_copy, flagged = base["copy"].to_numpy(), base.flagged.to_numpy()
    expected = base.object.map(base[matched].groupby("object").aligned.mean())
    rows = []
    for name, always in samples[samples.method != NONE].groupby("method", sort=False):
        for gated in (True, False):
            acts = flagged & ~matched if gated else ~matched
            here = pd.concat([always[acts], base.set_index(always.index)[~acts]]).sort_index().reset_index(drop=True)
            withheld = here.withheld.to_numpy(bool)
            left, turned = here["copy"].to_numpy(bool) & ~withheld, was_copy & acts & ~withheld
            shown = np.where(acts[:, None], embedded[str(name)], embedded[NONE])
            rows.append(
                {
                    "method": name,
                    "gated": gated,
                    **{f"copies_left_{kind}": rate(left[was_copy & (base.kind == kind)]) for kind in ("verbatim", "template")},
                    "withheld": rate(withheld[was_copy & acts]),
                    "alignment": rate(here.aligned[turned]),
                    "alignment_comparable": rate(here.aligned[turned & expected.notna().to_numpy()]),
                    "alignment_expected": float(expected[turned].mean()),
                    "alignment_ordinary": rate(here.aligned[ordinary]),
                    "ordinary_changed": rate(here.changed[ordinary]),
                    "kernel_distance": kernel_distance(shown[turned], embedded[NONE][matched]) if turned.sum() > 1 else float("nan"),
                    "diversity": diversity(shown[turned], base.text[turned]),
                    "moved": float(here.moved[turned].mean()),
                    "evaluations": float(here.evaluations[was_copy & acts].mean()),
                    "seconds": float(here.seconds[was_copy & acts].mean()),
                }
            )
    return rows


def contact_sheet(targets: Targets, nearest: np.ndarray, before: np.ndarray, after: np.ndarray, path: Path) -> None:
    """Columns of memorized picture, unguarded and steered one."""
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in (targets.pictures[nearest], before, after)])
    Image.fromarray(grid).save(path, quality=85)


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as people read them."""
    flat = [{k: v["share"] if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
    return pd.DataFrame(flat)


def main(
    split: Annotated[str, typer.Option(help="development or test.")] = "test",
    seeds: Annotated[int, typer.Option(help="Seeds a caption; ordinary captions have one.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
    work: Annotated[Path, typer.Option(help="Where what is done is kept, so that a stopped run goes on.")] = Path("build/benchmarks"),
    only: Annotated[list[str] | None, typer.Option(help="These methods alone.")] = None,
) -> None:
    """Measure every steering method on a split of the embedded model; under 'accelerate launch', processes share the work."""
    transformers.logging.set_verbosity_error()
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    profile = Profile.load(testbed.path() / PROFILE_FILE)
    captions = pd.read_parquet(testbed.path() / "prompts.parquet")
    captions = captions[(captions.split == split) & ((captions.copy_rate > 0) | captions.kind.isin(["unseen", "ordinary"]))]
    every = pd.concat([captions.assign(seed=seed) for seed in range(seeds)]).sort_index(kind="stable")
    every = every[(every.kind != "ordinary") | (every.seed == 0)][["text", "kind", "repetitions", "object", "seed"]].reset_index(drop=True)
    targets, _ = load_targets(testbed.path(), pipe.vae)
    sscd, cut = RememberingSSCD(), shipped_cut(testbed.path())
    classifier = ObjectClassifier.load(testbed.path() / CLASSIFIER_FILE, sscd)
    state = processes()
    about = {"profile": profile_digest(), **SETTING, **versions()}

    def made(name: str, samples: pd.DataFrame, measure: Callable[[pd.DataFrame], pd.DataFrame]) -> tuple[np.ndarray, pd.DataFrame]:
        """Pictures and notes of every sample under a method."""
        notes = measured(f"steering-{name}", samples[["text", "seed"]], measure, work, about, BATCH)
        return from_png(notes.pop("picture")), notes.drop(columns=list(about))

    before, verdicts = made(NONE, every, partial(guarded, pipe))
    acted = np.flatnonzero(every.kind != "unseen")
    some = every.iloc[acted].reset_index(drop=True)
    methods = {LADDER: partial(in_order, pipe, profile)} | {
        name: partial(alone, method, pipe, profile) for name, method in {**METHODS, **BASELINES}.items()
    }
    runs = {name: made(name, some, partial(steered, pipe, correct)) for name, correct in methods.items() if not only or name in only}
    if not state.is_main_process:
        return
    base = find_copies(before, targets, sscd, cut)
    every = pd.concat([every, verdicts.drop(columns="seconds")], axis=1)
    folder = out / f"steering-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    embedded = {NONE: sscd(before)}
    nothing = {"applied": False, "moved": 0.0, "evaluations": 0.0, "seconds": verdicts.seconds, "withheld": False, "changed": False}
    parts = [every.assign(method=NONE, **{"copy": base.copy}, aligned=classifier.shows(before, every.object.tolist()), **nothing)]
    show = np.flatnonzero(base.copy & every.flagged & (every.seed == 0))[:16]
    for name, (drawn, notes) in track(runs.items(), "comparing"):
        after, embedded[name] = before.copy(), embedded[NONE].copy()
        after[acted], embedded[name][acted] = drawn, sscd(drawn)
        found = parts[0].assign(
            method=name,
            **{"copy": find_copies(after, targets, sscd, cut).copy},
            aligned=classifier.shows(after, every.object.tolist()),
            changed=(after != before).any(axis=(1, 2, 3)),
        )
        for column in notes:
            found.loc[acted, column] = notes[column].to_numpy()
        found["withheld"] = (name == LADDER) & ~found.applied.astype(bool) & (found.kind != "unseen")
        parts.append(found)
        contact_sheet(targets, base.nearest[show], before[show], after[show], folder / f"{name.replace(' ', '-')}.jpg")
    samples = pd.concat(parts, ignore_index=True).assign(**about)
    rows = compare(samples, embedded)
    matched = samples[(samples.method == NONE) & (samples.kind == "unseen")]
    copies = samples[(samples.method == NONE) & samples["copy"]]
    half = pd.factorize(every.text)[0] % 2
    first, second = (embedded[NONE][(every.kind == "unseen") & (half == part)] for part in (0, 1))
    figures = {
        "samples that were copies, verbatim": int((copies.kind == "verbatim").sum()),
        "samples that were copies, template": int((copies.kind == "template").sum()),
        "copies that were flagged": rate(copies.flagged),
        "ordinary samples that were flagged": rate(every.flagged[every.kind == "ordinary"]),
        "alignment of matched never-seen captions": rate(matched.aligned),
        "diversity of matched never-seen captions": diversity(embedded[NONE][every.kind == "unseen"], matched.text),
        "kernel distance of two halves of them": kernel_distance(first, second),
        "evaluations of the decision, flagged": float(copies.decision[copies.flagged].mean()),
    }
    write_table(samples, out / f"steering-{split}.parquet")
    found = {"about": about, "split": split, "seeds": seeds, "figures": figures, "rows": rows}
    write_text(out / f"steering-{split}.json", json.dumps(found, indent=1))
    with pd.option_context("display.width", 250, "display.max_columns", 30):
        typer.echo(table(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for name, value in figures.items():
        typer.echo(f"{name}: {value}")
