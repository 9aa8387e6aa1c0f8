"""Statistical tests of random bytes and of normals, each giving a p-value that is uniform for a perfect source.

After NIST SP 800-22 rev. 1a (section numbers below), Marsaglia's birthday spacings, and the classical tests of fit. A
p-value is small where the source is bad; those that can also be "too good" are made two-sided.
"""

import math

import numpy as np
from scipy import special, stats


def two_sided(lower_tail: float, upper_tail: float) -> float:
    return float(min(1.0, 2 * min(lower_tail, upper_tail)))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return two_sided(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom))


def normal(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


# ------------------------------------------------------------------------------------------------ bytes


def monobit(bits: np.ndarray) -> float:
    """2.1: as many ones as zeros."""
    return normal((2.0 * int(bits.sum()) - len(bits)) / math.sqrt(len(bits)))


def block_frequency(bits: np.ndarray, size: int = 1024) -> float:
    """2.2: in every block of 1,024 bits too."""
    ones = bits[: len(bits) // size * size].reshape(-1, size).sum(1, dtype=np.int64)
    statistic = float(((ones - size / 2) ** 2 / (size / 4)).sum())
    return two_sided(stats.chi2.cdf(statistic, len(ones)), stats.chi2.sf(statistic, len(ones)))


def runs(bits: np.ndarray) -> float:
    """2.3: as many changes between neighbours as the share of ones makes likely."""
    share = float(bits.mean())
    if abs(share - 0.5) > 6 / math.sqrt(len(bits)):
        return 0.0  # as the standard says: not even the bits are fair
    changes = int((bits[1:] != bits[:-1]).sum()) + 1
    expected = 2 * len(bits) * share * (1 - share)
    return normal((changes - expected) / (2 * math.sqrt(len(bits)) * share * (1 - share)))


def longest_run(bits: np.ndarray) -> float:
    """2.4: the longest run of ones in blocks of 128 bits: at most 4, 5, 6, 7, 8, at least 9."""
    blocks = bits[: len(bits) // 128 * 128].reshape(-1, 128)
    run, longest = np.zeros(len(blocks), dtype=np.int64), np.zeros(len(blocks), dtype=np.int64)
    for column in blocks.T:
        run = (run + 1) * column
        np.maximum(longest, run, out=longest)
    counts = np.bincount(np.clip(longest, 4, 9) - 4, minlength=6)
    below = [_no_longer_run(128, k) for k in range(4, 9)]
    return chi_square(counts, len(blocks) * np.diff([0.0, *below, 1.0]))


def _no_longer_run(length: int, most: int) -> float:
    """The probability that so many fair bits have no run of more than ``most`` ones, exactly, by recursion."""
    ways = [2**n for n in range(most + 1)]
    for n in range(most + 1, length + 1):
        ways.append(sum(ways[n - k - 1] for k in range(most + 1)))
    return ways[length] / 2**length


def words(data: np.ndarray, kind: str) -> float:
    """Poker: every byte, or pair of bytes, is equally frequent."""
    values = data[: len(data) // np.dtype(kind).itemsize * np.dtype(kind).itemsize].view(kind)
    cells = 256 ** np.dtype(kind).itemsize
    return chi_square(np.bincount(values, minlength=cells), np.full(cells, len(values) / cells))


def serial(bits: np.ndarray, m: int = 10) -> float:
    """2.11: overlapping patterns of 10 bits, the first difference."""

    def psi(width: int) -> float:
        wrapped = np.concatenate([bits, bits[: width - 1]]).astype(np.int64)
        pattern = np.zeros(len(bits), dtype=np.int64)
        for k in range(width):
            pattern = pattern << 1 | wrapped[k : k + len(bits)]
        counts = np.bincount(pattern, minlength=2**width).astype(float)
        return float(2**width / len(bits) * (counts**2).sum() - len(bits))

    statistic = psi(m) - psi(m - 1)
    return two_sided(stats.chi2.cdf(statistic, 2 ** (m - 1)), stats.chi2.sf(statistic, 2 ** (m - 1)))


def autocorrelation(bits: np.ndarray, lags: list[int] | None = None) -> float:
    """Bits and those ``lag`` later differ half of the time; the worst of lags 1 .. 64 and of the powers of two (Bonferroni)."""
    lags = [*range(1, 65), *(2**k for k in range(7, 18) if 2**k < len(bits) // 2)] if lags is None else lags
    worst = 1.0
    for lag in lags:
        differ, count = int((bits[lag:] ^ bits[:-lag]).sum()), len(bits) - lag
        worst = min(worst, normal((2.0 * differ - count) / math.sqrt(count)))
    return min(1.0, worst * len(lags))


def spectral(bits: np.ndarray) -> float:
    """2.6: 95 % of the peaks of the Fourier transform are below the threshold; over many short stretches."""
    size = 4096
    rows = 2.0 * bits[: len(bits) // size * size].reshape(-1, size) - 1.0
    power = np.abs(np.fft.rfft(rows)[:, 1 : size // 2]) ** 2 / size  # of fair bits: exponential of mean 1, nearly
    below = int((power < math.log(1 / 0.05)).sum())
    # two peaks of one stretch have covariance -2 / size, which over size / 2 peaks takes (0.05 log 20)^2 off the variance
    # (about half of it, as Kim et al. 2004 found; 2.6 as printed first had it whole)
    return normal((below - 0.95 * power.size) / math.sqrt(power.size * (0.95 * 0.05 - (0.05 * math.log(20)) ** 2)))


def birthday_spacings(data: np.ndarray) -> float:
    """Marsaglia: 512 birthdays in a year of 2^24 days: the number of equal spacings is Poisson with mean 2."""
    days = data[: len(data) // 2048 * 2048].view("<u4").reshape(-1, 512) >> 8
    spacings = np.sort(np.diff(np.sort(days, axis=1), axis=1), axis=1)
    equal = (np.diff(spacings, axis=1) == 0).sum(1)
    mean = 512**3 / 2**26
    counts = np.bincount(np.minimum(equal, 7), minlength=8)
    expected = stats.poisson.pmf(np.arange(8), mean)
    expected[7] = stats.poisson.sf(6, mean)
    return chi_square(counts, expected * len(days))


def matrix_rank(data: np.ndarray) -> float:
    """2.5: the rank of 32 x 32 matrices of bits."""
    rows = data[: len(data) // 128 * 128].view("<u4").reshape(-1, 32).astype(np.int64).copy()
    rank = np.zeros(len(rows), dtype=np.int64)
    index = np.arange(len(rows))
    for column in range(32):
        bit = rows >> column & 1
        usable = bit.astype(bool) & (np.arange(32) >= rank[:, None])
        found, pivot = usable.any(1), usable.argmax(1)
        place = np.minimum(rank, 31)
        own = rows[index, pivot]
        rows[index[found], pivot[found]] = rows[index[found], place[found]]
        rows[index[found], place[found]] = own[found]
        eliminate = (rows >> column & 1).astype(bool) & found[:, None] & (np.arange(32) != place[:, None])
        rows ^= np.where(eliminate, own[:, None], 0)
        rank += found
    product = [math.prod((1 - 2.0 ** (i - 32)) ** 2 / (1 - 2.0 ** (i - r)) for i in range(r)) for r in (32, 31)]
    full, less = (2.0 ** (r * (64 - r) - 1024) * p for r, p in zip((32, 31), product, strict=True))
    counts = np.array([(rank == 32).sum(), (rank == 31).sum(), (rank < 31).sum()])
    return chi_square(counts, len(rows) * np.array([full, less, 1 - full - less]))


def cumulative_sums(bits: np.ndarray) -> float:
    """2.13: how far the walk gets; the distribution of the largest |sum| is that of a Brownian path (a little conservative)."""
    walk = np.cumsum(2 * bits.astype(np.int64) - 1)
    reach = float(np.abs(walk).max()) / math.sqrt(len(bits))
    odd, signs = 2 * np.arange(100) + 1, (-1.0) ** np.arange(100)
    outside = min(1.0, 4 * float((signs * stats.norm.sf(odd * reach)).sum()))
    inside = 4 / math.pi * float((signs / odd * np.exp(-((odd * math.pi / reach) ** 2) / 8)).sum())
    return two_sided(inside, outside)  # each of the two is exact where it is small


def repeated_blocks(data: np.ndarray) -> float:
    """No 16 bytes occur twice: what a key stream that starts again cannot avoid. P = pairs / 2^128."""
    blocks = data[: len(data) // 16 * 16].view("<u8").reshape(-1, 2)
    order = np.lexsort((blocks[:, 1], blocks[:, 0]))
    twice = bool((np.diff(blocks[order].view(np.int64), axis=0) == 0).all(1).any())
    return math.comb(len(blocks), 2) / 2**128 if twice else 1.0


def of_bytes(data: bytes | bytearray | np.ndarray) -> dict[str, float]:
    """p-values of at least 2^17 bytes."""
    data = np.frombuffer(data, dtype=np.uint8)
    assert len(data) >= 2**17
    bits = np.unpackbits(data)
    return {
        "monobit": monobit(bits),
        "block frequency": block_frequency(bits),
        "runs": runs(bits),
        "longest run": longest_run(bits),
        "bytes": words(data, "u1"),
        "pairs of bytes": words(data, "<u2"),
        "serial": serial(bits),
        "autocorrelation": autocorrelation(bits),
        "spectral": spectral(bits),
        "birthday spacings": birthday_spacings(data),
        "matrix rank": matrix_rank(data),
        "cumulative sums": cumulative_sums(bits),
        "repeated blocks": repeated_blocks(data),
    }


# ------------------------------------------------------------------------------------------------ normals


def moments(x: np.ndarray) -> float:
    """Hermite polynomials to order 8, orthonormal under the normal: each has mean 0 and variance 1 (Bonferroni)."""
    before, now, worst = np.ones_like(x), x, 1.0
    for order in range(1, 9):
        z = float(now.mean()) * math.sqrt(len(x) / math.factorial(order))
        worst = min(worst, normal(z))
        before, now = now, x * now - order * before
    return min(1.0, worst * 8)


def anderson_darling(x: np.ndarray) -> float:
    """The tail of A^2 is sqrt(3) P(chi2_1 > 2 z) for large z (Zolotarev's lemma for the weights 1 / (k (k + 1)))."""
    x = np.sort(x)
    odd = 2 * np.arange(1, len(x) + 1) - 1
    statistic = -len(x) - float((odd * (special.log_ndtr(x) + special.log_ndtr(-x[::-1]))).mean())
    return min(1.0, math.sqrt(3) * float(stats.chi2.sf(2 * statistic, 1)))


def kolmogorov_smirnov(x: np.ndarray) -> float:
    return float(stats.kstest(x, "norm").pvalue)


def tails(x: np.ndarray) -> float:
    """How many are beyond 3, 3.5, 4, 4.5 and 5, on each side (Bonferroni)."""
    worst = 1.0
    for limit in (3.0, 3.5, 4.0, 4.5, 5.0):
        share = float(stats.norm.sf(limit))
        for count in (int((x > limit).sum()), int((x < -limit).sum())):
            worst = min(
                worst, two_sided(stats.binom.cdf(count, len(x), share), stats.binom.sf(count - 1, len(x), share))
            )
    return min(1.0, worst * 10)


def lag_correlations(x: np.ndarray, lags: list[int]) -> float:
    """Of x, x^2 and sign at each lag (Bonferroni)."""
    worst = 1.0
    for values in (x, (x**2 - 1) / math.sqrt(2), np.sign(x)):
        for lag in lags:
            worst = min(worst, normal(float(values[:-lag] @ values[lag:]) / math.sqrt(len(x) - lag)))
    return min(1.0, worst * 3 * len(lags))


def neighbours(x: np.ndarray) -> float:
    """Pairs of neighbours in 16 x 16 cells of equal probability."""
    cell = np.minimum((special.ndtr(x[: len(x) // 2 * 2]) * 16).astype(int), 15).reshape(-1, 2)
    counts = np.bincount(cell[:, 0] * 16 + cell[:, 1], minlength=256)
    return chi_square(counts, np.full(256, len(cell) / 256))


def low_bits(multiples: np.ndarray, first: int = 0) -> float:
    """8 bits of the whole multiples of the grid are uniform."""
    counts = np.bincount((multiples.astype(np.int64) >> first) & 255, minlength=256)
    return chi_square(counts, np.full(256, multiples.size / 256))


def lattice(multiples: np.ndarray) -> float:
    """Three low bits of three neighbours each: 512 cells. A generator with few states leaves planes there."""
    low = (multiples[: len(multiples) // 3 * 3].astype(np.int64) & 7).reshape(-1, 3)
    counts = np.bincount(low[:, 0] * 64 + low[:, 1] * 8 + low[:, 2], minlength=512)
    return chi_square(counts, np.full(512, len(low) / 512))


def of_normals(x: np.ndarray, grid: float, lags: list[int]) -> dict[str, float]:
    """p-values of at least 2^18 standard normals on a grid. Args: lags: where this source might repeat itself."""
    assert len(x) >= 2**18
    multiples = np.round(x / grid)
    return {
        "moments": moments(x),
        "Anderson-Darling": anderson_darling(x),
        "Kolmogorov-Smirnov": kolmogorov_smirnov(x),
        "tails": tails(x),
        "lags": lag_correlations(x, lags),
        "neighbours": neighbours(x),
        "low bits": low_bits(multiples),
        "next bits": low_bits(multiples, 8),
        "lattice": lattice(multiples),
    }
