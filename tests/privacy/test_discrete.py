"""The discrete Gaussian against its probabilities, and against two slow samplers; every statistic states its false-alarm
probability, seeds are fixed."""

import bisect
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import discrete as module
from sfumato.privacy.discrete import STD, DiscreteSource, discrete, discrete_gaussian, source_named
from sfumato.privacy.noise import gaussian
from sfumato.randomness import SecretRandom, TestRandom

ALARM = 1e-6


def probabilities(std: float, reach: int) -> np.ndarray:
    """P(x) for x = -reach .. reach; what is left out is below 1e-30 for reach = 12 std + 12."""
    x = np.arange(-reach, reach + 1, dtype=float)
    weights = np.exp(-(x**2) / (2 * std**2))
    return weights / weights.sum()


def chi_square_p_value(draws: np.ndarray, std: float) -> float:
    """Cells of at least 10 expected counts each; a cell holds neighbours."""
    reach = math.ceil(12 * std) + 12
    assert np.abs(draws).max() <= reach
    expected = probabilities(std, reach) * len(draws)
    counts = np.bincount(draws + reach, minlength=2 * reach + 1)
    cells = np.floor(np.cumsum(expected) / 10).astype(int)
    cells = np.minimum(cells, cells[-1] - 1)
    e, c = np.bincount(cells, expected), np.bincount(cells, counts)
    kept = e > 0
    return float(stats.chi2.sf((((c - e) ** 2)[kept] / e[kept]).sum(), kept.sum() - 1))


# ------------------------------------------------------------------------------------------------ slow samplers


class Coins:
    """Random bits, one whole number at a time."""

    def __init__(self, seed: int) -> None:
        self.random = TestRandom(seed)

    def below(self, high: int) -> int:
        return int(self.random.integers(1, high)[0])

    def biased(self, p: Fraction) -> bool:
        return self.below(p.denominator) < p.numerator


def bernoulli_exp(exponent: Fraction, coins: Coins) -> bool:
    """Canonne, Kamath, Steinke 2020, Algorithm 1."""
    if exponent <= 1:
        k = 1
        while coins.biased(exponent / k):
            k += 1
        return k % 2 == 1
    for _ in range(math.floor(exponent)):
        if not bernoulli_exp(Fraction(1), coins):
            return False
    return bernoulli_exp(exponent - math.floor(exponent), coins)


def discrete_laplace(scale: int, coins: Coins) -> int:
    """Algorithm 2."""
    while True:
        u = coins.below(scale)
        if not bernoulli_exp(Fraction(u, scale), coins):
            continue
        v = 0
        while bernoulli_exp(Fraction(1), coins):
            v += 1
        x, negative = u + scale * v, coins.below(2) == 1
        if not (negative and x == 0):
            return -x if negative else x


def slow_discrete_gaussian(std: Fraction, coins: Coins) -> int:
    """Algorithm 3."""
    scale = math.floor(std) + 1
    while True:
        y = discrete_laplace(scale, coins)
        if bernoulli_exp((abs(y) - std**2 / scale) ** 2 / (2 * std**2), coins):
            return y


