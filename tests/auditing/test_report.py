import numpy as np
import pytest
import torch

from sfumato.auditing import membership, report
from sfumato.auditing.settings import AuditSettings
from sfumato.records import UnitTable

SETTINGS = AuditSettings(members=400)


def tables(shift: float = 0.0) -> tuple[UnitTable, UnitTable]:
    rng = np.random.default_rng(0)
    return (
        UnitTable({"image": torch.from_numpy(rng.normal(0, 1, (600, 1, 6, 6)))}, [f"in-{i}" for i in range(600)]),
        UnitTable({"image": torch.from_numpy(rng.normal(shift, 1, (500, 1, 6, 6)))}, [f"out-{i}" for i in range(500)]),
    )


def memory(members: UnitTable, strength: float):
    """The losses of a model that has memorised its members' exact pixels, ``strength`` of it."""
    known = {row.numpy().tobytes() for row in members.tensors["image"]}
    rng = np.random.default_rng(1)

    def row_losses(batch):
        hit = np.array([row.numpy().tobytes() in known for row in batch.tensors["image"]])
        return rng.normal(0, 1, len(hit)) - strength * hit

    return row_losses


def run(strength: float, *, epsilon: float | None, control: float | None, shift: float = 0.0):
    members, nonmembers = tables(shift)

    def control_scores():
        losses = memory(members, control)
        return tuple(
            membership.scores(losses, t, units=np.arange(400), records_per_unit=1) for t in (members, nonmembers)
        )

    return report.audit(
        memory(members, strength), members, nonmembers, SETTINGS, delta=1e-5, claimed_epsilon=epsilon,
        control=None if control is None else control_scores,
    )  # fmt: skip


def test_a_model_that_remembers_more_than_it_claims_is_convicted():
    found = run(6.0, epsilon=1.0, control=6.0)
    assert found.verdict == "VIOLATION"
    assert found.attacks[0].epsilon_lower_bound > 1
    assert "claimed epsilon 1" in found.because


def test_a_model_that_remembers_nothing_is_consistent_only_beside_a_detected_control():
    found = run(0.0, epsilon=8.0, control=3.0)
    assert found.verdict == "CONSISTENT"
    assert found.positive_control is not None and report.detected(found.positive_control)


@pytest.mark.parametrize(("control", "reason"), [(None, "not tried"), (0.0, "too weak")])
def test_a_low_bound_alone_proves_nothing(control, reason):
    found = run(0.0, epsilon=8.0, control=control)
    assert found.verdict == "INCONCLUSIVE"
    assert reason in found.because


@pytest.mark.parametrize("epsilon", [None, float("inf")])
def test_a_run_without_a_claim_has_nothing_to_test(epsilon):
    found = run(6.0, epsilon=epsilon, control=6.0)
    assert found.verdict == "INCONCLUSIVE"
    assert "no claim to test" in found.because
    assert found.attacks[0].auc > 0.95


def test_members_that_differ_by_themselves_neither_convict_nor_clear():
    found = run(6.0, epsilon=1.0, control=6.0, shift=1.0)
    assert found.verdict == "INCONCLUSIVE"
    assert "without the model" in found.because


def test_the_note_says_how_large_the_bound_could_have_been():
    found = run(60.0, epsilon=1.0, control=None)
    assert f"cannot pass {found.attacks[0].epsilon_lower_bound:.2f}" in found.notes[0]


def test_too_few_units_are_not_attacked():
    members, nonmembers = tables()
    few = AuditSettings(members=10)
    found = report.audit(memory(members, 9), members, nonmembers, few, delta=1e-5, claimed_epsilon=1.0)
    assert found.verdict == "INCONCLUSIVE" and found.attacks == []
    assert "too few" in found.because
