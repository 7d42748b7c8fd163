"""The demo without its page: streaming, limits, what runs find, the geometry against densities in closed form, and that text stays text."""

from __future__ import annotations

import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from torch import Tensor
from typer.testing import CliRunner

from sdguard import GuardConfig, Profile, guard, testbed
from sdguard.cli.main import app
from sdguard.decision.calibration import evenly
from sdguard.decision.model_folder import PROFILE_FILE
from sdguard.decision.profile import SERIES
from sdguard.demo import charts, elements, geometry_charts, signal_views
from sdguard.demo.app import Shield, names_of
from sdguard.demo.comparison import Comparison, compare
from sdguard.demo.landscape import REACH, SIDE, Landscape, Slice, landscape, potential, slice_of
from sdguard.demo.model import Model, embedded_captions, embedded_examples, embedded_list
from sdguard.demo.opening import begin_opening, make_opening, opening_prompts
from sdguard.demo.profiles import find_or_make_profile, make_profile, profile_known
from sdguard.demo.scan_run import scan_prompts
from sdguard.demo.settings import LARGEST_BODY, Setting, uploaded_prompts
from sdguard.demo.streaming import Emit, Progress, Stopped, stoppable, streamed
from sdguard.demo.turns import Client, Turns
from sdguard.demo.why_run import Why, why
from sdguard.denoiser.install import lock_of
from sdguard.explain.explanation import Explanation, explain
from sdguard.files.inputs import BadInput
from sdguard.guarded.report import GuardReport
from sdguard.testbed.copies import Targets

STEPS, GUIDANCE = testbed.STEPS, testbed.GUIDANCE_SCALE
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
ORDINARY = "a lion in fog"


@pytest.fixture(scope="session")
def model(embedded: Any, targets: tuple[Targets, list[str]]) -> Model:
    return Model("embedded", embedded, CALL, *targets, embedded_examples())


@pytest.fixture(scope="session")
def profile() -> Profile:
    return Profile.load(testbed.path() / PROFILE_FILE)


def emitted(work: Callable[[Emit], object]) -> list[Any]:
    events: list[Any] = []
    work(events.append)
    return events


# streaming


def test_what_is_emitted_comes_in_order_and_errors_come_through() -> None:
    def work(emit: Emit) -> None:
        emit("a")
        emit(1)
        emit(2.0)
        raise ValueError("no")

    events = streamed(work)
    assert [next(events), next(events), next(events)] == ["a", 1, 2.0]
    with pytest.raises(ValueError, match="no"):
        next(events)


def test_a_slow_reader_gets_the_newest_and_the_last_of_each_kind() -> None:
    def work(emit: Emit) -> None:
        for number in range(50):
            emit(number)
        emit("end")

    events = streamed(work)
    first = next(events)
    time.sleep(1)
    assert [event for event in events if event is not None] == [49, "end"]
    assert first in range(49)


def test_without_news_none_comes() -> None:
    ready = threading.Event()

    def work(emit: Emit) -> None:
        ready.wait(10)
        emit("late")

    events = streamed(work)
    assert next(events) is None
    ready.set()
    assert [event for event in events if event is not None] == ["late"]


def test_closing_ends_the_work_in_the_middle_of_a_denoiser_call() -> None:
    entered, ended = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            time.sleep(0.02)
            return x

    denoiser = torch.nn.Sequential(*(Slow() for _ in range(500)))
    stoppable(denoiser)

    def work(emit: Emit) -> None:
        try:
            emit("begun")
            denoiser(torch.zeros(1))
        except Stopped:
            ended.set()
            raise

    events = streamed(work)
    assert next(events) == "begun"
    assert entered.wait(5)
    events.close()
    assert ended.wait(2)  # all of it would take ten seconds
    assert denoiser[:2](torch.zeros(1)).shape == (1,)  # nobody else is stopped


def test_stop_ends_the_iterator_and_the_work() -> None:
    stop, ended = threading.Event(), threading.Event()

    def work(emit: Emit) -> None:
        try:
            while True:
                emit("at it")
        except Stopped:
            ended.set()
            raise

    events = streamed(work, stop)
    assert next(events) == "at it"
    stop.set()
    assert len(list(events)) <= 1  # one that was under way
    assert ended.wait(2)


