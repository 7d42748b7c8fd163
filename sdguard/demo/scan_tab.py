"""The tab that ranks the prompts of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import pandas as pd

from sdguard.demo import elements
from sdguard.demo.model import Model
from sdguard.demo.page import QUICK, WORK, Updates, own_folder, page_updates, path_of, run_buttons, setting_of, share, stops
from sdguard.demo.scan_run import Scanned, scan_prompts
from sdguard.demo.settings import MOST_SEEDS, SUFFIXES, uploaded_prompts
from sdguard.files.prompt_files import write_table
from sdguard.scan.scan import power_note

LESSON = (
    "A whole list is judged without making a single picture, and ranked, so that of all that is called discovered no more than the share "
    "you choose is ordinary in the long run."
)
EMPTY = "Choose a file of prompts and press Scan: they appear here, the most suspicious first. No pictures are made."
#: rows on the page; the files have all.
SHOWN = 200


def save_table(table: pd.DataFrame) -> list[str]:
    """The table as CSV and as JSON in a new folder among the app's own files."""
    folder = own_folder()
    write_table(table, folder / "scan.csv")
    table.to_json(folder / "scan.json", orient="records", indent=1, double_precision=15)
    return [str(folder / "scan.csv"), str(folder / "scan.json")]


def save_list(prompts: Sequence[str]) -> str:
    """Prompts as a text file of one a line among the app's own files."""
    path = own_folder() / "example-list.txt"
    path.write_text("\n".join(prompts) + "\n")
    return str(path)


def shown_table(table: pd.DataFrame) -> str:
    """The first rows, for people; discoveries are marked."""
    rows = [
        (
            rank,
            row.prompt,
            f"{row.score:+.2f}",
            f"{row.p_value:.2g}",
            f"{row.q_value:.2g}",
            "discovered" if row.discovered else row.error or "",
        )
        for rank, row in enumerate(table.head(SHOWN).itertuples(), start=1)
    ]
    return elements.table(("rank", "prompt", "score", "p", "q", ""), rows, "prompts by p-value")


def summary(found: Scanned) -> str:
    """What came out, in sentences."""
    table = found.table
    shown = f" The first {SHOWN} are shown; the files have all." if len(table) > SHOWN else ""
    sentence = (
        f"{int(table.discovered.sum())} of {len(table):,} prompts discovered at a false discovery rate of {found.fdr:.0%}, "
        f"{table.evaluations.mean():.1f} denoiser evaluations a prompt, {found.seconds:.1f} seconds.{shown}"
    )
    return " ".join(filter(None, [sentence, power_note(found.profile, found.seeds, int(table.p_value.notna().sum()), found.fdr)]))


def tab(model: Model, own_profile: Any, controls: list[Any]) -> None:
    """Lay the tab out."""
    gr.HTML(elements.lesson(LESSON))
    with gr.Row(elem_classes="sg-columns"):
        with gr.Column(elem_classes="sg-ask"):
            file = gr.File(label="Prompts", file_count="single", type="filepath", height=150, elem_id="scan-file")
            if model.listed:
                example = gr.Button(
                    f"Take an example list of {len(model.listed)} prompts", variant="secondary", size="sm", elem_id="scan-example"
                )
                example.click(lambda: save_list(model.listed), None, file, queue=False, **QUICK)
            start, stop = run_buttons("Scan", "scan")
        with gr.Column(elem_classes="sg-answer"):
            line = gr.HTML(
                elements.status(f"One prompt a line, or a column called prompt, caption or text: {', '.join(SUFFIXES)}, 2 MB at most."),
                elem_id="scan-status",
            )
            shown = gr.HTML(elements.hint(EMPTY), elem_id="scan-result")
            files = gr.File(
                label="Ranked table: CSV and JSON", file_count="multiple", interactive=False, visible=False, elem_id="scan-downloads"
            )
        with gr.Column(elem_classes="sg-more"):
            seeds = gr.Slider(1, MOST_SEEDS, 1, step=1, label="Seeds a prompt", elem_id="scan-seeds")
            fdr = gr.Slider(1, 50, 5, step=1, label="False discovery rate, %", info="The share of discoveries that may be ordinary.")

    def run(request: gr.Request, own: Any, uploaded: Any, count: Any, percent: Any, *values: Any) -> Iterator[Updates]:
        asked = setting_of(model, "-", *values)

        def work(emit: Any) -> None:
            scan_prompts(model, uploaded_prompts(path_of(uploaded)), count, share(percent), asked.checked(model).rate, own, emit)

        def view(found: Scanned) -> Updates:
            text = elements.status(summary(found), "done")
            return {line: text, shown: shown_table(found.table), files: gr.update(value=save_table(found.table), visible=True)}

        yield from page_updates(request, model, work, view, line, own_profile, (start, stop))

    start.click(run, [own_profile, file, seeds, fdr, *controls], [line, shown, files, own_profile, start, stop], **WORK)
    stops(stop)
