"""One page and the documentation's tables from the results that lie in ``benchmarks/results``; nothing is measured here.

``python -m benchmarks report`` writes ``report.html``, which holds its figures and needs no other file, and each figure as a PNG. What the
page says stands in ``report.html.j2``.
"""

from __future__ import annotations

import base64
import inspect
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from benchmarks import audit
from benchmarks.cures import EMBEDDINGS, NEVER_SEEN
from benchmarks.cures import GUARD as FROM_TEXT
from benchmarks.detection import CAPTION, GUARD, RATE, RESULTS, values_of
from benchmarks.documents import ROOT, markdown, put
from benchmarks.leave_one_out import NAME as LEAVE_ONE_OUT
from benchmarks.leave_one_out import SHIPPED
from benchmarks.models import ZOO
from benchmarks.overhead import unusual
from benchmarks.published import Released, over_run, released
from benchmarks.statistics import roc_band
from sdguard.files.atomic import write_text
from sdguard.signals import SIGNALS, Signal

UNSEEN, ORDINARY = "never-seen caption of the same make", "ordinary caption"
#: detectors that the ROC figure and the documentation show; the page's tables have all.
SHOWN = (GUARD, "guidance_norm", "output_density_ahead", "lid_contrast", "sharpness", "low_noise_alignment", "attention_entropy", CAPTION)
COLOURS = {"verbatim": "#c0392b", "template": "#e08e0b", UNSEEN: "#2563a8", ORDINARY: "#5b8c5a"}
NAMES = {
    GUARD: "**the guard's decision**",
    CAPTION: "the caption alone (character 3-grams)",
    "lid_contrast": "dimension (LID), unconditional minus conditional",
    "lid_conditional": "dimension (LID), conditional",
    "lid_unconditional": "dimension (LID), unconditional",
    "lid_guided": "dimension (LID), guided",
    "lid_noisy": "dimension (LID), at the noise itself",
    "output_density_ahead": "output density along the short rollout",
    "wen_released": "guidance norm, as released",
    "ssim_released": "SSIM over seeds, as released",
    "flipd_finished_released": "FLIPD of the finished sample, as released",
    "flipd_running_released": "FLIPD of the running latents, as released",
    "attention_entropy_run_released": "attention entropy over the run, as released",
}

PAGE = Path(__file__).with_suffix(".html.j2")


def plain(name: str) -> str:
    """A detector's name for people."""
    return NAMES.get(name, name.replace("_released", ", as released").replace("_", " "))


def samples_of(samples: pd.DataFrame, group: str) -> pd.Series:
    """Which samples a group holds: copies of a kind, or samples of a source of negatives that are none."""
    return (
        samples.positive & (samples.kind == group) if group in ("verbatim", "template") else ~samples.positive & (samples.source == group)
    )


def draw_roc(samples: pd.DataFrame) -> Figure:
    """True against false positives with bootstrap bands, samples at the first call."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
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
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
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
    """Copy rate, and the guard's score, over how often each pass of training showed a caption."""
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
    shown = sorted(samples[samples.kind.isin(("verbatim", "template"))].repetitions.unique())
    score.axhline(threshold, color="grey", ls=":", label="threshold at 1%")
    for axis, label in ((rate, "copies among 16 seeds, %"), (score, "score (median, 10 to 90%)")):
        axis.set(xscale="log", xlabel="repetitions in a pass of training", ylabel=label)
        axis.set_xticks(shown, [f"{count:.0f}" for count in shown], minor=False, rotation=60, fontsize=8)
        axis.minorticks_off()
        axis.legend(fontsize=8)
    return figure


def neighbours(points: np.ndarray, reach: float) -> list[list[int]]:
    """The points ``[n, 2]`` in groups, each point with the first earlier group that has its first point within ``reach`` of it."""
    groups: list[list[int]] = []
    for i, point in enumerate(points):
        near = [group for group in groups if np.linalg.norm(points[group[0]] - point) <= reach]
        if near:
            near[0].append(i)
        else:
            groups.append([i])
    return groups


