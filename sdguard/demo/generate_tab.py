"""The tab on which a prompt is run without and with the guard."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from sdguard.decision.profile import SERIES
from sdguard.demo import charts, elements, signal_views
from sdguard.demo.clients import Left, client_of, heard
from sdguard.demo.comparison import Comparison, Course, compare
from sdguard.demo.model import Model
from sdguard.demo.page import QUICK, ROOM, WORK, Updates, example_chips, page_updates, run_buttons, sentence, setting_of, stops
from sdguard.demo.profiles import profile_known
from sdguard.demo.settings import MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS, Setting
from sdguard.demo.streaming import streamed
from sdguard.files.inputs import BadInput
from sdguard.guarded.run import MemorizationError
from sdguard.steering import METHODS
from sdguard.testbed.copies import RATIO

LESSON = (
    "Some prompts bring back a training picture whatever the noise: the guard sees it before the first denoising step and steers away, "
    "and a picture that is not flagged stays as it is, bit by bit."
)
EMPTY = "Press Generate: the picture without the guard and the one with it appear here, with a slider between them."
COMING = "A memorized and an ordinary prompt are being run, once since this server was started: what comes out appears here."
EMPTY_COURSE = "While it runs, every denoiser call shows up here: the denoised estimate, and what is watched for free."


def controls(model: Model) -> list[Any]:
    """Seed, images, steps, guidance, false-positive rate in per cent, mode, steering: in the order of `page.setting_of`."""
    with gr.Accordion("Settings", open=False):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        images = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images")
        steps = gr.Slider(2, MOST_STEPS, model.defaults["num_inference_steps"], step=1, label="Steps")
        guidance = gr.Slider(0, MOST_GUIDANCE, model.defaults["guidance_scale"], step=0.5, label="Guidance scale")
        rate = gr.Slider(0.2, 10, 1, step=0.1, label="False-positive rate, %", info="The share of ordinary prompts that may be flagged.")
        mode = gr.Radio(
            [("Steer it away", "steer"), ("Only report", "observe"), ("Withhold it", "block")],
            value="steer",
            label="What happens to a flagged image",
        )
        steering = gr.Dropdown(
            list(METHODS),
            label="Steering methods, in order",
            multiselect=True,
            info="Left empty: the order this model’s profile has learnt.",
        )
    return [seed, images, steps, guidance, rate, mode, steering]


def card(model: Model, found: Comparison, row: int) -> str:
    """One image: the slider, the verdict once there is one, the nearest training picture."""
    before, after = (course.images[row] if course.images else newest_estimate(course, row) for course in (found.unguarded, found.guarded))
    if before is None:
        return elements.hint("The first estimate is on its way.")
    parts = [elements.slider(before, after or before, f"{found.setting.prompt}, seed {found.setting.seed + row}")]
    parts_below = []
    if found.done:
        report = found.reports[row]
        parts_below.append(elements.verdict(report))
        plain, guarded = found.unguarded.evaluations[row], found.guarded.evaluations[row]
        parts_below.append(
            elements.facts(
                [
                    ("p-value", f"{report.p_value:.3g}" if report.p_value is not None else "–"),
                    ("denoiser evaluations", f"{plain} → {guarded}"),
                    ("cost", cost(plain, guarded)),
                    ("pictures", sameness(found, row)),
                    ("seed", str(found.setting.seed + row)),
                ]
            )
        )
    if found.nearest and model.targets is not None:
        target = Image.fromarray(model.targets.pictures[found.nearest[row]])
        parts_below.append(nearest_picture(target, model.captions[found.nearest[row]], found, row))
    elif found.done:
        parts_below.append(
            elements.hint("The nearest training picture is shown for the embedded model only: this one’s training data is not known.")
        )
    return f'<article class="sg-card"><div>{"".join(parts)}</div><div>{"".join(parts_below)}</div></article>'


def newest_estimate(course: Course, row: int) -> Image.Image | None:
    """The newest denoised estimate, of the first image only."""
    return course.estimates[max(course.estimates)] if course.estimates and row == 0 else None


def cost(plain: int, guarded: int) -> str:
    """What the guard took of a run of ``plain`` denoiser evaluations: as a share, since a run's seconds are the machine's."""
    more = guarded - plain
    return f"+{more} evaluation{'s' * (more != 1)}, {more / plain:.0%} of this run" if more else "none"


def sameness(found: Comparison, row: int) -> str:
    """Whether the two pictures are one, in words."""
    if found.reports[row].verdict == "withheld":
        return "one is withheld"
    return "identical, bit by bit" if found.identical(row) else "differ"


def nearest_picture(target: Image.Image, caption: str, found: Comparison, row: int) -> str:
    """The memorized picture that the unguarded image is nearest to, and whether either image is a copy of it."""
    words = [f"Unguarded: {ratio_words(found.ratios_before[row])}"]
    if found.done:
        withheld = found.reports[row].verdict == "withheld"
        words.append("Guarded: withheld" if withheld else f"Guarded: {ratio_words(found.ratios_after[row])}")
    lines = "".join(f"<li>{line}</li>" for line in words)
    shown = elements.picture(target, f"“{caption}”", 128, "sg-nearest")
    return f'<div class="sg-training"><h4>Nearest training picture</h4>{shown}<ul>{lines}</ul></div>'


def ratio_words(ratio: float) -> str:
    """The distance ratio of the copy criterion in words."""
    return f"{'a copy' if ratio < RATIO else 'no copy'} ({ratio:.2f} of the distance to the next one; under {RATIO:.2f} is a copy)"


def result(model: Model, found: Comparison) -> str:
    """The images of a comparison as far as they have come."""
    count = found.setting.images
    return (
        f'<div class="sg-cards sg-{"one" if count == 1 else "many"}">' + "".join(card(model, found, row) for row in range(count)) + "</div>"
    )


def course(found: Comparison) -> str:
    """How both runs went: their estimates, their signals, and where the decision fell."""
    setting, profile = found.setting, found.profile
    strips = "".join(
        elements.filmstrip(title, sorted(run.estimates.items()), run.images[0] if run.images else None)
        for title, run in (("Without the guard", found.unguarded), ("With the guard", found.guarded))
        if run.estimates
    )
    runs = [("without the guard", found.unguarded, charts.UNGUARDED), ("with the guard", found.guarded, charts.GUARDED)]
    drawn = [
        signal_views.signal_chart(
            name, setting.steps, [(text, run.series[name][0], colour) for text, run, colour in runs if name in run.series]
        )
        for name in SERIES
        if name in found.unguarded.series
    ]
    marks = [
        (f"seed {setting.seed + row}", report.score, charts.GUARDED) for row, report in enumerate(found.reports) if report.score is not None
    ]
    marks = [("this prompt", value, colour) for _, value, colour in marks[:1]] + [("", value, colour) for _, value, colour in marks[1:]]
    title = f"The score against {profile.prompts:,} ordinary prompts"
    caption = f"From the threshold on an image is flagged: at most {setting.rate:.1%} of ordinary prompts are."
    drawn.insert(0, charts.histogram(title, profile.scores, profile.threshold(setting.rate), marks, caption))
    return f'<div class="sg-strips">{strips}</div><div class="sg-charts">{"".join(drawn)}</div>'


def opened(model: Model, found: Sequence[Comparison]) -> str:
    """What the page opens on: a memorized prompt's comparison beside an ordinary one's."""
    titles = ("A memorized prompt", "An ordinary prompt")
    cards = "".join(
        f"<section><h3>{title}</h3><p>{escape(each.setting.prompt)}</p>{card(model, each, 0)}</section>"
        for title, each in zip(titles, found, strict=True)
    )
    return f'<div class="sg-opening">{cards}</div>'


def line_of(found: Comparison) -> str:
    """How far a comparison has come, in words."""
    calls = found.setting.steps
    if found.done:
        plain, guarded = sum(found.unguarded.evaluations), sum(found.guarded.evaluations)
        return elements.status(f"Done. Cost of the guard: {cost(plain, guarded)}.", "done")
    name, run, base = ("With", found.guarded, 0.5) if found.unguarded.images else ("Without", found.unguarded, 0.0)
    done = min(len(run.timesteps), calls)
    return elements.status(f"{name} the guard: denoiser call {done} of {calls}", "busy", base + 0.5 * done / calls)


def tab(
    model: Model, box: gr.Textbox, own_profile: Any, why_box: gr.Textbox, load: Any, opening: Future[list[Comparison]] | None
) -> list[Any]:
    """Lay the tab out; returns its `controls`, whose setting the other tabs share.

    ``load`` is the event of a page that is opened, on which it shows ``opening``, or once that is there, unless something was run by then.
    """
    begun = gr.State(False)
    gr.HTML(elements.lesson(LESSON))
    with gr.Row(elem_classes="sg-columns"):
        with gr.Column(elem_classes="sg-ask"):
            box.render()
            start, stop = run_buttons("Generate", "generate")
        with gr.Column(elem_classes="sg-answer"):
            line = gr.HTML(elements.status("Choose an example or write a prompt, then press Generate."), elem_id="generate-status")
            front = gr.HTML(elements.hint(COMING), elem_id="generate-opening", visible=opening is not None)
            shown = gr.HTML("" if opening else elements.hint(EMPTY), elem_id="generate-result")
        with gr.Column(elem_classes="sg-more"):
            example_chips(model.examples, box)
            setting = controls(model)
    with gr.Column(elem_classes="sg-section"):
        gr.HTML("<h3>While it ran</h3>")
        ran = gr.HTML(elements.hint(EMPTY_COURSE), elem_id="generate-course")

    def run(request: gr.Request, own: Any, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, *values)

        def view(found: Comparison) -> Updates:
            away = gr.HTML(visible=False)
            updates: Updates = {begun: True, line: line_of(found), front: away, shown: result(model, found), ran: course(found)}
            return {**updates, why_box: found.setting.prompt} if found.done else updates

        yield from page_updates(request, model, lambda emit: compare(model, asked, own, emit), view, line, own_profile, (start, stop))

    changed = [line, front, shown, ran, own_profile, why_box, begun, start, stop]
    gr.on([start.click, box.submit], run, [own_profile, box, *setting], changed, **WORK)
    stops(stop)
    if opening is not None:
        show_opening(model, opening, load, begun, front, ran)
    return setting


def show_opening(model: Model, opening: Future[list[Comparison]], load: Any, begun: gr.State, front: gr.HTML, ran: gr.HTML) -> None:
    """Let a page that is opened show ``opening`` at once, or as soon as it is there; not where a run has ``begun``."""
    clock = gr.Timer(1.0)

    @functools.cache
    def drawn() -> Updates:
        if opening.exception() is not None:
            return {front: elements.hint(EMPTY)}
        found = opening.result()
        return {front: opened(model, found), ran: course(found[0])}

    def look(begun: bool) -> Updates:
        if begun:
            return {clock: gr.Timer(active=False), front: gr.HTML(visible=False)}
        return {clock: gr.Timer(active=False), **drawn()} if opening.done() else {clock: gr.skip()}

    gr.on([load, clock.tick], look, begun, [clock, front, ran], queue=False, **QUICK)


def png(image: Image.Image) -> str:
    """An image as a PNG in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def endpoint(model: Model) -> None:
    """The API: ``/generate``, with the limits of the page; a run ends when its client leaves."""

    def generate(
        request: gr.Request,
        prompt: str,
        seed: int = 0,
        images: int = 1,
        steps: int = model.defaults["num_inference_steps"],
        guidance: float = model.defaults["guidance_scale"],
        false_positive_rate: float = 0.01,
        mode: str = "steer",
        steering: list[str] | None = None,
    ) -> dict[str, Any]:
        """Run a prompt without and with the guard: ``reports``, and the pictures ``unguarded`` and ``guarded`` as PNG in base64."""
        asked = Setting(prompt, seed, images, steps, guidance, false_positive_rate, mode, () if steering is None else steering)
        found: Comparison | None = None
        try:
            asked = asked.checked(model)
            if profile_known(model, None) is None:
                raise BadInput("No profile is known for this model: run 'sdguard calibrate' for it first.")
            work = model.turns.taken(client_of(request), lambda emit: compare(model, asked, None, emit))
            for event in heard(request, streamed(work)):
                found = event or found
        except (ValueError, TypeError, MemorizationError, Left) as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        assert found is not None
        return {
            "reports": [vars(report) for report in found.reports],
            "unguarded": [png(image) for image in found.unguarded.images],
            "guarded": [png(image) for image in found.guarded.images],
            "milliseconds": [1000 * found.unguarded.seconds, 1000 * found.guarded.seconds],
        }

    gr.api(generate, api_name="generate", **ROOM)
