import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy.accounting import Event
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.privacy.planning import automatic_delta, make_plan, warnings_of
from sfumato.privacy.settings import PartSettings, PrivacySettings

PLAN = DpSgd(population=10_000, expected_batch_size=200.0, steps=50, noise_multiplier=1.1, delta=1e-5)
NOISE = PrivacySettings(epsilon=None, noise_multiplier=1.1)
TEXT = PartSettings(name="text", modules=("text_encoder",), max_grad_norm=0.3)
REST = PartSettings(name="rest", modules=("",), max_grad_norm=0.4)


def codes(settings: PrivacySettings, **sizes) -> list[str]:
    with pytest.raises(PrivacyRefused) as refused:
        make_plan(settings, **{"steps": 50, "expected_batch_size": 200, "population": 10_000, **sizes})
    assert refused.value.exit_code == 3
    for refusal in refused.value.refusals:
        assert set(refusal) == {"code", "message", "next"} and all(refusal.values())
    return [refusal["code"] for refusal in refused.value.refusals]


def test_the_event_the_rate_and_epsilon_come_from_the_same_fields():
    assert PLAN.sampling_rate == 0.02
    assert PLAN.event() == Event(sampling_rate=0.02, noise_multiplier=1.1, count=50)
    assert PLAN.event(3).count == 3
    assert 0 < PLAN.epsilon(10) < PLAN.epsilon() < 2
    assert PLAN.epsilon(0) == 0


def test_a_calibrated_plan_keeps_its_target_and_is_not_wasteful():
    plan = DpSgd.calibrated(epsilon=2.0, delta=1e-6, population=10_000, expected_batch_size=100, steps=1000)
    assert 1.999 <= plan.epsilon() <= 2.0
    assert plan.target_epsilon == 2.0


def test_make_plan_calibrates_and_declares_a_counted_population_public():
    plan = make_plan(PrivacySettings(epsilon=8.0), steps=100, expected_batch_size=200, population=10_000)
    assert isinstance(plan, DpSgd)
    assert 7.99 <= plan.epsilon() <= 8.0
    assert plan.delta == pytest.approx(1 / (10_000 * math.log(10_000)))
    assert plan.population_from_data


def test_a_population_in_the_settings_is_the_one_that_counts():
    settings = PrivacySettings(epsilon=None, noise_multiplier=1.0, population=20_000)
    plan = make_plan(settings, steps=10, expected_batch_size=200, population=9_999)
    assert (plan.population, plan.sampling_rate, plan.population_from_data) == (20_000, 0.01, False)


def test_noise_that_is_given_is_taken_as_it_is():
    plan = make_plan(NOISE, steps=50, expected_batch_size=200, population=10_000)
    assert isinstance(plan, DpSgd) and plan.noise_multiplier == 1.1 and plan.target_epsilon is None


def test_without_privacy_there_is_no_event_and_epsilon_is_infinite():
    plan = make_plan(PrivacySettings(mechanism="none"), steps=5, expected_batch_size=20, population=50)
    assert isinstance(plan, NotPrivate)
    assert plan.event() is None and plan.epsilon() == math.inf
    assert [warning["code"] for warning in warnings_of(plan)] == ["not_private"]


