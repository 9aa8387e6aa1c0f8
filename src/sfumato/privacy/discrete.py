"""The discrete Gaussian on a grid of integers, sampled exactly: the strict source of noise.

N_Z(c, s^2) gives the integer x with probability exp(-(x - c)^2 / 2 s^2) / sum over all integers. ``discrete_gaussian``
draws from N_Z(0, s^2) itself: random bits are compared with integer bounds on the true probabilities, more bits are drawn
where the first do not decide, and no floating-point number decides anything.

The claim of ``discrete``. The sum of the units' contributions, one unit's of L2 norm at most C, is divided by a step
h = std / 2^30, rounded to integers, and cut to +-2^52 (both are done in float64; one unit then moves the d integers by at
most C / h + 2 sqrt(d) in L2: rounding moves two numbers apart by at most 1, and so does the division, below 2^52). N_Z(0, s^2)
with s = 2^30 is added to each. *Released are these integers*; what is returned, their product with h, is
post-processing. Unit and adjacency are the sum's.

*zCDP and RDP.* For an integer shift v every order alpha > 1 has D_alpha(N_Z(v, s^2) || N_Z(0, s^2)) <= alpha |v|^2 / 2 s^2, in
d dimensions too: the continuous Gaussian's (Canonne, Kamath, Steinke 2020, arXiv:2004.00010, Proposition 5, Theorem 14).

*Everything else*, PLD, Poisson sampling and adaptive composition among it, follows from a comparison. Let r = 8 and
kappa = 2 sum_k exp(-2 pi^2 r^2 k^2) < 10^-547. By Poisson's summation formula, sum_x exp(-(x - y)^2 / 2 r^2), over the
integers x, is sqrt(2 pi) r times a number in [1 - kappa, 1 + kappa], for every real y. Draw y from N(v, t^2), t^2 = s^2 - r^2,
then x from N_Z(y, r^2): the density of (x, y) is N(v, t^2)(y) exp(-(x - y)^2 / 2 r^2) / sqrt(2 pi) r over such a number, and
integrated over y it is exp(-(x - v)^2 / 2 s^2) / sqrt(2 pi) s over such a number. So x has the probabilities of N_Z(v, s^2)
up to factors in [exp(-3 kappa), exp(3 kappa)]. Hence a whole run, n numbers over all its steps, has the law of
post-processing a run with N(0, t^2) up to a factor in [exp(-3 n kappa), exp(3 n kappa)]: whatever was sampled and whatever
earlier answers the questions depend on, for each is compared given all before. If the run with N(0, t^2) is
(epsilon, delta)-private, this one is (epsilon + 6 n kappa, exp(3 n kappa) delta)-private, and for n < 10^30, 6 n kappa <
10^-515. ``widened`` pays for the rest: t h against the sensitivity C + 2 h sqrt(d) is at least std / C.

Sampling: s = K s', with K = floor(s / 64). x >= 0 with probability ~ exp(-x^2 / 2 s'^2), by inversion of a table; y uniform on
0 .. K - 1; z = K x + y is accepted with probability exp(-y (y + 2 K x) / 2 s^2), which leaves exp(-z^2 / 2 s^2), at any size
of s in 1.01 trials; then a sign, and -0 is drawn again (the scheme of Ducas et al. 2013, BLISS, section 6). For K = 2^k the 96
bits of a trial are used sparingly (``_fill``): 98 of 100 are decided by two look-ups.
Differs: Canonne et al. sample a discrete Laplace first and make every coin from coins of rational bias (Algorithms 1 to 3). That is
the slow oracle of the tests; the distribution is the same one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sfumato import checks
from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy.noise import GaussianSource, Source
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor

STD = 2**30  # of ``discrete``, in steps of its grid
LARGEST = 2**31  # standard deviation in steps that the arithmetic of 64 bits admits

_SMOOTH = 8  # r
_COARSE = 64  # least s'
_CUTS = 15  # coins are looked up by the first 15 bits after the point of their exponent
_CHUNK = 1 << 17
_PIECE = 1 << 15  # of a chunk, so that the work stays in the processor's cache
_END = 2**64 - 1
_LARGEST_SUM = float(2**52)


class DiscreteSource:
    """Discrete Gaussians, sampled exactly: the strict one."""

    name = "discrete"

    def spacing(self, std: float) -> float:
        return step(std)

    def widened(self, std: float, bound: float, dimension: int) -> float:
        return widened(std, bound, dimension)

    def draw(self, count: int, std: float, random: Random, plus: "Tensor | None" = None) -> "Tensor":
        return discrete(count, std, random, plus)

    def whole(self, count: int, std: float, step: float, random: Random) -> "Tensor":
        import torch

        return torch.from_numpy(discrete_gaussian(count, Fraction(std) / Fraction(step), random)).double()

    def rounded(self, values: "Tensor", step: float) -> "Tensor":
        return values.double().div(step).clamp_(-_LARGEST_SUM, _LARGEST_SUM).round_()


def source_named(name: str) -> Source:
    """The source of independent noise that an engine, or a plan, asks for by name."""
    checks.one_of(("gaussian", "discrete"), noise_source=name)
    return DiscreteSource() if name == "discrete" else GaussianSource()


def step(std: float) -> float:
    """The grid of ``discrete`` noise with this standard deviation."""
    return math.ldexp(std, -30)


def widened(std: float, bound: float, dimension: int) -> float:
    """The standard deviation with which ``discrete`` costs what a continuous Gaussian of ``std`` costs without rounding.

    With a = std / bound it solves s h - (r h)^2 / (s h) >= a (bound + 2 h sqrt(dimension)), for which t >= s - r^2 / s.
    Raises: PrivacyRefused where rounding so many coordinates would need twice the noise, or more.
    """
    if std == 0:
        return 0.0
    lost = 2.0 * math.sqrt(dimension) / STD * (std / bound)
    if lost > 0.5:
        raise PrivacyRefused(
            f"dimension = {dimension:,} · is too many for discrete noise of multiplier {std / bound:g}: rounding them would "
            "double it",
            next="Use the Gaussian source, or less noise and fewer steps.",
            code="discrete_noise",
        )
    return std / (1.0 - lost) * (1.0 + 2.0**-50)  # 2^-50 > (r / s)^2, and pays for these few roundings too


def discrete(count: int, std: float, random: Random, plus: "Tensor | None" = None) -> "Tensor":
    """Draws ``count`` independent discrete Gaussians on the grid ``step(std)``; the face of ``noise.gaussian``.

    Args: plus: (count,), on the CPU, is rounded to the grid, cut to +-2^22 ``std``, and added exactly; as it is for
        ``std`` = 0.
    Returns: (count,) float64 on the CPU, multiples of the step up to their rounding to float64.
    """
    import torch

    checks.non_negative(count=count, std=std)
    if std == 0:
        return torch.zeros(count, dtype=torch.float64) if plus is None else plus.double()
    h = step(std)
    out = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _CHUNK):  # so that the work stays in the processor's cache
        part = out[start : start + _CHUNK]
        part.copy_(torch.from_numpy(discrete_gaussian(len(part), STD, random)))
        if plus is not None:
            part.add_(_SOURCE.rounded(plus[start : start + _CHUNK], h))  # whole numbers below 2^53: exact
        part.mul_(h)
    return out


def discrete_gaussian(count: int, std: float | Fraction, random: Random) -> np.ndarray:
    """Draws ``count`` independent numbers from N_Z(0, std^2), exactly.

    Args: std: in steps of the grid, at most 2^31; a float is the rational number that it is.
    Returns: (count,) int64.
    """
    checks.non_negative(count=count)
    checks.positive(std=float(std), next="Give a standard deviation in steps of the grid.")
    if std > LARGEST:
        raise UsageError(f"std = {float(std):g} · must be at most 2^31 steps of the grid", next="Take a coarser grid.")
    scheme = _scheme(Fraction(std))
    out = np.empty(count, dtype=np.int64)
    fill = _fill if scheme.fine_bits else _fill_slowly
    for start in range(0, count, _CHUNK):
        fill(scheme, out[start : start + _CHUNK], random)
    return out


_SOURCE = DiscreteSource()


@dataclass(frozen=True, eq=False)
class _Scheme:
    """What one standard deviation needs. Bounds are integers of 64 bits, for words of 64 random bits."""

    variance: Fraction
    fine: int  # K
    fine_bits: int  # its logarithm; 0 if it is no power of two, or 1
    coarse_variance: Fraction  # s'^2
    below: np.ndarray  # uint64: a word under below[x] is surely under P(X <= x)
    above: np.ndarray  # uint64: a word over above[x] is surely over it; the last one is over every word
    shift: int  # the exponent in cuts is (numerator << shift) / divisor, a number between the two divisors
    divisors: tuple[int, int]  # from above, from below
    accept: np.ndarray  # uint64: a word under accept[j] is surely under exp(-j / 2^15)
    reject: np.ndarray  # a word over reject[j] is surely over it
    guide: np.ndarray  # int32 by the first 16 bits of a word: x
    sure: (
        np.ndarray
    )  # uint32 likewise: a coin of 32 bits under it is accepted whatever y; 0 where 16 bits do not give x


@lru_cache(maxsize=16)
def _scheme(std: Fraction) -> _Scheme:
    fine = max(1, int(std / _COARSE))
    coarse_variance = (std / fine) ** 2
    bounds = _distribution(coarse_variance, 64)
    below = np.array([low for low, _ in bounds], dtype=np.uint64)
    above = np.array([high - 1 for _, high in bounds], dtype=np.uint64)
    largest = fine * fine * (2 * len(below) + 1)  # of the numerators y (y + 2 K x)
    shift = 63 - largest.bit_length()
    cut = 2 * std**2 * 2**shift / 2**_CUTS  # the exponent is numerator / 2 s^2; above 2^40 where there are offsets
    divisors = (math.ceil(cut), math.floor(cut)) if fine > 1 else (1, 1)
    accept, reject = _coins((largest << shift) // divisors[1] + 3 if fine > 1 else 0)
    starts = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    first = np.searchsorted(below, starts, side="right")
    last = np.searchsorted(below, starts + np.uint64(2**48 - 1), side="right")
    plain = (first == last) & (first < len(below)) & ((first == 0) | (above[first - 1] < starts))
    worst = [_exp(Fraction(2 * x + 1) / (2 * coarse_variance), 32)[0] for x in range(len(below) + 1)]  # y < K
    return _Scheme(
        variance=std**2,
        fine=fine,
        fine_bits=fine.bit_length() - 1 if fine & (fine - 1) == 0 else 0,
        coarse_variance=coarse_variance,
        below=below,
        above=above,
        shift=shift,
        divisors=divisors,
        accept=accept,
        reject=reject,
        guide=first.astype(np.int32),
        sure=np.where(plain, np.array(worst, dtype=np.uint32)[first], np.uint32(0)),
    )


def _fill(scheme: _Scheme, out: np.ndarray, random: Random) -> None:
    """Fills out (n,) int64 for K = 2^k, k <= 25. Of a trial's first word the first 16 bits give x, if they do, and the last 32 begin a
    coin; its second one, of 32 bits, holds the sign and y."""
    words = np.frombuffer(random.bytes(8 * len(out)), dtype="<u8")
    half_words = np.frombuffer(random.bytes(4 * len(out)), dtype="<u4")
    unsure = [
        start + _look_up(scheme, *(held[start : start + _PIECE] for held in (words, half_words, out)))
        for start in range(0, len(out), _PIECE)
    ]
    rest = np.concatenate(unsure)
    if len(rest) == 0:
        return
    words, half_words = words[rest], half_words[rest]
    start, negative = (words >> np.uint64(48)).view(np.int64), half_words >= np.uint32(2**31)
    more = np.frombuffer(random.bytes(8 * len(rest)), dtype="<u8")
    known = scheme.sure[start] > 0  # x, and the coin's first 32 bits
    coins = np.where(known, words << np.uint64(32) | more >> np.uint64(32), more)
    coarse = np.where(known, scheme.guide[start], _coarse(scheme, np.where(known, 0, words), random))
    y = (half_words & np.uint32(scheme.fine - 1)).astype(np.int64)
    z = coarse * scheme.fine + y
    keep = _accepted(scheme, coarse, y, coins, random) & ((z != 0) | ~negative)
    out[rest] = np.where(negative, -z, z)
    again = rest[~keep]
    if len(again):
        fresh = np.empty(len(again), dtype=np.int64)
        _fill_slowly(scheme, fresh, random)
        out[again] = fresh


def _look_up(scheme: _Scheme, words: np.ndarray, half_words: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Fills out (n,). Returns: (r,) int64, where that is not yet sure to be accepted, or x not known."""
    start = (words >> np.uint64(48)).view(np.int64)
    sure = words.view("<u4")[::2] < scheme.sure.take(start)
    np.left_shift(scheme.guide.take(start), scheme.fine_bits, out=out, dtype=np.int64)
    np.bitwise_or(out, half_words & np.uint32(scheme.fine - 1), out=out)
    mask = half_words.view(np.int32) >> np.int32(31)  # -1 for a negative one
    if not out.all():
        sure &= (out != 0) | (mask == 0)
    np.bitwise_xor(out, mask, out=out)
    np.subtract(out, mask, out=out)
    return np.flatnonzero(~sure)


