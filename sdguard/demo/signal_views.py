"""What was read of a run: charts of the free signals, and the table of all against ordinary prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdguard.decision.cascade import BY_NAME, Scale
from sdguard.decision.profile import SERIES, Profile
from sdguard.demo.charts import Line, chart, ticks
from sdguard.demo.elements import table
from sdguard.guarded.report import GuardReport

PLAIN = {"guidance_norm": "Guidance norm", "guidance_peak": "Guidance peak", "denoised_norm": "Norm of the denoised estimate"}


def plain(name: str) -> str:
    """A signal's name for people."""
    return PLAIN.get(name, name.replace("_", " ").capitalize())


def signal_chart(name: str, steps: int, courses: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """A free signal over the calls of runs ``(name, values, class)``.

    Ordinary prompts are not beside it: what they have at later calls hangs on guidance and steps, and a profile knows one setting's.
    """
    lines = [Line(run, [(float(i), v) for i, v in enumerate(values, start=1)], colour) for run, values, colour in courses]
    last = float(steps)
    caption = "Watched for free at every call; it decides nothing by itself."
    return chart(plain(name), lines, "denoiser call", "", caption, (1.0, last), [t for t in ticks(1, last, 6) if t >= 1])


def deciding(profile: Profile) -> list[str]:
    """The signals that the score is made of; what else the cascade reads is only reported."""
    return list(dict.fromkeys(name for stage in profile.cascade.stages for name in stage.fused))


def price(name: str) -> str:
    """What a signal costs, in words."""
    return str(BY_NAME[name].cost or "free")


def signals_table(report: GuardReport, profile: Profile) -> str:
    """Every signal that was read at the guard's own call of a prompt, against ordinary prompts."""
    rows, decide = [], deciding(profile)
    for name, found in report.signals.items():
        rows.append((plain(name), f"{found['value']:.3g}", f"{found['z']:+.1f}", price(name), "decides" if name in decide else "reported"))
    for name in SERIES:
        if name not in report.signals and name in profile.values:
            value = report.series[name][0]
            z = Scale.fit(profile.values[name]).z(torch.tensor(value)).item()
            rows.append((plain(name), f"{value:.3g}", f"{z:+.1f}", price(name), "watched"))
    unread = [name for name in profile.cascade.signals if name not in report.signals]
    rows += [(plain(name), "not bought", "–", price(name), f"{'decides' if name in decide else 'reported'} in doubt") for name in unread]
    return table(("signal", "value", "z-score", "cost", "role"), rows, "signals at the guard’s own call")
