"""What a person does on the demo's page, in a browser, against what the library says."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect

from browser.conftest import PHONE, Server
from sdguard import GuardConfig, guard, testbed
from sdguard.demo.model import embedded_captions, embedded_examples, embedded_list
from sdguard.guarded.report import GuardReport

Shot = Callable[[Page, str], None]
Open = Callable[..., Page]
MEMORIZED, TEMPLATE, ORDINARY = (
    next(example.text for example in embedded_examples() if example.kind == kind) for kind in ("verbatim", "template", "ordinary")
)
THING, PLACE = MEMORIZED.split(",")[0].split(" at ")


@cache
def report_of(
    embedded: Any, prompt: str, seed: int = 0, steps: int = testbed.STEPS, guidance: float = testbed.GUIDANCE_SCALE, **config: Any
) -> GuardReport:
    """What the library itself says of a prompt, seed and setting; asked once."""
    generator = torch.Generator().manual_seed(seed)
    output = guard(embedded, GuardConfig(**config))(prompt, generator=generator, num_inference_steps=steps, guidance_scale=guidance)
    return output.guard[0]


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def settle(page: Page) -> None:
    """Let the page take up what was opened or filled in: it does so after the event, and nobody clicks on within a millisecond."""
    page.wait_for_timeout(400)


def write(page: Page, box: str, text: str) -> None:
    page.locator(f"#{box} textarea").fill(text)
    settle(page)


def open_settings(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    settle(page)


def choose(page: Page, label: str, value: str) -> None:
    """Put a number into one of the settings."""
    field = page.get_by_label(label, exact=True)
    field.fill(value)
    field.press("Tab")
    settle(page)


def said(page: Page, verdict: str, pane: str = "generate-result") -> str:
    """The sentence under a verdict, once it is there."""
    shown = page.locator(f"#{pane} [data-verdict={verdict}] p").first
    shown.wait_for()
    return shown.inner_text()


def generate(page: Page, prompt: str, verdict: str) -> str:
    write(page, "generate-prompt", prompt)
    page.locator("#generate-run").click()
    return said(page, verdict)


def top(page: Page, selector: str) -> float:
    """How far down the page something stands."""
    box = page.locator(selector).bounding_box()
    assert box is not None, selector
    return box["y"]


def overflow(page: Page) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")


def cut_off(page: Page) -> int:
    """By how many pixels the widest table that is to be seen has to be scrolled."""
    wider = "tables => Math.max(0, ...tables.map(table => table.scrollWidth - table.clientWidth))"
    return page.locator(".sg-table:visible").evaluate_all(wider)


@pytest.mark.parametrize(
    ("kind", "prompt", "verdict", "copied"),
    [("verbatim", MEMORIZED, "steered", True), ("template", TEMPLATE, "steered", True), ("ordinary", ORDINARY, "clean", False)],
)
def test_a_prompt_gets_the_librarys_verdict(
    kind: str,
    prompt: str,
    verdict: str,
    copied: bool,
    page: Page,
    embedded: Any,
    shot: Shot,
    record_property: Callable[[str, object], None],
) -> None:
    expected = report_of(embedded, prompt)
    write(page, "generate-prompt", prompt)
    began = time.monotonic()
    page.locator("#generate-prompt textarea").press("Enter")
    page.locator("#generate-result .sg-compare img").first.wait_for()
    first = time.monotonic() - began
    record_property("seconds to the first picture", round(first, 2))
    print(f"first picture after {first:.2f} s")
    assert first < 15
    assert said(page, verdict) == expected.reason
    assert expected.verdict == verdict
    print(f"verdict after {time.monotonic() - began:.2f} s")
    result = page.locator("#generate-result")
    guarded, unguarded = (
        result.get_by_alt_text(f"{which}: {prompt}, seed 0", exact=True).get_attribute("src") for which in ("guarded", "unguarded")
    )
    assert (guarded == unguarded) == (verdict == "clean")
    expect(result.locator(".sg-training li").first).to_contain_text("Unguarded: a copy" if copied else "Unguarded: no copy")
    expect(result.locator(".sg-training li").last).to_contain_text("Guarded: no copy")
    expect(result.locator(".sg-facts")).to_contain_text(f"{expected.p_value:.3g}")
    expect(result.locator(".sg-facts")).to_contain_text(f"20 → {20 + expected.extra_evaluations}")
    expect(page.locator("#generate-run")).to_be_enabled()
    expect(page.locator("#generate-status")).to_contain_text("Done")
    expect(page.locator("#generate-course .sg-strip li")).to_have_count(2 * (testbed.STEPS + 1))
    assert overflow(page) <= 0
    shot(page, f"generate-{kind}")


def test_the_page_opens_on_a_result_that_was_made_once(opened: Open, server: Server, embedded: Any, shot: Shot) -> None:
    page = opened()
    front = page.locator("#generate-opening")
    said(page, "clean", "generate-opening")
    memorized, ordinary = (front.locator("section > p").nth(i).inner_text() for i in range(2))
    assert said(page, "steered", "generate-opening") == report_of(embedded, memorized).reason
    assert said(page, "clean", "generate-opening") == report_of(embedded, ordinary).reason
    pictures = [
        front.get_by_alt_text(f"{which}: {ordinary}, seed 0", exact=True).get_attribute("src") for which in ("guarded", "unguarded")
    ]
    assert pictures[0] == pictures[1]
    expect(front.locator(".sg-facts").last).to_contain_text("identical, bit by bit")
    expect(page.locator("#generate-course .sg-strip li")).to_have_count(2 * (testbed.STEPS + 1))
    shot(page, "opening")
    assert overflow(page) <= 0
    before = sum(server.process.cpu_times()[:2])
    other = opened(PHONE)
    said(other, "steered", "generate-opening")
    assert sum(server.process.cpu_times()[:2]) - before < 2  # a comparison takes more
    assert overflow(other) <= 0
    shot(other, "phone-opening")
    generate(other, ordinary, "clean")
    expect(other.locator("#generate-opening")).to_be_hidden()


def test_the_slider_is_moved_by_keyboard(page: Page) -> None:
    generate(page, MEMORIZED, "steered")
    compare = page.locator("#generate-result .sg-compare")
    compare.get_by_role("slider").focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert compare.evaluate("node => node.style.getPropertyValue('--cut')") == "60%"


def test_an_example_fills_the_prompt_and_settings_are_obeyed(page: Page, embedded: Any, shot: Shot) -> None:
    page.get_by_role("button", name=TEMPLATE).click()
    expect(page.locator("#generate-prompt textarea")).to_have_value(TEMPLATE)
    open_settings(page)
    choose(page, "Seed", "3")
    choose(page, "number input for Images", "2")
    page.get_by_label("Withhold it").check()
    settle(page)
    page.locator("#generate-run").click()
    assert said(page, "withheld") == report_of(embedded, TEMPLATE, 3, mode="block").reason
    expect(page.locator("#generate-result .sg-card")).to_have_count(2)
    shot(page, "generate-withheld")


def test_why_explains_and_an_edit_changes_the_verdict(page: Page, embedded: Any, shot: Shot) -> None:
    tab(page, "Why")
    write(page, "why-prompt", MEMORIZED)
    page.locator("#why-prompt textarea").press("Enter")
    assert said(page, "flagged", "why-result") == report_of(embedded, MEMORIZED, mode="observe").reason
    words = page.locator("#why-result .sg-words").first.locator("span")
    assert [word.split("\n")[0] for word in words.all_inner_texts()] == MEMORIZED.split()
    shown = page.locator("#why-result .sg-map img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert shown == [256] * 3
    table = page.locator("#why-result table")
    report = report_of(embedded, MEMORIZED, mode="observe")
    for found in report.signals.values():
        expect(table).to_contain_text(f"{found['z']:+.1f}")
    passed = (report_of(embedded, MEMORIZED).steering or {})["passed"]
    steering = page.locator("#why-result .sg-steering")
    for text in (passed.get("wording", passed["method"]), *passed.get("dropped", ())):
        expect(steering).to_contain_text(text)
    changed = f"a {THING} in {PLACE.split()[-1]}"
    write(page, "edit-prompt", changed)
    assert said(page, "clean", "edit-result") == report_of(embedded, changed, mode="observe").reason
    expect(page.locator("#why-run")).to_be_enabled()
    expect(page.locator("#why-status")).to_have_text("Done.")
    expect(page.locator("#edit-result")).to_contain_text("as it was")
    assert overflow(page) <= 0
    shot(page, "why")


def test_geometry_shows_the_spike_beside_the_ridge(page: Page, shot: Shot) -> None:
    tab(page, "Geometry")
    page.locator("#geometry-run").click()
    surfaces = page.locator("#geometry-result .sg-figure:has(.sg-quad)")
    expect(surfaces).to_have_count(2)
    steepness = [float(text.split("flattest direction ")[1].split(",")[0]) for text in surfaces.locator("figcaption").all_inner_texts()]
    assert steepness[0] > steepness[1]
    expect(page.locator("#geometry-result .sg-figure")).to_have_count(6)
    assert overflow(page) <= 0
    shot(page, "geometry")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A file of prompts, two of them memorized."""
    path = tmp_path / "captions.csv"
    prompts = [ORDINARY, MEMORIZED, embedded_captions("ordinary")[1], TEMPLATE, "a cat in snow", "=1+1 a frog, in forest"]
    pd.DataFrame({"caption": prompts}).to_csv(path, index=False)
    return path


