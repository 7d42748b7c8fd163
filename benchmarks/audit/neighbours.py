"""``python -m benchmarks audit neighbours``: the baseline that all three papers argue against, and what it misses.

Nearest-neighbour ratio tests on the digits' VAE, by pixels, and on the embedded model, by pixels and by SSCD, against what is known there:
which samples are copies (the shipped criterion), and the memorization scores that ``score`` and ``agreement`` have measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from benchmarks.audit import pictures
from benchmarks.audit.pictures import WORLD, Data, Pictures
from benchmarks.audit.results import RESULTS, TOP, WORK, Out, Work, interval, rank_correlation, write
from benchmarks.documents import markdown
from sdguard import testbed
from sdguard.audit import digits
from sdguard.audit.neighbours import Embedding, pixels, sample_ratio, second_ratio
from sdguard.audit.subjects import Samples
from sdguard.cli.errors import one_sentence
from sdguard.files.inputs import BadInput
from sdguard.files.processes import processes
from sdguard.testbed.copies import RATIO, SSCD

#: pixels by which a copy is moved to the side.
SHIFT = 2


def moved(images: np.ndarray) -> np.ndarray:
    """Pictures ``[n, H, W, 3]`` moved `SHIFT` pixels to the right, their edge repeated."""
    return np.pad(images, ((0, 0), (0, 0), (SHIFT, 0), (0, 0)), mode="edge")[:, :, :-SHIFT]


def tested(name: str, samples: Samples, embed: Embedding, score: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row a generated point, with its second ratio, and one a training point, with its sample ratio and memorization score."""
    generated = pd.DataFrame({"test": name, "second_ratio": second_ratio(samples.generated, samples.training, embed)})
    ratio = sample_ratio(samples.training, samples.held_out, samples.generated, embed)
    return generated, pd.DataFrame({"test": name, "sample_ratio": ratio, "score": score})


def summary(generated: pd.DataFrame, training: pd.DataFrame) -> dict[str, Any]:
    """What one test says, against copies where they are known and against memorization scores."""
    top = training.score >= training.score.quantile(1 - TOP)
    found: dict[str, Any] = {
        "training points": len(training),
        "generated points called copies": float((generated.second_ratio < RATIO).mean()),
        "training points drawn nearer than unseen ones come": float((training.sample_ratio > 1).mean()),
        "most memorized among them": float((training.sample_ratio[top] > 1).mean()),
        "sample ratio and memorization score": rank_correlation(training.sample_ratio, training.score),
    }
    for kind, part in generated.dropna(subset=["kind"]).groupby("kind"):
        found[f"{kind}: copies"] = int(part.copied.sum())
        for name, ratio in (("second_ratio", "copies told from others (AUC)"), ("moved_ratio", "the same, moved (AUC)")):
            found[f"{kind}: {ratio}"] = float(roc_auc_score(part.copied, -part[name]))
    return found