class InDecimals:
    """The scheme of the docstring, number by number, in decimal numbers of 60 digits."""

    def __init__(self, std: Fraction) -> None:
        self.fine = max(1, math.floor(std / 64))
        self.variance = Decimal((std**2).numerator) / Decimal((std**2).denominator)
        self.coarse = self.variance / self.fine**2
        weights = [(-Decimal(x * x) / (2 * self.coarse)).exp() for x in range(1500)]
        total, self.below = sum(weights), [weights[0]]
        for weight in weights[1:]:
            self.below.append(self.below[-1] + weight)
        self.below = [value / total * 2**64 for value in self.below]

    def x_of(self, word: int) -> int:
        return bisect.bisect_right(self.below, Decimal(word))

    def accepts(self, x: int, y: int, coin: int, negative: bool) -> bool:
        under = Decimal(coin) < (-Decimal(y * (y + 2 * self.fine * x)) / (2 * self.variance)).exp() * 2**64
        return under and not (negative and x == y == 0)

    def trials(self, trials: int, random: TestRandom) -> list[int]:
        words = np.frombuffer(random.bytes(8 * trials), dtype="<u8").tolist()
        signs = [byte >= 128 for byte in random.bytes(trials)]
        offsets = random.integers(trials, self.fine).tolist()
        coins = np.frombuffer(random.bytes(8 * trials), dtype="<u8").tolist()
        out = []
        for word, negative, y, coin in zip(words, signs, offsets, coins, strict=True):
            x = self.x_of(word)
            if self.accepts(x, y, coin, negative):
                out.append((-1 if negative else 1) * (self.fine * x + y))
        return out

    def slowly(self, count: int, random: TestRandom) -> list[int]:
        out: list[int] = []
        while len(out) < count:
            out += self.trials(count - len(out) + 8, random)[: count - len(out)]
        return out

    def sparingly(self, count: int, random: TestRandom) -> list[int]:
        words = np.frombuffer(random.bytes(8 * count), dtype="<u8").tolist()
        halves = np.frombuffer(random.bytes(4 * count), dtype="<u4").tolist()
        xs = [self.x_of(word) for word in words]
        signs, offsets = [half >= 2**31 for half in halves], [half % self.fine for half in halves]
        known = [self.x_of(word >> 48 << 48) == self.x_of((word >> 48 << 48) + 2**48 - 1) for word in words]
        rest = []
        for i, word in enumerate(words):
            worst = (-Decimal(2 * xs[i] + 1) / (2 * self.coarse)).exp() * 2**32
            if not known[i] or word % 2**32 >= math.floor(worst) or (signs[i] and xs[i] == offsets[i] == 0):
                rest.append(i)
        more = np.frombuffer(random.bytes(8 * len(rest)), dtype="<u8").tolist()
        again = []
        for i, fresh in zip(rest, more, strict=True):
            coin = (words[i] % 2**32 << 32) + (fresh >> 32) if known[i] else fresh
            if not self.accepts(xs[i], offsets[i], coin, signs[i]):
                again.append(i)
        out = [(-1 if signs[i] else 1) * (self.fine * xs[i] + offsets[i]) for i in range(count)]
        for i, value in zip(again, self.slowly(len(again), random) if again else [], strict=True):
            out[i] = value
        return out


def from_the_same_bits(std: Fraction, count: int, seed: int) -> list[int]:
    with localcontext() as context:
        context.prec = 60
        scheme = InDecimals(std)
        power_of_two = scheme.fine > 1 and scheme.fine & (scheme.fine - 1) == 0
        return (scheme.sparingly if power_of_two else scheme.slowly)(count, TestRandom(seed))


@pytest.mark.parametrize(
    "std", [Fraction(STD), Fraction(1000), Fraction(256), Fraction(140.3), Fraction(37, 10), Fraction(1, 3)]
)
def test_the_fast_sampler_equals_the_slow_one_from_the_same_bits(std):
    assert discrete_gaussian(1500, std, TestRandom(4)).tolist() == from_the_same_bits(std, 1500, 4)


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 3.7, 40.3, 128.0, 500.5])
def test_every_number_has_its_probability(std):
    """Chi-square on 300,000 draws; false-alarm probability 1e-6 each."""
    assert chi_square_p_value(discrete_gaussian(300_000, std, TestRandom(1)), std) > ALARM


def test_the_chi_square_convicts_a_wrong_scale_and_a_rounded_gaussian():
    assert chi_square_p_value(discrete_gaussian(300_000, 1.02, TestRandom(1)), 1.0) < ALARM
    rounded = gaussian(300_000, 1.0, TestRandom(2)).round().long().numpy()
    assert chi_square_p_value(rounded, 1.0) < ALARM  # its variance is 1 + 1/12


@pytest.mark.parametrize("std", [Fraction(3, 4), Fraction(5, 2)])
def test_the_algorithm_of_the_paper_draws_from_the_same_distribution(std):
    """Two chi-square tests on 4,000 draws each, of the oracle and of ours against the same probabilities; 1e-6 each."""
    coins = Coins(3)
    assert chi_square_p_value(np.array([slow_discrete_gaussian(std, coins) for _ in range(4000)]), float(std)) > ALARM
    assert chi_square_p_value(discrete_gaussian(4000, std, TestRandom(3)), float(std)) > ALARM


def test_large_scales_have_the_moments_and_the_shape_of_a_normal():
    """Kolmogorov-Smirnov, sum of squares, third and fourth moment, tails beyond 3.5; false-alarm probability 1e-6 each."""
    count = 400_000
    x = discrete_gaussian(count, STD, TestRandom(5)) / STD
    assert stats.kstest(x, "norm").pvalue > ALARM
    assert stats.chi2.ppf(5e-7, count) < (x**2).sum() < stats.chi2.ppf(1 - 5e-7, count)
    assert abs((x**3).mean()) < 4.9 * math.sqrt(15 / count)
    assert abs((x**4).mean() - 3) < 4.9 * math.sqrt(96 / count)
    assert stats.binomtest(int((np.abs(x) > 3.5).sum()), count, float(2 * stats.norm.sf(3.5))).pvalue > ALARM


