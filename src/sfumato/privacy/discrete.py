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

Sampling: s = K s', with K = floor(s / 16). x >= 0 with probability ~ exp(-x^2 / 2 s'^2), by inversion of a table; y uniform on
0 .. K - 1; z = K x + y is accepted with probability exp(-y (y + 2 K x) / 2 s^2), which leaves exp(-z^2 / 2 s^2), at any size
of s in 1.03 trials; then a sign, and -0 is drawn again (the scheme of Ducas et al. 2013, BLISS, section 6).
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
_COARSE = 16  # least s'
_CUTS = 13  # coins are looked up by the first 13 bits after the point of their exponent
_CHUNK = 1 << 14
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
    total = _SOURCE.whole(count, std, step(std), random)  # numbers below 2^53, as are the sums: exact
    if plus is not None:
        total.add_(_SOURCE.rounded(plus, step(std)))
    return total.mul_(step(std))


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
    filled = 0
    while filled < count:
        wanted = min(count - filled, _CHUNK)
        drawn = _trials(scheme, wanted + wanted // 16 + 8, random)[: count - filled]
        out[filled : filled + len(drawn)] = drawn
        filled += len(drawn)
    return out


_SOURCE = DiscreteSource()


@dataclass(frozen=True, eq=False)
class _Scheme:
    """What ``_trials`` needs for one standard deviation. Bounds are integers of 64 bits, for words of 64 random bits."""

    variance: Fraction
    fine: int  # K
    coarse_variance: Fraction  # s'^2
    below: np.ndarray  # uint64: a word under below[x] is surely under P(X <= x)
    above: np.ndarray  # uint64: a word over above[x] is surely over it; the last one is over every word
    guide: np.ndarray  # int64 by the first 13 bits of a word: x, or -1 where a bound lies between such words
    shift: int  # the exponent in cuts is (numerator << shift) / divisor, a number between the two divisors
    divisors: tuple[int, int]  # from above, from below
    accept: np.ndarray  # uint64: a word under accept[j] is surely under exp(-j / 2^13)
    reject: np.ndarray  # a word over reject[j] is surely over it


@lru_cache(maxsize=16)
def _scheme(std: Fraction) -> _Scheme:
    fine = max(1, int(std / _COARSE))
    coarse_variance = (std / fine) ** 2
    bounds = _distribution(coarse_variance, 64)
    below = np.array([low for low, _ in bounds], dtype=np.uint64)
    above = np.array([high - 1 for _, high in bounds], dtype=np.uint64)
    starts = np.arange(2**13, dtype=np.uint64) << np.uint64(51)
    first = np.searchsorted(below, starts, side="right")
    last = np.searchsorted(below, starts + np.uint64(2**51 - 1), side="right")
    plain = (first == last) & (first < len(below)) & ((first == 0) | (above[first - 1] < starts))
    largest = fine * fine * (2 * len(below) + 1)  # of the numerators y (y + 2 K x)
    shift = 63 - largest.bit_length()
    cut = 2 * std**2 * 2**shift / 2**_CUTS  # the exponent is numerator / 2 s^2; above 2^40 where there are offsets
    divisors = (math.ceil(cut), math.floor(cut)) if fine > 1 else (1, 1)
    accept, reject = _coins((largest << shift) // divisors[1] + 3 if fine > 1 else 0)
    return _Scheme(
        variance=std**2,
        fine=fine,
        coarse_variance=coarse_variance,
        below=below,
        above=above,
        guide=np.where(plain, first, -1).astype(np.int64),
        shift=shift,
        divisors=divisors,
        accept=accept,
        reject=reject,
    )


def _trials(scheme: _Scheme, trials: int, random: Random) -> np.ndarray:
    """Makes so many trials; returns those that were accepted, in order: (a,) int64."""
    words = np.frombuffer(random.bytes(8 * trials), dtype="<u8")
    coarse = scheme.guide[words >> np.uint64(51)]
    unsure = np.flatnonzero(coarse < 0)
    coarse[unsure] = np.searchsorted(scheme.below, words[unsure], side="right")
    edge = unsure[(coarse[unsure] > 0) & (words[unsure] <= scheme.above[coarse[unsure] - 1])]
    far = [(int(i), _index(int(words[i]), scheme.coarse_variance, random)) for i in edge]
    for i, x in far:
        coarse[i] = min(x, len(scheme.below) - 1)
    sign, offset = _sign_and_offset(scheme.fine, trials, random)
    z = coarse * scheme.fine + offset
    keep = np.ones(trials, dtype=bool)
    if scheme.fine > 1:
        coins = np.frombuffer(random.bytes(8 * trials), dtype="<u8")
        numerator = (offset * (z + coarse * scheme.fine)).astype(np.uint64) << np.uint64(scheme.shift)
        least = numerator // np.uint64(scheme.divisors[0])
        most = least if scheme.divisors[0] == scheme.divisors[1] else numerator // np.uint64(scheme.divisors[1])
        keep = coins < scheme.accept[most + np.uint64(1)]
        for i in np.flatnonzero(~keep & (coins <= scheme.reject[least])):
            keep[i] = _coin(int(coins[i]), _exponent(scheme, int(coarse[i]), int(offset[i])), random)
        for i, x in far:
            keep[i] = _coin(int(coins[i]), _exponent(scheme, x, int(offset[i])), random)
    for i, x in far:
        z[i] = x * scheme.fine + int(offset[i])
    keep &= (z != 0) | ~sign
    return np.where(sign, -z, z)[keep]


def _sign_and_offset(fine: int, trials: int, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """(trials,) bool and (trials,) int64, uniform on 0 .. fine - 1."""
    if fine & (fine - 1) == 0:  # one word for both
        words = np.frombuffer(random.bytes(8 * trials), dtype="<u8")
        return (words >> np.uint64(63)).astype(bool), (words & np.uint64(fine - 1)).astype(np.int64)
    signs = np.frombuffer(random.bytes(trials), dtype=np.uint8) & 1
    return signs.astype(bool), random.integers(trials, fine)


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
    halvings = max(0, math.ceil(exponent).bit_length() + 1)
    work = bits + 2 * halvings + 16
    one = 1 << work
    a = exponent / 2**halvings
    low_a, high_a = math.floor(a * one), math.ceil(a * one)
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
    """Bounds on 2^64 exp(-j / 2^13) for j < cuts: a word under the first is under it, one over the second is over it."""
    bounds = [_exp(Fraction(j, 2**_CUTS), 64) for j in range(cuts)]
    return (
        np.array([min(low, _END) for low, _ in bounds], dtype=np.uint64),
        np.array([min(high - 1, _END) for _, high in bounds], dtype=np.uint64),
    )