def _fill_slowly(scheme: _Scheme, out: np.ndarray, random: Random) -> None:
    """Fills out (n,) int64, with a word for each of the draws of a trial."""
    filled = 0
    while filled < len(out):
        drawn = _trials(scheme, len(out) - filled + 8, random)[: len(out) - filled]
        out[filled : filled + len(drawn)] = drawn
        filled += len(drawn)


def _trials(scheme: _Scheme, trials: int, random: Random) -> np.ndarray:
    """Makes so many trials; returns those that were accepted, in order: (a,) int64."""
    coarse = _coarse(scheme, np.frombuffer(random.bytes(8 * trials), dtype="<u8"), random)
    negative = np.frombuffer(random.bytes(trials), dtype=np.uint8) >= 128
    offset = random.integers(trials, scheme.fine)
    coins = np.frombuffer(random.bytes(8 * trials), dtype="<u8")
    z = coarse * scheme.fine + offset
    keep = _accepted(scheme, coarse, offset, coins, random) & ((z != 0) | ~negative)
    return np.where(negative, -z, z)[keep]


def _coarse(scheme: _Scheme, words: np.ndarray, random: Random) -> np.ndarray:
    """(n,) int64: the least x with U < P(X <= x), where the words are the first 64 bits of U."""
    coarse = np.searchsorted(scheme.below, words, side="right").astype(np.int64)
    for i in np.flatnonzero((coarse > 0) & (words <= scheme.above[np.maximum(coarse, 1) - 1])):
        coarse[i] = _index(int(words[i]), scheme.coarse_variance, random)
    return coarse


