"""``python -m benchmarks leave-one-out``: model directories, what their cases are for, labels, rules and the choice between them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import build
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from benchmarks import leave_one_out
from benchmarks.__main__ import app
from benchmarks.first_use import calibration_cost
from benchmarks.leave_one_out import CHOSEN, MEAN, NAME, ORACLE, RANKED, SHIPPED, ranking, read, shipped_rule
from benchmarks.models import SEEDS, SETTING_FILE, labelled, read_model, read_setting, roles, twins
from benchmarks.rules import (
    BOUGHT,
    FREE,
    GEOMETRY,
    MOST,
    READINGS,
    Fitted,
    Readings,
    Rule,
    calibrated,
    choose,
    collapsed,
    merit,
    merits,
    value_of,
)
from sdguard.decision.calibration import calibrate
from sdguard.decision.cascade import BY_NAME, PLAN, Cascade
from sdguard.denoiser.probe import probe_run
from sdguard.files.inputs import BadInput

GROUPS = {"repeated 60": (60, True), "repeated 9": (9, True), "unseen, same make": (0, False), "ordinary": (0, False)}
CASES = [
    {"caption": f"{group} {i}", "group": group, "reps": reps, "target": 2 * n + i if has else None}
    for n, (group, (reps, has)) in enumerate(GROUPS.items())
    for i in range(2)
]


def written(folder: Path, pipe: Any, **changed: Any) -> Path:
    """A tiny model directory, with some of its files' contents changed."""
    pipe.save_pretrained(folder)
    torch.manual_seed(3)
    torch.save(changed.get("targets", torch.randn(4, 4, 8, 8).half()), folder / "targets.pt")
    cases = changed.get("cases", CASES)
    (folder / "cases.json").write_text(cases if isinstance(cases, str) else json.dumps(cases))
    (folder / "ordinary.txt").write_text(changed.get("ordinary", "\n".join(f"a thing number {i}" for i in range(12))))
    return folder


