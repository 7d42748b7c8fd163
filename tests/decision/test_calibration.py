"""Profiles: conformal p-values, thresholds, files, and what is refused."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LENIENT
from hypothesis import given
from hypothesis import strategies as st

from sdguard.decision import calibration
from sdguard.decision import cascade as decision
from sdguard.decision.cache import cache_path
from sdguard.decision.calibration import calibrate
from sdguard.decision.cascade import Cascade, Scale, Stage
from sdguard.decision.identity import identity
from sdguard.decision.known_profiles import load_profile
from sdguard.decision.profile import FORMAT, HELD, SAME_PICTURE, MethodStatistics, Profile, ProfileError
from sdguard.decision.store import profile_for
from sdguard.denoiser.probe import read_prompts
from sdguard.observation import Observation
from sdguard.steering.learning import learn_methods
from sdguard.words import document_frequency

values = st.lists(st.floats(0.1, 100), min_size=2, max_size=60)


def profile(norms: list[float]) -> Profile:
    cascade = Cascade((Stage(("guidance_norm",), ("guidance_norm",), None),), {"guidance_norm": Scale(False, 0.0, 1.0)})
    course = {"guidance_norm": [(1.0, 0.1), (2.0, 0.3)]}
    methods = [MethodStatistics("rewording", 0.9, 20.0, 0.4)]
    return Profile(
        {"denoiser": "Tiny", "weights": {"unet": {"float32": "a"}}},
        cascade,
        sorted(norms),
        dict.fromkeys(HELD, sorted(norms)),
        course,
        [900.0, 100.0],
        {"cat": 2},
        methods,
    )


@given(values, st.floats(0.001, 200))
def test_p_value_falls_as_the_norm_rises(norms: list[float], norm: float) -> None:
    made = profile(norms)
    assert 1 / (1 + len(norms)) <= made.p_value(norm * 1.5) <= made.p_value(norm) <= 1


@given(values, st.sampled_from([0.05, 0.1, 0.3]))
def test_no_more_ordinary_prompts_are_flagged_than_promised(norms: list[float], rate: float) -> None:
    """Leave-one-out over any sample is the exchangeability argument itself: at most ``rate`` of its members are flagged."""
    flagged = 0
    for i, norm in enumerate(norms):
        rest = [v for j, v in enumerate(norms) if j != i]
        flagged += len(rest) > 0 and profile(rest).p_value(norm) <= rate
    assert flagged <= rate * len(norms) + 1e-9


@given(st.lists(st.floats(0.1, 100), min_size=20, max_size=60), st.sampled_from([0.05, 0.1, 0.3]))
def test_threshold_and_p_value_are_one_decision(norms: list[float], rate: float) -> None:
    made = profile(norms)
    limit = made.threshold(rate)
    assert made.p_value(limit * 1.0001) <= rate
    assert made.p_value(limit) > rate


def test_a_rate_the_prompts_cannot_support_says_how_many_are_needed() -> None:
    with pytest.raises(ProfileError, match="at least 99 scored ordinary prompts; this profile has 3"):
        profile([1, 2, 3]).threshold(0.01)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    made = profile([3.0, 1.0, 2.0])
    made.save(tmp_path / "deep" / "profile.json")
    assert Profile.load(tmp_path / "deep" / "profile.json") == made


def test_a_profile_file_is_read_again_once_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for scores in ([1.0, 2.0], [1.0, 3.0]):
        profile(scores).save(path)
        assert load_profile(path).scores == scores
    path.unlink()
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"steps": 1}',
        '{"fingerprint": {}, "cascade": {"stages": [], "scales": {}}, "scores": [], "values": {}, "series": {}}',
    ],
)
def test_a_damaged_profile_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ProfileError, match="is not a profile of sdguard, or it is damaged"):
        Profile.load(tmp_path / "profile.json")


def test_a_profile_of_another_format_is_refused(tmp_path: Path) -> None:
    profile([1, 2]).save(tmp_path / "profile.json")
    fields = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps({**fields, "format": 99}))
    with pytest.raises(ProfileError, match=rf"another version of sdguard \(format 99; this one reads {FORMAT}\): calibrate again\.$"):
        Profile.load(tmp_path / "profile.json")


def test_a_profile_of_another_model_is_refused_by_name() -> None:
    with pytest.raises(ProfileError, match="denoiser is Small, the profile's is Tiny"):
        profile([1, 2]).check({"denoiser": "Small", "weights": {"unet": {"float32": "a"}}})


def test_calibration_is_deterministic_and_independent_of_batching(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a cat number {i}" for i in range(6)]
    whole = calibrate(tiny, prompts)
    monkeypatch.setattr("sdguard.decision.calibration.BATCH_SIZE", 4)
    parts = calibrate(tiny, prompts)
    assert parts.scores == pytest.approx(whole.scores, rel=1e-3, abs=1e-3)
    assert parts.values["reference_agreement"] == pytest.approx(whole.values["reference_agreement"], abs=1e-3)
    assert [len(course) for course in whole.series.values()] == [8, 8]
    assert len(whole.timesteps) == 8
    assert whole.words["cat"] == 6


def test_calibration_needs_prompts(tiny: Any) -> None:
    with pytest.raises(ValueError, match="at least 4 ordinary prompts; 0 given"):
        calibrate(tiny, [])


def test_make_profile_fixture_matches(tiny: Any, profile_for: Callable[..., Profile]) -> None:
    made = profile_for(tiny, 2.0)
    made.check(identity(tiny))


@given(st.integers(100, 2000), st.sampled_from([0.01, 0.05]))
def test_the_interval_of_the_realised_rate_holds_its_mean_and_narrows(prompts: int, rate: float) -> None:
    made, larger = profile([float(i) for i in range(prompts)]), profile([float(i) for i in range(4 * prompts)])
    low, high = made.false_positive_interval(rate)
    assert low < made.allowed(rate) / (prompts + 1) < high
    assert made.false_positive_interval(rate, of=50)[1] > high
    assert larger.false_positive_interval(rate)[1] - larger.false_positive_interval(rate)[0] < high - low


def test_a_killed_calibration_goes_on_where_it_stopped(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a cat number {i}" for i in range(9)]
    monkeypatch.setattr("sdguard.decision.calibration.BATCH_SIZE", 2)
    asked: list[str] = []
    last = math.inf

    def counted(pipe: Any, batch: list[str], *args: Any, **kwargs: Any) -> Observation:
        asked.extend(batch)
        if len(asked) >= last:
            raise KeyboardInterrupt
        return read_prompts(pipe, batch, *args, **kwargs)

    monkeypatch.setattr("sdguard.decision.calibration.read_prompts", counted)
    whole = calibrate(tiny, prompts)
    total, last = len(asked), len(asked) + 7
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny, prompts, work=tmp_path / "work")
    before, last = len(asked), math.inf
    assert calibrate(tiny, prompts, work=tmp_path / "work") == whole
    assert len(asked) - before == total - 5  # 7 were asked for, and the batch of 2 that was under way is lost
    assert not list(tmp_path.iterdir())


def test_a_series_is_read_between_its_calls() -> None:
    made = profile([1.0, 2.0])
    assert made.at("guidance_norm", 500.0) == pytest.approx((1.5, 0.2))
    assert made.at("guidance_norm", 5000.0) == pytest.approx((1.0, 0.1))


def test_limits_of_verification_are_those_of_99_in_100_ordinary_prompts() -> None:
    values = {name: [i / 1000 for i in range(200)] for name in ("reference_agreement", "guidance_detail", "alignment")}
    made = replace(profile([1.0, 2.0]), values={**values, "recurrence": [0.8 + i / 1000 for i in range(200)]})
    assert made.agreement_limit() == pytest.approx(0.198)
    assert made.alignment_limit() == pytest.approx(0.001)
    assert made.detail_limit() == pytest.approx(0.190)
    assert made.recurrence_limit() == pytest.approx(0.998)


def test_a_recurrence_under_which_two_pictures_are_not_one_is_never_memorized() -> None:
    made = replace(profile([1.0, 2.0]), values={"recurrence": [0.5] * 27})
    assert made.recurrence_limit() == SAME_PICTURE


def test_the_order_of_methods_is_learnt_from_memorized_prompts_alone_and_the_same_each_time(tiny: Any) -> None:
    prompts = [f"a cat number {i}" for i in range(8)]
    profile = calibrate(tiny, prompts)
    assert not profile.methods
    lenient = replace(
        profile,
        values={**profile.values, **LENIENT},
    )
    learnt = learn_methods(tiny, lenient, ["a zebra at sea", "a rose at sea"])
    assert {"embedding descent", "padding damping", "attention attenuation"} <= {measured.method for measured in learnt.methods}
    assert all(measured.cured > 0 and measured.cost > 0 for measured in learnt.methods)
    assert replace(learnt, methods=[]) == lenient
    assert learn_methods(tiny, lenient, ["a zebra at sea", "a rose at sea"]) == learnt
    assert not learn_methods(tiny, replace(lenient, values={**lenient.values, "reference_agreement": [-2.0] * 100}), prompts[:1]).methods


def test_a_prompt_that_gives_one_picture_from_any_noise_is_no_ordinary_one(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a cat number {i}" for i in range(30)]
    plain = calibrate(tiny, prompts)
    assert not plain.set_aside
    known = {"a cat number 3", "a cat number 5"}
    read = calibration.Measurement.read

    def with_known(self: Any, what: str, positions: Sequence[int], look: Any, first_time: bool = False, **options: Any) -> Any:
        if what.startswith("collapsed"):
            return {"reference_agreement": [1.0 if self.prompts[position] in known else 0.0 for position in positions]}
        return read(self, what, positions, look, first_time, **options)

    monkeypatch.setattr(calibration.Measurement, "read", with_known)
    monkeypatch.setattr(calibration, "BATCH_SIZE", 30)
    made = calibrate(tiny, prompts)
    assert made.set_aside == sorted(known)
    assert len(made.scores) == len(plain.scores) - 1
    assert len(made.values["persistence"]) == len(plain.values["persistence"]) - 1


def test_a_profile_of_other_prompts_is_not_taken_for_the_users_own(tiny: Any) -> None:
    mine, others = [f"a cat number {i}" for i in range(8)], [f"a dog number {i}" for i in range(8)]
    first = profile_for(tiny, prompts=others)
    own = profile_for(tiny, prompts=mine)
    assert first.prompts_digest != own.prompts_digest
    assert profile_for(tiny, prompts=others) == first


def test_what_is_no_number_is_named_and_nothing_is_calibrated_by_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(decision.BY_NAME["persistence"], read=lambda observation: torch.full((len(observation.x),), math.nan))
    monkeypatch.setitem(decision.BY_NAME, "persistence", broken)
    with pytest.raises(ValueError, match="persistence of the prompt 'a cat number 0' is no number"):
        calibrate(tiny, [f"a cat number {i}" for i in range(9)])


def test_a_list_of_memorized_prompts_is_refused_in_one_sentence(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "same_picture", lambda observation: {"reference_agreement": [1.0] * len(observation.x)})
    with pytest.raises(ValueError, match="4 give one picture from any noise"):
        calibrate(tiny, [f"a cat number {i}" for i in range(12)])


def test_a_file_of_another_format_that_nobody_named_is_passed_over(tiny: Any, tmp_path: Path) -> None:
    prompts = [f"a cat number {i}" for i in range(8)]
    made = profile_for(tiny, prompts=prompts)
    cache_path(made.model, prompts).parent.mkdir(parents=True, exist_ok=True)
    cache_path(made.model, prompts).write_text('{"format": 5}')
    assert profile_for(tiny, prompts=prompts) == made


def test_the_free_signal_is_held_against_ordinary_prompts_at_the_level_it_was_read_at(tiny: Any) -> None:
    """At 951 in place of 976 the median of other prompts is where the tilted scale expects it, and not where the reference call has it."""
    made = calibrate(tiny, [f"a cat number {i}" for i in range(90)])
    scale = made.cascade.scales["guidance_detail"]
    assert all(scale.slopes)
    with torch.no_grad():
        read = read_prompts(tiny, [f"a dog number {i}" for i in range(40)], range(500, 540), timestep=951.0)
    values = decision.BY_NAME["guidance_detail"].read(read)
    tilted, level = scale.z(values, read.level.log_snr).median(), scale.z(values).median()
    assert abs(tilted - scale.z(decision.BY_NAME["guidance_detail"].read(at_reference(tiny))).median()) < abs(level) / 2


def at_reference(pipe: Any) -> Observation:
    with torch.no_grad():
        return read_prompts(pipe, [f"a dog number {i}" for i in range(40)], range(500, 540))


def test_a_batch_that_does_not_fit_into_memory_is_halved(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, largest = [f"a cat number {i}" for i in range(12)], 2
    whole = calibrate(tiny, prompts)
    sizes: list[int] = []

    def small(pipe: Any, batch: list[str], *args: Any, **kwargs: Any) -> Observation:
        if len(batch) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(batch))
        return read_prompts(pipe, batch, *args, **kwargs)

    monkeypatch.setattr("sdguard.decision.calibration.read_prompts", small)
    halved = calibrate(tiny, prompts)
    assert halved.scores == pytest.approx(whole.scores, rel=1e-3, abs=1e-3)
    assert max(sizes) == largest
    largest = 0
    with pytest.raises(torch.OutOfMemoryError):
        calibrate(tiny, prompts)


def test_words_stand_in_a_profile_in_the_order_in_which_they_come() -> None:
    """And not in that of a set, which is another in each process: a profile's bytes are the same on every run."""
    assert list(document_frequency(["The cat, the dog -", "a dog in a hat", "the fox"])) == "the cat dog a in hat fox".split()