def test_low_bits_are_uniform_and_draws_uncorrelated():
    """Chi-square of the last 8 bits; lags 1 and one chunk. False-alarm probability 1e-6 each."""
    count = 400_000
    drawn = discrete_gaussian(count, STD, TestRandom(6))
    counts = np.bincount(drawn & 255, minlength=256)
    assert ((counts - count / 256) ** 2 / (count / 256)).sum() < stats.chi2.ppf(1 - ALARM, 255)
    x = drawn / STD
    for lag in (1, module._CHUNK):
        assert abs((x[:-lag] * x[lag:]).sum()) / math.sqrt(count - lag) < 4.9


# ------------------------------------------------------------------------------------------------ exactness at the edges


@pytest.mark.parametrize("bits", [8, 64, 200])
@pytest.mark.parametrize(
    "exponent", [Fraction(0), Fraction(1, 10**6), Fraction(1, 3), Fraction(1), Fraction(29, 7), Fraction(150)]
)
def test_integer_bounds_on_the_exponential_enclose_it_closely(exponent, bits):
    low, high = module._exp(exponent, bits)
    with localcontext() as context:
        context.prec = 120
        true = (-Decimal(exponent.numerator) / exponent.denominator).exp() * 2**bits
        assert low <= true <= high
        assert high - low <= 2


@pytest.mark.parametrize("variance", [Fraction(1, 9), Fraction(2), Fraction(256)])
def test_integer_bounds_on_the_distribution_enclose_it_closely(variance):
    bounds = module._distribution(variance, 64)
    with localcontext() as context:
        context.prec = 60
        weights = [(-Decimal(x * x) * variance.denominator / (2 * variance.numerator)).exp() for x in range(600)]
        below = Decimal(0)
        for x, (low, high) in enumerate(bounds):
            below += weights[x]
            assert low <= below / sum(weights) * 2**64 <= high
            assert high - low <= 1
    assert bounds[-1][1] == 2**64


class Bits:
    """Gives the words it was made with, in order, then the bytes of a test source."""

    def __init__(self, *words: int, of: int = 8) -> None:
        self.words = b"".join(word.to_bytes(of, "little") for word in words)
        self.rest = TestRandom(8)
        self.further = 0

    def bytes(self, count: int) -> bytearray:
        given, self.words = self.words[:count], self.words[count:]
        self.further += count - len(given)
        return bytearray(given) + self.rest.bytes(count - len(given))

    def integers(self, count: int, high: int) -> np.ndarray:
        return self.rest.integers(count, high)


def test_a_word_that_does_not_decide_is_continued_by_more_bits():
    variance = Fraction(256)
    low = module._distribution(variance, 64)[10][0]
    for further, expected in ((0, 10), (2**64 - 1, 11)):
        assert module._index(low, variance, Bits(further)) == expected  # type: ignore[arg-type]
    exponent = Fraction(1, 3)
    low = module._exp(exponent, 64)[0]
    for further, expected in ((0, True), (2**64 - 1, False)):
        bits = Bits(further)
        assert module._coin(low, exponent, bits) is expected  # type: ignore[arg-type]
        assert bits.further == 0  # one word more, not two
    bits = Bits()
    assert module._coin(low - 1, exponent, bits) and not module._coin(low + 1, exponent, bits)  # type: ignore[arg-type]
    assert bits.further == 0