def label(axis: Axes, points: np.ndarray, names: Sequence[str]) -> None:
    """Write each point's name beside it, towards the middle, or else at the nearest place where no name stands, tied to it by a line.

    Points that all but coincide share theirs. The axis has its limits.
    """
    places = axis.transData.transform(points)
    middle = axis.transData.transform((0.75 * axis.get_xlim()[1], 0))[0]
    written: list[Annotation] = []
    for group in neighbours(places, reach=12):
        edge, point = places[group[0]][0] > middle, points[group].mean(axis=0)
        for rise, left in itertools.product(sorted(range(-200, 201, 10), key=abs), (edge, not edge)):
            text = axis.annotate(
                "\n".join(names[i] for i in group),
                point,
                (-8 if left else 8, rise),
                textcoords="offset points",
                fontsize=7,
                ha="right" if left else "left",
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5} if rise else None,
            )
            text.get_window_extent()  # puts it in its place
            box, inside = Text.get_window_extent(text).expanded(1.02, 1.3), axis.get_window_extent()  # without its line
            free = not any(box.overlaps(Text.get_window_extent(other)) for other in written)
            if free and inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                written.append(text)
                break
            text.remove()


def draw_cost(rows: pd.DataFrame) -> Figure:
    """Accuracy against cost of every detector, samples at the first call."""
    figure, axis = plt.subplots(figsize=(9, 5))
    here = rows[(rows.level == "sample") & (rows.steps == "first") & (rows.negatives == UNSEEN)]
    for kind, marker in (("verbatim", "o"), ("template", "s")):
        part = here[here.kind == kind]
        axis.scatter(part.evaluations, part.auc, color=COLOURS[kind], marker=marker, label=f"{kind} copies", alpha=0.8)
    axis.axhline(0.5, color="grey", ls=":", lw=0.8)
    axis.set(xlabel="extra denoiser evaluations an image", ylabel="area under the ROC curve", xlim=(-0.7, None), ylim=(-0.05, 1.05))
    named = here[(here.kind == "verbatim") & (here.auc < 0.98)]
    figure.tight_layout()
    label(axis, named[["evaluations", "auc"]].to_numpy(), [plain(name).strip("*") for name in named.detector])
    axis.legend(fontsize=8)
    return figure


def draw_steering(rows: pd.DataFrame) -> Figure:
    """Copies that are left against alignment of what was steered, gated methods; methods at one place share a label."""
    figure, axis = plt.subplots(figsize=(9, 5.4))
    here = rows[rows.gated]
    left = here[["copies_left_verbatim", "copies_left_template"]].map(lambda rate: rate["share"]).mean(axis=1)
    points = 100 * np.stack([left, here.alignment.map(lambda rate: rate["share"])], axis=1)
    colours = ["#c0392b" if name == "ladder" else "#2563a8" for name in here.method]
    axis.scatter(*points[::-1].T, color=colours[::-1])  # the first, which is the fallback sequence, on top
    axis.axhline(100 * here.alignment_expected.iloc[0], color="grey", ls=":", label="never-seen captions of the same objects")
    axis.set(xlabel="copies left, % (mean of verbatim and template)", ylabel="pictures that show their object, %", xlim=(-5, 105))
    axis.set_ylim(None, 1.06 * points[:, 1].max())
    figure.tight_layout()
    label(axis, points, here.method.tolist())
    axis.legend(fontsize=8, loc="lower right")
    return figure


def as_html(table: pd.DataFrame) -> str:
    """A table for the page."""
    return table.to_html(index=False, border=0, na_rep="", float_format=lambda value: f"{value:.3g}")


def opened(title: str, table: pd.DataFrame) -> dict[str, Any]:
    """A table that the page shows without being asked."""
    return {"title": title, "html": as_html(table), "open": True}


def share(value: float) -> str:
    """A share as people read it: in percent, with a digit more where it is near to none or all."""
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def with_interval(cell: dict[str, float]) -> str:
    """A measured share and its interval."""
    return f"{share(cell['share'])} [{share(cell['low'])}, {share(cell['high'])}]"


