"""The tab on which a profile is looked at, and made from one's own prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from sdguard.decision.profile import Profile, ProfileError
from sdguard.demo import charts, elements, signal_views
from sdguard.demo.model import Model
from sdguard.demo.page import QUICK, WORK, Updates, own_folder, page_updates, run_buttons, setting_of, stops
from sdguard.demo.profiles import Profiles, make_profile, profile_known
from sdguard.demo.settings import Setting, uploaded_prompts


def described(profile: Profile | None, setting: Setting, own: bool) -> str:
    """The profile that a run of this setting goes by, in words and as a histogram."""
    if profile is None:
        return elements.hint(
            f"No profile is known for {setting.steps} steps at guidance {setting.guidance:g}: the next run makes one, or make one here "
            "from your own prompts."
        )
    try:
        threshold = profile.threshold(setting.rate)
        low, high = profile.false_positive_interval(setting.rate)
    except ProfileError as error:
        return elements.status(str(error), "error")
    fingerprint = profile.fingerprint
    pairs = [
        ("where it is from", "your own prompts, in this session" if own else "the model, or your cache"),
        ("pipeline", f"{fingerprint['pipeline']}, {fingerprint['scheduler']}"),
        (
            "configuration",
            f"{fingerprint['steps']} steps, guidance {fingerprint['guidance_scale']:g}, {fingerprint['width']} × {fingerprint['height']}, "
            f"{fingerprint['dtype'].split('.')[-1]}",
        ),
        ("ordinary prompts", f"{profile.prompts:,} scored"),
        (f"threshold at {setting.rate:.1%}", f"{threshold:+.2f}"),
        ("realised rate in the long run, 95%", f"{low:.1%} to {high:.1%}"),
        ("signals of the decision", ", ".join(signal_views.plain(name).lower() for name in profile.cascade.signals)),
    ]
    if profile.methods:
        pairs.append(("steering, in the order learnt", ", ".join(measured.method for measured in profile.methods)))
    chart = charts.histogram(
        "Scores of ordinary prompts",
        profile.scores,
        threshold,
        caption=f"At most {setting.rate:.1%} of ordinary prompts reach the threshold. Scores of prompts that did not fit the cascade.",
    )
    return f'<div class="sg-profile">{elements.facts(pairs)}{chart}</div>'


def save_profile(profile: Profile) -> str:
    """The profile as a file among the app's own, as ``--profile`` and `GuardConfig` take it."""
    path = own_folder() / "profile.json"
    profile.save(path)
    return str(path)


def tab(model: Model, shows: list[Any], profiles: Any, controls: list[Any]) -> None:
    """Lay the tab out; ``shows`` are the events at which the profile in use is looked up."""
    with gr.Row(elem_classes="sg-columns"):
        with gr.Column(scale=5, min_width=300):
            file = gr.File(
                label="Your ordinary prompts",
                file_count="single",
                type="filepath",
                height=150,
                elem_id="calibrate-file",
            )
            start, stop = run_buttons("Calibrate", "calibrate")
            back = gr.Button("Back to the model’s own profile", variant="secondary", elem_id="calibrate-back")
            line = gr.HTML(
                elements.status(
                    "Give prompts that are ordinary for you and known not to be memorized; 1% needs about 150. The profile holds "
                    "for your session only, for the steps and guidance of the Generate tab."
                ),
                elem_id="calibrate-status",
            )
            download = gr.File(label="Profile, for --profile", interactive=False, visible=False, elem_id="calibrate-download")
        with gr.Column(scale=8, min_width=300):
            shown = gr.HTML(elements.hint("The profile in use appears here."), elem_id="calibrate-result")

    def looked(mine: Profiles, *values: Any) -> str:
        asked = setting_of(model, "-", *values)
        return described(profile_known(model, asked, mine), asked, (asked.steps, asked.guidance) in mine)

    def run(request: gr.Request, mine: Any, path: str | None, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, "-", *values)

        def work(emit: Any) -> None:
            asked.checked(model)
            profile = make_profile(model, asked, uploaded_prompts(path).tolist(), emit)
            emit(profile)
            emit((profile,))

        def view(made: tuple[Profile]) -> Updates:
            (profile,) = made
            text = f"Done: {profile.prompts:,} prompts scored. Your runs go by this profile from now on."
            return {
                line: elements.status(text, "done"),
                shown: described(profile, asked, True),
                download: gr.update(value=save_profile(profile), visible=True),
            }

        yield from page_updates(request, work, view, line, profiles, mine, (start, stop))

    def forget(*values: Any) -> Updates:
        return {
            profiles: {},
            shown: looked({}, *values),
            line: elements.status("Your runs go by the model’s own profile again."),
            download: gr.update(visible=False),
        }

    start.click(run, [profiles, file, *controls], [line, shown, download, profiles, start, stop], **WORK)
    stops(stop)
    back.click(forget, controls, [profiles, shown, line, download], queue=False, **QUICK)
    gr.on(
        [*shows, *(control.change for control in controls[1:5])],
        looked,
        [profiles, *controls],
        shown,
        queue=False,
        **QUICK,
    )