def _accepted(scheme: _Scheme, coarse: np.ndarray, offset: np.ndarray, coins: np.ndarray, random: Random) -> np.ndarray:
    """(n,) bool: U < exp(-y (y + 2 K x) / 2 s^2), where the coins are the first 64 bits of U."""
    if scheme.fine == 1:
        return np.ones(len(coins), dtype=bool)
    inside = np.minimum(coarse, len(scheme.below) - 1)  # what the integers of 64 bits are large enough for
    numerator = (offset * (offset + 2 * scheme.fine * inside)).astype(np.uint64) << np.uint64(scheme.shift)
    least = numerator // np.uint64(scheme.divisors[0])
    most = least if scheme.divisors[0] == scheme.divisors[1] else numerator // np.uint64(scheme.divisors[1])
    keep = coins < scheme.accept[most + np.uint64(1)]
    for i in np.flatnonzero((~keep & (coins <= scheme.reject[least])) | (inside < coarse)):
        keep[i] = _coin(int(coins[i]), _exponent(scheme, int(coarse[i]), int(offset[i])), random)
    return keep


def _exponent(scheme: _Scheme, coarse: int, offset: int) -> Fraction:
    return Fraction(offset * (offset + 2 * scheme.fine * coarse)) / (2 * scheme.variance)


