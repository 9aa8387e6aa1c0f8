"""The discrete Gaussian against its probabilities, and against two slow samplers; every statistic states its false-alarm
probability, seeds are fixed."""

import math
from collections.abc import Callable
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


def from_the_same_bits(std: Fraction, count: int, seed: int) -> list[int]:
    """The scheme of the docstring, number by number, in decimal numbers of 60 digits, from the bytes that the fast one takes."""
    random = TestRandom(seed)
    trials = count + count // 16 + 8
    fine = max(1, math.floor(std / 16))
    words = np.frombuffer(random.bytes(8 * trials), dtype="<u8").tolist()
    if fine & (fine - 1) == 0:
        more = np.frombuffer(random.bytes(8 * trials), dtype="<u8").tolist()
        signs, offsets = [word >> 63 for word in more], [word % fine for word in more]
    else:
        signs = [byte & 1 for byte in random.bytes(trials)]
        offsets = random.integers(trials, fine).tolist()
    coins = np.frombuffer(random.bytes(8 * trials), dtype="<u8").tolist() if fine > 1 else [0] * trials
    out = []
    with localcontext() as context:
        context.prec = 60
        variance = Decimal((std**2).numerator) / Decimal((std**2).denominator)
        coarse = variance / fine**2
        weights = [(-Decimal(x * x) / (2 * coarse)).exp() for x in range(700)]
        total = sum(weights)
        for word, sign, y, coin in zip(words, signs, offsets, coins, strict=True):
            x, left = 0, Decimal(word) / 2**64 * total - weights[0]
            while left >= 0:
                x += 1
                left -= weights[x]
            z = fine * x + y
            if Decimal(coin) / 2**64 < (-Decimal(y * (y + 2 * fine * x)) / (2 * variance)).exp() and not (
                sign and z == 0
            ):
                out.append(-z if sign else z)
    return out[:count]


@pytest.mark.parametrize(
    "std", [Fraction(STD), Fraction(100), Fraction(64), Fraction(40.3), Fraction(37, 10), Fraction(1, 3)]
)
def test_the_fast_sampler_equals_the_slow_one_from_the_same_bits(std):
    assert discrete_gaussian(1500, std, TestRandom(4)).tolist() == from_the_same_bits(std, 1500, 4)


@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 3.7, 16.0, 40.3, 500.5])
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

    def __init__(self, *words: int) -> None:
        self.words = b"".join(word.to_bytes(8, "little") for word in words)
        self.rest = TestRandom(8)
        self.further = 0

    def bytes(self, count: int) -> bytearray:
        given, self.words = self.words[:count], self.words[count:]
        self.further += count - len(given)
        return bytearray(given) + self.rest.bytes(count - len(given))


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
    """U = 1 - 2^-64 (1 - 2^-64): P(X > x) < 2^-127 from x = 13 s' on."""
    scheme = module._scheme(Fraction(STD))
    words = [2**64 - 1] * 3 + [0] * 3 + [0] * 3 + [2**64 - 1, 0] * 3  # index, sign and offset, coin, then continued
    far = module._trials(scheme, 3, Bits(*words))  # type: ignore[arg-type]
    assert (far > 13 * STD).all() and (far < 15 * STD).all()
    assert (far % (STD // 16) == 0).all()


@pytest.mark.parametrize("std", [Fraction(STD), Fraction(2**31), Fraction(40.3), Fraction(1000003, 7)])
def test_undecided_coins_agree_with_the_bounds_that_decide_the_others(std):
    """Coins put upon and beside the tabled bounds: the vectorised decision is the exact one."""
    scheme = module._scheme(std)
    numbers = np.random.default_rng(0)
    trials = 64
    coarse = numbers.integers(0, len(scheme.below) - 1, trials)
    words = [int(scheme.below[x]) - 1 - int(numbers.integers(0, 1000)) for x in coarse]
    offsets = numbers.integers(0, scheme.fine, trials).tolist()
    exponents = [module._exponent(scheme, int(x), y) for x, y in zip(coarse, offsets, strict=True)]
    coins = [max(0, min(module._exp(e, 64)[0] + int(numbers.integers(-3, 3)), 2**64 - 1)) for e in exponents]
    if scheme.fine & (scheme.fine - 1) == 0:
        random = Bits(*words, *offsets, *coins)
    else:
        random = Bits(*words)
        random.rest.integers = None  # type: ignore[assignment]
        chosen = iter((np.zeros(trials, dtype=bool), np.array(offsets)))
        module_signs = lambda fine, count, source: (next(chosen), next(chosen))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_sign_and_offset", module_signs)
            kept = module._trials(scheme, trials, Bits(*words, *coins))  # type: ignore[arg-type]
    if scheme.fine & (scheme.fine - 1) == 0:
        kept = module._trials(scheme, trials, random)  # type: ignore[arg-type]
    expected = []
    with localcontext() as context:
        context.prec = 60
        for x, y, e, coin in zip(coarse.tolist(), offsets, exponents, coins, strict=True):
            true = (-Decimal(e.numerator) / e.denominator).exp() * 2**64
            if coin != math.floor(true):  # else the bits that follow decide
                expected.append((x * scheme.fine + y, coin < true))
    assert {z for z, accepted in expected if accepted} <= set(kept.tolist())
    assert not ({z for z, accepted in expected if not accepted} - {z for z, a in expected if a}) & set(kept.tolist())


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


@pytest.mark.parametrize("draw", [lambda: discrete_gaussian(5, 2.0**31 + 1, SecretRandom()), lambda: discrete_gaussian(5, 0.0, SecretRandom()),
                                  lambda: discrete_gaussian(5, math.nan, SecretRandom()), lambda: discrete(5, -1.0, SecretRandom())])  # fmt: skip
def test_impossible_scales_are_refused(draw: Callable[[], object]):
    with pytest.raises(UsageError, match="std"):
        draw()


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