def draw(generated: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """For each test: the second ratios of copies and of other samples, and the sample ratio against the memorization score."""
    names = list(training.test.unique())
    figure = Figure(figsize=(13, 7))
    for column, (name, axes) in enumerate(zip(names, figure.subplots(2, len(names)).T, strict=True)):
        part, of = generated[generated.test == name], training[training.test == name]
        bins = np.linspace(0, 1, 41)
        groups = {"samples": part[part.copied.isna()], "no copies": part[part.copied == 0], "copies": part[part.copied == 1]}
        for (label, some), colour in zip(groups.items(), ("#9aa4b0", "#5b8c5a", "#c0392b"), strict=True):
            if len(some):
                axes[0].hist(some.second_ratio, bins=bins, color=colour, alpha=0.6, label=f"{label} ({len(some)})")
        moved_copies = groups["copies"]
        if len(moved_copies):
            axes[0].hist(moved_copies.moved_ratio, bins=bins, histtype="step", color="black", label=f"copies moved by {SHIFT} pixels")
        axes[0].axvline(RATIO, color="grey", ls=":", lw=1)
        axes[0].set(title=name, xlabel="nearest over second nearest training point", ylabel="samples" if column == 0 else "")
        axes[0].legend(fontsize=8)
        axes[1].scatter(of.score, of.sample_ratio, s=5, color="#2563a8")
        axes[1].axhline(1, color="grey", ls=":", lw=1)
        axes[1].set(xlabel="memorization score, nats", ylabel="nearest held-out over nearest sample" if column == 0 else "")
    return figure


def of_digits(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The VAE's samples and training digits, by pixels, with the scores of ``score``."""
    scores = pd.read_parquet(out / "score.parquet")
    scores = scores[scores.model == "VAE"].set_index("point").score
    training, _ = digits.split_digits(digits.HELD_OUT)
    return tested("digits, pixels", digits.samples(), pixels, scores[training.numpy()].to_numpy())


def of_model(looked: Pictures, out: Path, work: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The embedded model's samples of its captions and the captions' pictures, by pixels and by SSCD, with the scores of ``agreement``."""
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    count, sscd = len(looked.captions), SSCD()
    images = pictures.decoded(pipe.vae, pictures.generated(pipe, looked.texts, work))[:count]
    copied = pictures.copied(pipe.vae, images, sscd).astype(float)
    scores = pd.read_parquet(out / "agreement.parquet").set_index("text").score.dropna()[looked.captions.text].to_numpy()
    rng = np.random.default_rng(91)  # as many unseen pictures as there are samples
    samples = Samples(images, looked.shown, np.stack([looked.world.composition(rng)[0] for _ in range(count)]))
    kind = looked.captions.kind.where(looked.captions.kind == "template", "verbatim")
    parts = []
    embeddings: dict[str, Embedding] = {"pixels": pixels, "SSCD": sscd}
    for name, embed in embeddings.items():
        generated, training = tested(f"embedded model, {name}", samples, embed, scores)
        ratio = second_ratio(moved(images), looked.shown, embed)
        parts.append((generated.assign(moved_ratio=ratio, copied=copied, kind=kind), training))
    return pd.concat([g for g, _ in parts]), pd.concat([t for _, t in parts])


def main(data: Data = WORLD, out: Out = RESULTS, work: Work = WORK) -> None:
    """Nearest-neighbour tests by pixels and by SSCD; needs the results of 'score' and 'agreement', and the world's data."""
    with one_sentence():
        for needed in ("score", "agreement"):
            if not (out / f"{needed}.parquet").exists():
                raise BadInput(f"{out / needed}.parquet is not there: run 'python -m benchmarks audit {needed}' first.")
        looked = pictures.load(data)
    parts = [of_digits(out), of_model(looked, out, work)]
    if not processes().is_main_process:
        return
    generated, training = (pd.concat(some, ignore_index=True) for some in zip(*parts, strict=True))
    by_test = {str(name): summary(generated[generated.test == name], training[training.test == name]) for name in training.test.unique()}
    table = pd.concat([generated.assign(of="sample"), training.assign(of="training")], ignore_index=True)
    write("neighbours", table, {"tests": by_test}, draw(generated, training), out)


def brief(figures: Mapping[str, Any]) -> str:
    """The documentation's table."""

    def share(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda test: f"{test[name]:.0%}"

    def auc(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda test: f"{test[name]:.2f}" if name in test else "-"

    rows = {
        "copies of whole pictures told from other samples (AUC)": auc("verbatim: copies told from others (AUC)"),
        f"the same, moved by {SHIFT} pixels": auc("verbatim: the same, moved (AUC)"),
        "copies of templates": auc("template: copies told from others (AUC)"),
        f"copies of templates, moved by {SHIFT} pixels": auc("template: the same, moved (AUC)"),
        "training points drawn nearer than unseen ones come": share("training points drawn nearer than unseen ones come"),
        f"the {TOP:.0%} most memorized among them": share("most memorized among them"),
        "rank correlation with the memorization score": lambda test: interval(**test["sample ratio and memorization score"]),
    }
    tests = figures["tests"]
    return markdown(["", *tests], [[name, *(cell(test) for test in tests.values())] for name, cell in rows.items()])