def test_a_changed_profile_is_damaged_whatever_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile([1.0, 2.0, 3.0]).save(path)
    path.write_text(path.read_text().replace("2.0", "2.1", 1))
    with pytest.raises(ProfileError, match="or it is damaged"):
        Profile.load(path)


@pytest.mark.parametrize(
    ("change", "by"),
    [
        ("scores", [2.0, 1.0]),
        ("scores", [1.0, 10**400]),
        ("scores", [1.0, "2"]),
        ("scores", [True, 2.0]),
        ("values", {}),
        ("values", {"guidance_norm": [10**400]}),
        *(("values", {name: [1.0] for name in HELD if name != left_out}) for left_out in HELD),
        ("timesteps", [900.0]),
        ("timesteps", [float("nan"), 1.0]),
        ("series", {"guidance_norm": [[1.0, 10**400], [1.0, 2.0]]}),
        ("words", {"cat": None}),
        ("words", ["cat"]),
        ("methods", [{"method": 5, "cured": 0.9, "cost": 20.0, "moved": 0.4}]),
        ("note", None),
        ("set_aside", "cat"),
        ("model", []),
        ("cascade", {"stages": [], "scales": {}}),
        ("cascade", {"stages": [{"signals": ["none"], "fused": ["none"], "bound": None}], "scales": {}}),
        ("unknown", 1),
    ],
)
def test_a_profile_without_a_hash_is_damaged_where_a_field_cannot_be(change: str, by: Any, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile([1.0, 2.0, 3.0]).save(path)
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
    path.write_text(json.dumps(fields))
    assert Profile.load(path) == profile([1.0, 2.0, 3.0])
    path.write_text(json.dumps({**fields, change: by}))
    with pytest.raises(ProfileError, match=rf"^{path} is not a profile of sdguard, or it is damaged\.$"):
        Profile.load(path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b"\xff\xfe\x00", b'{"scores": [1e999, 2]}'])
def test_hostile_bytes_are_a_damaged_profile(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_bytes(content)
    with pytest.raises(ProfileError, match="or it is damaged"):
        Profile.load(tmp_path / "profile.json")
