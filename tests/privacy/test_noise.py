"""Goodness of fit of the noise; seeds are fixed, each test states its false-alarm probability."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.errors import UsageError
from sfumato.privacy import noise
from sfumato.privacy.noise import gaussian
from sfumato.randomness import SecretRandom, TestRandom

COUNT = 300_001  # odd, and more than one chunk


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    return gaussian(COUNT, 2.0, TestRandom(1)).numpy()


def test_the_noise_is_normal(draws):
    """Kolmogorov-Smirnov; false-alarm probability 1e-6."""
    assert stats.kstest(draws, "norm", args=(0, 2.0)).pvalue > 1e-6


def test_the_noise_has_the_promised_scale(draws):
    """Chi-square of the sum of squares, which an error of 1.3 % in the scale fails; false-alarm probability 1e-6."""
    statistic = float(((draws / 2.0) ** 2).sum())
    assert stats.chi2.ppf(5e-7, COUNT) < statistic < stats.chi2.ppf(1 - 5e-7, COUNT)


def test_the_tails_are_those_of_a_normal(draws):
    """Binomial test of |x| > 3.5 standard deviations; false-alarm probability 1e-6."""
    outside = int((np.abs(draws) > 3.5 * 2.0).sum())
    assert stats.binomtest(outside, COUNT, float(2 * stats.norm.sf(3.5))).pvalue > 1e-6


def test_coordinates_are_uncorrelated(draws):
    """Lag 1, lag of one chunk, and the two members of a Box-Muller pair (also squared); 1e-6 each."""
    half = (COUNT + 1) // 2
    standard = draws / 2.0
    for lag in (1, noise._CHUNK, half):
        for values in (standard, (standard**2 - 1) / math.sqrt(2)):
            correlation = float((values[:-lag] * values[lag:]).sum()) / math.sqrt(COUNT - lag)
            assert abs(correlation) < 4.9


def test_the_low_bits_show_no_lattice(draws):
    """Chi-square of the bits 2 to 9 of the mantissa where the sum is as large as its summands, so that all its bits are
    in use (the lowest ones favour even numbers in every rounded sum); false-alarm probability 1e-6. A float32 source
    leaves zeros there."""

    def statistic(values: np.ndarray) -> float:
        values = values[np.abs(values) > 4]  # twice the standard deviation
        expected = len(values) / 256
        counts = np.bincount((values.view(np.int64) >> 2) & 255, minlength=256)
        return float(((counts - expected) ** 2 / expected).sum())

    assert statistic(draws) < stats.chi2.ppf(1 - 1e-6, 255)
    assert statistic(draws.astype(np.float32).astype(np.float64)) > stats.chi2.ppf(1 - 1e-6, 255)
    assert len(np.unique(draws)) == COUNT


def test_every_number_uses_four_independent_normals():
    """Holohan & Braghin: an attacker must guess all summands; 64 bytes of secret stand behind each pair of numbers."""
    assert noise.SUMMANDS == 4
    random = TestRandom(0)
    gaussian(1000, 1.0, random)
    assert random._given == 1000 // 2 * 2 * 4 * 8


def test_the_noise_equals_a_slow_box_muller_of_the_same_bytes():
    """Oracle: the formula, one number after the other, from the same key stream."""
    words = np.frombuffer(TestRandom(9).bytes(16 * 4 * 3), dtype="<u8").reshape(2, 4, 3)
    unit = (words & np.uint64(2**52 - 1)) / 2.0**52
    expected = np.zeros((2, 3))
    for i in range(4):
        for j in range(3):
            radius = math.sqrt(-2 * math.log(1 - unit[0, i, j]))
            expected[0, j] += radius * math.cos(2 * math.pi * unit[1, i, j]) / 2
            expected[1, j] += radius * math.sin(2 * math.pi * unit[1, i, j]) / 2
    np.testing.assert_allclose(gaussian(5, 1.0, TestRandom(9)).numpy(), expected.flatten()[:5], rtol=1e-9, atol=1e-12)


def test_two_draws_of_one_source_never_repeat():
    random = SecretRandom()
    assert not torch.isin(gaussian(1000, 1.0, random), gaussian(1000, 1.0, random)).any()


def test_no_noise_is_exactly_zero():
    assert gaussian(7, 0.0, SecretRandom()).tolist() == [0.0] * 7


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_small_counts_have_the_right_length_and_type(count):
    drawn = gaussian(count, 1.0, SecretRandom())
    assert (tuple(drawn.shape), drawn.dtype) == ((count,), torch.float64)


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(std):
    with pytest.raises(UsageError, match="std"):
        gaussian(1, std, SecretRandom())


def test_the_largest_possible_number_is_finite():
    """All bits zero would be log(1) = 0, all ones log(2^-52): both finite."""

    class Ones:
        def bytes(self, count):
            return bytearray(b"\xff" * count)

    assert torch.isfinite(gaussian(2, 1.0, Ones())).all()  # type: ignore[arg-type]
