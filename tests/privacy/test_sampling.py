"""Poisson sampling is what amplification is proved for; shuffling must fail the same tests."""

import numpy as np
import pytest
from scipy.stats import chi2

from sfumato.errors import UsageError
from sfumato.privacy.sampling import physical_parts, poisson_units
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
