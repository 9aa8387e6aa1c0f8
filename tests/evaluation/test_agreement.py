import numpy as np
import pytest

from sfumato.errors import UsageError
from sfumato.evaluation import agreement


def slow_kappa(a, b):
    """Cohen 1960, counted by hand: (observed - expected) / (1 - expected) agreement."""
    count = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / count
    expected = sum(list(a).count(value) * list(b).count(value) for value in set(a)) / count**2
    return (observed - expected) / (1 - expected)


def test_kappa_equals_its_definition_counted_by_hand():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a = rng.choice(["x", "y", "z"], 50, p=[0.6, 0.3, 0.1])
        b = np.where(rng.random(50) < 0.6, a, rng.choice(["x", "y", "z"], 50))
        value, low, high = agreement.kappa(a.tolist(), b.tolist())
        assert value == pytest.approx(slow_kappa(a, b), abs=1e-12)
        assert low <= value <= high


def test_kappa_is_one_for_equal_readings_and_near_zero_for_shuffled_ones():
    values = ["left", "right"] * 500
    assert agreement.kappa(values, values) == (1, 1, 1)
    shuffled = np.random.default_rng(0).permutation(values).tolist()
    value, low, high = agreement.kappa(values, shuffled)
    assert abs(value) < 0.15 and low < value < high


def test_kappa_of_a_reading_that_never_changes_shows_nothing():
    assert agreement.kappa(["none"] * 10, ["none"] * 10)[0] == 0
    assert agreement.kappa(["none", "some"] * 5, ["none"] * 10)[0] == 0


def test_a_kappa_of_zero_has_no_crumbs_of_rounding():
    first = [value for value, count in (("a", 12), ("b", 18), ("c", 10)) for _ in range(count)]
    assert agreement.kappa(first, ["a"] * 40) == (0, 0, 0)


def test_the_kappa_interval_covers_the_truth():
    """True kappa .5 (two equal classes, 75 % agreement); 200 repetitions at 95 %: under 176 hits has probability < 1e-4."""
    rng = np.random.default_rng(1)
    hits = 0
    for repetition in range(200):
        a = rng.integers(0, 2, 300)
        b = np.where(rng.random(300) < 0.75, a, 1 - a)
        _, low, high = agreement.kappa(a.astype(str).tolist(), b.astype(str).tolist(), seed=repetition)
        hits += low <= 0.5 <= high
    assert hits >= 176


def test_a_fact_that_is_unknown_is_left_out():
    result = agreement.facts(
        {"side": ["left", None, "right"], "kind": [None] * 3}, {"side": ["left"] * 3, "kind": ["a"] * 3}
    )
    assert set(result) == {"side"}


def test_the_mean_of_kappas_is_the_mean_of_the_facts_kappas():
    rng = np.random.default_rng(0)
    asked = {name: rng.choice(["a", "b", "c"], 300).tolist() for name in ("side", "zone")}
    asked["zone"][:100] = [None] * 100
    read = {"side": asked["side"], "zone": rng.choice(["a", "b", "c"], 300).tolist()}
    value, low, high = agreement.mean_kappa(asked, read)
    assert value == pytest.approx(np.mean([v for v, _, _ in agreement.facts(asked, read).values()]), abs=1e-12)
    assert low < value < high


def test_accuracy_is_the_share_of_equal_readings():
    value, low, high = agreement.accuracy(["1", "2", "3", "4"] * 25, ["1", "2", "3", "0"] * 25)
    assert value == 0.75 and 0.6 < low < 0.75 < high < 0.9


def test_retrieval_is_perfect_for_equal_features_and_chance_for_constant_ones():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 8))
    perfect = agreement.retrieval(features, features * 3)
    assert all(perfect[direction][1] == (1, 1, 1) for direction in ("image→text", "text→image"))
    constant = agreement.recall_at(np.ones((40, 8)), np.ones((40, 8)))
    assert [constant[k].mean() for k in (1, 5, 10)] == pytest.approx([1 / 40, 5 / 40, 10 / 40])


def test_recall_counts_the_better_items_one_by_one():
    """Oracle: a sort, query after query."""
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(2, 30, 5))
    slow = []
    for index, query in enumerate(queries):
        cosine = [query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in gallery]
        slow.append(index in np.argsort(cosine)[::-1][:5])
    assert agreement.recall_at(queries, gallery)[5].tolist() == [float(hit) for hit in slow]


def test_unequal_lengths_are_refused():
    with pytest.raises(UsageError, match="kappa of 2 and 1"):
        agreement.kappa(["a", "b"], ["a"])
    with pytest.raises(UsageError, match="must be the same"):
        agreement.recall_at(np.zeros((3, 2)), np.zeros((4, 2)))
