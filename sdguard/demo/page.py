"""What the tabs share: work as updates of the page, the box for a prompt, the examples."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from sdguard.decision.profile import Profile
from sdguard.demo.clients import Left, client_of, heard
from sdguard.demo.elements import status
from sdguard.demo.model import Example, Model
from sdguard.demo.settings import LONGEST_PROMPT, Setting
from sdguard.demo.streaming import Emit, Progress, streamed
from sdguard.demo.turns import MOST_AT_ONCE
from sdguard.guarded.run import MemorizationError

logger = logging.getLogger(__name__)

#: updates of the page, by component.
Updates = dict[Any, Any]
#: of every event that runs the model: so many are let in at once, of two addresses at least, and wait their turn there (`turns`).
ROOM: dict[str, Any] = {"concurrency_limit": 2 * MOST_AT_ONCE, "concurrency_id": "model"}
#: of the page's own events. What they are given is looked at here, not by the components: a sentence then says what is wrong, and where.
QUICK: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
WORK: dict[str, Any] = {**QUICK, **ROOM}
KINDS = {"verbatim": "Verbatim copy", "template": "Template copy", "ordinary": "Ordinary", "near miss": "Near miss"}
INTERNAL = "Something went wrong in the app itself; its log says what. Nothing was changed."
#: characters that a sentence shown to a client has at most: some say what they were given.
LONGEST_SENTENCE = 400


#: by session and stop button: what ends the work that runs there. The work itself then says so on the page: Gradio's own way to cancel has
#: two writers of one line, and now and then leaves the page with an error for a run that was stopped.
_running: dict[tuple[str | None, int], threading.Event] = {}


def sentence(error: BaseException) -> str:
    """What an error says, on one line and of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= LONGEST_SENTENCE else f"{text[: LONGEST_SENTENCE - 1]}…"


def page_updates(
    request: gr.Request,
    model: Model,
    work: Callable[[Emit], None],
    view: Callable[[Any], Updates],
    line: Any,
    own_profile: Any,
    buttons: tuple[Any, Any] | None,
) -> Iterator[Updates]:
    """The updates that ``work`` makes on the page: ``view`` of what it emits, its progress and its errors as sentences in ``line``.

    The work waits for its client's turn at the model, and ends when its page goes. A profile that it emits becomes the session's
    ``own_profile``; the ``buttons`` are the one that starts it and the one that stops it, where there are any.
    """
    end: Updates = {line: gr.skip()}
    stopping = threading.Event()
    if buttons:
        start, stop = buttons
        _running[request.session_hash, stop._id] = stopping
        yield {line: status("Waiting for the model …", "busy"), start: gr.update(interactive=False), stop: gr.update(interactive=True)}
        end = {start: gr.update(interactive=True), stop: gr.update(interactive=False)}
    try:
        events = heard(request, streamed(model.turns.taken(client_of(request), work), stopping))
        with closing(events):  # where this generator is closed, too: when the page has gone
            for event in events:
                if event is None:
                    yield {line: gr.skip()}  # so that it can be closed now
                elif isinstance(event, Progress):
                    text = f"{event.doing}: {event.done:,} of {event.total:,}"
                    yield {line: status(text, "busy", event.done / max(event.total, 1))}
                elif isinstance(event, Profile):
                    yield {own_profile: event}
                else:
                    yield view(event)
    except Left:
        return
    except (ValueError, TypeError, MemorizationError) as error:
        yield {line: status(sentence(error), "error"), **end}
        return
    except Exception:
        logger.exception("sdguard demo")
        yield {line: status(INTERNAL, "error"), **end}
        return
    finally:
        if buttons:
            _running.pop((request.session_hash, stop._id), None)
    yield {**end, line: status("Stopped. Nothing is running.")} if stopping.is_set() else end


def own_folder() -> Path:
    """A new folder among the app's own files, which are all that can be downloaded from it."""
    return Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))


def stops(stop: Any) -> None:
    """Let the button end what runs in its tab and session, where something does; the run then says so itself."""

    def end(request: gr.Request) -> None:
        if running := _running.get((request.session_hash, stop._id)):
            running.set()

    stop.click(end, queue=False, **QUICK)


def run_buttons(text: str, name: str) -> tuple[gr.Button, gr.Button]:
    """The one primary button of a tab, and the one that stops what it starts."""
    with gr.Row(elem_classes="sg-run"):
        start = gr.Button(text, variant="primary", elem_id=f"{name}-run", scale=3, min_width=140)
        stop = gr.Button("Stop", variant="secondary", interactive=False, elem_id=f"{name}-stop", scale=1, min_width=90)
    return start, stop


def prompt_box(name: str, label: str, value: str = "", info: str | None = "Enter runs it.") -> gr.Textbox:
    """A box for a prompt of one line, which Enter submits."""
    return gr.Textbox(value, label=label, info=info, lines=1, max_lines=3, max_length=LONGEST_PROMPT, elem_id=f"{name}-prompt")


def example_chips(examples: Sequence[Example], box: Any) -> None:
    """A button for each example, which puts it into ``box``; its kind beside it."""
    kinds = dict.fromkeys(example.kind for example in examples)
    with gr.Column(elem_classes="sg-examples"):
        for kind in kinds:
            with gr.Row(elem_classes="sg-chips"):
                gr.HTML(f"<span>{KINDS.get(kind, kind)}</span>", elem_classes="sg-kind")
                for example in examples:
                    if example.kind == kind:
                        chip = gr.Button(example.text, size="sm", elem_classes=["sg-chip"], min_width=0)
                        chip.click(None, None, box, js=f"() => {json.dumps(example.text)}", queue=False, **QUICK)


def setting_of(model: Model, *values: Any) -> Setting:
    """The setting that the page's controls show, in the order of `sdguard.demo.generate_tab.controls`; nothing is checked here."""
    prompt, seed, images, steps, guidance, percent, mode, steering = values
    return Setting(
        prompt,
        0 if seed is None else seed,
        1 if images is None else images,
        model.defaults["num_inference_steps"] if steps is None else steps,
        model.defaults["guidance_scale"] if guidance is None else guidance,
        share(percent),
        mode,
        () if steering is None else steering,
    )


def share(percent: Any) -> Any:
    """Per cent as a share; what is no number stays what it is."""
    return percent / 100 if isinstance(percent, (int, float)) else percent


def path_of(uploaded: Any) -> str | None:
    """Where a file lies that was uploaded into a `gr.File`; None where none was."""
    return uploaded["path"] if uploaded else None
