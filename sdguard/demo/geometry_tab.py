"""The tab that shows the learned density itself, for a memorized and an ordinary prompt side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from sdguard.demo import charts, elements, geometry_charts
from sdguard.demo.charts import MEMORIZED, ORDINARY, Line, chart
from sdguard.demo.landscape import FINE_ITERATIONS, ITERATIONS, REACH, SIDE, Landscape, landscape
from sdguard.demo.model import Model
from sdguard.demo.page import WORK, Updates, page_updates, prompt_box, run_buttons, setting_of, stops
from sdguard.demo.settings import MOST_STEPS, whole

LESSON = (
    "Where a prompt is memorized the density that the model has learnt is one narrow spike with the picture on it; from an ordinary "
    "picture it goes on to others as likely."
)
EMPTY = (
    "Press Measure: the spectrum of the Hessian, how many directions each prompt leaves free, its output density, "
    "and the density around the finished sample."
)


def drawn(found: Landscape) -> str:
    """All figures of a landscape of two prompts."""
    names, colours = ("first prompt", "second prompt"), (MEMORIZED, ORDINARY)
    calls = [float(i) for i in range(1, len(found.timesteps) + 1)]
    at = (found.step + 1.0, "chosen")

    def lines(at: list[float], values: list[list[float]]) -> list[Line]:
        return [Line(name, list(zip(at, row, strict=True)), colour) for name, row, colour in zip(names, values, colours, strict=True)]

    def over_calls(title: str, values: list[list[float]], label: str, caption: str) -> str:
        ticks = [tick for tick in charts.ticks(1, calls[-1], 6) if tick >= 1]
        return chart(title, lines(calls, values), "denoiser call", label, caption=caption, x_ticks=ticks, upright=at)

    def over_levels(title: str, values: list[list[float]], label: str, caption: str) -> str:
        shown = lines(found.levels, values)
        return chart(title, shown, "noise level (timestep)", label, caption=caption, x_range=(0.0, max(found.levels)))

    d = found.dimensions
    parts = [
        geometry_charts.spectrum_chart(found.nodes, found.weights, names, colours),
        over_calls(
            "Free directions",
            found.free,
            f"of {d:,}",
            f"d + s² tr H at the run’s own points: how many of the {d:,} directions of the latent the text leaves free. Two probes.",
        ),
        over_levels(
            "Local intrinsic dimension",
            found.lid,
            "FLIPD",
            "Of the finished sample under its prompt, by noise level, two probes. A network biases the absolute value, which may be "
            "negative; the contrast is what counts.",
        ),
        over_calls(
            "Output density",
            found.density,
            "nats",
            "Minus the log volume element of the denoised estimate at the run’s own points: how much of noise space is squeezed into "
            f"one picture. Two probes, {ITERATIONS} Lanczos steps.",
        ),
    ]
    most = float(np.exp(min(cut.heights.max() for cut in found.slices)))
    surfaces = "".join(
        geometry_charts.surface(cut, f"The density around the {name}’s sample", colour, most)
        for cut, name, colour in zip(found.slices, ("first prompt", "second prompt"), colours, strict=True)
    )
    note = (
        f"A plane through each finished sample (the dot) at the noise of call {found.step + 1} (timestep {found.chosen:.0f}), along the "
        f"flattest and the sharpest direction that {FINE_ITERATIONS} Lanczos steps find, {REACH:g} standard deviations of the noise to "
        "each side. Height is the density of pictures under the prompt, over that of the sample itself: log p by least squares from the "
        f"network’s score on {SIDE} × {SIDE} points. Both scales are the same and begin at 0; the higher surface is cut off at the top of "
        "the lower. A memorized sample lies on a narrow spike, with nothing around it; from an ordinary one the density goes on to other "
        "pictures, which are as likely or likelier."
    )
    return (
        f'<div class="sg-charts sg-two">{"".join(parts)}</div><h3>The density around the sample</h3>'
        f'<div class="sg-charts sg-two">{surfaces}</div><p class="sg-note">{note}</p>'
    )


def tab(model: Model, prompts: tuple[str, str], own_profile: Any, controls: list[Any]) -> None:
    """Lay the tab out; ``prompts`` are a memorized and an ordinary one to begin with."""
    gr.HTML(elements.lesson(LESSON))
    steps = model.defaults["num_inference_steps"]
    with gr.Row(elem_classes="sg-columns sg-wide"):
        with gr.Column(elem_classes="sg-ask"):
            with gr.Row():
                memorized = prompt_box("geometry-first", "First prompt, memorized", prompts[0], None)
                ordinary = prompt_box("geometry-second", "Second prompt, ordinary", prompts[1], None)
            start, stop = run_buttons("Measure", "geometry")
        with gr.Column(elem_classes="sg-answer"):
            line = gr.HTML(
                elements.status("Both prompts start from the same noise. Seed, steps and guidance are those of the Generate tab."),
                elem_id="geometry-status",
            )
            shown = gr.HTML(elements.hint(EMPTY), elem_id="geometry-result")
        with gr.Column(elem_classes="sg-more"):
            step = gr.Slider(
                1,
                MOST_STEPS if steps > 50 else steps,
                round(0.7 * steps),
                step=1,
                label="Denoiser call",
                info="For the spectrum and the density.",
                elem_id="geometry-call",
            )

    def run(request: gr.Request, first: str, second: str, call: float, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, first, *values)

        def view(found: Landscape) -> Updates:
            return {line: elements.status("Done.", "done"), shown: drawn(found)}

        work = lambda emit: landscape(model, [first, second], asked, whole("The denoiser call", call, 1, MOST_STEPS) - 1, emit)  # noqa: E731
        yield from page_updates(request, model, work, view, line, own_profile, (start, stop))

    gr.on(
        [start.click, memorized.submit, ordinary.submit],
        run,
        [memorized, ordinary, step, *controls],
        [line, shown, start, stop],
        **WORK,
    )
    stops(stop)
