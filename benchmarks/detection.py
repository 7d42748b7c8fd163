"""Detection on the embedded model: every signal, the guard's cascade and a caption-only baseline, and what each costs.

``python -m benchmarks.detection`` reads each signal at the first denoiser call, before any step is taken, one seed a caption. Positives are
samples that are copies, negatives samples of captions of the same make that training never showed. It also runs the cascade over ordinary
captions that neither training's table nor calibration holds, for its realised false-positive rate. Writes
``benchmarks/results/detection-SPLIT.parquet`` (one row a sample) and ``.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.progress import track
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from sdguard import Profile, testbed
from sdguard.calibration import PROFILE_FILE
from sdguard.decision import judge, judge_later
from sdguard.observation import Observation
from sdguard.reading import read
from sdguard.signals import SIGNALS, Signal
from sdguard.signals.guidance_norm import guidance_norm
from sdguard.testbed.world import ordinary_captions

BATCH = 16
RESAMPLES = 1000
HELD_OUT = 1000
RATE = 0.01
SETTING: dict[str, Any] = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}


def measure(pipe: Any, captions: pd.DataFrame, profile: Profile, signals: tuple[Signal, ...]) -> pd.DataFrame:
    """``captions`` with every signal's value and seconds, the cascade's score, evaluations and seconds at the first call, and the p-value
    of the run, the later calls that are watched included."""
    parts: list[dict[str, Any]] = []

    def look(observation: Observation) -> None:
        if observation.step:
            later = judge_later(guidance_norm(observation), observation.step, profile.cascade).tolist()
            parts[-1]["run"] = [max(pair) for pair in zip(parts[-1]["run"], later, strict=True)]
            parts[-1]["p_value"] = [profile.p_value(s) for s in parts[-1]["run"]]
            return

        def timed(read: Callable[[], Any]) -> tuple[Any, float]:
            started = time.perf_counter()
            return read(), (time.perf_counter() - started) / len(observation.x)

        found: dict[str, Any] = {}
        for signal in signals:
            value, found[f"{signal.name}_seconds"] = timed(partial(signal.read, observation))
            found[signal.name] = value.tolist()
        before = observation.evaluations.clone()
        fresh = replace(observation, estimates={})  # the cascade buys its own look-aheads, whatever a signal has made before
        (score, _), found["cascade_seconds"] = timed(lambda: judge(fresh, profile.cascade))
        found["cascade"] = found["run"] = score.tolist()
        found["p_value"] = [profile.p_value(s) for s in score.tolist()]
        found["evaluations"] = (observation.evaluations - before).tolist()
        parts.append(found)

    for start in track(range(0, len(captions), BATCH), "measuring"):
        part = captions[start : start + BATCH]
        read(pipe, part.text.tolist(), part.seed.tolist(), look, 1 + len(profile.cascade.later), **SETTING)
    return pd.concat([captions.reset_index(drop=True), pd.concat(map(pd.DataFrame, parts), ignore_index=True)], axis=1)


def true_positive_rate(truth: np.ndarray, score: np.ndarray, false_positive_rate: float = RATE) -> float:
    """Share of positives above the threshold that at most this share of the negatives exceeds."""
    negatives = np.sort(score[~truth])
    return float((score[truth] > negatives[len(negatives) - 1 - int(false_positive_rate * len(negatives))]).mean())


def resamples(groups: np.ndarray, truth: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """Row indices of bootstrap draws of whole caption clusters, those that hold both classes."""
    rng = np.random.default_rng(seed)
    clusters = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    draws = [np.concatenate([clusters[i] for i in rng.integers(len(clusters), size=len(clusters))]) for _ in range(RESAMPLES)]
    return [draw for draw in draws if 0 < truth[draw].sum() < len(draw)]


def interval(
    statistic: Callable[[np.ndarray, np.ndarray], float], truth: np.ndarray, score: np.ndarray, draws: list[np.ndarray]
) -> list[float]:
    """The 95% bootstrap interval of ``statistic(truth, score)``."""
    return [float(v) for v in np.quantile([statistic(truth[draw], score[draw]) for draw in draws], [0.025, 0.975])]


def compare(samples: pd.DataFrame, costs: dict[str, float]) -> list[dict[str, Any]]:
    """One row a score and kind of target: AUC and true-positive rate at 1% false positives, with intervals, cost and milliseconds."""
    negatives = samples[(samples.kind == "unseen") & ~samples["copy"]]
    rows = []
    for kind in ("verbatim", "template"):
        both = pd.concat([samples[(samples.kind == kind) & samples["copy"]], negatives])
        truth = both["copy"].to_numpy()
        draws = resamples(both.group.to_numpy(), truth)
        for name, cost in costs.items():
            score = both[name].to_numpy()
            seconds = samples.get(f"{name}_seconds")
            rows.append(
                {
                    "kind": kind,
                    "score": name,
                    "auc": float(roc_auc_score(truth, score)),
                    "auc_interval": interval(roc_auc_score, truth, score, draws),
                    "tpr": true_positive_rate(truth, score),
                    "tpr_interval": interval(true_positive_rate, truth, score, draws),
                    "cost": cost,
                    "milliseconds": None if seconds is None else float(1000 * seconds.mean()),
                    "copies": int(truth.sum()),
                    "negatives": len(negatives),
                }
            )
    return rows


def caption_only(known: pd.DataFrame, texts: pd.Series) -> np.ndarray:
    """How memorized captions look to a character-3-gram naive Bayes classifier that learnt from another split and sees no model."""
    chosen = known[(known.kind == "unseen") | (known.copy_rate >= 0.5)]
    classifier = make_pipeline(CountVectorizer(analyzer="char", ngram_range=(3, 3)), MultinomialNB())
    return classifier.fit(chosen.text, chosen.kind != "unseen").predict_proba(texts)[:, 1]


def held_out(table: pd.DataFrame, seed: int = 90) -> pd.DataFrame:
    """Ordinary captions that the prompt table does not hold."""
    left = sorted({text for text, _, _ in ordinary_captions()} - set(table.text))
    chosen = np.random.default_rng(seed).choice(left, size=min(HELD_OUT, len(left)), replace=False)
    return pd.DataFrame(
        {"text": chosen, "kind": "ordinary, held out", "repetitions": 0, "seed": 1000 + np.arange(len(chosen)), "copy": False}
    )


def main(
    split: Annotated[str, typer.Option(help="development or test.")] = "development",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
) -> None:
    """Measure every signal and the cascade on a split and report."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    table["copy"] = [0 in seeds for seeds in table.copied_seeds]
    profile = Profile.load(testbed.path() / PROFILE_FILE)
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    captions = table.loc[table.split == split, ["text", "kind", "repetitions", "group", "copy"]].assign(seed=0)
    samples = measure(pipe, captions, profile, SIGNALS)
    samples["caption_only"] = caption_only(table[table.split == ("test" if split == "development" else "development")], samples.text)
    ordinary = measure(pipe, held_out(table), profile, ())
    unseen = samples[(samples.kind == "unseen") & ~samples["copy"]]
    figures = {
        "calibration scores": profile.prompts,
        "promised false-positive rate": RATE,
        "interval of the realised rate, long run": profile.false_positive_interval(RATE),
        "interval of the realised rate, among the held-out captions": profile.false_positive_interval(RATE, of=len(ordinary)),
        "realised on held-out ordinary captions": float((ordinary.p_value <= RATE).mean()),
        "held-out ordinary captions": len(ordinary),
        "realised on never-seen specific captions": float((unseen.p_value <= RATE).mean()),
        "never-seen specific captions": len(unseen),
        "held-out ordinary captions that cost nothing": float((ordinary.evaluations == 0).mean()),
        "mean evaluations of a held-out ordinary caption": float(ordinary.evaluations.mean()),
        "copies flagged, verbatim": float((samples[samples["copy"] & (samples.kind == "verbatim")].p_value <= RATE).mean()),
        "copies flagged, template": float((samples[samples["copy"] & (samples.kind == "template")].p_value <= RATE).mean()),
    }
    costs = {**{signal.name: float(signal.cost) for signal in SIGNALS}, "cascade": float(samples.evaluations.mean()), "caption_only": 0.0}
    rows = compare(samples, costs)
    out.mkdir(parents=True, exist_ok=True)
    pd.concat([samples, ordinary]).to_parquet(out / f"detection-{split}.parquet", index=False)
    (out / f"detection-{split}.json").write_text(json.dumps({"figures": figures, "rows": rows}, indent=1))
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    for name, value in figures.items():
        typer.echo(f"{name}: {value}")


if __name__ == "__main__":
    typer.run(main)