def test_the_last_word_of_all_goes_far_into_the_tail():
    """U = 1 - 2^-64 (1 - 2^-64): P(X > x) < 2^-127 from x = 13 s' on. y and the coins are 0, the third is negative."""
    out, end = np.zeros(3, dtype=np.int64), 2**32 - 1
    bits = Bits(*[end] * 6, 0, 0, 2**31, *[0] * 6, *[end, end, 0, 0] * 3, of=4)
    module._fill(module._scheme(Fraction(STD)), out, bits)  # type: ignore[arg-type]
    assert bits.further == 0
    assert (np.abs(out) > 13 * STD).all() and (np.abs(out) < 15 * STD).all()
    assert (out % (STD // 64) == 0).all() and np.sign(out).tolist() == [1, 1, -1]


def test_minus_zero_is_drawn_again():
    """Otherwise 0 would have twice its probability: words of 0 are x = 0, y = 0, and a coin that is accepted."""
    scheme = module._scheme(Fraction(STD))
    plus, minus = np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    module._fill(scheme, plus, Bits(0, 0, 0, of=4))  # type: ignore[arg-type]
    module._fill(scheme, minus, Bits(0, 0, 2**31, of=4))  # type: ignore[arg-type]
    assert plus.tolist() == [0] and minus.tolist() != [0]


@pytest.mark.parametrize("std", [Fraction(STD), Fraction(2**31), Fraction(140.3), Fraction(1000003, 7)])
def test_undecided_coins_agree_with_the_bounds_that_decide_the_others(std):
    """Coins put upon and beside the tabled bounds: the vectorised decision is the exact one."""
    scheme, numbers, trials = module._scheme(std), np.random.default_rng(0), 200
    coarse = numbers.integers(0, len(scheme.below) + 9, trials)  # some beyond the table
    offset = numbers.integers(0, scheme.fine, trials)
    bounds = [
        module._exp(module._exponent(scheme, x, y), 64)[0]
        for x, y in zip(coarse.tolist(), offset.tolist(), strict=True)
    ]
    coins = [max(0, min(low + int(numbers.integers(-3, 4)), 2**64 - 1)) for low in bounds]
    kept = module._accepted(scheme, coarse, offset, np.array(coins, dtype=np.uint64), TestRandom(1))
    decided = 0
    with localcontext() as context:
        context.prec = 60
        for x, y, coin, answer in zip(coarse.tolist(), offset.tolist(), coins, kept.tolist(), strict=True):
            e = module._exponent(scheme, x, y)
            true = (-Decimal(e.numerator) / e.denominator).exp() * 2**64
            if coin != math.floor(true):  # else the bits that follow decide
                assert answer == (coin < true)
                decided += 1
    assert decided > trials / 2


# ------------------------------------------------------------------------------------------------ what the claim rests on


@pytest.mark.parametrize("order", [1.5, 2, 10])
@pytest.mark.parametrize("shift", [1, 3, 40])
def test_the_renyi_divergence_is_at_most_that_of_the_continuous_gaussian(order, shift):
    std = 6.0
    x = np.arange(-3000, 3001, dtype=float)
    p, q = (-((x - c) ** 2) / (2 * std**2) for c in (shift, 0.0))
    exponents = order * p + (1 - order) * q
    top = exponents.max()
    total = math.log(np.exp(exponents - top).sum()) + top - math.log(np.exp(q).sum())
    bound = order * shift**2 / (2 * std**2)
    assert total / (order - 1) <= bound * (1 + 1e-12)
    if float(order).is_integer():
        assert total / (order - 1) == pytest.approx(bound, rel=1e-12)


def test_a_rounded_continuous_gaussian_comes_as_near_as_the_docstring_says():
    """The comparison with r = 1/2, where kappa is visible: every probability within exp(+-3 kappa)."""
    r, t = 0.5, 1.5
    kappa = 2 * sum(math.exp(-2 * math.pi**2 * r**2 * k**2) for k in (1, 2, 3))
    assert 0.01 < kappa < 0.02
    s = math.hypot(r, t)

    def kernel(x: int, y: float) -> float:
        return math.exp(-((x - y) ** 2) / (2 * r**2)) / sum(
            math.exp(-((k - y) ** 2) / (2 * r**2)) for k in range(round(y) - 9, round(y) + 10)
        )

    true = probabilities(s, 60)
    ratios = [
        quad(lambda y, x=x: stats.norm.pdf(y, scale=t) * kernel(x, y), -12, 12, epsabs=1e-13, limit=200)[0]
        / true[60 + x]
        for x in range(-4, 5)
    ]
    assert max(abs(math.log(ratio)) for ratio in ratios) <= 3 * kappa
    assert max(abs(math.log(ratio)) for ratio in ratios) > kappa / 100  # the bound is about something


def test_sampled_and_composed_it_loses_no_more_than_the_smaller_continuous_gaussian():
    """The exact hockey-stick divergence of two Poisson-sampled steps on the integers, both directions, against the PLD of
    N(0, t^2): s = 64, sensitivity 64."""
    from dp_accounting.pld import privacy_loss_distribution

    rate, s, shift = 0.2, 64.0, 64
    x = np.arange(-900, 901, dtype=float)
    q = np.exp(-(x**2) / (2 * s**2))
    q /= q.sum()
    p = (1 - rate) * q + rate * np.exp(-((x - shift) ** 2) / (2 * s**2)) / np.exp(-(x**2) / (2 * s**2)).sum()
    t = math.sqrt(s**2 - module._SMOOTH**2) / shift
    reference = privacy_loss_distribution.from_gaussian_mechanism(
        t, sampling_prob=rate, value_discretization_interval=1e-4
    )
    reference = reference.self_compose(2)
    for epsilon in (0.1, 0.5, 1.0):
        for upper, lower in ((p, q), (q, p)):
            delta = np.maximum(np.outer(upper, upper) - math.exp(epsilon) * np.outer(lower, lower), 0).sum()
            assert delta <= reference.get_delta_for_epsilon(epsilon)


@pytest.mark.parametrize(("bound", "dimension"), [(3.0, 1), (1.0, 10_000_000), (0.01, 1000)])
def test_rounding_and_the_comparison_are_paid_for(bound, dimension):
    std = 1.5
    paid = module.widened(std, bound, dimension)
    h = module.step(paid)
    t = Fraction(paid) * (1 - Fraction(module._SMOOTH**2, STD**2))  # below h sqrt(s^2 - r^2)
    root = Fraction(math.isqrt(dimension * 10**20) + 1, 10**10)
    assert t / (Fraction(bound) + 2 * Fraction(h) * root) >= Fraction(std) / Fraction(bound)
    assert paid <= std * (1 + 2e-5)
    assert module.widened(0.0, 1.0, 10) == 0.0


def test_too_many_coordinates_for_so_much_noise_are_refused():
    with pytest.raises(PrivacyRefused, match="dimension = 1,000,000,000"):
        module.widened(1e5, 1.0, 1_000_000_000)


def test_sum_and_noise_are_whole_multiples_and_added_exactly():
    std = 0.7
    sums = torch.tensor([0.1, -1e3, 1e-12, math.pi, 1e9, -math.inf], dtype=torch.float64)
    h = Fraction(module.step(std))
    alone = discrete_gaussian(6, STD, TestRandom(5)).tolist()
    together = discrete(6, std, TestRandom(5), plus=sums).tolist()
    cut = [max(-(2**52), min(2**52, round(Fraction(c) / h))) if math.isfinite(c) else -(2**52) for c in sums.tolist()]
    for a, b, c in zip(alone, together, cut, strict=True):
        assert abs(Fraction(b) / h - (a + c)) <= Fraction(
            abs(a + c), 2**53
        )  # the product with h is rounded: post-processing


@pytest.mark.parametrize("std", [2.0**31 + 1, 0.0, math.nan, math.inf, -1.0])
def test_impossible_scales_are_refused(std):
    with pytest.raises(UsageError, match="std"):
        discrete_gaussian(5, std, SecretRandom())
    if not 0 <= std < math.inf:
        with pytest.raises(UsageError, match="std"):
            discrete(5, std, SecretRandom())


def test_no_noise_is_exactly_zero_and_secret_draws_never_repeat():
    assert discrete(3, 0.0, SecretRandom()).tolist() == [0.0] * 3
    assert (
        discrete(2, 0.0, SecretRandom(), plus=torch.tensor([1.5, -0.1])).tolist() == torch.tensor([1.5, -0.1]).tolist()
    )
    random = SecretRandom()
    assert not np.isin(discrete_gaussian(1000, STD, random), discrete_gaussian(1000, STD, random)).any()
    assert discrete_gaussian(0, 3.0, random).shape == (0,)


def test_the_two_sources_have_one_face():
    assert isinstance(source_named("discrete"), DiscreteSource)
    assert [source_named(name).name for name in ("gaussian", "discrete")] == ["gaussian", "discrete"]
    with pytest.raises(UsageError, match="noise_source = 'laplace'"):
        source_named("laplace")
    for name in ("gaussian", "discrete"):
        source = source_named(name)
        h = source.spacing(3.0)
        assert h <= 3.0 / 2**30
        whole = source.whole(1000, 3.0, h, TestRandom(1))
        assert (whole == whole.round()).all()
        assert torch.equal(source.draw(1000, 3.0, TestRandom(1)), whole * h)
        assert torch.equal(
            source.draw(1000, 3.0, TestRandom(1), torch.full((1000,), 0.3)),
            (whole + source.rounded(torch.full((1000,), 0.3), h)) * h,
        )
