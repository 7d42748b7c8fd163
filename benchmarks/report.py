"""One page and the README's tables from the results that lie in ``benchmarks/results``; nothing is measured here.

``python -m benchmarks report`` writes ``report.html``, which holds its figures and needs no other file, and each figure as a PNG.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import typer
from adjustText import adjust_text
from matplotlib.figure import Figure

from benchmarks import audit
from benchmarks.detection import CAPTION, GUARD, RATE, RESULTS, values_of
from benchmarks.published import released
from benchmarks.readme import README, markdown, put
from benchmarks.statistics import roc_band

UNSEEN, ORDINARY = "never-seen caption of the same make", "ordinary caption"
#: detectors that the ROC figure and the README show; the page's tables have all.
SHOWN = (GUARD, "guidance_norm", "output_density_ahead", "lid_contrast", "sharpness", "low_noise_alignment", "attention_entropy", CAPTION)
COLOURS = {"verbatim": "#c0392b", "template": "#e08e0b", UNSEEN: "#2563a8", ORDINARY: "#5b8c5a"}
NAMES = {
    GUARD: "**the guard's decision**",
    CAPTION: "the caption alone (character 3-grams)",
    "lid_contrast": "dimension (LID), unconditional minus conditional",
    "output_density_ahead": "output density along the look-ahead",
}

PAGE = Path(__file__).with_suffix(".html.j2")


def plain(name: str) -> str:
    """A detector's name for people."""
    return NAMES.get(name, name.replace("_", " "))


def samples_of(samples: pd.DataFrame, group: str) -> pd.Series:
    """Which samples a group holds: copies of a kind, or samples of a source of negatives that are none."""
    return (
        samples.positive & (samples.kind == group) if group in ("verbatim", "template") else ~samples.positive & (samples.source == group)
    )