# -- exact decisions: a uniform real number U of which the first bits are known, against a bound known as closely as need be --


def _coin(word: int, exponent: Fraction, random: Random) -> bool:
    """Whether U < exp(-exponent), where ``word`` holds the first 64 bits of U and ``random`` the others."""
    if exponent == 0:
        return True
    return _under(word, 64, lambda bits: _exp(exponent, bits), random)


def _index(word: int, variance: Fraction, random: Random) -> int:
    """The least x >= 0 with U < P(X <= x), P(X = x) ~ exp(-x^2 / 2 variance)."""
    bits = 64
    while True:
        bits, word = _more(word, bits, random)
        for x, (low, high) in enumerate(_distribution(variance, bits)):
            if word < low:
                return x
            if word < high:
                break  # not decided by so many bits


def _under(word: int, bits: int, bound: Callable[[int], tuple[int, int]], random: Random) -> bool:
    while True:
        low, high = bound(bits)
        if word < low:
            return True
        if word >= high:
            return False
        bits, word = _more(word, bits, random)


def _more(word: int, bits: int, random: Random) -> tuple[int, int]:
    return bits + 64, (word << 64) | int.from_bytes(random.bytes(8), "little")


def _exp(exponent: Fraction, bits: int) -> tuple[int, int]:
    """(low, high), integers with low <= 2^bits exp(-exponent) <= high, mostly 1 apart; ``exponent`` >= 0.

    exp(-a) = exp(-a / 2^k)^(2^k) with a / 2^k <= 1/2; the series there alternates with falling terms, so that partial sums
    enclose it; rounded down for low and up for high.
    """
    above, below = exponent.numerator, exponent.denominator
    halvings = 0 if 2 * above <= below else math.ceil(exponent).bit_length() + 1
    work = bits + 2 * halvings + 16
    low_a = (above << work) // (below << halvings)
    high_a = low_a + 1
    low, high = _series(high_a, work)[0], _series(low_a, work)[1]
    for _ in range(halvings):
        low, high = low * low >> work, -(-high * high >> work)
    drop = work - bits
    return low >> drop, -(-high >> drop)


