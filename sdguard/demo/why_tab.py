"""The tab that explains a prompt: which words pull, where in the picture, which signals said so; and what an edit changes."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from sdguard.demo import elements, signal_views
from sdguard.demo.model import Model
from sdguard.demo.page import WORK, Updates, page_updates, prompt_box, run_buttons, setting_of, stops
from sdguard.demo.why_run import Why, judge_edit, why
from sdguard.explain.explanation import Explanation, heat
from sdguard.guarded.report import GuardReport
from sdguard.words import bare

LESSON = (
    "A memorized prompt pulls harder than ordinary ones do: here is which of its words pull, where in the picture, and how little of the "
    "wording has to change to let go."
)
EMPTY = "Press Explain: the words by how much they are to blame, the place in the picture, and every signal that was read appear here."
EMPTY_EDIT = "Explain a prompt first; then change a word of it here and see the verdict change."


def gone_by_steering(report: GuardReport | None) -> list[str]:
    """The words, bare, that the steering which passed has dropped."""
    passed = (report.steering or {}).get("passed") if report else None
    return list(passed.get("dropped") or ()) if passed else []


def steering_sentences(explanation: Explanation, report: GuardReport) -> str:
    """What steering does with the words, and where the most blamed one is not what goes, why it need not be."""
    most = explanation.words[int(np.argmax(explanation.left_out))]
    steering = report.steering or {}
    passed, gone = steering.get("passed"), gone_by_steering(report)
    if report.verdict != "steered" or not passed:
        return f"No correction held ({len(steering.get('attempts', []))} tried): the picture would be withheld, and no word is singled out."
    if "wording" not in passed:
        return f"Steered by {passed['method']}, which moves what the text encoder makes of the whole prompt: no word goes."
    if not gone:
        return (
            f"Reworded to “{passed['wording']}”: no word goes. The same words put otherwise do not bring the picture back, so that none of "
            "them alone is to blame."
        )
    what = f"Reworded to “{passed['wording']}”, without {', '.join(f'“{word}”' for word in gone)}."
    if bare(most) in gone:
        return f"{what} Blame and steering agree: “{bare(most)}” pulls most."
    return (
        f"{what} The most blamed word, “{bare(most)}”, stays: blame is of the guidance norm, to which whatever the picture shows adds; "
        "steering asks instead which wording nearest to the prompt leaves the copy, and gives up names and numbers first."
    )


def explained(found: Why) -> str:
    """The whole explanation."""
    explanation = found.explanation
    picture = found.picture
    agreement = "" if explanation.agreement != explanation.agreement else f" The two agree in rank by {explanation.agreement:+.2f}."
    gone = gone_by_steering(found.steered)
    steering = (
        f'<h3>What steering does about it</h3><p class="sg-steering">{escape(steering_sentences(explanation, found.steered))}</p>'
        if found.steered
        else ""
    )
    maps = [
        elements.picture(picture, "the picture, unguarded", 256, "sg-map"),
        elements.picture(heat(picture, explanation.pull), "where the text pulls", 256, "sg-map"),
        elements.picture(heat(picture, explanation.curvature), "where it sharpens the density", 256, "sg-map"),
    ]
    return (
        f"{elements.verdict(found.report, False)}<h3>Which words pull</h3>"
        f"{elements.highlighted_words(explanation.words, explanation.left_out, 'of the guidance norm goes without it', gone)}"
        '<p class="sg-note">The share of the guidance norm that goes when a word is left out and the rest is encoded again.</p>'
        f"{elements.highlighted_words(explanation.words, explanation.gradient, 'of the gradient')}"
        f'<p class="sg-note">Each word’s share of the norm’s gradient on the token embeddings; the rest lies on end and padding.{agreement}'
        f'</p>{steering}<h3>Where in the picture</h3><div class="sg-maps">{"".join(maps)}</div>'
        f"<h3>What the guard measured</h3>{signal_views.signals_table(found.report, found.profile)}"
        '<p class="sg-note">z-scores: in standard deviations of ordinary prompts; costs: in denoiser evaluations beyond the run’s own.</p>'
    )


def changed(before: GuardReport | None, after: GuardReport) -> str:
    """The verdict on an edited prompt, beside that on the prompt as it was; new words are marked."""
    known = set((before.prompt or "").split()) if before else set()
    words = " ".join(
        f"<mark>{escape(word)}</mark>" if before and word not in known else escape(word) for word in (after.prompt or "").split()
    )
    rows = [("edited", after)] + ([("as it was", before)] if before else [])
    table = elements.table(
        ("prompt", "verdict", "score", "p-value"),
        [(name, elements.HEADLINES[r.verdict].split(",")[0], or_dash(r.score, "+.2f"), or_dash(r.p_value, ".3g")) for name, r in rows],
        "verdicts before and after the edit",
    )
    return f'<p class="sg-edit">{words}</p>{elements.verdict(after, False)}{table}'


def or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def tab(model: Model, box: gr.Textbox, own_profile: Any, controls: list[Any]) -> None:
    """Lay the tab out."""
    reference = gr.State(None)
    gr.HTML(elements.lesson(LESSON))
    with gr.Row(elem_classes="sg-columns"):
        with gr.Column(elem_classes="sg-ask"):
            box.render()
            start, stop = run_buttons("Explain", "why")
        with gr.Column(elem_classes="sg-answer"):
            line = gr.HTML(elements.status("Seed, steps and guidance are those of the Generate tab."), elem_id="why-status")
            shown = gr.HTML(elements.hint(EMPTY), elem_id="why-result")
        with gr.Column(elem_classes="sg-more"):
            edit = prompt_box("edit", "Change a word", "", "The verdict follows as you type; no picture is made.")
            verdict = gr.HTML(elements.hint(EMPTY_EDIT), elem_id="edit-result")

    def run(request: gr.Request, own: Any, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, *values)

        def view(found: Why) -> Updates:
            return {
                line: elements.status("Done.", "done"),
                shown: explained(found),
                reference: found.report,
                edit: found.setting.prompt,  # which is judged as an edit at once
            }

        yield from page_updates(request, model, lambda emit: why(model, asked, own, emit), view, line, own_profile, (start, stop))

    def typed(request: gr.Request, own: Any, before: GuardReport | None, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, *values)
        if asked.prompt is None or not str(asked.prompt).strip():
            yield {verdict: elements.hint("An empty prompt pulls nowhere.")}
            return
        work = lambda emit: judge_edit(model, asked, own, emit)  # noqa: E731
        yield from page_updates(request, model, work, lambda report: {verdict: changed(before, report)}, verdict, own_profile, None)

    gr.on([start.click, box.submit], run, [own_profile, box, *controls], [line, shown, reference, edit, own_profile, start, stop], **WORK)
    stops(stop)
    gr.on(
        [edit.change, edit.submit],
        typed,
        [own_profile, reference, edit, *controls],
        [verdict, own_profile],
        trigger_mode="always_last",
        **WORK,
    )