def draw_roc(samples: pd.DataFrame) -> Figure:
    """True against false positives with bootstrap bands, samples at the first call."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    rates = np.unique(np.concatenate([[0.0], np.geomspace(0.002, 1, 80)]))
    for axis, kind in zip(axes, ("verbatim", "template"), strict=True):
        for i, name in enumerate(name for name in SHOWN if values_of(samples, name, "first") is not None):
            value = values_of(samples, name, "first")
            assert value is not None
            taken = (samples_of(samples, kind) | samples_of(samples, UNSEEN)).to_numpy() & np.isfinite(value)
            curve, low, high = roc_band(samples.positive.to_numpy()[taken], value[taken], samples.cluster.to_numpy()[taken], rates)
            axis.plot(rates, curve, color=f"C{i}", label=plain(name).strip("*"), lw=2 if name == GUARD else 1.2)
            axis.fill_between(rates, low, high, color=f"C{i}", alpha=0.12, lw=0)
        axis.axvline(RATE, color="grey", lw=0.8, ls=":")
        axis.set(xscale="symlog", xlim=(0, 1), ylim=(0, 1.02), title=f"{kind} copies", xlabel="false-positive rate, never-seen captions")
        axis.set_xscale("symlog", linthresh=0.01)
    axes[0].set_ylabel("true-positive rate")
    axes[1].legend(fontsize=8, loc="lower right")
    return figure


def draw_series(samples: pd.DataFrame) -> Figure:
    """The guidance norm over the steps of the run: median and central 90% of copies and of negatives."""
    figure, axis = plt.subplots(figsize=(8, 4.4))
    for group, colour in COLOURS.items():
        here = samples[samples_of(samples, group)]
        if len(here):
            series, steps = np.stack(here.guidance_norm_series.to_list()), 1 + np.arange(len(here.guidance_norm_series.iloc[0]))
            low, middle, high = np.quantile(series, [0.05, 0.5, 0.95], axis=0)
            axis.plot(steps, middle, color=colour, label=f"{group} ({len(here)})")
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axis.set(xlabel="denoising step", ylabel="guidance norm", yscale="log")
    axis.legend(fontsize=8)
    return figure


def draw_dose(samples: pd.DataFrame) -> Figure:
    """Copy rate, and the guard's score, over how often training showed a caption."""
    figure, (rate, score) = plt.subplots(1, 2, figsize=(11, 4.2))
    for kind in ("verbatim", "template"):
        here = samples[samples.kind == kind]
        prompts = here.groupby("prompt").agg(repetitions=("repetitions", "first"), copy_rate=("copy_rate", "first"), score=(GUARD, "mean"))
        grouped = prompts.groupby("repetitions")
        counts = grouped.copy_rate.mean().index.to_numpy(float)
        rate.plot(counts, 100 * grouped.copy_rate.mean(), "o-", color=COLOURS[kind], label=kind)
        low, middle, high = (grouped.score.quantile(share) for share in (0.1, 0.5, 0.9))
        score.errorbar(counts, middle, [middle - low, high - middle], fmt="o-", color=COLOURS[kind], label=kind, capsize=3)
    threshold = samples[samples.p_value <= RATE][GUARD].min()
    score.axhline(threshold, color="grey", ls=":", label="threshold at 1%")
    for axis, label in ((rate, "copies among 16 seeds, %"), (score, "score (median, 10 to 90%)")):
        axis.set(xscale="log", xlabel="repetitions in training", ylabel=label)
        axis.set_xticks(counts, [f"{count:.0f}" for count in counts], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    return figure


def draw_cost(rows: pd.DataFrame) -> Figure:
    """Accuracy against cost of every detector, samples at the first call."""
    figure, axis = plt.subplots(figsize=(9, 5))
    here = rows[(rows.level == "sample") & (rows.steps == "first") & (rows.negatives == UNSEEN)]
    for kind, marker in (("verbatim", "o"), ("template", "s")):
        part = here[here.kind == kind]
        axis.scatter(part.evaluations, part.auc, color=COLOURS[kind], marker=marker, label=f"{kind} copies", alpha=0.8)
    lowest = here[here.kind == "verbatim"].sort_values("auc")
    named = lowest[lowest.auc < 0.98]
    labels = [axis.text(row.evaluations, row.auc, plain(row.detector).strip("*"), fontsize=7) for row in named.itertuples()]
    adjust_text(labels, ax=axis, arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"})
    axis.axhline(0.5, color="grey", ls=":", lw=0.8)
    axis.set(xlabel="extra denoiser evaluations an image", ylabel="area under the ROC curve", xlim=(-0.7, None))
    axis.legend(fontsize=8)
    return figure


def draw_steering(rows: pd.DataFrame) -> Figure:
    """Copies that are left against alignment of what was steered, gated methods."""
    figure, axis = plt.subplots(figsize=(9, 5.4))
    here = rows[rows.gated]
    left = here[["copies_left_verbatim", "copies_left_template"]].map(lambda rate: rate["share"]).mean(axis=1)
    aligned = here.alignment.map(lambda rate: rate["share"])
    axis.scatter(100 * left, 100 * aligned, color=["#c0392b" if name == "ladder" else "#2563a8" for name in here.method])
    labels = [axis.text(100 * x, 100 * y, name, fontsize=7) for name, x, y in zip(here.method, left, aligned, strict=True)]
    adjust_text(labels, ax=axis, arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey"})
    axis.axhline(100 * here.alignment_expected.iloc[0], color="grey", ls=":", label="never-seen captions of the same objects")
    axis.set(xlabel="copies left, % (mean of verbatim and template)", ylabel="pictures that show their object, %")
    axis.legend(fontsize=8)
    return figure


def table_of_detection(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as people read them, best first within each comparison."""
    differences = {detector.name: f"as released; {detector.difference}" for detector in released("epsilon")}
    shown = rows.assign(
        AUC=[f"{r.auc:.3f} [{r.auc_low:.3f}, {r.auc_high:.3f}]" for r in rows.itertuples()],
        TPR=[f"{r.tpr:.2f} [{r.tpr_low:.2f}, {r.tpr_high:.2f}]" for r in rows.itertuples()],
        remark=rows.detector.map(differences).fillna(""),
    ).rename(columns={"TPR": "TPR at 1% FPR", "positives": "copies", "of": "negatives", "negatives": "source of negatives"})
    order = shown.sort_values(
        ["level", "kind", "source of negatives", "seeds", "steps", "auc"], ascending=[False, False, True, True, False, False]
    )
    columns = ["detector", "level", "seeds", "steps", "kind", "source of negatives", "AUC", "TPR at 1% FPR", "evaluations", "milliseconds"]
    return order[[*columns, "copies", "negatives", "remark"]]


def readme_detection(rows: pd.DataFrame) -> str:
    """The README's table: samples at the first call against never-seen captions of the same make."""
    here = rows[(rows.level == "sample") & (rows.steps == "first") & (rows.negatives == UNSEEN)]
    lines = []
    for name in SHOWN:
        by_kind = [here[(here.detector == name) & (here.kind == kind)] for kind in ("verbatim", "template")]
        if any(part.empty for part in by_kind):
            continue
        verbatim, template = (part.iloc[0] for part in by_kind)
        time = "" if pd.isna(verbatim.milliseconds) else f"{verbatim.milliseconds:.{0 if verbatim.milliseconds >= 1 else 3}f}"
        areas, shares = f"{verbatim.auc:.3f} / {template.auc:.3f}", f"{verbatim.tpr:.0%} / {template.tpr:.0%}"
        lines.append([plain(name), areas, shares, f"{verbatim.evaluations:.2g}", time])
    header = ["", "AUC, verbatim / template", "true positives at 1% false positives", "extra evaluations", "milliseconds an image"]
    return markdown(header, lines)


def readme_steering(rows: pd.DataFrame) -> str:
    """The README's table: every method, gated."""
    lines = []
    for row in rows[rows.gated].itertuples():
        copies = f"{row.copies_left_verbatim['share']:.1%} / {row.copies_left_template['share']:.1%}"
        name = f"**{row.method}**" if row.method == "ladder" else row.method
        kernel = f"{row.kernel_distance:.0f}"
        lines.append([name, copies, f"{row.alignment['share']:.0%}", kernel, f"{row.diversity:.2f}", f"{row.evaluations:.0f}"])
    return markdown(
        ["method, gated", "copies left, verbatim / template", "alignment", "kernel distance", "diversity", "evaluations"], lines
    )


def readme_overhead(found: dict[str, dict[str, Any]]) -> str:
    """The README's table: every shape and path."""
    lines = [
        [
            f"{shape}, {result['about']['height']} px",
            row["path"],
            f"{row['ratio']:.3f}",
            f"{row['memory ratio']:.3f}",
            str(row["extra evaluations"]),
        ]
        for shape, result in found.items()
        for row in result["rows"]
        if row["path"] != "unguarded"
    ]
    return markdown(["shape", "path", "wall time", "peak memory", "extra evaluations"], lines)


def readme_development(figures: dict[str, float]) -> str:
    """The README's table of the guard on the development split."""
    shares = ("highest", "flagged that", "ordinary samples", "never-seen", "still", "withheld", "reworded", "names")
    lines = [[name, f"{v:.1%}" if any(part in name for part in shares) else f"{v:.3g}"] for name, v in figures.items() if name != "seeds"]
    return markdown(["", "measured"], lines)


def load(results: Path, name: str) -> dict[str, Any] | None:
    """A result file, if it is there."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def as_html(table: pd.DataFrame) -> str:
    """A table for the page."""
    return table.to_html(index=False, border=0, na_rep="", float_format=lambda value: f"{value:.3g}")


def main(
    results: Annotated[Path, typer.Option(help="Where the results lie.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Where the page and its figures go.")] = RESULTS / "report",
    readme: Annotated[Path, typer.Option(help="The README whose tables are written.")] = README,
) -> None:
    """Draw the page and the README's tables from the results."""
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    sections: list[dict[str, Any]] = []

    def section(title: str, command: str, text: list[str], draw: Callable[[], Figure] | None = None, **more: Any) -> None:
        picture = None
        if draw:
            path = out / f"{title.lower().replace(' ', '-')}.png"
            figure = draw()
            figure.tight_layout()
            figure.savefig(path, dpi=110)
            plt.close(figure)
            picture = base64.b64encode(path.read_bytes()).decode()
        sections.append({"title": title, "command": f"python -m benchmarks {command}", "text": text, "picture": picture, **more})

    about = "Nothing has been measured yet."
    if detection := load(results, "detection"):
        samples, rows = pd.read_parquet(results / "detection.parquet"), pd.DataFrame(detection["rows"])
        setting = ", ".join(f"{name} {value}" for name, value in detection["about"].items())
        about = (
            f"What the guard and the detectors it is made of do, measured on: {setting}. Negatives are kept apart by where they come from; "
            "intervals are 95%, by bootstrap of whole clusters of near-duplicates; a classifier that sees the caption alone stands beside "
            "every detector."
        )
        section(
            "ROC", "detection",
            [
                "Samples at the first denoiser call, before any step is taken. A positive is a sample that is a copy of a "
                "training picture; a negative one of a caption of the same make that training never showed. The dotted line is "
                "1% false positives."
            ],
            lambda: draw_roc(samples),
        )  # fmt: skip
        section(
            "Score against time", "detection",
            [
                "The guidance norm at every step of the run, unguarded. Lines are medians, bands hold 90% of the samples."
            ],
            lambda: draw_series(samples),
        )  # fmt: skip
        section(
            "Dose and response", "detection",
            [
                "The repetition count was drawn at random for each caption, so that nothing else differs. Left: how often the "
                "picture comes back. Right: what the guard says before the first step."
            ],
            lambda: draw_dose(samples),
        )  # fmt: skip
        section(
            "Cost against accuracy", "detection",
            [
                "Each detector's extra denoiser evaluations an image and its area under the ROC curve. Detectors under .98 on "
                "verbatim copies are named."
            ],
            lambda: draw_cost(rows), table=as_html(table_of_detection(rows)),
        )  # fmt: skip
        figures = pd.DataFrame([{"": name, "measured": str(value)} for name, value in detection["figures"].items()])
        section("The decision", "detection", ["The guard at its own conformal threshold."], table=as_html(figures), open=True)
        put("detection", readme_detection(rows), readme)
    if steering := load(results, "steering-test"):
        rows_ = pd.DataFrame(steering["rows"])
        shares = rows_.map(lambda cell: cell["share"] if isinstance(cell, dict) else cell)
        section(
            "Copies against alignment", "steering",
            [
                "Each method, applied to what the guard flags. To the left no copies are left; to the top the pictures still "
                "show what was asked for."
            ],
            lambda: draw_steering(rows_), table=as_html(shares),
        )  # fmt: skip
        put("steering", readme_steering(rows_), readme)
    if development := load(results, "development"):
        table = pd.DataFrame(development["table"])
        section(
            "The guard end to end",
            "development",
            ["By kind and repetition count, through the real pipeline."],
            table=as_html(table),
            open=True,
        )
        put("development", readme_development(development["figures"]), readme)
    overhead = {path.stem.removeprefix("overhead-"): json.loads(path.read_text()) for path in sorted(results.glob("overhead-*.json"))}
    if overhead:
        rows_ = pd.concat([pd.DataFrame(result["rows"]).assign(shape=shape) for shape, result in overhead.items()])
        text = [
            "Against the unguarded call, interleaved: medians of the rounds' ratios. Clean: the free signals stop the sample. Gray: it "
            "buys the look-ahead. Flagged: it is steered as well."
        ]
        section("Overhead", "overhead SHAPE", text, table=as_html(rows_[["shape", *rows_.columns[:-1]]]), open=True)
        put("overhead", readme_overhead(overhead), readme)
    for name, table_of in audit.TABLES.items():
        if found := load(results / "audit", name):
            put(f"audit-{name}", table_of(found), readme)
    (out / "report.html").write_text(jinja2.Template(PAGE.read_text(), autoescape=True).render(about=about, sections=sections))
    typer.echo(f"{out / 'report.html'}")
