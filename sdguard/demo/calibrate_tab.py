"""The tab on which a profile is looked at, and made from one's own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from sdguard.decision.profile import Profile, ProfileError
from sdguard.demo import charts, elements, signal_views
from sdguard.demo.clients import alone, client_of
from sdguard.demo.model import Model
from sdguard.demo.page import QUICK, WORK, Updates, own_folder, page_updates, path_of, run_buttons, sentence, setting_of, stops
from sdguard.demo.profiles import make_profile, profile_known
from sdguard.demo.settings import MOST_ORDINARY, uploaded_prompts
from sdguard.files.inputs import BadInput
from sdguard.guarded.config import GuardConfig

LESSON = (
    "The threshold comes from ordinary prompts alone: give your own, and the false-positive rate you choose holds for prompts like them."
)


def described(profile: Profile | None, rate: float, own: bool) -> str:
    """The profile that runs go by, in words and as a histogram; ``own``: it was made in this session."""
    if profile is None:
        return elements.hint("No profile is known for this model: the next run makes one, or make one here from your own prompts.")
    try:
        threshold = profile.threshold(rate)
        low, high = profile.false_positive_interval(rate)
    except ProfileError as error:
        return elements.status(str(error), "error")
    of = profile.model
    pairs = [
        ("where it is from", "this session" if own else "the model, or your cache"),
        ("model", f"{of['denoiser']}, {of['size']} × {of['size']}"),
        ("weights", ", ".join(f"{part} {next(iter(digests.values()))[:8]}" for part, digests in of["weights"].items())),
        ("ordinary prompts", f"{profile.prompts:,} scored"),
        (f"threshold at {rate:.1%}", f"{threshold:+.2f}"),
        ("realised rate in the long run, 95%", f"{low:.1%} to {high:.1%}"),
        ("signals of the decision", ", ".join(signal_views.plain(name).lower() for name in signal_views.deciding(profile))),
    ]
    if profile.methods:
        pairs.append(("steering, in the order learnt", ", ".join(measured.method for measured in profile.methods)))
    chart = charts.histogram(
        "Scores of ordinary prompts",
        profile.scores,
        threshold,
        caption=f"At most {rate:.1%} of ordinary prompts reach the threshold. Scores of prompts that did not fit the cascade.",
    )
    return f'<div class="sg-profile">{elements.facts(pairs)}{chart}</div>'


def save_profile(profile: Profile) -> str:
    """The profile as a file among the app's own, as ``--profile`` and `GuardConfig` take it."""
    path = own_folder() / "profile.json"
    profile.save(path)
    return str(path)


def tab(model: Model, shows: list[Any], own_profile: Any, controls: list[Any]) -> None:
    """Lay the tab out; ``shows`` are the events at which the profile in use is looked up."""
    gr.HTML(elements.lesson(LESSON))
    with gr.Row(elem_classes="sg-columns"):
        with gr.Column(elem_classes="sg-ask"):
            file = gr.File(
                label="Your ordinary prompts",
                file_count="single",
                type="filepath",
                height=150,
                elem_id="calibrate-file",
            )
            start, stop = run_buttons("Calibrate", "calibrate")
        with gr.Column(elem_classes="sg-answer"):
            line = gr.HTML(
                elements.status(
                    "Give prompts that are ordinary for you and known not to be memorized; 1% needs about 150. The profile holds "
                    "for your session only, whatever the settings of the Generate tab."
                ),
                elem_id="calibrate-status",
            )
            download = gr.File(label="Profile, for --profile", interactive=False, visible=False, elem_id="calibrate-download")
            shown = gr.HTML(elements.hint("The profile in use appears here."), elem_id="calibrate-result")
        with gr.Column(elem_classes="sg-more"):
            back = gr.Button("Back to the model’s own profile", variant="secondary", elem_id="calibrate-back")

    def looked(own: Profile | None, *values: Any) -> str:
        try:
            rate = GuardConfig(false_positive_rate=setting_of(model, "-", *values).rate).false_positive_rate
        except (ValueError, TypeError) as error:
            return elements.status(sentence(error), "error")
        return described(profile_known(model, own), rate, own is not None)

    def run(request: gr.Request, uploaded: Any, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, "-", *values)

        def work(emit: Any) -> None:
            rate = asked.checked(model).rate
            profile = make_profile(model, uploaded_prompts(path_of(uploaded), MOST_ORDINARY).tolist(), rate, emit)
            emit(profile)
            emit((profile,))

        def view(made: tuple[Profile]) -> Updates:
            (profile,) = made
            text = f"Done: {profile.prompts:,} prompts scored. Your runs go by this profile from now on."
            return {
                line: elements.status(text, "done"),
                shown: described(profile, asked.rate, True),
                download: gr.update(value=save_profile(profile), visible=True),
            }

        try:
            with alone("A calibration", client_of(request)):
                yield from page_updates(request, model, work, view, line, own_profile, (start, stop))
        except BadInput as error:
            yield {line: elements.status(str(error), "error")}

    def forget(*values: Any) -> Updates:
        return {
            own_profile: None,
            shown: looked(None, *values),
            line: elements.status("Your runs go by the model’s own profile again."),
            download: gr.update(visible=False),
        }

    start.click(run, [file, *controls], [line, shown, download, own_profile, start, stop], **WORK)
    stops(stop)
    back.click(forget, controls, [own_profile, shown, line, download], queue=False, **QUICK)
    rate = controls[4]
    gr.on([*shows, rate.change], looked, [own_profile, *controls], shown, queue=False, **QUICK)
