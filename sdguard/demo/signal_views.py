"""What was read of a run, against ordinary prompts: charts of the free signals, the table of all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdguard.decision.cascade import BY_NAME
from sdguard.decision.profile import SERIES, Profile
from sdguard.demo.charts import Band, Line, chart, ticks
from sdguard.demo.elements import table
from sdguard.guarded.report import GuardReport

PLAIN = {"guidance_norm": "Guidance norm", "guidance_peak": "Guidance peak", "denoised_norm": "Norm of the denoised estimate"}


def plain(name: str) -> str:
    """A signal's name for people."""
    return PLAIN.get(name, name.replace("_", " ").capitalize())


def later_threshold(profile: Profile, rate: float) -> list[float]:
    """The guidance norm from which each later call that is watched flags an image."""
    threshold = profile.threshold(rate)
    bounds = [scale.median + threshold * scale.deviation for scale in profile.cascade.later]
    return [math.exp(bound) if scale.log else bound for bound, scale in zip(bounds, profile.cascade.later, strict=True)]


def signal_chart(
    name: str, profile: Profile, rate: float, steps: int, courses: Sequence[tuple[str, Sequence[float], Sequence[float], str]]
) -> str:
    """A free signal over the calls of runs ``(name, timesteps, values, class)`` against ordinary prompts, two deviations to either side."""
    known = sorted(profile.timesteps, reverse=True)
    at = [(call, *profile.at(name, timestep)) for call, timestep in enumerate(known, start=1)]
    band = Band("ordinary prompts, ±2 deviations", [(float(call), mean - 2 * std, mean + 2 * std) for call, mean, std in at])
    lines = []
    caption = "Watched for free at every call; it decides nothing by itself."
    if name == "guidance_norm":
        flags = [(float(call), value) for call, value in enumerate(later_threshold(profile, rate), start=2)]
        lines.append(Line("threshold at the later calls", flags, "sg-ink", dashed=True, dots=False))
        caption = (
            "How hard the text pulls. The first call is judged by the score; at the calls after it the norm alone can still flag an image."
        )
    lines += [Line(run, [(float(i), v) for i, v in enumerate(values, start=1)], colour) for run, _, values, colour in courses]
    last = float(max(steps, len(known)))
    return chart(plain(name), lines, "denoiser call", "", [band], caption, (1.0, last), [t for t in ticks(1, last, 6) if t >= 1])


def price(name: str) -> str:
    """What a signal costs, in words."""
    return str(BY_NAME[name].cost or "free")


def signals_table(report: GuardReport, profile: Profile) -> str:
    """Every signal that was read at the first call, against ordinary prompts."""
    rows = []
    for name, found in report.signals.items():
        rows.append((plain(name), f"{found['value']:.3g}", f"{found['z']:+.1f}", price(name), "decides"))
    for name in SERIES:
        if name not in report.signals and report.series.get(name):
            mean, std = profile.at(name, max(profile.timesteps))
            value = report.series[name][0]
            rows.append((plain(name), f"{value:.3g}", f"{(value - mean) / std:+.1f}", price(name), "watched"))
    unread = [name for name in profile.cascade.signals if name not in report.signals]
    rows += [(plain(name), "not bought", "–", price(name), "decides in doubt") for name in unread]
    return table(("signal", "value", "z-score", "evaluations", "role"), rows, "signals at the first call")