def test_a_file_is_ranked_and_downloaded(page: Page, listed: Path, tmp_path: Path, shot: Shot) -> None:
    tab(page, "Scan")
    page.locator("#scan-file input[type=file]").set_input_files(listed)
    expect(page.locator("#scan-file")).to_contain_text("captions")
    page.locator("#scan-run").click()
    rows = page.locator("#scan-result tbody tr")
    expect(rows).to_have_count(6)
    assert {rows.nth(i).locator("td").nth(1).inner_text() for i in range(2)} == {MEMORIZED, TEMPLATE}
    tables = {}
    for link in page.locator("#scan-downloads a").all():
        with page.expect_download() as started:
            link.click()
        path = tmp_path / started.value.suggested_filename
        started.value.save_as(path)
        tables[path.suffix] = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path)
    assert set(tables) == {".csv", ".json"}
    for table in tables.values():
        assert list(table.prompt) == rows.locator("td:nth-child(2)").all_inner_texts()
    assert overflow(page) <= 0
    shot(page, "scan")


def test_the_example_list_is_one_press_away(page: Page) -> None:
    tab(page, "Scan")
    page.locator("#scan-example").click()
    expect(page.locator("#scan-file")).to_contain_text("example-list")
    page.locator("#scan-run").click()
    expect(page.locator("#scan-result tbody tr")).to_have_count(len(embedded_list()))
    expect(page.locator("#scan-result tbody tr").first).to_contain_text("discovered")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("captions.exe", b"MZ", "captions.exe is of a kind that is not taken here"),
        ("empty.txt", b"\n\n", "empty.txt"),
        ("two.csv", b"a,b\nx,y\n", "two.csv does not tell which column holds the prompts"),
        ("wide.txt", b"x" * 700, "holds a prompt of 700 characters"),
        ("many.txt", b"a cat\n" * 6000, "holds 6,000 prompts"),
        ("bytes.txt", b"\xff\xfe\x00\x81", "bytes.txt"),
    ],
)
def test_a_bad_upload_is_a_sentence_on_the_page(name: str, content: bytes, says: str, page: Page, tmp_path: Path, shot: Shot) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    tab(page, "Scan")
    page.locator("#scan-file input[type=file]").set_input_files(path)
    expect(page.locator("#scan-file")).to_contain_text(path.stem)
    page.locator("#scan-run").click()
    alert = page.locator("#scan-status [role=alert]")
    expect(alert).to_contain_text(says)
    assert str(tmp_path) not in alert.inner_text()
    assert "/" not in alert.inner_text()
    expect(page.locator("#scan-run")).to_be_enabled()
    if name == "captions.exe":
        shot(page, "bad-upload")