@pytest.mark.parametrize(
    ("settings", "sizes", "code"),
    [
        (NOISE, {"population": 99, "expected_batch_size": 9}, "too_few_units"),
        (NOISE, {"population": 0}, "too_few_units"),
        (PrivacySettings(epsilon=None, noise_multiplier=1.1, delta=1e-4), {}, "delta_too_large"),
        (NOISE, {"expected_batch_size": 10_001}, "batch_larger_than_population"),
        (NOISE, {"expected_batch_size": 0}, "empty_batch"),
        (NOISE, {"expected_batch_size": float("nan")}, "empty_batch"),
        (NOISE, {"steps": 0}, "no_steps"),
        (NOISE, {"records": 0}, "no_records"),
        (NOISE, {"parameters": 10**9, "memory_bytes": 16 * 2**30}, "memory"),
        (PrivacySettings(epsilon=101.0), {}, "epsilon_too_large"),
        (PrivacySettings(epsilon=1e-9), {"steps": 10**6}, "epsilon_unreachable"),
        (PrivacySettings(epsilon=None, noise_multiplier=0.01), {}, "noise_multiplier_out_of_range"),
        (PrivacySettings(epsilon=None, noise_multiplier=1e6), {}, "noise_multiplier_out_of_range"),
        (PrivacySettings(epsilon=None, noise_multiplier=0.1), {"steps": 1000}, "epsilon_too_large"),
        (PrivacySettings(mechanism="none"), {"expected_batch_size": 10_001}, "batch_larger_than_population"),
        (
            PrivacySettings(epsilon=None, noise_multiplier=1.1, clipping="adaptive"),
            {"expected_batch_size": 11},
            "count_noise",
        ),
        (PrivacySettings(epsilon=0.1, clipping="adaptive"), {"expected_batch_size": 4}, "count_noise"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason(settings, sizes, code):
    assert code in codes(settings, **sizes)


def test_every_reason_is_told_at_once():
    found = codes(
        PrivacySettings(epsilon=500.0, delta=0.5),
        population=60, expected_batch_size=100, steps=0, parameters=10**9, memory_bytes=1,
    )  # fmt: skip
    assert set(found) == {
        "too_few_units", "delta_too_large", "batch_larger_than_population", "no_steps", "memory", "epsilon_too_large"
    }  # fmt: skip
    assert len(found) == 6


def test_delta_exactly_one_over_n_is_refused_and_just_below_is_not():
    assert codes(PrivacySettings(epsilon=None, noise_multiplier=1.1, delta=1 / 10_000)) == ["delta_too_large"]
    settings = PrivacySettings(epsilon=None, noise_multiplier=1.1, delta=0.999 / 10_000)
    assert make_plan(settings, steps=5, expected_batch_size=20, population=10_000).population == 10_000


@given(population=st.integers(3, 10**9))
def test_the_automatic_delta_is_always_below_one_over_n(population):
    assert automatic_delta(population) < 1 / population


@pytest.mark.parametrize(
    ("noise", "steps", "expected"),
    [
        (1.1, 50, ["epsilon_small"]),
        (0.7, 50, []),
        (0.29, 5, ["epsilon_large", "noise_small"]),
        (0.45, 500, ["epsilon_large"]),
    ],
)
def test_small_and_large_epsilons_are_warned_about(noise, steps, expected):
    plan = DpSgd(population=10_000, expected_batch_size=200, steps=steps, noise_multiplier=noise, delta=1e-5)
    assert [warning["code"] for warning in warnings_of(plan)] == expected


def test_noise_that_drowns_every_signal_is_warned_about():
    few = DpSgd(population=1000, expected_batch_size=20, steps=10, noise_multiplier=2.0, delta=1e-5)
    assert "few_units" in [warning["code"] for warning in warnings_of(few, parameters=10**6)]
    assert "few_units" not in [warning["code"] for warning in warnings_of(few, parameters=100)]


def test_of_sites_the_units_of_all_are_counted_and_the_noise_of_each():
    """A quarter of 4,000 units at one of four sites: the batch of all is four times its own, their noise twice as long."""
    site = DpSgd(population=1_000, expected_batch_size=100.0, steps=10, noise_multiplier=1.0, delta=1e-5)
    (alone,) = [w["message"] for w in warnings_of(site, parameters=10**6) if w["code"] == "few_units"]
    (together,) = [
        w["message"] for w in warnings_of(site, parameters=10**6, sites=[1_000] * 4) if w["code"] == "few_units"
    ]
    assert "population = 1000 records · is few" in alone and "at least 10 times" in alone
    assert "population = 4000 records at 4 sites · is few" in together and "at least 5 times" in together


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        NotPrivate(population=10, expected_batch_size=5, steps=3, unit="person", records_per_unit=4),
        replace(PLAN, clipping="adaptive"),
        replace(PLAN, clipping="per_layer", parts=(TEXT, REST), max_grad_norm=0.5),
    ],
)
def test_plans_survive_a_round_trip(plan):
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


def test_a_plan_without_parts_is_written_as_it_always_was():
    """The ledger hashes it: an old run must find its plan again."""
    old = {
        "kind": "dp_sgd", "population": 10_000, "expected_batch_size": 200.0, "steps": 50, "noise_multiplier": 1.1,
        "delta": 1e-5, "max_grad_norm": 1.0, "unit": "record", "records_per_unit": 1, "adjacency": "add_or_remove",
        "target_epsilon": None, "population_from_data": False,
    }  # fmt: skip
    assert plan_to_dict(PLAN) == old
    assert plan_from_dict(old) == PLAN


def test_a_plan_with_parts_has_the_event_of_the_whole_and_shares_its_noise():
    """1/sigma^2 is the sum of the parts'; shares that are left out give the same noise everywhere."""
    for shares in ((None, None), (0.25, 0.75)):
        parts = tuple(replace(part, share=share) for part, share in zip((TEXT, REST), shares, strict=True))
        settings = PrivacySettings(epsilon=2.0, parts=parts)
        plan = make_plan(settings, steps=100, expected_batch_size=200, population=10_000)
        assert isinstance(plan, DpSgd)
        whole = make_plan(PrivacySettings(epsilon=2.0), steps=100, expected_batch_size=200, population=10_000)
        assert isinstance(whole, DpSgd)
        assert plan.event() == whole.event() and plan.epsilon() == whole.epsilon()
        assert settings.max_grad_norm == plan.max_grad_norm == 0.5
        noise = plan.part_noise_multipliers()
        assert sum(value**-2 for value in noise.values()) ** -0.5 == pytest.approx(plan.noise_multiplier, rel=1e-12)
        if shares[0] is None:
            assert noise["text"] * 0.3 == pytest.approx(noise["rest"] * 0.4)
        else:
            assert noise["text"] == pytest.approx(plan.noise_multiplier / math.sqrt(0.25))
    assert plan_to_dict(plan)["parts"][0] == {
        "name": "text", "modules": ["text_encoder"], "max_grad_norm": 0.3, "share": 0.25
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"parts": {}}, {"parts": [1]}, {"parts": [{"name": "a"}]}, {"clipping": "adaptive"}, {"clipping": "none"},
        {"clipping": 1}, {"max_grad_norm": 0.4},
        *({"parts": [{**plan_to_dict(replace(PLAN, parts=(REST,), max_grad_norm=0.4))["parts"][0], **bad}]} for bad in (
            {"share": 0.5}, {"share": "1"}, {"share": None}, {"share": 10**400}, {"share": -1.0}, {"max_grad_norm": 0},
            {"modules": []}, {"modules": "all"}, {"modules": [1]}, {"name": ""}, {"name": None}, {"more": 1},
            {"max_grad_norm": 10**400},
        )),
    ],
)  # fmt: skip
def test_changed_parts_are_refused(change):
    plan = replace(PLAN, parts=(REST,), max_grad_norm=0.4)
    assert plan_from_dict(plan_to_dict(plan)) == plan
    if "max_grad_norm" not in change and "clipping" not in change:
        change = {**change, "max_grad_norm": change["parts"][0].get("max_grad_norm", 0.4) if _is_part(change) else 0.4}
    elif "max_grad_norm" in change:
        change = {"max_grad_norm": 0.41}
    with pytest.raises(UsageError):
        plan_from_dict({**plan_to_dict(plan), **change})


