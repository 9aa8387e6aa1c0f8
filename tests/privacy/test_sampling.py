"""Poisson sampling is what amplification is proved for; shuffling must fail the same tests."""

import numpy as np
import pytest
from scipy.stats import binom, chi2

from sfumato.errors import UsageError
from sfumato.privacy.sampling import CyclicPoisson, physical_parts, poisson_units, truncated_poisson_units
from sfumato.randomness import SecretRandom, TestRandom

UNITS, STEPS, RATE = 400, 3000, 0.05
ALARM = 1e-6  # false-alarm probability of each statistic, two-sided, by the normal approximation of binomials


def inclusion(sampler) -> np.ndarray:
    """(STEPS, UNITS) bool."""
    joined = np.zeros((STEPS, UNITS), dtype=bool)
    for step in range(STEPS):
        joined[step, sampler(step)] = True
    return joined


def p_values(joined: np.ndarray) -> dict[str, float]:
    """Chi-square of inclusion counts, of batch sizes, and of the overlap of steps that follow each other."""
    spread = RATE * (1 - RATE)
    overlap = RATE**2
    pairs = (joined[:-1:2] & joined[1::2]).sum(axis=1)  # disjoint pairs of steps
    coins = len(pairs) * UNITS
    statistics = {
        "inclusion": (((joined.sum(0) - STEPS * RATE) ** 2 / (STEPS * spread)).sum(), UNITS),
        "batch size": (((joined.sum(1) - UNITS * RATE) ** 2 / (UNITS * spread)).sum(), STEPS),
        "overlap": ((pairs.sum() - coins * overlap) ** 2 / (coins * overlap * (1 - overlap)), 1),
    }
    return {name: float(2 * min(chi2.cdf(value, df), chi2.sf(value, df))) for name, (value, df) in statistics.items()}


def test_inclusions_batch_sizes_and_steps_are_those_of_independent_coins():
    random = TestRandom(2)
    values = p_values(inclusion(lambda step: poisson_units(UNITS, RATE, random)))
    assert {name: value for name, value in values.items() if value < ALARM} == {}


def test_shuffling_is_convicted_by_the_same_statistics():
    random = np.random.default_rng(0)
    per_epoch, size = int(1 / RATE), int(UNITS * RATE)
    order: list[np.ndarray] = []

    def shuffled(step: int) -> np.ndarray:
        if step % per_epoch == 0:
            order[:] = np.array_split(random.permutation(UNITS), per_epoch)
        assert len(order[0]) == size
        return order[step % per_epoch]

    values = p_values(inclusion(shuffled))
    assert values["inclusion"] < ALARM and values["batch size"] < ALARM and values["overlap"] < ALARM


def test_a_wrong_rate_is_convicted():
    random = TestRandom(4)
    values = p_values(inclusion(lambda step: poisson_units(UNITS, RATE * 1.1, random)))
    assert values["inclusion"] < ALARM


def test_units_come_in_ascending_order_and_once():
    drawn = poisson_units(10_000, 0.3, SecretRandom())
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 50)])
def test_rate_zero_draws_nobody_and_rate_one_everybody(rate, expected):
    assert len(poisson_units(50, rate, SecretRandom())) == expected


def test_no_units_give_an_empty_batch():
    assert poisson_units(0, 0.5, SecretRandom()).tolist() == []


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(UsageError, match="sampling_rate"):
        poisson_units(10, rate, SecretRandom())


@pytest.mark.parametrize(("units", "limit"), [(0, 5), (1, 5), (5, 5), (6, 5), (23, 5), (7, 1), (9, None)])
def test_physical_parts_hold_every_unit_once_and_none_is_too_large(units, limit):
    drawn = np.arange(units)
    parts = physical_parts(drawn, limit)
    assert len(parts) >= 1  # an empty batch is a step too
    assert np.concatenate(parts).tolist() == drawn.tolist()
    assert max(map(len, parts)) <= (limit or units)
    assert units == 0 or min(map(len, parts)) > 0


def test_parts_of_no_units_are_refused():
    with pytest.raises(UsageError, match="max_physical_batch_size = 0"):
        physical_parts(np.arange(3), 0)


# ------------------------------------------------------------------------------------------------ cyclic and truncated


BANDS = 5


def cyclic(seed: int) -> np.ndarray:
    """(STEPS, UNITS) bool of one block."""
    sampler = CyclicPoisson(UNITS, BANDS, RATE * BANDS, TestRandom(seed))
    return inclusion(lambda step: sampler.next())


def test_a_unit_is_drawn_in_the_steps_of_its_group_only_by_independent_coins():
    """Within the steps of its group every unit's coin is a Poisson sampler's: the statistics above, group by group;
    false-alarm probability 1e-6 each."""
    joined = cyclic(11)
    groups = np.array([np.unique(np.flatnonzero(column) % BANDS) for column in joined.T]).ravel()
    assert len(groups) == UNITS  # nobody was drawn in the steps of two groups
    rate, steps = RATE * BANDS, STEPS // BANDS
    own = np.stack([joined[group::BANDS, unit] for unit, group in enumerate(groups)], axis=1)
    spread = rate * (1 - rate)
    pairs, coins = (own[:-1:2] & own[1::2]).sum(), own[:-1:2].size
    statistics = {
        "inclusion": (((own.sum(0) - steps * rate) ** 2 / (steps * spread)).sum(), UNITS),
        "batch size": (((own.sum(1) - UNITS * rate) ** 2 / (UNITS * spread)).sum(), steps),
        "overlap": ((pairs - coins * rate**2) ** 2 / (coins * rate**2 * (1 - rate**2)), 1),
    }
    values = {name: float(2 * min(chi2.cdf(value, df), chi2.sf(value, df))) for name, (value, df) in statistics.items()}
    assert {name: value for name, value in values.items() if value < ALARM} == {}
    assert abs(joined.sum(1).mean() - UNITS * RATE) < 0.1  # as many on average as without groups


