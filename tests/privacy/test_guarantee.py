import json
from dataclasses import replace

import pytest

from sfumato import reports
from sfumato.errors import UsageError
from sfumato.privacy.guarantee import guarantee, in_words
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.privacy.plan_json import plan_to_dict
from sfumato.privacy.settings import PartSettings

PLAN = DpSgd(
    population=10_000, expected_batch_size=200.0, steps=50, noise_multiplier=1.1, delta=1e-5,
    unit="person", records_per_unit=4, population_from_data=True,
)  # fmt: skip
OPEN = NotPrivate(population=10_000, expected_batch_size=200.0, steps=50)


def test_the_claim_is_computed_from_what_was_spent_not_from_what_was_planned():
    claim = guarantee(PLAN, [PLAN.event(7), PLAN.event(3)], boundary=["training"])
    assert claim.epsilon == PLAN.epsilon(10) < PLAN.epsilon()
    assert (claim.definition, claim.delta, claim.unit, claim.records_per_unit) == (
        "(epsilon, delta)-DP",
        1e-5,
        "person",
        4,
    )
    assert claim.accountants["pld"] == claim.epsilon
    assert claim.accountants["rdp"] > claim.epsilon and claim.accountants["zcdp"] is None  # type: ignore[operator]
    assert [1e-5, claim.epsilon] in claim.curve
    assert claim.mechanism["steps_spent"] == 10 and claim.mechanism["steps_planned"] == 50
    assert claim.not_for_release == "" and len(claim.not_promised) >= 5


def test_a_population_counted_in_the_data_is_declared_public_in_the_boundary():
    claim = guarantee(PLAN, [], boundary=["only the training is inside"])
    assert claim.boundary[0] == "only the training is inside"
    assert any("N = 10000, was counted in the data and is declared public" in line for line in claim.boundary)


def test_a_plan_of_which_nothing_was_spent_claims_nothing():
    claim = guarantee(PLAN, [], boundary=[])
    assert (claim.definition, claim.epsilon, claim.curve, claim.accountants) == ("none", None, [], {})
    assert claim.not_for_release == "nothing was spent: nothing was trained"
    assert in_words(claim) == "There is nothing to claim yet: nothing was spent: nothing was trained."
    assert claim.mechanism["steps_spent"] == 0 and claim.delta == PLAN.delta
    json.dumps(reports.to_dict(claim), allow_nan=False)


def test_a_run_without_privacy_claims_nothing_and_is_not_for_release():
    claim = guarantee(OPEN, [], boundary=[])
    assert (claim.definition, claim.epsilon, claim.delta, claim.curve) == ("none", None, None, [])
    assert claim.not_for_release == "trained without privacy"
    assert "without differential privacy" in in_words(claim)


def test_the_parts_of_a_model_are_in_the_claim_in_words_and_figures():
    parts = (
        PartSettings(name="text", modules=("text_encoder",), max_grad_norm=0.3, share=0.2),
        PartSettings(name="picture", modules=("",), max_grad_norm=0.4, share=0.8),
    )
    plan = replace(PLAN, parts=parts, max_grad_norm=0.5)
    claim = guarantee(plan, [plan.event(3)], boundary=[])
    assert claim.epsilon == PLAN.epsilon(3)
    assert claim.mechanism["parts"] == plan_to_dict(plan)["parts"]
    assert (
        "charged as one mechanism of noise multiplier 1.1: text (text_encoder): gradients of at most 0.3, noise multiplier "
        "2.46; picture (all else that is trained): gradients of at most 0.4, noise multiplier 1.23. Every other weight was "
        "frozen."
    ) in claim.boundary[0]
    assert "parts" not in guarantee(PLAN, [], boundary=[]).mechanism
    assert guarantee(PLAN, [], boundary=[]).mechanism["clipping"] == "flat"
    json.dumps(reports.to_dict(claim), allow_nan=False)


def test_noise_of_zero_claims_nothing():
    plan = DpSgd(population=100, expected_batch_size=10, steps=5, noise_multiplier=0.0, delta=1e-3)
    claim = guarantee(plan, [plan.event()], boundary=[])
    assert (claim.definition, claim.epsilon, claim.not_for_release) == ("none", None, "trained without noise")
    json.dumps(reports.to_dict(claim), allow_nan=False)


def test_a_claim_is_plain_json():
    text = json.dumps(reports.to_dict(guarantee(PLAN, [PLAN.event()], boundary=[])), allow_nan=False)
    assert json.loads(text)["epsilon"] == PLAN.epsilon()


def test_events_of_another_mechanism_are_refused():
    other = DpSgd(population=10_000, expected_batch_size=200.0, steps=50, noise_multiplier=1.2, delta=1e-5)
    with pytest.raises(UsageError, match="is not an event of the plan"):
        guarantee(PLAN, [other.event()], boundary=[])
    with pytest.raises(UsageError, match="without privacy has none"):
        guarantee(OPEN, [other.event()], boundary=[])


def test_the_words_say_whom_how_much_and_what_forbids_a_release():
    claim = guarantee(
        PLAN, [PLAN.event()], boundary=[], not_for_release="test source", composed_with=[{"run": "earlier"}]
    )
    words = in_words(claim)
    assert "all records of one person (at most 4 in a step)" in words
    assert f"({claim.epsilon:.4g}, 1e-05)-differentially private" in words
    assert "1 other run(s)" in words and "NOT FOR RELEASE: test source" in words