def _is_part(change: dict) -> bool:
    return isinstance(change["parts"], list) and isinstance(change["parts"][0], dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": (TEXT, TEXT)}, "'text', 'text_encoder' occurs twice"),
        ({"parts": (replace(TEXT, share=0.5), REST)}, "must be 1 together, or missing in all"),
        ({"parts": (replace(TEXT, share=0.5), replace(REST, share=0.4))}, "must be 1 together"),
        ({"parts": (TEXT, REST), "max_grad_norm": 0.7}, r"max_grad_norm = 0\.7 · every part has its own.*0\.5"),
        ({"parts": (TEXT, REST), "clipping": "adaptive"}, "adaptive · follows one bound"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        PrivacySettings(**values)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "gdp"}, {"kind": None}, {"kind": []}, {"extra": 1}, {"steps": 1.5}, {"steps": True}, {"steps": 0},
        {"population": -1}, {"delta": 0}, {"delta": 2}, {"delta": "auto"}, {"noise_multiplier": -1}, {"unit": "family"},
        {"adjacency": "replace"}, {"expected_batch_size": 10_001}, {"max_grad_norm": 0}, {"records_per_unit": 2},
        {"expected_batch_size": 10**400},
    ],
)  # fmt: skip
def test_a_changed_plan_is_refused(change):
    with pytest.raises(UsageError):
        plan_from_dict({**plan_to_dict(PLAN), **change})


@pytest.mark.parametrize("values", [None, [], "plan", {}, {"kind": "dp_sgd"}])
def test_what_is_no_plan_is_refused(values):
    with pytest.raises(UsageError):
        plan_from_dict(values)
