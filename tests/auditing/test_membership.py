import numpy as np
import pytest
import torch

from sfumato.auditing import membership
from sfumato.errors import UsageError
from sfumato.records import UnitTable


def table(units: int, rng: np.random.Generator, shift: float = 0.0, records: int = 1) -> UnitTable:
    count = units * records
    return UnitTable(
        {
            "image": torch.from_numpy(rng.normal(shift, 1, (count, 1, 8, 8))).float(),
            "text": torch.from_numpy(rng.integers(0, 500, (count, 12))).to(torch.int16),
        },
        [f"u{i // records}" for i in range(count)],
    )


def test_a_units_score_is_minus_the_mean_loss_of_its_rows():
    rng = np.random.default_rng(0)
    data = table(600, rng, records=2)  # more than one batch of units
    chosen = np.array([5, 599, 0])
    score = membership.scores(
        lambda batch: batch.tensors["image"].sum((1, 2, 3)), data, units=chosen, records_per_unit=2
    )
    expected = [-data.tensors["image"][data.rows_of(u)].sum((1, 2, 3)).double().mean().item() for u in chosen]
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    everyone = membership.scores(
        lambda b: b.tensors["image"][:, 0, 0, 0], data, units=np.arange(600), records_per_unit=2
    )
    assert everyone.shape == (600,)


def test_losses_that_are_not_one_per_row_are_refused():
    with pytest.raises(UsageError, match="one loss per row"):
        membership.scores(
            lambda batch: batch.tensors["image"],
            table(4, np.random.default_rng(0)),
            units=np.arange(4),
            records_per_unit=1,
        )


def test_an_attack_on_memorised_units_finds_them_and_on_others_does_not():
    rng = np.random.default_rng(0)
    leaky = membership.attack(rng.normal(2, 1, 1000), rng.normal(0, 1, 1000), delta=1e-5, confidence=0.95, seed=0)
    assert leaky.auc_low > 0.85 and leaky.epsilon_lower_bound > 1
    assert leaky.tpr_at_fpr["0.01"] > 0.2 and leaky.covered_by == "internal"
    fair = membership.attack(rng.normal(size=1000), rng.normal(size=1000), delta=1e-5, confidence=0.95, seed=0)
    assert abs(fair.auc - 0.5) < 5 * 0.013 and fair.epsilon_lower_bound < 0.2  # five standard deviations
    assert fair.members == fair.nonmembers == 1000


def test_the_blind_attacker_is_at_one_half_for_a_random_split():
    """60 random splits: their mean has standard deviation .003, so .02 off has probability < 1e-9; single ones pass the
    limit of three standard deviations with probability < .00135 each, twice in 60 with probability .003."""
    rng = np.random.default_rng(0)
    values = [
        membership.blind_baseline(rng.normal(size=(150, 20)), rng.normal(size=(150, 20)), seed=i) for i in range(60)
    ]
    assert abs(np.mean(values) - 0.5) < 0.02
    assert sum(value > membership.blind_limit(150, 150) for value in values) <= 1


@pytest.mark.parametrize("what", ["pixels", "words", "number of records"])
def test_the_blind_attacker_sees_that_members_differ_by_themselves(what):
    rng = np.random.default_rng(0)
    members, others = table(300, rng), table(300, rng, shift=0.5 if what == "pixels" else 0)
    if what == "words":
        others.tensors["text"][:, 0] = 77
    if what == "number of records":
        others = table(300, rng, records=2)
    seen = [membership.blind_features(t, units=np.arange(300), records_per_unit=2) for t in (members, others)]
    assert membership.blind_baseline(*seen) > membership.blind_limit(300, 300)


def test_blind_features_of_the_same_split_are_fair():
    rng = np.random.default_rng(0)
    seen = [membership.blind_features(table(300, rng), units=np.arange(300), records_per_unit=1) for _ in range(2)]
    assert membership.blind_baseline(*seen) <= membership.blind_limit(300, 300)


def test_how_far_a_table_is_padded_is_not_taken_for_a_difference_of_its_units():
    """The longest text of either table decides its width; the texts themselves are drawn alike."""
    rng = np.random.default_rng(0)
    members, others = table(300, rng), table(300, rng)
    for padded, width in ((members, 12), (others, 20)):
        text = torch.full((300, width), 500, dtype=torch.int16)
        for row in range(300):
            length = rng.integers(6, 12)
            text[row, :length] = padded.tensors["text"][row, :length]
        padded.tensors["text"] = text
    seen = [membership.blind_features(t, units=np.arange(300), records_per_unit=1) for t in (members, others)]
    assert membership.blind_baseline(*seen) <= membership.blind_limit(300, 300)


def test_padding_is_what_fills_the_rest_of_a_row():
    rows = torch.tensor([[3, 9, 9], [4, 5, 9]])
    assert membership._padding(rows).tolist() == [[False, True, True], [False, False, True]]
    assert not membership._padding(torch.tensor([[9, 3, 9], [4, 5, 9]])).any()


def test_the_logistic_regression_minimises_its_loss():
    """Oracle: a general minimiser."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    y = (x[:, 0] + rng.normal(size=200) > 0).astype(float)
    slow = minimize(lambda w: np.logaddexp(0, -(2 * y - 1) * (x @ w)).sum() + w @ w / 2, np.zeros(6), tol=1e-12).x
    np.testing.assert_allclose(membership._logistic(x, y), slow, rtol=1e-4, atol=1e-5)
