import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from sfumato.errors import DataError, UsageError
from sfumato.randomness import SecretRandom, TestRandom
from sfumato.records import Record, UnitTable


def table(counts: list[int]) -> UnitTable:
    """A table whose row i holds the number i, its units in a mixed order."""
    units = [f"unit {number:03}" for number, count in enumerate(counts) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(units))
    return UnitTable({"image": torch.arange(len(units)).reshape(-1, 1)}, [units[i] for i in order])


def slow_batch(units: UnitTable, chosen: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Oracle: a loop over units."""
    rows, owner = [], []
    for position, unit in enumerate(chosen):
        for row in units.rows_of(unit)[:limit]:
            rows.append(int(row))
            owner.append(position)
    return rows, owner


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    picks=st.lists(st.integers(0, 11), max_size=12),
    limit=st.integers(1, 7),
)
def test_a_batch_equals_a_loop_over_its_units(counts, picks, limit):
    units = table(counts)
    chosen = sorted({pick % units.num_units for pick in picks})
    batch = units.batch(chosen, records_per_unit=limit)
    rows, owner = slow_batch(units, chosen, limit)
    assert batch.tensors["image"].flatten().tolist() == rows
    assert batch.unit.tolist() == owner
    assert batch.num_units == len(chosen)
    assert batch.present["image"].tolist() == [True] * len(rows)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=9), limit=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_unit_ever_contributes_more_rows_than_its_bound_nor_one_twice(counts, limit, seed):
    units = table(counts)
    chosen = np.arange(units.num_units)
    batch = units.batch(chosen, records_per_unit=limit, rng=TestRandom(seed))
    assert torch.bincount(batch.unit, minlength=len(counts)).tolist() == [min(count, limit) for count in counts]
    rows = batch.tensors["image"].flatten().tolist()
    assert len(set(rows)) == len(rows)
    assert all(row in units.rows_of(owner) for row, owner in zip(rows, batch.unit.tolist(), strict=True))


def test_a_drawn_subset_is_uniform_over_all_subsets():
    """Chi-square over the 10 pairs out of 5 rows, 5,000 draws; false-alarm probability 1e-6."""
    units = table([5, 1])
    random = TestRandom(5)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(5_000):
        batch = units.batch([0, 1], records_per_unit=2, rng=random)
        pair = tuple(sorted(batch.tensors["image"].flatten().tolist()[:2]))
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 10
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < chi2.ppf(1 - 1e-6, 9)


def test_an_empty_batch_has_no_rows_and_no_units():
    batch = table([2, 3]).batch([], records_per_unit=1, rng=SecretRandom())
    assert (batch.num_rows, batch.num_units, tuple(batch.tensors["image"].shape)) == (0, 0, (0, 1))


def test_a_batch_of_thousands_of_units_needs_few_draws():
    """One vectorised call, whatever the number of units: nothing is drawn where no unit has too many records."""

    class Counting(TestRandom):
        calls = 0

        def uniform(self, count):
            self.calls += 1
            return super().uniform(count)

    units, random = table([1, 2, 3, 4] * 1000), Counting(0)
    assert units.batch(range(4000), records_per_unit=4, rng=random).num_rows == 10_000
    assert random.calls == 0
    assert units.batch(range(4000), records_per_unit=2, rng=random).num_rows == 7_000
    assert random.calls == 1


def test_numpys_generator_is_refused_because_its_uniform_means_another_thing():
    with pytest.raises(UsageError, match="rng = Generator"):
        table([3]).batch([0], records_per_unit=1, rng=np.random.default_rng(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("units", [[-1], [2], [0, 5]])
def test_units_outside_the_table_are_refused(units):
    with pytest.raises(UsageError, match="must be between 0 and 1"):
        table([1, 1]).batch(units, records_per_unit=1)


def test_a_bound_below_one_is_refused():
    with pytest.raises(UsageError, match="records_per_unit = 0"):
        table([1]).batch([0], records_per_unit=0)


def test_per_unit_is_the_mean_of_each_units_rows():
    units = UnitTable({"x": torch.tensor([1.0, 2.0, 6.0])}, ["b", "a", "b"])
    batch = units.batch([0, 1], records_per_unit=2)
    torch.testing.assert_close(batch.per_unit(batch.tensors["x"]), torch.tensor([2.0, 3.5]))


def test_tensors_and_units_of_different_lengths_are_refused():
    with pytest.raises(UsageError, match="must equal the number of records, 2"):
        UnitTable({"x": torch.zeros(3)}, ["a", "b"])


@pytest.mark.parametrize("unit", ["", "  "])
def test_a_record_without_a_unit_is_refused_by_its_name(unit):
    with pytest.raises(DataError, match="record row 7: unit"):
        Record(id="row 7", unit=unit)