def test_a_file_over_the_limit_is_refused(page: Page, address: str, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"a cat in snow\n" * 200_000)
    tab(page, "Scan")
    page.locator("#scan-file input[type=file]").set_input_files(path)
    expect(page.get_by_text("maximum allowed size", exact=False).first).to_be_visible()


def scan_for_long(page: Page, folder: Path) -> None:
    """Start a scan that takes minutes."""
    path = folder / "many.txt"
    path.write_text("".join(f"a lion in fog, number {i}\n" for i in range(4000)))
    tab(page, "Scan")
    page.locator("#scan-file input[type=file]").set_input_files(path)
    expect(page.locator("#scan-file")).to_contain_text("many")
    page.locator("#scan-run").click()
    expect(page.locator("#scan-status")).to_contain_text(re.compile("Scanning: [1-9]"))


def test_a_run_is_stopped_and_the_app_goes_on(page: Page, server: Server, tmp_path: Path, shot: Shot) -> None:
    idle = server.busy()  # about .05 of a core and rising by a little with every session: Gradio looks for events that are waiting
    scan_for_long(page, tmp_path)
    status = page.locator("#scan-status")
    shot(page, "scan-running")
    assert server.busy() > idle + 0.1
    page.locator("#scan-stop").click()
    expect(status).to_have_text("Stopped. Nothing is running.")
    expect(page.locator("#scan-run")).to_be_enabled()
    assert any(server.busy() < idle + 0.03 for _ in range(5))
    tab(page, "Generate")
    generate(page, ORDINARY, "clean")
    tab(page, "Scan")
    expect(status).to_contain_text("Stopped. Nothing is running.")


