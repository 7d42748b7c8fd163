"""Every signal on the embedded model: how well it tells samples that are copies from captions never seen, and at what cost.

``python -m benchmarks.detection`` reads each signal at the first denoiser call, before any step is taken, and writes
``benchmarks/results/detection-SPLIT.parquet`` (one row a sample) and ``.json`` (one row a signal).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.progress import track
from sklearn.metrics import roc_auc_score

from sdguard import testbed
from sdguard.observation import Observation
from sdguard.reading import read
from sdguard.signals import SIGNALS

BATCH = 16
RESAMPLES = 1000


def measure(table: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """One row a sample: every signal's value, whether the sample is a copy, and each signal's seconds per image."""
    pipe = testbed.load()
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for start in track(range(0, len(table), BATCH), "measuring"):
        part = table.iloc[start : start + BATCH]
        for seed in range(seeds):
            found: dict[str, Any] = {}

            def look(observation: Observation, found: dict[str, Any] = found) -> None:
                for signal in SIGNALS:
                    started = time.perf_counter()
                    found[signal.name] = signal.read(observation).tolist()
                    found[f"{signal.name}_seconds"] = [(time.perf_counter() - started) / len(observation.x)] * len(observation.x)

            setting = {"num_inference_steps": testbed.STEPS, "guidance_scale": testbed.GUIDANCE_SCALE}
            read(pipe, part.text.tolist(), [seed] * len(part), look, **setting)
            for i, (_, caption) in enumerate(part.iterrows()):
                known = {key: caption[key] for key in ("text", "kind", "repetitions", "group")}
                rows.append(
                    {**known, "seed": seed, "copy": seed in caption.copied_seeds, **{name: values[i] for name, values in found.items()}}
                )
    return pd.DataFrame(rows)


def true_positive_rate(truth: np.ndarray, score: np.ndarray, false_positive_rate: float = 0.01) -> float:
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


def summarise(samples: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a signal and kind of target: AUC and true-positive rate at 1% false positives, with intervals, cost and seconds."""
    negatives = samples[(samples.kind == "unseen") & ~samples["copy"]]
    rows = []
    for kind in ("verbatim", "template"):
        both = pd.concat([samples[(samples.kind == kind) & samples["copy"]], negatives])
        truth = both["copy"].to_numpy()
        draws = resamples(both.group.to_numpy(), truth)
        for signal in SIGNALS:
            score = both[signal.name].to_numpy()
            rows.append(
                {
                    "kind": kind,
                    "signal": signal.name,
                    "auc": float(roc_auc_score(truth, score)),
                    "auc_interval": interval(roc_auc_score, truth, score, draws),
                    "tpr": true_positive_rate(truth, score),
                    "tpr_interval": interval(true_positive_rate, truth, score, draws),
                    "cost": signal.cost,
                    "milliseconds": float(1000 * samples[f"{signal.name}_seconds"].median()),
                    "copies": int(truth.sum()),
                    "negatives": len(negatives),
                }
            )
    return rows


def main(
    split: Annotated[str, typer.Option(help="development or test.")] = "development",
    seeds: Annotated[int, typer.Option(help="Seeds per caption.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(__file__).parent / "results",
) -> None:
    """Measure every signal on a split and report."""
    table = pd.read_parquet(testbed.path() / "prompts.parquet")
    samples = measure(table[table.split == split], seeds)
    out.mkdir(parents=True, exist_ok=True)
    samples.to_parquet(out / f"detection-{split}.parquet", index=False)
    rows = summarise(samples)
    (out / f"detection-{split}.json").write_text(json.dumps({"seeds": seeds, "rows": rows}, indent=1))
    typer.echo(pd.DataFrame(rows).to_string(index=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    typer.run(main)