@pytest.fixture(scope="module")
def folder(embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = build("StableDiffusionPipeline", embedded.tokenizer)
    return written(tmp_path_factory.mktemp("models") / "tiny", pipe)


def made_up(seed: int, count: int = 60) -> Readings:
    """Readings of a model on which every reading tells copies from ordinary prompts somewhat."""
    rng = np.random.default_rng(seed)
    role = np.repeat(["memorized", "never seen", "ordinary", "too rarely seen"], count)
    lift = np.repeat([2.0, 0.7, 0.0, 0.5], count)

    def values(shift: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({name: np.exp(shift + rng.normal(size=len(shift))) for name in READINGS})

    cases = values(lift).assign(role=role, copy=role == "memorized", case=np.arange(len(role)) // 2)
    cases = cases.assign(resembles=np.where(cases["copy"], 0.99, rng.uniform(0.5, 1, len(role))), twin=lift, group=role, reps=0, ratio=1.0)
    own, shipped = (values(np.zeros(300)).assign(same=rng.uniform(-1, 0.8, 300)) for _ in range(2))
    return Readings(cases, own, shipped)


def test_a_directory_is_read_and_its_groups_have_the_roles_that_follow_from_their_counts(folder: Path) -> None:
    model = read_model(folder)
    assert model.name == "tiny"
    assert model.targets.shape == (4, 4, 8, 8)
    assert model.targets.dtype == torch.float32
    assert model.cases.role.tolist() == [r for r in ("memorized", "too rarely seen", "never seen", "ordinary") for _ in range(2)]
    counts = model.samples.groupby("role").size().to_dict()
    assert counts == {"memorized": 2 * SEEDS, "too rarely seen": 2 * SEEDS, "never seen": 2 * SEEDS, "ordinary": 4}
    assert model.samples.seed[:5].tolist() == [1000, 1001, 1002, 1003, 1017]


def test_what_was_shown_once_is_not_memorized_though_nothing_was_shown_more_often() -> None:
    table = pd.DataFrame([("verbatim 1", 1, 0), ("never seen", 0, -1)], columns=["group", "reps", "target"])
    assert roles(table) == ["too rarely seen", "never seen"]


def test_a_template_is_memorized_or_nothing_and_one_count_alone_is_not_too_rare() -> None:
    cases = [("template 200", 200, 0), ("template 0", 0, -1), ("verbatim 30", 30, 1), ("verbatim 900", 900, 2), ("verbatim 30", 30, -1)]
    table = pd.DataFrame(cases, columns=["group", "reps", "target"])
    assert roles(table) == ["memorized", "none", "too rarely seen", "memorized", "too rarely seen"]
    assert roles(table[3:4]) == ["memorized"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cases": "{"}, "cannot be read as JSON"),
        ({"cases": []}, "a list of cases"),
        ({"cases": [{"caption": "a", "group": "g", "reps": 1}]}, "case 0 has to have"),
        ({"cases": [{**CASES[0], "caption": " "}]}, "have to be text"),
        ({"cases": [{**CASES[0], "reps": -1}]}, "a whole number from 0, not -1"),
        ({"cases": [{**CASES[0], "reps": True}]}, "a whole number from 0, not True"),
        ({"cases": [{**CASES[0], "target": 4}]}, "one of the 4 targets"),
        ({"cases": CASES[4:]}, "no case that was shown"),
        ({"targets": {"a": 1}}, "one tensor of at least two latents"),
        ({"targets": torch.zeros(4, 8)}, "one tensor of at least two latents"),
        ({"ordinary": "\n \n"}, "holds no caption"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(folder: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    class Empty:
        def save_pretrained(self, to: Path) -> None:
            (to / "model_index.json").write_text("{}")

    with pytest.raises(BadInput, match=said) as error:
        read_model(written(tmp_path, Empty(), **changed))
    assert "\n" not in str(error.value)


def test_a_model_is_drawn_at_the_setting_of_its_directory_and_else_at_the_usual_one(tmp_path: Path) -> None:
    path = tmp_path / SETTING_FILE
    assert read_setting(path) == (20, 7.5)
    path.write_text('{"num_inference_steps": 10, "guidance_scale": 3}')
    assert read_setting(path) == (10, 3.0)
    for text in ("[]", "{", '{"num_inference_steps": 0, "guidance_scale": 3}', '{"num_inference_steps": 5, "guidance_scale": "x"}'):
        path.write_text(text)
        with pytest.raises(BadInput, match="a whole number from 1"):
            read_setting(path)


def test_a_directory_without_its_files_is_said_to_lack_them(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no model_index"):
        read_model(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "cases.json").write_text("[]")
    with pytest.raises(BadInput, match=r"has no targets\.pt and no ordinary\.txt"):
        read_model(tmp_path)
    result = CliRunner().invoke(app, ["leave-one-out", str(tmp_path)])
    assert result.exit_code == 1


def test_a_copy_is_near_its_target_and_another_family_far() -> None:
    targets = torch.randn(3, 4, 8, 8)
    targets[1] = targets[0] + 0.1
    latents = torch.stack([targets[0] + 0.01 * torch.randn(4, 8, 8), 3 * targets[2] + 1, torch.randn(4, 8, 8)])
    found = labelled(latents, targets, np.array([0, 0, 1]))
    assert found["copy"].tolist() == [True, False, False]
    assert labelled(latents[:1], targets, np.arange(3)).ratio[0] == pytest.approx(0.1, rel=0.3)
    assert found.nearest[0] == 0
    assert (found.resembles[:2] > 0.99).all()
    assert found.resembles[2] < 0.5
    pairs = twins(pd.Series([7, 7, 8]), latents)
    assert pairs[0] == pytest.approx(pairs[1])
    assert np.isnan(pairs[2])


def test_readings_under_the_names_of_signals_are_the_signals_and_cost_what_rules_say(tiny: Any) -> None:
    found: dict[str, Any] = {}

    def look(observation: Any) -> None:
        fresh = replace(observation, memo={})
        before = observation.evaluations.clone()
        found["read"] = read(fresh)
        found["cost"] = (observation.evaluations - before).tolist()
        for ours, name in zip(sum(shipped, ()), sum(theirs, ()), strict=True):
            torch.testing.assert_close(found["read"][ours], BY_NAME[name].read(fresh))

    rule = shipped_rule()
    assert rule is not None
    shipped, theirs = (rule.gate, rule.evidence), tuple(stage.fused for stage in PLAN)
    probe_run(tiny, ["a cat", "a dog"], [0, 1], look, num_inference_steps=50, guidance_scale=4.0)
    assert set(found["read"]) == set(READINGS)
    needed = len(frozenset().union(*BOUGHT.values()))
    assert found["cost"] == [needed + GEOMETRY + BY_NAME["bottleneck_shift"].cost] * 2


def test_a_rule_is_scored_as_the_cascade_scores_it() -> None:
    rule, model = shipped_rule(), made_up(0)
    assert rule is not None
    names = dict(zip((*rule.gate, *rule.evidence), (n for stage in PLAN for n in stage.fused), strict=True))
    fitted = Fitted.fit(rule, model.own)
    plan = [stage._replace(signals=stage.fused) for stage in PLAN]
    cascade = Cascade.fit({theirs: model.own[ours].tolist() for ours, theirs in names.items()}, plan)
    assert cascade.stages[0].bound == pytest.approx(fitted.bound, rel=1e-5)
    suspicion = cascade.suspicion({theirs: model.cases[ours].tolist() for ours, theirs in names.items()})
    np.testing.assert_allclose(fitted.stages(model.cases)[1], suspicion, rtol=1e-5, atol=1e-5)
    passed = fitted.passes(model.cases)
    assert fitted.score(model.cases)[passed].min() > fitted.score(model.cases)[~passed].max()


def test_rules_compared_all_at_once_are_worth_what_each_is_alone() -> None:
    model, evidence = made_up(2), ("persistence at 0, relative", "agreement at 0, 2 noises, mean, correlation", "sharpness")
    rules = [Rule(gate, 0.1, evidence, scale) for gate in ((), FREE, ("guidance_norm",)) for scale in ("mean", "median")]
    alone = [merits(Fitted.fit(rule, model.own).score(model.cases)[None], model.cases)[0] for rule in rules]
    np.testing.assert_allclose(value_of(rules, model.own, model.cases), alone, rtol=1e-9)


def test_merit_is_area_and_rate() -> None:
    rng = np.random.default_rng(0)
    copies, others = rng.normal(1, 1, (3, 40)), rng.normal(0, 1, (3, 250))
    for row, value in enumerate(merit(copies, others)):
        truth = np.r_[np.ones(40), np.zeros(250)]
        limit = np.sort(others[row])[-3]  # 2 of 250 are at most 1%
        assert value == pytest.approx(roc_auc_score(truth, np.r_[copies[row], others[row]]) + (copies[row] > limit).mean())


def test_the_choice_sees_nothing_of_the_model_left_out_and_has_every_kind_of_evidence() -> None:
    models = {name: made_up(seed) for seed, name in enumerate("abc")}
    rng = np.random.default_rng(5)
    mixed = {**models, "c": Readings(*(t.iloc[rng.permutation(len(t))].reset_index(drop=True) for t in models["c"]))}
    mixed["c"].cases["copy"] = rng.permutation(mixed["c"].cases["copy"])
    rules = [leave_one_out.rules_for(some, "c")[CHOSEN] for some in (models, mixed)]
    assert rules[0] == rules[1]
    assert set(rules[0].gate) <= set(FREE)
    assert any(name.startswith("persistence") for name in rules[0].evidence)
    assert any(name.startswith("agreement") for name in rules[0].evidence)
    assert rules[0].cost <= MOST
    assert leave_one_out.rules_for(mixed, "a")[CHOSEN] == choose({name: mixed[name] for name in "bc"}, READINGS)


def test_a_reading_that_tells_better_is_chosen() -> None:
    models = {name: made_up(seed) for seed, name in enumerate("ab")}
    good = ("persistence at -2, relative", "agreement at start, 2 noises, mean, distance")
    for model in models.values():
        for name in good:
            model.cases.loc[model.cases["copy"], name] *= 50
    assert set(good) <= set(choose(models, READINGS).evidence)


def test_what_the_left_out_model_lacks_is_not_chosen() -> None:
    models = {name: made_up(seed) for seed, name in enumerate("abc")}
    for model in models.values():
        model.cases.loc[model.cases["copy"], "bottleneck_shift"] *= 1e6
    assert "bottleneck_shift" in {
        *leave_one_out.rules_for(models, "c")[CHOSEN].gate,
        *leave_one_out.rules_for(models, "c")[CHOSEN].evidence,
    }
    for table in models["c"]:
        table["bottleneck_shift"] = np.nan
    rule = leave_one_out.rules_for(models, "c")[CHOSEN]
    assert "bottleneck_shift" not in {*rule.gate, *rule.evidence}


def test_a_control_is_measured_and_not_chosen_on() -> None:
    models = {name: made_up(seed) for seed, name in enumerate("ab")}
    control = made_up(7)
    control.cases["copy"] = False
    with_control = {**models, "control": control}
    assert leave_one_out.rules_for(with_control, "a") == leave_one_out.rules_for(models, "a")
    assert leave_one_out.rules_for(with_control, "control")[CHOSEN] == choose(models, READINGS)


def test_single_signals_are_ranked_by_their_mean_over_the_models_that_memorize() -> None:
    none = (np.nan, np.nan, np.nan)
    areas = {
        ("a", "guidance_norm"): (0.9, 0.86, 0.94), ("b", "guidance_norm"): (0.7, 0.67, 0.73), ("control", "guidance_norm"): none,
        ("a", "sharpness"): (0.95, 0.95, 0.95), ("b", "sharpness"): (0.85, 0.85, 0.85), ("control", "sharpness"): none,
        ("a", "bottleneck_shift"): (1.0, 1.0, 1.0),
    }  # fmt: skip
    rows = [{"left out": m, "rule": s, "told apart": {"never seen, cleaned": {"auc": area}}} for (m, s), area in areas.items()]
    ranked = ranking(rows)
    assert list(ranked) == ["sharpness", "guidance_norm"]  # one has not been read on every model
    assert set(ranked["sharpness"]) == {"a", "b", MEAN}
    np.testing.assert_allclose(ranked["guidance_norm"][MEAN], (0.8, 0.775, 0.825))


def test_prompts_that_collapse_are_set_aside_where_they_score_high() -> None:
    same, suspicion = np.zeros(40), np.arange(40.0)
    same[[39, 36, 31, 2]] = 0.95
    # batches of 8, the most suspicious first: 32 to 39, 24 to 31, and one that has none
    assert np.flatnonzero(collapsed(same, suspicion)).tolist() == [31, 36, 39]
    model = made_up(1)
    rule = Rule((), 1.0, ("guidance_norm",))
    worst = model.own.guidance_norm.nlargest(6).index
    model.own.loc[worst, "same"] = 0.99
    (_, as_it_is, none), (_, checked, aside) = (calibrated(rule, model.own, check) for check in (False, True))
    assert (none, aside) == (0, 6)
    assert checked.prompts + (6 - len([i for i in worst if i % 3 == 0])) == as_it_is.prompts
    assert checked.threshold(0.01) < as_it_is.threshold(0.01)


def test_a_calibration_is_counted_in_rows_of_denoiser_calls(tiny: Any) -> None:
    prompts, seen = [f"a drawing {i}" for i in range(8)], SimpleQueue[int]()  # a list would be put back to what it was
    taken = calibration_cost(tiny, prompts)
    forward = tiny.unet.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.put(len(args[0] if args else kwargs["sample"]))
        return forward(*args, **kwargs)

    tiny.unet.forward = counted
    try:
        calibrate(tiny, prompts)
    finally:
        del tiny.unet.forward
    assert taken == sum(seen.get() for _ in range(seen.qsize())) >= 2 * len(prompts)


def test_the_command_measures_directories_and_writes_no_caption(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(read_model(folder), steps=3)
    monkeypatch.setattr(leave_one_out, "read_model", lambda _: quick)
    monkeypatch.setattr(leave_one_out, "embedded_model", lambda: replace(quick, name="embedded"))
    monkeypatch.setattr(leave_one_out, "shipped_prompts", lambda: [f"a shipped prompt {i}" for i in range(9)])
    monkeypatch.setattr(
        leave_one_out, "rules_for", lambda models, left_out: {CHOSEN: Rule(FREE, 0.1, tuple(BOUGHT)), SHIPPED: shipped_rule()}
    )
    readme = tmp_path / "README.md"
    places = [f"<!-- {name}: python -m benchmarks leave-one-out -->\n<!-- /{name} -->\n" for name in (NAME, RANKED)]
    readme.write_text("".join(places))
    arguments = ["leave-one-out", str(folder), "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--root", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert [(row["left out"], row["rule"]) for row in written["rows"]] == [
        (m, r) for m in ("tiny", "embedded") for r in (CHOSEN, SHIPPED, ORACLE)
    ]
    rows = pd.read_parquet(tmp_path / f"{NAME}.parquet")
    assert not {"caption", "prompt"} & set(rows)
    assert not any(str(case["caption"]) in (tmp_path / f"{NAME}.json").read_text() for case in CASES)
    assert rows.groupby(["model", "prompts"]).size().to_dict()["tiny", "own"] == 12
    assert readme.read_text().count("tiny: ") == 3