def test_work_that_ends_of_itself_was_not_stopped() -> None:
    stop = threading.Event()
    assert [event for event in streamed(lambda emit: emit("all"), stop) if event is not None] == ["all"]
    assert not stop.is_set()


# limits


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompt": "  "}, "Write a prompt first"),
        ({"prompt": "x" * 601}, "601 characters"),
        ({"prompt": "panda " * 90}, "would be cut"),
        ({"images": 5}, "number of images must lie between 1 and 4"),
        ({"images": 0}, "number of images"),
        ({"steps": 101}, "number of steps"),
        ({"guidance": float("nan")}, "guidance scale"),
        ({"guidance": "7"}, "guidance scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"seed": 1.5}, "seed must be a whole number; it is 1.5"),
        ({"images": 1.5}, "number of images must be a whole number"),
        ({"steps": "10"}, "number of steps"),
        ({"rate": 0.0}, "false_positive_rate"),
        ({"mode": "off"}, "mode"),
        ({"steering": ("magic",)}, "steering has 'magic'"),
        ({"steering": 3}, "steering must be a list of methods; it is 3"),
        ({"steering": ["rewording"] * 2}, "names a method twice"),
        ({"seed": True}, "seed must lie between 0 and 4,294,967,292; it is true"),
        ({"steps": "x" * 10**6}, 'it is "x{39}\\.'),
        ({"steps": 10**5000}, "steps must lie between 2 and 100; it is a value of type int"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(changed: dict[str, Any], says: str, model: Model) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        Setting(**{"prompt": ORDINARY, **changed}).checked(model)
    assert "\n" not in str(refused.value)


def test_a_whole_number_may_come_as_a_float(model: Model) -> None:
    checked = Setting(ORDINARY, seed=3.0, images=2.0).checked(model)  # type: ignore[arg-type]
    assert [type(v) for v in (checked.seed, checked.images)] == [int, int]


def reading() -> TestClient:
    """The shield before a server that says how long a body was."""

    async def length(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    return TestClient(Shield(Starlette(routes=[Route("/", length, methods=["POST"])])))


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_is_taken_up_to_its_limit(declared: bool) -> None:
    def sent(size: int) -> Any:
        body = b"x" * size
        return reading().post("/", content=body if declared else iter([body[: size // 2], body[size // 2 :]]))

    assert sent(LARGEST_BODY).text == str(LARGEST_BODY)
    refused = sent(LARGEST_BODY + 1)
    assert refused.status_code == 413
    assert "2.1 MB" in refused.text
    assert "default-src 'self'" in refused.headers["content-security-policy"]


def test_only_who_is_named_may_show_the_page_in_a_frame() -> None:
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("in"))])
    policies = [TestClient(Shield(app, **named)).get("/").headers["content-security-policy"] for named in ({}, {"frames": "*"})]
    assert [policy.rpartition("; ")[2] for policy in policies] == ["frame-ancestors 'self'", "frame-ancestors *"]
    assert "default-src 'self'" in policies[1]


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [("127.0.0.1", "evil.example", 400), ("127.0.0.1", "localhost:7860", 200), ("0.0.0.0", "demo.example", 200)],
)
def test_a_server_of_this_machine_is_asked_for_as_such(host: str, asked: str, status: int) -> None:
    app = Starlette(
        routes=[Route("/", lambda request: PlainTextResponse("in"))],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))],
    )
    assert TestClient(app).get("/", headers={"host": asked}).status_code == status