def test_a_run_ends_when_its_page_is_closed(page: Page, server: Server, tmp_path: Path) -> None:
    idle = server.busy()
    scan_for_long(page, tmp_path)
    page.close()
    assert any(server.busy() < idle + 0.03 for _ in range(20))


@pytest.mark.parametrize(("prompt", "verdict"), [(MEMORIZED, "steered"), (ORDINARY, "clean")])
def test_other_steps_and_guidance_get_a_verdict_without_calibration(prompt: str, verdict: str, page: Page, embedded: Any) -> None:
    open_settings(page)
    choose(page, "number input for Steps", "12")
    choose(page, "number input for Guidance scale", "6")
    page.evaluate(
        """() => {
            const line = document.querySelector("#generate-status");
            window.told = [];
            const seen = new MutationObserver(() => window.told.push(line.innerText));
            seen.observe(line, {childList: true, characterData: true, subtree: true});
        }"""
    )
    assert generate(page, prompt, verdict) == report_of(embedded, prompt, steps=12, guidance=6.0).reason
    expect(page.locator("#generate-course .sg-strip li")).to_have_count(2 * (12 + 1))
    told = "\n".join(page.evaluate("window.told"))
    assert "denoiser call" in told
    assert "calibrating" not in told.lower()


def test_a_calibration_shows_its_progress_and_can_be_stopped(page: Page) -> None:
    tab(page, "Calibrate")
    page.locator("#calibrate-file input[type=file]").set_input_files(testbed.path() / "sdguard/ordinary_prompts.txt")
    expect(page.locator("#calibrate-file")).to_contain_text("ordinary")
    page.locator("#calibrate-run").click()
    status = page.locator("#calibrate-status")
    expect(status).to_contain_text(re.compile("Calibrating: [1-9]"))
    page.locator("#calibrate-status progress[value]").wait_for()
    page.locator("#calibrate-stop").click()
    expect(status).to_have_text("Stopped. Nothing is running.")
    expect(page.locator("#calibrate-run")).to_be_enabled()
    expect(page.locator("#calibrate-result")).to_contain_text("the model, or your cache")
    tab(page, "Generate")
    generate(page, ORDINARY, "clean")