def test_groups_are_uniform_and_new_in_every_block():
    """Chi-square of the sizes of groups over 400 blocks, and of how often a pair of blocks agrees; 1e-6 each."""
    random = TestRandom(12)
    groups = np.empty((400, UNITS), dtype=int)
    for block in groups:
        sampler = CyclicPoisson(UNITS, BANDS, 1.0, random)
        for group in range(BANDS):
            block[sampler.next()] = group
    counts = np.bincount(groups.ravel(), minlength=BANDS)
    expected = groups.size / BANDS
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - ALARM, BANDS - 1)
    agree, pairs = (groups[::2] == groups[1::2]).sum(), groups[::2].size
    assert (agree - pairs / BANDS) ** 2 / (pairs / BANDS * (1 - 1 / BANDS)) < chi2.ppf(1 - ALARM, 1)


def test_poisson_sampling_is_convicted_by_the_test_of_groups():
    random = TestRandom(2)
    joined = inclusion(lambda step: poisson_units(UNITS, RATE, random))
    assert any(len(np.unique(np.flatnonzero(column) % BANDS)) > 1 for column in joined.T)


def test_one_band_is_poisson_sampling():
    sampler = CyclicPoisson(UNITS, 1, RATE, TestRandom(5))
    values = p_values(inclusion(lambda step: sampler.next()))
    assert {name: value for name, value in values.items() if value < ALARM} == {}


def test_bands_that_ask_for_more_than_everybody_are_refused():
    with pytest.raises(UsageError, match=r"sampling_rate = 1.2"):
        CyclicPoisson(10, 3, 1.2, SecretRandom())
    with pytest.raises(UsageError, match="bands = 0"):
        CyclicPoisson(10, 0, 0.1, SecretRandom())
    assert CyclicPoisson(0, 3, 0.1, SecretRandom()).next().tolist() == []


def truncated_p_values(sampler, units: int, rate: float, limit: int, steps: int) -> dict[str, float]:
    """Chi-square of batch sizes against a cut binomial, of which units are in full batches, and of pairs of neighbours in
    them; two-sided."""
    drawn = [sampler() for _ in range(steps)]
    sizes = np.bincount([len(d) for d in drawn], minlength=limit + 1)
    expected = binom.pmf(np.arange(limit + 1), units, rate) * steps
    expected[limit] = binom.sf(limit - 1, units, rate) * steps
    cells = np.minimum(np.searchsorted(np.cumsum(expected), np.arange(10, expected.sum(), 10)), limit)
    edges = np.unique(np.concatenate([[0], cells, [limit + 1]]))
    c, e = np.add.reduceat(sizes, edges[:-1]), np.add.reduceat(expected, edges[:-1])
    full = np.zeros((steps, units), dtype=bool)
    for row, d in zip(full, drawn, strict=True):
        row[d] = len(d) == limit
    full = full[full.any(1)]
    share = limit / units
    counts, count = full.sum(0), len(full)
    spread = (
        count * share * (1 - share) * units / (units - 1)
    )  # batches of one size: inclusion counts sum to a constant
    both = share * (limit - 1) / (units - 1)
    pairs = (full[:, ::2] & full[:, 1::2]).sum()
    statistics = {
        "size": (((c - e) ** 2 / e).sum(), len(c) - 1),
        "units": (((counts - count * share) ** 2).sum() / spread, units - 1),
        "pairs": ((pairs - count * units / 2 * both) ** 2 / (count * units / 2 * both), 1),
    }
    return {name: float(2 * min(chi2.cdf(v, df), chi2.sf(v, df))) for name, (v, df) in statistics.items()}


def test_truncated_poisson_sampling_has_cut_binomial_sizes_and_uniform_subsets():
    """False-alarm probability 1e-6 each (sizes in cells of 10 expected counts)."""
    random = TestRandom(21)
    values = truncated_p_values(lambda: truncated_poisson_units(200, 0.1, 22, random), 200, 0.1, 22, 20_000)
    assert {name: value for name, value in values.items() if value < ALARM} == {}


def test_cutting_away_the_last_units_is_convicted():
    random = TestRandom(22)
    values = truncated_p_values(lambda: poisson_units(200, 0.1, random)[:22], 200, 0.1, 22, 20_000)
    assert values["units"] < ALARM and values["size"] > ALARM


def test_truncation_leaves_smaller_batches_alone():
    assert (
        truncated_poisson_units(500, 0.1, 500, TestRandom(3)).tolist()
        == poisson_units(500, 0.1, TestRandom(3)).tolist()
    )
    drawn = truncated_poisson_units(500, 1.0, 7, SecretRandom())
    assert len(drawn) == 7 and (np.diff(drawn) > 0).all() and drawn.dtype == np.int64
    with pytest.raises(UsageError, match="max_units = 0"):
        truncated_poisson_units(5, 0.5, 0, SecretRandom())


def test_words_that_tie_are_drawn_again():
    class Ties(TestRandom):
        calls = 0

        def bytes(self, count: int) -> bytearray:
            self.calls += 1
            return bytearray(count) if self.calls == 2 else super().bytes(count)

    random = Ties(1)
    assert len(truncated_poisson_units(10, 1.0, 4, random)) == 4
    assert random.calls == 3