def test_a_file_of_prompts_is_checked(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("a cat\n\na dog\n")
    assert uploaded_prompts(str(good)).to_dict() == {0: "a cat", 2: "a dog"}
    large = tmp_path / "large.txt"
    large.write_bytes(b"a cat in snow\n" * 150_000)
    for path, says in (
        (None, "Choose a file"),
        (tmp_path / "x.parquet", "of a kind that is not taken"),
        (tmp_path / "passwd", "of a kind"),
        (large, "2.1 MB; 2 MB"),
    ):
        with pytest.raises(BadInput, match=says) as refused:
            uploaded_prompts(str(path) if path else None)
        assert str(tmp_path) not in str(refused.value)


def test_evenly_keeps_the_ends_and_the_order() -> None:
    assert evenly([str(i) for i in range(10)], 5) == ["0", "2", "4", "6", "8"]
    assert evenly(["a", "b"], 5) == ["a", "b"]


# runs


@pytest.mark.parametrize("mode", ["steer", "observe", "block"])
def test_a_comparison_is_the_two_plain_calls(mode: str, model: Model, embedded: Any, memorized: dict[str, Any]) -> None:
    setting = Setting(memorized["text"], memorized["copied_seeds"][0], images=2, mode=mode)
    generators = [[torch.Generator().manual_seed(setting.seed + i) for i in range(2)] for _ in range(2)]
    plain = embedded([setting.prompt] * 2, generator=generators[0], **CALL).images
    output = guard(embedded, GuardConfig(mode))([setting.prompt] * 2, generator=generators[1], **CALL)  # type: ignore[arg-type]
    events = emitted(lambda emit: compare(model, setting, None, emit))
    found = events[-1]
    assert isinstance(found, Comparison)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.unguarded.images, plain, strict=True))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.guarded.images, output.images, strict=True))
    assert found.reports == output.guard
    assert found.guarded.evaluations == [2 * STEPS + report.extra_evaluations for report in output.guard]
    assert found.copied(0) == (True, mode == "observe")
    assert model.captions[found.nearest[0]] == memorized["text"]
    assert len(events) > 2 * STEPS


def test_the_cost_of_the_guard_is_a_share_of_the_run() -> None:
    cost = pytest.importorskip("sdguard.demo.generate_tab").cost
    assert cost(20, 24) == "+4 evaluations, 20% of this run"
    assert cost(10, 11) == "+1 evaluation, 10% of this run"
    assert cost(20, 20) == "none"


def test_no_time_is_shown_and_an_ordinary_pair_is_said_to_be_one(tiny: Any, profile_for: Callable[..., Profile]) -> None:
    generate_tab = pytest.importorskip("sdguard.demo.generate_tab")
    other = Model("tiny", tiny, {"num_inference_steps": 3, "guidance_scale": 4.0})
    found = emitted(lambda emit: compare(other, Setting("a cat", steps=3, guidance=4.0), profile_for(tiny, 1e6), emit))[-1]
    shown = generate_tab.result(other, found) + generate_tab.line_of(found)
    assert "identical, bit by bit" in shown
    assert "millisecond" not in shown
    found.guarded.images[0] = Image.eval(found.guarded.images[0], lambda value: value ^ 1)
    assert "identical" not in generate_tab.result(other, found)


def test_a_course_ends_at_its_picture(model: Model, memorized: dict[str, Any]) -> None:
    found = emitted(lambda emit: compare(model, Setting(memorized["text"]), None, emit))[-1]
    for course in (found.unguarded, found.guarded):
        assert sorted(course.estimates) == list(range(STEPS))
        last = np.asarray(course.estimates[STEPS - 1], float) - np.asarray(course.images[0], float)
        assert np.abs(last).mean() < 1
        assert course.timesteps == sorted(course.timesteps, reverse=True)
        assert len(course.series["guidance_norm"][0]) == STEPS
        assert course.seconds > 0
    assert found.guarded.series["guidance_norm"][0] == pytest.approx(found.reports[0].series["guidance_norm"])


def test_a_run_has_a_scheduler_of_its_own(model: Model) -> None:
    twin = model.own()
    assert twin.unet is model.pipe.unet
    assert twin.scheduler is not model.pipe.scheduler
    twin.scheduler.set_timesteps(3)
    assert model.own().scheduler.num_inference_steps != 3
    assert profile_known(model, None) is not None


def test_the_sessions_own_profile_comes_first(model: Model, profile: Profile) -> None:
    own = replace(profile, scores=profile.scores[1:])
    assert profile_known(model, None) == profile
    assert profile_known(model, own) is own