def test_two_people_do_not_mix(opened: Open, embedded: Any) -> None:
    one, other = opened(), opened()
    write(one, "generate-prompt", MEMORIZED)
    write(other, "generate-prompt", ORDINARY)
    one.locator("#generate-run").click()
    other.locator("#generate-run").click()
    assert said(one, "steered") == report_of(embedded, MEMORIZED).reason
    assert said(other, "clean") == report_of(embedded, ORDINARY).reason
    for page, prompt in ((one, MEMORIZED), (other, ORDINARY)):
        for which in ("guarded", "unguarded"):
            expect(page.get_by_alt_text(f"{which}: {prompt}, seed 0", exact=True)).to_have_count(1)


def test_ones_own_profile_is_ones_own(opened: Open, tmp_path: Path, shot: Shot) -> None:
    one, other = opened(), opened()
    path = tmp_path / "ordinary.txt"
    lines = (testbed.path() / "sdguard/ordinary_prompts.txt").read_text().splitlines()
    path.write_text("\n".join(lines[::37]))
    open_settings(one)
    choose(one, "number input for False-positive rate, %", "5")
    tab(one, "Calibrate")
    expect(one.locator("#calibrate-result")).to_contain_text("the model, or your cache")
    shot(one, "calibrate")
    one.locator("#calibrate-file input[type=file]").set_input_files(path)
    expect(one.locator("#calibrate-file")).to_contain_text("ordinary")
    one.locator("#calibrate-run").click()
    expect(one.locator("#calibrate-result")).to_contain_text("this session")
    expect(one.locator("#calibrate-download")).to_contain_text("profile")
    shot(one, "calibrate-own")
    tab(other, "Calibrate")
    expect(other.locator("#calibrate-result")).to_contain_text("the model, or your cache")
    assert overflow(one) <= 0
    one.locator("#calibrate-back").click()
    expect(one.locator("#calibrate-result")).to_contain_text("the model, or your cache")


def test_a_phones_width(opened: Open, listed: Path, shot: Shot) -> None:
    page = opened({"width": 390, "height": 844})
    assert overflow(page) <= 0
    generate(page, MEMORIZED, "steered")
    for button in ("#generate-run", "#generate-stop"):
        box = page.locator(button).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["height"] >= 36
    assert overflow(page) <= 0
    assert top(page, "#generate-run") < top(page, "#generate-result") < top(page, ".sg-examples")
    shot(page, "phone-generate")
    for name, run, there, other in (
        ("Why", "#why-run", "#why-result table", "#edit-prompt"),
        ("Geometry", "#geometry-run", "#geometry-result .sg-quad >> nth=0", "#geometry-call"),
    ):
        tab(page, name)
        page.locator(run).click()
        page.locator(there).wait_for()
        assert overflow(page) <= 0, name
        assert top(page, run) < top(page, there) < top(page, other), name
        assert cut_off(page) == 0, name
        shot(page, f"phone-{name.lower()}")
    tab(page, "Scan")
    page.locator("#scan-file input[type=file]").set_input_files(listed)
    expect(page.locator("#scan-file")).to_contain_text("captions")
    page.locator("#scan-run").click()
    page.locator("#scan-result tbody tr").first.wait_for()
    assert overflow(page) <= 0
    assert cut_off(page) == 0
    assert top(page, "#scan-run") < top(page, "#scan-result") < top(page, "#scan-seeds")
    shot(page, "phone-scan")
    tab(page, "Calibrate")
    page.locator("#calibrate-result svg").wait_for()
    assert overflow(page) <= 0
    assert top(page, "#calibrate-run") < top(page, "#calibrate-result") < top(page, "#calibrate-back")
    shot(page, "phone-calibrate")