def _series(a: int, work: int) -> tuple[int, int]:
    """Bounds on 2^work exp(-a / 2^work) for 0 <= a <= 2^work / 2."""
    low = high = 1 << work
    low_term = high_term = 1 << work
    for k in range(1, work):
        low_term, high_term = low_term * a // (k << work), -(-high_term * a // (k << work))
        if k % 2:
            low, high = low - high_term, high - low_term
        else:
            low, high = low + low_term, high + high_term
        if high_term <= 1:  # what is left out is less than one more such term
            return low - high_term, high + high_term
    raise AssertionError("unreachable: the terms halve at least")


@lru_cache(maxsize=16)
def _distribution(variance: Fraction, bits: int) -> tuple[tuple[int, int], ...]:
    """(low, high) around 2^bits P(X <= x) for x = 0, 1, ..., until high reaches 2^bits; mostly 1 apart."""
    work = bits + 32
    weights: list[tuple[int, int]] = []
    while not weights or weights[-1][1] > 2:
        weights.append(_exp(Fraction(len(weights) ** 2) / (2 * variance), work))
    last = len(weights) - 1
    # beyond: sum_j exp(-(last + j)^2 / 2 v) <= w_last / (exp(last / v) - 1) <= w_last v / last
    total_low = sum(low for low, _ in weights)
    total_high = sum(high for _, high in weights) + math.ceil(weights[-1][1] * variance / max(last, 1)) + 1
    out: list[tuple[int, int]] = []
    below_low = below_high = 0
    for low, high in weights:
        below_low, below_high = below_low + low, below_high + high
        out.append(((below_low << bits) // total_high, min(-(-(below_high << bits) // total_low), 1 << bits)))
        if out[-1][1] == 1 << bits:
            break
    return tuple(out)


@lru_cache(maxsize=8)
def _coins(cuts: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on 2^64 exp(-j / 2^15) for j < cuts: a word under the first is under it, one over the second is over it."""
    bounds = [_exp(Fraction(j, 2**_CUTS), 64) for j in range(cuts)]
    return (
        np.array([min(low, _END) for low, _ in bounds], dtype=np.uint64),
        np.array([min(high - 1, _END) for _, high in bounds], dtype=np.uint64),
    )