@pytest.mark.parametrize(("steps", "guidance"), [(4, 2.5), (17, 9.0), (STEPS, 1.0)])
def test_one_profile_serves_every_setting(steps: int, guidance: float, model: Model, embedded: Any, memorized: dict[str, Any]) -> None:
    setting = Setting(memorized["text"], steps=steps, guidance=guidance, mode="observe")
    events = emitted(lambda emit: compare(model, setting, None, emit))
    assert {type(event) for event in events} == {Comparison}  # nothing was calibrated
    generator = torch.Generator().manual_seed(0)
    output = guard(embedded, GuardConfig("observe"))(setting.prompt, generator=generator, **setting.call)
    assert events[-1].reports == output.guard
    assert (output.guard[0].verdict, output.guard[0].error) == ("flagged", None)
    assert events[-1].unguarded.evaluations == [steps * (2 if guidance > 1 else 1)]
    assert events[-1].guarded.evaluations == [events[-1].unguarded.evaluations[0] + output.guard[0].extra_evaluations]


def test_a_model_without_a_profile_is_calibrated_with_progress_and_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdguard.demo.profiles.QUICK_CALIBRATION", 12)
    other = Model("tiny", tiny, {"num_inference_steps": 3, "guidance_scale": 4.0})
    *progress, made = emitted(lambda emit: find_or_make_profile(other, 0.2, None, emit))
    assert isinstance(made, Profile)
    assert {event.doing for event in progress} == {"No profile is known for this model: calibrating, once a session"}
    assert (progress[-1].done, progress[-1].total) == (12, 12)
    assert emitted(lambda emit: find_or_make_profile(other, 0.2, made, emit)) == []


def test_another_model_has_no_training_pictures(tiny: Any, profile_for: Callable[..., Profile]) -> None:
    other = Model("tiny", tiny, {"num_inference_steps": 3, "guidance_scale": 4.0})
    setting = Setting("a cat", steps=3, guidance=4.0, images=2)
    found = emitted(lambda emit: compare(other, setting, profile_for(tiny, 1e6), emit))[-1]
    assert found.done
    assert [report.verdict for report in found.reports] == ["clean"] * 2
    assert found.nearest == found.ratios_before == found.ratios_after == []
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found.unguarded.images, found.guarded.images, strict=True)] == [
        True
    ] * 2


def test_too_few_prompts_for_a_rate_are_refused_before_anything_is_measured(model: Model) -> None:
    with pytest.raises(BadInput, match="needs 99 scored prompts; of 12 prompts 8 are scored"):
        make_profile(model, ["a cat"] * 12, 0.01, print)
    with pytest.raises(BadInput, match="of 2 prompts 0 are scored"):
        make_profile(model, ["a cat"] * 2, 0.01, print)


def test_why_has_the_librarys_explanation_and_report(model: Model, embedded: Any, memorized: dict[str, Any]) -> None:
    setting = Setting(memorized["text"], 1)
    found = emitted(lambda emit: why(model, setting, None, emit))[-1]
    assert isinstance(found, Why)
    assert found.explanation == explain(embedded, memorized["text"], 1, **CALL)
    generator = torch.Generator().manual_seed(1)
    expected = guard(embedded, GuardConfig("observe"))(memorized["text"], generator=generator, **CALL).guard[0]
    assert (found.report.verdict, found.report.score, found.report.signals) == (expected.verdict, expected.score, expected.signals)


def test_why_says_what_steering_does_of_a_flagged_prompt(model: Model, embedded: Any, memorized: dict[str, Any]) -> None:
    seed = memorized["copied_seeds"][0]
    found = emitted(lambda emit: why(model, Setting(memorized["text"], seed), None, emit))[-1]
    expected = guard(embedded, GuardConfig())(memorized["text"], generator=torch.Generator().manual_seed(seed), **CALL).guard[0]
    assert found.steered == expected
    assert emitted(lambda emit: why(model, Setting(ORDINARY), None, emit))[-1].steered is None