def test_a_prompt_is_text_and_never_markup(page: Page) -> None:
    write(page, "generate-prompt", "<img src=x onerror=alert(1)> panda")
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.locator("#generate-run").click()
    page.locator("#generate-result [data-verdict]").wait_for()
    expect(page.locator("#generate-result img[src=x]")).to_have_count(0)


def test_bad_input_is_a_sentence(page: Page) -> None:
    write(page, "generate-prompt", "   ")
    page.locator("#generate-run").click()
    expect(page.locator("#generate-status [role=alert]")).to_contain_text("Write a prompt first")
    write(page, "generate-prompt", "panda " * 80)
    page.locator("#generate-run").click()
    expect(page.locator("#generate-status [role=alert]")).to_contain_text("this part would be cut")


def test_the_api_gives_reports_and_obeys_the_same_limits(address: str, embedded: Any) -> None:
    client = Client(address, verbose=False)
    found = client.predict(prompt=MEMORIZED, seed=0, api_name="/generate")
    (report,) = (GuardReport(**row) for row in found["reports"])
    assert report.reason == report_of(embedded, MEMORIZED).reason
    (other,) = client.predict(prompt=MEMORIZED, steps=17, guidance=6.0, api_name="/generate")["reports"]
    assert GuardReport(**other).reason == report_of(embedded, MEMORIZED, steps=17, guidance=6.0).reason
    assert len(found["unguarded"]) == len(found["guarded"]) == 1
    for wrong, says in (
        ({"prompt": "x" * 601}, "601 characters"),
        ({"prompt": ORDINARY, "images": 100}, "number of images"),
        ({"prompt": ORDINARY, "steps": 100_000}, "number of steps"),
        ({"prompt": ORDINARY, "seed": 1.5}, "a whole number"),
        ({"prompt": ORDINARY, "false_positive_rate": 1e-6}, "needs at least"),
        ({"prompt": ORDINARY, "mode": "off"}, "mode is 'off'"),
    ):
        with pytest.raises(AppError, match=says):
            client.predict(**wrong, api_name="/generate")


def test_no_file_outside_the_app_can_be_read(address: str, page: Page) -> None:
    root = Path(__file__).parents[2]
    paths = (
        "/etc/passwd",
        str(root / "pyproject.toml"),
        "pyproject.toml",
        "../../../../etc/passwd",
        "http://127.0.0.1:1/",
        "https://example.com/",
    )
    for path in paths:
        for quoted in (path, urllib.parse.quote(path, safe="")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}/gradio_api/file={quoted}", timeout=10)
            assert refused.value.code in (403, 404), path
    config = json.load(urllib.request.urlopen(f"{address}/config", timeout=10))
    scan = next(d for d in config["dependencies"] if any(t[1] == "click" for t in d["targets"]) and d["outputs"] and is_scan(config, d))
    body = {
        "data": [None, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 1, 5, 0, 1, 10, 2.5, 1, "steer", []],
        "fn_index": scan["id"],
        "session_hash": "outsider",
    }
    request = urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=10).close()
        stream = urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=outsider", timeout=30)
        answer = b""
        while b"process_completed" not in answer:
            line = stream.readline()
            assert line, answer
            answer += line
        text = answer.decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    assert "root:" not in text
    assert "daemon" not in text
    assert '"success":true' not in text.replace(" ", "").split("process_completed")[-1]


def is_scan(config: dict[str, Any], dependency: dict[str, Any]) -> bool:
    """Whether an event is the one that scans an uploaded file."""
    named = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
    return any(named.get(i) == "scan-file" for i in dependency["inputs"])


def test_a_page_whose_name_was_made_to_resolve_here_is_not_let_in(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}/config", headers={"host": "evil.example"}), timeout=10)
    assert refused.value.code == 400


def test_the_page_says_that_nothing_is_loaded_from_elsewhere(address: str) -> None:
    headers = urllib.request.urlopen(address, timeout=10).headers
    assert "default-src 'self'" in headers["content-security-policy"]