def shown(name: str, value: Any) -> str:
    """A figure of a result file as people read it: counts whole, shares in percent, intervals of shares as such."""
    if isinstance(value, list):
        return " to ".join(share(end) for end in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if name.startswith("mean") else share(value)


def said_of(detector: Signal) -> str:
    """What a detector reads: the first sentence of its own description, or that of its file where the file describes it alone."""
    home = inspect.getmodule(detector.read)
    alone = sum(inspect.getmodule(signal.read) is home for signal in SIGNALS) == 1
    described = inspect.getdoc(home if alone else detector.read) or ""
    sentence = re.split(r"\.\s|\n\n", described.partition(": ")[2] if alone else described, maxsplit=1)[0]
    return re.sub(r", ``\[B\]``|`", "", " ".join(sentence.split())).rstrip(".")


def table_of_detectors(names: Sequence[str]) -> dict[str, Any]:
    """What each measured detector reads; of a released one, where it is from, what it is beside and what it does otherwise."""
    known: dict[str, Signal] = {d.name: d for d in (*SIGNALS, *released("epsilon"), *over_run(50, torch.zeros(0)))}
    rows = [
        {
            "detector": plain(GUARD).strip("*"),
            "reads": "the free signals that its profile names, and in doubt the agreement of two short rollouts",
        },
        {"detector": plain(CAPTION), "reads": "the caption's letters, by naive Bayes in five folds"},
    ]
    for name in sorted(set(names) & set(known), key=list(known).index):
        detector = known[name]
        row = {"detector": plain(name), "reads": said_of(detector)}
        if isinstance(detector, Released):
            row |= {"corrected form": plain(detector.corrected), "what the released code does otherwise": detector.difference}
        rows.append(row)
    return {"title": "What each detector reads", "html": as_html(pd.DataFrame(rows).fillna("")), "prose": True}


#: what sets one comparison of detectors apart from another, and the order in which their entries are shown.
COMPARED = {
    "level": ("sample", "prompt"),
    "seeds": (),
    "steps": ("first", "first five", "all"),
    "negatives": (UNSEEN, ORDINARY),
}
CALLS = {"first": "at the first call", "first five": "over the first five calls", "all": "over the whole run"}


def tables_of_detection(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A table a comparison, best detector first, verbatim and template copies side by side."""
    ranks = {name: {value: i for i, value in enumerate(values)} for name, values in COMPARED.items() if values}
    rows = rows.sort_values(list(COMPARED), key=lambda column: column.map(ranks.get(str(column.name), lambda value: value)))
    tables: list[dict[str, Any]] = []
    for (level, seeds, steps, negatives), here in rows.groupby(list(COMPARED), sort=False):
        kinds = sorted(here.kind.unique(), reverse=True)  # verbatim first
        table = pd.DataFrame(index=here[here.kind == kinds[0]].sort_values("auc", ascending=False, kind="stable").detector)
        for kind in kinds:
            part = here[here.kind == kind].set_index("detector").reindex(table.index)
            table[f"AUC, {kind}"] = [f"{r.auc:.3f} [{r.auc_low:.3f}, {r.auc_high:.3f}]" for r in part.itertuples()]
            table[f"TPR at 1%, {kind}"] = [f"{share(r.tpr)} [{share(r.tpr_low)}, {share(r.tpr_high)}]" for r in part.itertuples()]
            table[f"of, {kind}"] = [f"{r.positives:.0f} / {r.of:.0f}" for r in part.itertuples()]
            if kind == kinds[0]:
                spent, time = part.evaluations, part.milliseconds
        table["extra evaluations"], table["ms"] = spent.map("{:.3g}".format), ["" if pd.isna(t) else f"{t:.2g}" for t in time]
        table = table.rename(index=lambda name: plain(name).strip("*")).rename_axis("detector").reset_index()
        unit = "Samples" if level == "sample" else "Prompts, one seed" if seeds == 1 else f"Prompts, mean of {seeds} seeds"
        title = f"{unit}, {CALLS[str(steps)]}; negatives: {negatives}"
        tables.append({"title": title, "html": as_html(table), "open": not tables})
    return tables


def brief_detection(rows: pd.DataFrame) -> str:
    """The documentation's table: samples at the first call against never-seen captions of the same make."""
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


def tables_of_steering(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of the methods where the guard flags, and one of the methods always on."""
    names = {"alignment_comparable": "comparable", "alignment_expected": "expected", "alignment_ordinary": "ordinary: alignment"}
    read = rows.map(lambda cell: with_interval(cell) if isinstance(cell, dict) else cell).rename(columns=names)
    read["expected"] = rows.alignment_expected.map(share)
    read.columns = read.columns.str.replace("copies_left_", "copies left, ").str.replace("ordinary_", "ordinary: ").str.replace("_", " ")
    titles = {True: "Applied to what the guard flags", False: "Always on"}
    return [
        {"title": titles[gated], "html": as_html(read[rows.gated == gated].drop(columns="gated")), "open": gated}
        for gated in titles
        if (rows.gated == gated).any()
    ]


def brief_steering(rows: pd.DataFrame) -> str:
    """The documentation's table: every method, gated."""
    lines = []
    for row in rows[rows.gated].itertuples():
        copies = f"{row.copies_left_verbatim['share']:.1%} / {row.copies_left_template['share']:.1%}"
        name = f"**{row.method}**" if row.method == "ladder" else row.method
        kernel = f"{row.kernel_distance:.0f}"
        lines.append([name, copies, f"{row.alignment['share']:.0%}", kernel, f"{row.diversity:.2f}", f"{row.evaluations:.0f}"])
    return markdown(
        ["method, gated", "copies left, verbatim / template", "alignment", "kernel distance", "diversity", "evaluations"], lines
    )


def brief_cures(found: dict[str, Any]) -> str:
    """A row a run, and for each model: memorized pictures shown and withheld, of all; the subject shown, of the others; evaluations.

    Methods that cure no sample of any model are marked as there for comparison only.
    """
    models = list(found["about"]["models"])

    def cell(summary: dict[str, Any] | None) -> str:
        if not summary:
            return "- | - | -"
        memorized, withheld, aligned, among = (summary[name]["share"] for name in ("memorized", "withheld", "aligned", "in three"))
        asked = "-" if math.isnan(aligned) else f"{share(aligned)}, {share(among)}"
        return f"{share(memorized)}, {share(withheld)} | {asked} | {summary['evaluations']:.0f}"

    def name(row: dict[str, Any]) -> str:
        cures = [row[model]["cured"]["share"] for model in models if model in row]
        return row["run"] if any(cures) or row["run"] == "unguarded" else f"{row['run']} (comparison only)"

    header = ["", *(part for model in models for part in (f"{model}: memorized, withheld", "subject at first, in three", "evaluations"))]
    return markdown(header, [[name(row), *(cell(row.get(model)) for model in models)] for row in found["rows"]])


def brief_guard(found: dict[str, Any]) -> str:
    """A row a model, of the guard from text and from embeddings: what it leaves, what of that it calls steered, what it withholds."""
    rows = {row["run"]: row for row in found["rows"]}
    guards = (rows[FROM_TEXT], rows[EMBEDDINGS])
    lines = []
    for model in found["about"]["models"]:
        both, never = [row[model] for row in guards], rows[NEVER_SEEN].get(model)

        def shares(name: str, both: Sequence[dict[str, Any]] = both) -> str:
            return " / ".join("-" if math.isnan(each[name]["share"]) else share(each[name]["share"]) for each in both)

        asked = f"{share(never['aligned, all']['share'])}, {share(never['in three, all']['share'])}" if never else "-"
        lines.append(
            [
                model,
                str(found["about"]["models"][model]["memorized"]),
                shares("acted on"),
                shares("copies"),
                shares("memorized"),
                " / ".join(str(each["called steered"]) for each in both),
                shares("withheld"),
                f"{shares('aligned')} ({shares('in three')})",
                asked,
                " / ".join(f"{each['evaluations']:.0f}" for each in both),
                shares("ordinary flagged"),
            ]
        )
    header = ["text / embeddings alone", "memorized samples", "flagged", "copies left", "memorized left", "of them called steered"]
    header += ["withheld", "subject at first (in three)", "never seen: subject at first, in three", "evaluations", "ordinary flagged"]
    return markdown(header, lines)


def brief_results(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """A row a model of the zoo, which neither the decision nor the steering was chosen on: what is flagged, and what the guard leaves."""
    runs, models = {row["run"]: row for row in found["rows"]}, zoo()
    lines = []
    for row in rows:
        name = row["left out"]
        if row["rule"] != SHIPPED or name not in models:
            continue
        own, by_shipped = (row[f"{prompts}, checked"]["flagged"] for prompts in ("own", "shipped"))
        asked = row["told apart"]["ordinary"]["of"]
        flagged = [share(own[what][0]) if own[what][0] >= 0 else "-" for what in ("copies", "never seen, cleaned")]
        flagged += [f"{found['ordinary'][0] * asked:.0f} of {asked}" for found in (own, by_shipped)]
        left = ["-"] * 3
        if guarded := runs[FROM_TEXT].get(name):
            memorized, withheld, kept = (guarded[what] for what in ("memorized", "withheld", "aligned"))
            shown = [f"{each['share'] * each['of']:.0f} of {each['of']}" for each in (memorized, withheld)]
            left = [*shown, f"{kept['share']:.0%} ({runs[NEVER_SEEN][name]['aligned']['share']:.0%})"]
        lines.append([name, *flagged, *left])
    header = [
        "",
        "copies flagged",
        "never-shown captions of the same make flagged",
        "ordinary captions flagged",
        "the same, by sdguard's prompts",
    ]
    header += ["memorized pictures left", "withheld", "subject kept (drawn unguarded, never-shown captions)"]
    return markdown(header, lines)


def brief_cost(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """What the README says of the cost of a picture, from the models of `brief_results`."""
    guarded = next(row for row in found["rows"] if row["run"] == FROM_TEXT)
    models = zoo()
    own = [row["own, checked"] for row in rows if row["rule"] == SHIPPED and row["left out"] in models]
    free = [each["free"] for each in own]
    others = max(each["evaluations"] / (1 - each["free"]) for each in own)
    flagged = [guarded[name]["evaluations"] for name in models if name in guarded]
    return (
        f"After that {min(free):.0%} to {max(free):.0%} of ordinary prompts, on the models below, cost no extra evaluation of the denoiser "
        f"(a guided step is two), the others {others:.0f}, a flagged one {min(flagged):.0f} to {max(flagged):.0f} on average; a negative "
        f"prompt adds one, another size or few steps two."
    )


def zoo() -> list[str]:
    """The models that neither the decision nor the steering was chosen on."""
    return [path.parent.name for path in ZOO.glob("*/model_index.json")]


def shape_named(about: dict[str, Any]) -> str:
    """A shape whose overhead was measured, with its size and what is not usual of the run."""
    where = [] if about["device"] == "cpu" else [about["device"]]
    return ", ".join([about["shape"], f"{about['height']} px", *unusual(about), *where])


def brief_overhead(found: dict[str, dict[str, Any]]) -> str:
    """The documentation's table: every shape and path, with an interval where the pairs are enough for one of 95%."""
    lines = [
        [
            shape_named(result["about"]),
            row["path"],
            f"{row['ratio']:.3f}" + (f" ({row['low']:.3f} to {row['high']:.3f})" if row.get("low") else ""),
            f"{row['memory ratio']:.3f}",
            str(row["extra evaluations"]),
        ]
        for result in found.values()
        for row in result["rows"]
        if row["path"] != "unguarded"
    ]
    return markdown(["shape", "path", "wall time", "peak memory", "extra evaluations"], lines)


def brief_development(figures: dict[str, float]) -> str:
    """The documentation's table of the guard on the development split."""
    shares = ("highest", "flagged that", "ordinary samples", "never-seen", "still", "withheld", "reworded", "names")
    lines = [[name, f"{v:.1%}" if any(part in name for part in shares) else f"{v:.3g}"] for name, v in figures.items() if name != "seeds"]
    return markdown(["", "measured"], lines)


def brief_load(found: dict[str, Any]) -> str:
    """The documentation's table of the demo's server under load."""
    median, most = found["seconds a request, median and 95%"]
    lines = [
        [f"requests of {found['clients']} clients at once, {found['steps']} steps each", f"{found['requests']:,}"],
        ["answers that were another request's", f"{found['answers of another request']}"],
        ["seconds a request, alone", f"{found['seconds a request, alone']:.2f}"],
        ["seconds a request under load, median and 95%", f"{median:.1f}, {most:.1f}"],
        ["requests a second under load", f"{found['requests a second']:.2f}"],
        ["mean seconds of the slowest client over the fastest's", f"{found['slowest client over fastest, mean seconds']:.2f}"],
        [
            "resident MB before, and after each tenth",
            ", ".join(f"{value:,}" for value in found["resident MB, before and after each tenth"]),
        ],
    ]
    return markdown(["", "measured"], lines)


def load(results: Path, name: str) -> dict[str, Any] | None:
    """A result file, if it is there."""
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def main(
    results: Annotated[Path, typer.Option(help="Where the results lie.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Where the page and its figures go.")] = RESULTS / "report",
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ lie, whose tables are written.")] = ROOT,
) -> None:
    """Draw the page and the documentation's tables from the results."""
    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {}
    pictures: dict[str, str] = {}
    tables: dict[str, list[dict[str, Any]]] = {}

    def draw(name: str, figure: Figure) -> None:
        path = out / f"{name}.png"
        if figure.get_layout_engine() is None:
            figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)
        # a palette is a third of the size; chosen for the rarest colours, it is off by no more than an eye can see
        Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        pictures[name] = base64.b64encode(path.read_bytes()).decode()

    if detection := load(results, "detection"):
        samples, rows = pd.read_parquet(results / "detection.parquet"), pd.DataFrame(detection["rows"])
        about = detection["about"]
        draw("roc", draw_roc(samples))
        draw("cost-against-accuracy", draw_cost(rows))
        draw("dose-and-response", draw_dose(samples))
        draw("score-against-time", draw_series(samples))
        first, *others = tables_of_detection(rows)
        tables["detectors"], tables["comparisons"] = [first, table_of_detectors(rows.detector)], others
        figures = pd.DataFrame([{"": name, "measured": shown(name, value)} for name, value in detection["figures"].items()])
        tables["decision"] = [opened("Figures", figures)]
        put("detection", brief_detection(rows), root)
    if steering := load(results, "steering-test"):
        methods = pd.DataFrame(steering["rows"])
        draw("copies-against-alignment", draw_steering(methods))
        tables["steering"] = tables_of_steering(methods)
        put("steering", brief_steering(methods), root)
    if development := load(results, "development"):
        names = {"copies_flagged": "copies flagged", "copies_left": "copies left", "evaluations": "extra evaluations"}
        tables["development"] = [opened("By kind and repetition count", pd.DataFrame(development["table"]).rename(columns=names))]
        put("development", brief_development(development["figures"]), root)
    if cures := load(results, "cures"):
        put("cures", brief_cures(cures), root)
        put("cures-guard", brief_guard(cures), root)
        if chosen := load(results, LEAVE_ONE_OUT):
            put("results", brief_results(chosen["rows"], cures), root)
            put("cost", brief_cost(chosen["rows"], cures), root)
    overhead = {path.stem.removeprefix("overhead-"): json.loads(path.read_text()) for path in sorted(results.glob("overhead-*.json"))}
    if overhead:
        paths = pd.concat([pd.DataFrame(result["rows"]).assign(shape=shape) for shape, result in overhead.items()])
        tables["overhead"] = [opened("By shape and path", paths[["shape", *paths.columns[:-1]]])]
        put("overhead", brief_overhead(overhead), root)
    if loaded := load(results, "load"):
        put("load", brief_load(loaded), root)
    for name, table_of in audit.TABLES.items():
        if found := load(results / "audit", name):
            put(f"audit-{name}", table_of(found), root)
    page = jinja2.Template(PAGE.read_text(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(out / "report.html", page.render(about=about, pictures=pictures, tables=tables))
    typer.echo(f"{out / 'report.html'}")