def steered_with(**passed: Any) -> GuardReport:
    return GuardReport("panda at qux canyon", 0, "steered", 6.0, 2.9, 0.001, steering={"passed": passed, "attempts": [passed]})


@pytest.mark.parametrize(
    ("blame", "report", "says", "crossed"),
    [
        ([0.1, 0.0, 0.9, 0.2], steered_with(method="rewording", wording="a panda", dropped=["qux"]), "agree: “qux” pulls most", ["Qux,"]),
        (
            [0.9, 0.0, 0.1, 0.2],
            steered_with(method="rewording", wording="a panda", dropped=["qux"]),
            "“panda”, stays: blame is of the guidance norm",
            ["Qux,"],
        ),
        (
            [0.9, 0.0, 0.1, 0.2],
            steered_with(method="rewording", wording="a photo of <b>", dropped=[]),
            "no word goes. The same words",
            [],
        ),
        ([0.9, 0.0, 0.1, 0.2], steered_with(method="neutral blend", share=0.4), "Steered by neutral blend", []),
        (
            [0.9, 0.0, 0.1, 0.2],
            GuardReport("x", 0, "withheld", 6.0, steering={"passed": None, "attempts": [{}, {}]}),
            "No correction held (2 tried)",
            [],
        ),
    ],
)
def test_blame_and_steering_agree_or_it_is_said_why_not(
    blame: list[float], report: GuardReport, says: str, crossed: list[str], profile: Profile
) -> None:
    explained = pytest.importorskip("sdguard.demo.why_tab").explained
    flagged = GuardReport("panda at qux canyon", 0, "flagged", 6.0, 2.9, 0.001, series={name: [1.0] for name in SERIES})
    explanation = Explanation("panda at Qux, canyon", 0, 1.0, ["panda", "at", "Qux,", "canyon"], blame, blame, 1.0, [[0.0]], [[0.0]])
    page = explained(Why(Setting(explanation.prompt), explanation, flagged, Image.new("RGB", (8, 8)), profile, report))
    assert says in page
    assert re.findall("<s>(.*?)</s>", page) == crossed
    assert "<b>" not in page


def test_a_scan_counts_what_is_done_and_ranks(model: Model, memorized: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([ORDINARY] + [f"a cat in snow {i}" for i in range(9)] + [memorized["text"]]))
    events = emitted(lambda emit: scan_prompts(model, uploaded_prompts(str(path)), 1, 0.05, 0.01, None, emit))
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)
    assert done[-1] == 11
    assert events[-1].table.prompt.iloc[0] == memorized["text"]
    assert len(events[-1].table) == 11


def test_work_holds_nothing_of_the_model_where_it_rests(model: Model, tmp_path: Path) -> None:
    """Somebody else has a turn there, and would wait for ever."""
    path = tmp_path / "prompts.txt"
    path.write_text("a cat in snow\na dog in fog\n")
    free: dict[str, bool] = {}  # by what is done: whether another thread could take the denoiser whenever it rested

    def emit(event: Any) -> None:
        if isinstance(event, Progress) and event.rests:
            free[event.doing] = False
            lock = lock_of(model.pipe.unet)

            def other() -> None:
                if lock.acquire(blocking=False):
                    lock.release()
                    free[event.doing] = True

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    scan_prompts(model, uploaded_prompts(str(path)), 1, 0.05, 0.01, None, emit)
    why(model, Setting(ORDINARY, steps=4), None, emit)
    make_profile(model, [f"a cat number {i}" for i in range(9)], 0.4, emit)
    words = ["Scanning", "Making the picture", "Leaving out one word after the other", "Calibrating"]
    assert free == dict.fromkeys(words, True)


def test_the_opening_is_a_copy_that_was_steered_and_an_ordinary_pair_that_is_one(model: Model) -> None:
    memorized, ordinary = make_opening(model)
    assert [memorized.setting.prompt, ordinary.setting.prompt] == opening_prompts(model)
    assert (memorized.reports[0].verdict, memorized.copied(0)) == ("steered", (True, False))
    assert (ordinary.reports[0].verdict, ordinary.copied(0), ordinary.identical(0)) == ("clean", (False, False), True)
    assert emitted(lambda emit: compare(model, ordinary.setting, None, emit))[-1].reports == ordinary.reports


