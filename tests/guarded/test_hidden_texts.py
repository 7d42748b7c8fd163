"""Embeddings that a callback writes into past torch's count of writes, as through ``.data``: judged as if torch had counted it."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from families import PROMPTS, build, call, modular, profile_for
from torch import Tensor

import sdguard
from sdguard import GuardConfig, GuardReport, MemorizationError
from sdguard.denoiser import record as record_module
from sdguard.guarded import guider as guider_module
from sdguard.guarded import pipeline as pipeline_module
from sdguard.guarded import run as run_module
from sdguard.guarded.guider import GuardedGuidance

FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
#: of three images of one prompt and one noise, the one whose text changes
ROW = 1
#: puts values into a tensor
Way = Callable[[Tensor, Tensor], Any]
#: of these torch takes no note
HIDDEN: dict[str, Way] = {
    "data": lambda held, values: held.data.copy_(values),
    "numpy": lambda held, values: np.copyto(held.numpy(), values.numpy()),
    "other storage": lambda held, values: setattr(held, "data", values.clone()),
}
through_data = HIDDEN["data"]


@pytest.fixture(autouse=True)
def given_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile that is given is taken for any run."""
    for module in (pipeline_module, guider_module):
        monkeypatch.setattr(module, "profile_of", lambda pipe, config, adapter_scale: config.profile)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not read call by call."""
    monkeypatch.setattr(record_module, "at_hand", lambda tensor: False)


@pytest.fixture
def pipe(request: pytest.FixtureRequest, embedded: Any) -> Any:
    return build(getattr(request, "param", FAMILIES[0]), embedded.tokenizer)


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7) for _ in range(3)]


def written(pipe: Any, texts: dict[int, Tensor], way: Way = through_data, **extra: Any) -> Any:
    """A run into whose embeddings those of ``texts`` are written after calls, by call."""

    def write(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step in texts:
            way(values["prompt_embeds"], texts[step])
        return values

    callback = {"callback_on_step_end": write, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    return call(pipe, PROMPTS[1:2] * 3, generator=seeds(), **callback, **extra)


def guarded(pipe: Any, threshold: float = 1e6, mode: Any = "steer", **config: Any) -> Any:
    return sdguard.guard(pipe, GuardConfig(mode, profile=profile_for(threshold), **config))


class Case(NamedTuple):
    """Embeddings as a callback is shown them, of which ``strong`` alone is flagged under ``threshold``; it and ``weak`` differ from those
    given in one image."""

    given: Tensor
    weak: Tensor
    strong: Tensor
    threshold: float


def with_text(given: Tensor, text: Tensor) -> Tensor:
    changed = given.clone()
    changed[len(given) - 3 + ROW] = text
    return changed


def chosen(given: Tensor, score: Callable[[Tensor], float]) -> Case:
    """A case of random texts, by the scores of images that are given them."""
    before = score(given)
    texts = [with_text(given, 3 * torch.randn(given.shape[1:], generator=torch.Generator().manual_seed(seed))) for seed in range(8)]
    scores = [score(text) for text in texts]
    highest, weak = max(scores), with_text(given, 1.001 * given[len(given) - 3 + ROW])
    assert highest > 1.02 * before
    return Case(given, weak, texts[scores.index(highest)], (highest * before) ** 0.5)


def case(pipe: Any) -> Case:
    found: list[Tensor] = []
    written(pipe, {0: torch.zeros(0)}, lambda held, values: found.append(held.clone()))
    return chosen(found[0], lambda text: written(guarded(pipe), {1: text}, Tensor.copy_).guard[ROW].score)


def judgement(report: GuardReport) -> dict[str, Any]:
    """A report without what was spent and watched: calls without guidance are not watched where nobody sees that their text is another.

    Numbers are to five digits, as a batch of another size rounds differently on some processors.
    """
    signals = {name: {key: f"{value:.5g}" for key, value in found.items()} for name, found in report.signals.items()}
    plain = asdict(replace(report, series={}, extra_evaluations=0, id="", time=""))
    return {"reason": report.reason, **plain, "score": f"{report.score:.5g}", "signals": signals}


def only_row(reports: Any, verdict: str, at: int) -> bool:
    """Whether one image is judged so, at that call, and the others are clean."""
    return [(report.verdict, report.flagged_at) for report in reports] == [
        (verdict, at) if row == ROW else ("clean", None) for row in range(3)
    ]


@pytest.mark.parametrize("pipe", FAMILIES, indirect=True)
def test_what_is_written_unseen_is_reported_as_what_is_written_seen(pipe: Any) -> None:
    _, _, strong, threshold = case(pipe)
    seen = written(guarded(pipe, threshold), {1: strong}, Tensor.copy_)
    assert only_row(seen.guard, "withheld", 2)
    for way in HIDDEN.values():
        plain, unseen = (written(of, {1: strong}, way) for of in (pipe, guarded(pipe, threshold)))
        assert list(map(judgement, unseen.guard)) == list(map(judgement, seen.guard))
        assert [np.array_equal(unseen.images[i], plain.images[i]) for i in range(3)] == [i != ROW for i in range(3)]
        assert not unseen.images[ROW].any()


def test_it_is_told_when_it_is_written_back_too(pipe: Any) -> None:
    given, _, strong, threshold = case(pipe)
    output = written(guarded(pipe, threshold), {1: strong, 2: given})
    assert only_row(output.guard, "withheld", 2)
    assert output.guard[ROW].error is None


def test_it_is_told_when_it_is_written_over_seen(pipe: Any) -> None:
    given, _, strong, threshold = case(pipe)

    def first_unseen(held: Tensor, values: Tensor) -> None:
        (held.data if values is strong else held).copy_(values)

    assert only_row(written(guarded(pipe, threshold), {0: strong, 1: given}, first_unseen).guard, "withheld", 1)


def test_each_image_is_flagged_at_the_call_that_had_its_own(pipe: Any) -> None:
    """Of two images with texts written in, each at another call."""
    _, _, strong, threshold = case(pipe)
    both = strong.clone()
    both[-1] = strong[3 + ROW]
    output = written(guarded(pipe, threshold, "observe"), {0: strong, 2: both})
    assert [report.flagged_at for report in output.guard] == [None, 1, 3]


def test_of_several_those_that_are_not_known_any_more_are_not_clean(pipe: Any) -> None:
    """The flagged text first and another on top of it."""
    _, weak, strong, threshold = case(pipe)
    assert {report.verdict for report in written(guarded(pipe, threshold), {0: weak}).guard} == {"clean"}
    output = written(guarded(pipe, threshold), {0: strong, 1: weak})
    assert only_row(output.guard, "withheld", 1)
    assert "several calls" in output.guard[ROW].reason


def test_on_a_cpu_each_is_judged_at_its_call(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(pipeline_module, "profile_of", lambda pipe, config, adapter_scale: config.profile)
    _, weak, strong, threshold = case(pipe)
    seen, unseen = (written(guarded(pipe, threshold), {0: strong, 1: weak}, way) for way in (Tensor.copy_, through_data))
    unseen_each, seen_each = ([asdict(replace(report, id="", time="")) for report in output.guard] for output in (unseen, seen))
    assert unseen_each == seen_each
    assert only_row(unseen.guard, "withheld", 1)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_an_ordinary_text_stays_clean_for_two_evaluations(guidance: float, pipe: Any) -> None:
    strong = case(pipe).strong
    text = strong if guidance > 1 else strong[3:]
    plain = written(pipe, {1: text}, guidance_scale=guidance)
    output, before = (written(guarded(pipe), texts, guidance_scale=guidance) for texts in ({1: text}, {}))
    assert [report.verdict for report in output.guard] == ["clean"] * 3
    assert [report.extra_evaluations - of.extra_evaluations for report, of in zip(output.guard, before.guard, strict=True)] == [2] * 3
    assert np.array_equal(output.images, plain.images)


def test_what_is_written_where_no_prompt_is_costs_nothing(pipe: Any) -> None:
    given, _, strong, _ = case(pipe)
    changed = torch.cat([strong[3:], given[3:]])
    assert [(report.verdict, report.extra_evaluations) for report in written(guarded(pipe), {1: changed}).guard] == [("clean", 0)] * 3


def test_it_is_told_in_a_run_that_is_ended_early(pipe: Any) -> None:
    given, _, strong, threshold = case(pipe)

    def write(held: Tensor, values: Tensor) -> None:
        through_data(held, values)
        pipe._interrupt = values is given

    output = written(guarded(pipe, threshold), {0: strong, 2: given}, write)
    assert only_row(output.guard, "withheld", 1)
    assert len(output.guard[ROW].series["guidance_norm"]) == 3


def test_it_raises_where_that_is_asked_for(pipe: Any) -> None:
    _, _, strong, threshold = case(pipe)
    with pytest.raises(MemorizationError, match=f"Image {ROW}: predicted to be memorized") as raised:
        written(guarded(pipe, threshold, "block", on_failure="raise"), {1: strong})
    assert only_row(raised.value.reports, "flagged", 2)


def test_what_cannot_be_read_is_withheld(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strong = case(pipe).strong
    judge, calls = run_module.judge, []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise ArithmeticError("no luck")
        return judge(*args)

    monkeypatch.setattr(run_module, "judge", once)
    output = written(guarded(pipe), {1: strong})
    assert only_row(output.guard, "withheld", 2)
    assert output.guard[ROW].error == "ArithmeticError: no luck"


class Writes(GuardedGuidance):
    """What a block of the user's own may do: at the third step it writes other embeddings into the denoiser's."""

    brought: ClassVar[Tensor]
    way: ClassVar[Any]

    def prepare_inputs(self, data: dict[str, tuple[Any, Any]]) -> Any:
        if self._step == 2:
            Writes.way(data["prompt_embeds"][0], self.brought)
        return super().prepare_inputs(data)


def test_a_guider_withholds_it_too(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = modular("StableDiffusionXLModularPipeline", embedded.tokenizer)

    def run(text: Tensor, way: Way, threshold: float = 1e6) -> tuple[Any, Any]:
        monkeypatch.setattr(Writes, "brought", text, raising=False)
        monkeypatch.setattr(Writes, "way", way, raising=False)
        guider = Writes(pipe, guard=GuardConfig(profile=profile_for(threshold)), guidance_scale=4.0)
        pipe.update_components(guider=guider)
        sized = {"height": 16, "width": 16, "num_inference_steps": 4}
        return pipe(prompt=PROMPTS[1:2] * 3, generator=seeds(), **sized, output_type="latent", output="images"), guider

    found: list[Tensor] = []
    run(torch.zeros(0), lambda held, values: found.append(held.clone()))
    _, _, strong, threshold = chosen(found[0], lambda text: run(text, Tensor.copy_)[1].reports[ROW].score)
    _, seen = run(strong, Tensor.copy_, threshold)
    latents, unseen = run(strong, through_data, threshold)
    assert only_row(unseen.reports, "withheld", 2)
    assert list(map(judgement, unseen.reports)) == list(map(judgement, seen.reports))
    assert [bool(of.any()) for of in latents] == [i != ROW for i in range(3)]
