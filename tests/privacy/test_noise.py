"""Goodness of fit of the noise; seeds are fixed, each test states its false-alarm probability."""

import math
from fractions import Fraction

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


def test_noise_and_sum_lie_on_one_grid_and_its_last_bits_are_uniform(draws):
    """Whatever is added, the release is a whole multiple of the spacing: no low bit tells what it was. Chi-square of the
    last 8 bits of the multiples; false-alarm probability 1e-6. A float32 source leaves zeros there."""

    def statistic(multiples: np.ndarray) -> float:
        counts = np.bincount(multiples.astype(np.int64) & 255, minlength=256)
        return float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())

    step = noise.spacing(2.0)
    sums = torch.from_numpy(np.random.default_rng(0).standard_normal(COUNT) * 1e-3)
    released = gaussian(COUNT, 2.0, TestRandom(2), plus=sums).numpy()
    for values in (draws, released):
        assert (values / step == np.round(values / step)).all()
        assert statistic(values / step) < stats.chi2.ppf(1 - 1e-6, 255)
    coarse = (draws.astype(np.float32) / step).round()
    assert statistic(coarse) > stats.chi2.ppf(1 - 1e-6, 255)


def test_the_sum_is_added_exactly_after_rounding_to_the_grid():
    sums = torch.tensor([0.1, -1e3, 1e-12, math.pi], dtype=torch.float64)
    step = noise.spacing(3.0)
    alone = gaussian(4, 3.0, TestRandom(5))
    together = gaussian(4, 3.0, TestRandom(5), plus=sums)
    for a, b, c in zip(alone.tolist(), together.tolist(), sums.tolist(), strict=True):
        assert Fraction(b) == Fraction(a) + round(Fraction(c) / Fraction(step)) * Fraction(step)


@pytest.mark.parametrize("std", [1e-20, 0.3, 1.0, 1.5, 1e12])
def test_the_grid_is_fine_and_rounding_is_paid_for(std):
    assert 2.0**-31 < noise.spacing(std) / std <= 2.0**-30
    bound, dimension = std / 3, 10_000_000
    moved = bound + math.sqrt(dimension) * noise.spacing(std)  # how far two sums may be apart after rounding
    assert noise.widened(std, bound, dimension) / moved >= std / bound
    assert noise.widened(std, bound, dimension) <= std * (1 + 3e-5)
    assert noise.widened(0.0, 1.0, 10) == 0.0


def test_the_noise_equals_a_slow_box_muller_of_the_same_bytes():
    """Oracle: the formula, one number after the other, from the same key stream."""

    class Small(TestRandom):
        """The second pair's uniform number is below 2^-20, and gets the bits that follow."""

        calls = 0

        def bytes(self, count: int) -> bytearray:
            drawn, self.calls = super().bytes(count), self.calls + 1
            if self.calls == 1:
                drawn[8 + 3 : 8 + 8] = b"\xff" * 5
            return drawn

    random = Small(9)
    words = np.frombuffer(random.bytes(16 * 3), dtype="<u8").reshape(2, 3)
    first, angles = ([int(word) & (2**52 - 1) for word in row] for row in words)
    further = int.from_bytes(random.bytes(8), "little") & (2**52 - 1)
    expected = np.zeros((2, 3))
    for j in range(3):
        uniform = 1 - Fraction(first[j], 2**52)
        if j == 1:
            assert uniform < Fraction(1, 2**20)
            uniform -= Fraction(further, 2**104)
        radius = math.sqrt(-2 * math.log(float(uniform)))
        expected[0, j] = radius * math.cos(2 * math.pi * angles[j] / 2**52)
        expected[1, j] = radius * math.sin(2 * math.pi * angles[j] / 2**52)
    np.testing.assert_allclose(gaussian(5, 1.0, Small(9)).numpy(), expected.flatten()[:5], rtol=0, atol=2.0**-30)


def test_the_tail_is_fine_where_the_first_bits_are_all_one():
    """The radius then comes from the next 52 bits, so that far numbers are not a few fixed ones."""

    class FewBits:
        def bytes(self, count):
            if count == 8 * 1000:  # the further bits
                return TestRandom(3).bytes(count)
            return bytearray(b"\xff" * (count // 2)) + bytearray(count // 2)

    drawn = gaussian(2000, 1.0, FewBits())[:1000]  # type: ignore[arg-type]
    assert float(drawn.min()) > 8.4
    assert len(drawn.unique()) > 990


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


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_largest_possible_number_is_finite(byte):
    class Same:
        def bytes(self, count):
            return bytearray(byte * count)

    assert torch.isfinite(gaussian(2, 1.0, Same())).all()  # type: ignore[arg-type]