def test_the_opening_waits_for_its_turn(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdguard.demo.opening.compare", lambda model, setting, own, emit: emit(setting.prompt))
    other = replace(model, turns=Turns())
    entered, leave = threading.Event(), threading.Event()

    def work(emit: Emit) -> None:
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=other.turns.taken(Client("1.2.3.4", "a"), work), args=(print,))
    thread.start()
    assert entered.wait(5)
    opening = begin_opening(other)
    time.sleep(0.2)
    assert not opening.done()
    leave.set()
    assert opening.result(5) == opening_prompts(model)
    thread.join()


def test_an_opening_that_fails_is_no_end_of_the_page(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("sdguard.demo.opening.compare", fail)
    assert isinstance(begin_opening(model).exception(5), RuntimeError)


def test_of_a_model_of_which_nothing_is_known_nothing_is_run_unasked(tiny: Any) -> None:
    assert opening_prompts(Model("tiny", tiny, {}, examples=embedded_examples())) == []


def test_the_examples_are_of_every_kind() -> None:
    examples = embedded_examples()
    assert list(dict.fromkeys(example.kind for example in examples)) == ["verbatim", "template", "ordinary", "near miss"]
    assert len({example.text for example in examples}) == len(examples) == 8
    thing = examples[0].text.split(" at ")[0]
    assert thing in next(example.text for example in examples if example.kind == "ordinary")


def test_a_scan_of_the_example_list_discovers_what_is_memorized(model: Model) -> None:
    save_list = pytest.importorskip("sdguard.demo.scan_tab").save_list
    memorized = {text for kind in ("verbatim", "template") for text in embedded_captions(kind)[:3]}
    prompts = uploaded_prompts(save_list(embedded_list()))
    assert prompts.tolist() == sorted(prompts)
    assert len(memorized & set(prompts)) == len(memorized) == 6
    events = emitted(lambda emit: scan_prompts(model, prompts, 1, 0.05, 0.01, None, emit))
    assert set(events[-1].table.prompt[events[-1].table.discovered]) == memorized


# geometry


@pytest.mark.parametrize("sharpness", [(1.0, 1.0), (0.2, 1.0)])
def test_a_slice_of_a_gaussian_is_its_log_density(sharpness: tuple[float, float]) -> None:
    d, scale = 12, 0.7
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)))[0]
    precision = torch.linspace(sharpness[0], sharpness[1], d) / scale**2
    matrix = basis @ torch.diag(precision) @ basis.T
    centre = torch.randn(1, d, 1, 1, generator=torch.Generator().manual_seed(2))

    def score(x: Tensor) -> Tensor:
        return -((x - centre).flatten(1) @ matrix).view_as(x)

    start = torch.randn(1, d, 1, 1, generator=torch.Generator().manual_seed(3))
    found = slice_of(score, centre, scale, start, d)
    expected = -(found.offsets[None, :] ** 2 * sharpness[0] + found.offsets[:, None] ** 2 * sharpness[1]) / 2
    assert found.heights == pytest.approx(expected, abs=0.02)
    assert found.steepness == pytest.approx(sharpness, rel=0.01)
    assert found.rest < 0.01
    assert found.offsets[[0, -1]].tolist() == pytest.approx([-REACH, REACH])


@pytest.mark.parametrize(("sharpness", "widths"), [((1.0, 1.0), (2.35, 2.35)), ((0.2, 1.0), (5.27, 2.35))])
def test_a_peak_is_drawn_as_wide_and_as_high_as_it_is(sharpness: tuple[float, float], widths: tuple[float, float]) -> None:
    offsets = np.linspace(-REACH, REACH, SIDE)
    down, right = np.meshgrid(offsets, offsets, indexing="ij")
    cut = Slice(offsets, -(right**2 * sharpness[0] + down**2 * sharpness[1]) / 2, 0.0, sharpness)
    drawn = geometry_charts.refined(cut)
    middle = len(drawn) // 2
    spacing = 2 * REACH / (len(drawn) - 1)
    assert drawn.max() == pytest.approx(drawn[middle, middle]) == pytest.approx(1)
    for line, width in zip((drawn[middle], drawn[:, middle]), widths, strict=True):
        assert (line > 0.5).sum() * spacing == pytest.approx(width, abs=1.01 * spacing)  # full width at half maximum
    shown = geometry_charts.surface(cut, "peak", "sg-red", 2.0)
    heights = [float(value) for value in re.findall(r"--up:([\d.]+)", shown)]
    assert max(heights) == pytest.approx(0.5, abs=0.05)  # half of what the scale goes to
    assert min(heights) == 0  # the floor


def test_what_is_over_the_scale_is_cut_off_there() -> None:
    offsets = np.linspace(-REACH, REACH, SIDE)
    rising = Slice(offsets, np.tile(3 * offsets, (SIDE, 1)), 0.0, (0.0, 0.0))
    shown = geometry_charts.surface(rising, "cliff", "sg-red", 2.0)
    assert max(float(value) for value in re.findall(r"--up:([\d.]+)", shown)) == 1.0
    ups = [float(y) for path in re.findall(r' d="M([^"]*)Z"', shown) for _, y in (corner.split() for corner in path.split("L"))]
    assert min(ups) >= 14.0


def test_a_potential_of_a_mixture_is_its_log_density() -> None:
    at = np.linspace(-3, 3, 49)
    y, x = np.meshgrid(at, at, indexing="ij")
    parts = [(0.7, -1.0, 0.0, 0.6), (0.3, 1.2, 0.8, 0.5)]
    densities = [w * np.exp(-((x - mx) ** 2 + (y - my) ** 2) / (2 * v)) / v for w, mx, my, v in parts]
    total = np.sum(densities, axis=0)
    along = sum(p * (mx - x) / v for p, (_, mx, _, v) in zip(densities, parts, strict=True)) / total
    across = sum(p * (my - y) / v for p, (_, _, my, v) in zip(densities, parts, strict=True)) / total
    heights, rest = potential(along, across, at[1] - at[0])
    expected = np.log(total) - np.log(total)[24, 24]
    assert heights == pytest.approx(expected, abs=0.03)
    assert rest < 0.01


def test_what_is_no_gradient_is_told() -> None:
    at = np.linspace(-1, 1, 21)
    y, x = np.meshgrid(at, at, indexing="ij")
    heights, rest = potential(-y, x, at[1] - at[0])
    assert rest > 0.9  # not quite 1: along the edges of the grid nothing tells a rotation from a slope
    assert np.abs(heights).max() < 0.2
    _, mixed = potential(-x - y, -y + x, at[1] - at[0])
    assert mixed == pytest.approx(0.5**0.5 * rest, abs=0.02)


def test_a_memorized_prompt_leaves_fewer_directions_free(model: Model, memorized: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdguard.demo.landscape.SIDE", 9)
    events = emitted(lambda emit: landscape(model, [memorized["text"], ORDINARY], Setting(ORDINARY), 6, emit))
    found = events[-1]
    assert isinstance(found, Landscape)
    assert all(isinstance(event, Progress) for event in events[:-1])
    assert found.dimensions == 1024
    assert [len(row) for row in (*found.free, *found.density)] == [STEPS] * 4
    assert [len(row) for row in found.lid] == [len(found.levels)] * 2
    assert np.sum(found.weights, axis=1) == pytest.approx([1, 1], abs=1e-4)
    assert found.free[0][6] < found.free[1][6]
    assert found.slices[0].steepness[0] > found.slices[1].steepness[0]
    assert found.slices[0].heights.shape == (9, 9)
    with pytest.raises(BadInput, match="step must lie between 1 and 10; it is 11"):
        landscape(model, [ORDINARY, ORDINARY], Setting(ORDINARY), 10, print)


# figures

WICKED = '<img src=x onerror="alert(1)">'


def test_text_stays_text(profile: Profile) -> None:
    image = Image.new("RGB", (4, 4))
    report = GuardReport(WICKED, 0, "flagged", 1.0, 0.5, 0.01, error=WICKED)
    drawn = [
        elements.status(WICKED, "error", 0.5),
        elements.hint(WICKED),
        elements.slider(image, image, WICKED),
        elements.picture(image, WICKED),
        elements.verdict(report),
        elements.facts([(WICKED, WICKED)]),
        elements.filmstrip(WICKED, [(0, image)]),
        elements.highlighted_words([WICKED], [0.5], WICKED),
        elements.table([WICKED], [[WICKED]]),
        charts.chart(WICKED, [charts.Line(WICKED, [(0.0, 1.0)], "sg-red")], WICKED, WICKED, caption=WICKED),
        charts.histogram(WICKED, profile.scores, 1.0, [(WICKED, 2.0, "sg-red")], WICKED),
    ]
    for html in drawn:
        assert "<img src=x" not in html
        assert "&lt;img" in html


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 10) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert charts.ticks(-0.15, 1.15) == pytest.approx([0, 0.5, 1])
    assert charts.ticks(3, 3) == [3]
    for low, high in ((3.2, 4.1), (-7, 1000), (0.001, 0.002)):
        found = charts.ticks(low, high)
        assert 2 <= len(found) <= 8
        assert low - 1e-9 <= min(found)
        assert max(found) <= high + 1e-9


def test_the_table_of_signals_has_what_was_read_against_ordinary_prompts(profile: Profile) -> None:
    usual = statistics.median(profile.values["guidance_norm"])
    first = profile.cascade.signals[0]
    report = GuardReport(ORDINARY, 0, signals={first: {"value": 1.5, "z": 2.25}}, series={"guidance_norm": [usual], "denoised_norm": [1.0]})
    table = signal_views.signals_table(report, profile)
    rows = [re.findall("<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows[0] == [signal_views.plain(first), "1.5", "+2.2", signal_views.price(first), "decides"]
    assert rows[1] == ["Guidance norm", f"{usual:.3g}", "+0.0", "free", "watched"]
    assert [row[0] for row in rows[2:]] == [signal_views.plain(name) for name in profile.cascade.signals[1:]]
    assert {row[1] for row in rows[2:]} == {"not bought"}
    roles = {row[0]: row[4] for row in rows[2:]}
    assert (roles["Persistence"], roles["Sharpness"]) == ("decides in doubt", "reported in doubt")


def test_a_profile_is_described_by_its_model(profile: Profile) -> None:
    described = pytest.importorskip("sdguard.demo.calibrate_tab").described
    shown = described(profile, 0.01, own=False)
    for told in ("UNet2DConditionModel, 64 × 64", profile.model["weights"]["unet"]["float32"][:8], f"{profile.prompts:,} scored"):
        assert told in shown
    assert "the model, or your cache" in shown
    assert "this session" in described(profile, 0.01, own=True)
    assert "No profile is known for this model" in described(None, 0.01, own=False)


def test_the_api_does_not_calibrate(tiny: Any) -> None:
    gr, generate_tab = pytest.importorskip("gradio"), pytest.importorskip("sdguard.demo.generate_tab")
    with gr.Blocks(analytics_enabled=False) as page:
        generate_tab.endpoint(Model("tiny", tiny, {"num_inference_steps": 3, "guidance_scale": 4.0}))
    (generate,) = (event.fn for event in page.fns.values())
    with pytest.raises(gr.Error, match="No profile is known for this model"):
        generate(None, "a cat")


# the command


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("sdguard.demo.")]:
        if name.rpartition(".")[2] in ("app", "page", "generate", "why", "geometry", "scan", "calibrate"):
            monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr.split() == ["The", "demo", "needs", "Gradio:", "pip", "install", "'sdguard[demo]'."]


def test_a_model_that_is_none_is_one_sentence() -> None:
    pytest.importorskip("gradio")
    result = CliRunner().invoke(app, ["demo", "--model", "no/such/model"])
    assert result.exit_code == 1
    assert "There is no model at no/such/model" in " ".join(result.stderr.split())
