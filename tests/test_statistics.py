"""The batteries of ``batteries.py``: our sources pass, broken ones are convicted. Seeds of test sources are fixed; a fresh
SecretRandom is drawn in every run, so its alarms are set lower.

False-alarm probability: 1e-6 for each of the p-values of a test source (once, when the seed was chosen), 1e-9 for each of a secret one.
"""

import math

import numpy as np
import pytest
from tests import batteries

from sfumato.privacy import noise
from sfumato.privacy.discrete import source_named
from sfumato.randomness import SecretRandom, TestRandom

ALARM, SECRET_ALARM = 1e-6, 1e-9
BYTES = 2**20
STEP = 2.0**-30


def convicting(values: dict[str, float], alarm: float = ALARM) -> set[str]:
    assert all(0 <= value <= 1 for value in values.values())
    return {name for name, value in values.items() if value < alarm}


# ------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("seed", [1, 2])
def test_the_key_stream_passes(seed):
    assert convicting(batteries.of_bytes(TestRandom(seed).bytes(BYTES))) == set()


def test_the_secret_key_stream_passes_whatever_its_key():
    assert convicting(batteries.of_bytes(SecretRandom().bytes(BYTES)), SECRET_ALARM) == set()


def test_small_draws_make_as_good_a_stream_as_large_ones():
    random = TestRandom(3)
    sizes = [1 + size % 97 for size in range(4000)]
    assert convicting(batteries.of_bytes(b"".join(random.bytes(size) for size in sizes))) == set()


def test_the_first_bytes_of_many_keys_are_as_random_as_one_stream():
    first = b"".join(bytes(TestRandom(seed).bytes(64)) for seed in range(3000))
    assert convicting(batteries.of_bytes(first)) == set()


def congruential(modulus_bits: int, a: int, c: int) -> bytes:
    """A linear congruential generator, whose states are given out whole, as 32 bits."""
    state, out = 12345, np.empty(BYTES // 4, dtype="<u4")
    for i in range(len(out)):
        state = (a * state + c) % 2**modulus_bits
        out[i] = state & 0xFFFFFFFF
    return out.tobytes()


def changed(change) -> bytes:
    data = np.frombuffer(TestRandom(5).bytes(BYTES), dtype=np.uint8).copy()
    return change(data).tobytes()


def stuck_bit(data: np.ndarray) -> np.ndarray:
    data[::16] |= 4  # one bit of each 128
    return data


def repeated_key(data: np.ndarray) -> np.ndarray:
    data[BYTES // 2 :] = data[: BYTES // 2]  # the stream begins again
    return data


def biased(data: np.ndarray) -> np.ndarray:
    more = np.random.default_rng(0).random((BYTES, 8)) < 0.004
    return data | np.packbits(more, axis=1)[:, 0]


def echo(data: np.ndarray) -> np.ndarray:
    data[1::64] = data[::64]
    return data


def parity(data: np.ndarray) -> np.ndarray:
    """The last of every 32 bits is the parity of the others: each word alone looks perfect."""
    values = data.view("<u4")
    folded = values >> 1
    for shift in (16, 8, 4, 2, 1):
        folded = folded ^ (folded >> shift)
    return ((values & 0xFFFFFFFE) | (folded & 1)).view(np.uint8)


def smoothed(data: np.ndarray) -> np.ndarray:
    return np.minimum(data.astype(int) // 2 + np.roll(data, 1).astype(int) // 2, 255).astype(np.uint8)


BROKEN = {
    "a congruential generator": (lambda: congruential(32, 1664525, 1013904223), {"autocorrelation", "spectral"}),
    "RANDU": (lambda: congruential(31, 65539, 0), {"monobit", "matrix rank"}),
    "a stuck bit": (lambda: changed(stuck_bit), {"monobit", "bytes"}),
    "a key used twice": (lambda: changed(repeated_key), {"repeated blocks"}),
    "a bias of 0.2 %": (lambda: changed(biased), {"monobit"}),
    "an echo": (lambda: changed(echo), {"autocorrelation"}),
    "a parity bit": (lambda: changed(parity), {"matrix rank"}),
    "an average": (lambda: changed(smoothed), {"bytes", "serial"}),
    "a counter": (lambda: np.arange(BYTES // 4, dtype="<u4").tobytes(), {"runs", "block frequency", "spectral", "longest run"}),
    "digits": (lambda: bytes(48 + i * i % 10 for i in range(BYTES)), {"bytes", "pairs of bytes", "birthday spacings"}),
    "one half of the walk": (lambda: bytes(BYTES // 2) + bytes([255]) * (BYTES // 2), {"cumulative sums"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_source_is_convicted(name):
    make, expected = BROKEN[name]
    assert expected <= convicting(batteries.of_bytes(make()))


def test_every_test_of_bytes_convicts_somebody():
    assert set().union(*(expected for _, expected in BROKEN.values())) == set(
        batteries.of_bytes(TestRandom(1).bytes(2**17))
    )


@pytest.mark.slow
def test_p_values_are_uniform_for_a_perfect_source():
    """Kolmogorov-Smirnov on 300 streams of 2^17 bytes, for each test whose p-value is not made conservative on purpose;
    false-alarm probability 1e-6 each."""
    from scipy.stats import kstest

    numbers = np.random.default_rng(1)
    values = [batteries.of_bytes(numbers.bytes(2**17)) for _ in range(300)]
    exact = set(values[0]) - {"autocorrelation", "cumulative sums", "repeated blocks", "birthday spacings"}
    for name in exact:
        assert kstest([value[name] for value in values], "uniform").pvalue > ALARM, name


def test_two_streams_are_independent_and_two_of_one_key_are_convicted():
    """What one stream is to another: their exclusive or must pass, too."""

    def difference(a: TestRandom | SecretRandom, b: TestRandom | SecretRandom) -> np.ndarray:
        x, y = (np.frombuffer(random.bytes(2**18), dtype=np.uint8) for random in (a, b))
        return x ^ y

    assert convicting(batteries.of_bytes(difference(SecretRandom(), SecretRandom())), SECRET_ALARM) == set()
    assert convicting(batteries.of_bytes(difference(TestRandom(1), TestRandom(2)))) == set()
    assert "monobit" in convicting(batteries.of_bytes(difference(TestRandom(1), TestRandom(1))))


# ------------------------------------------------------------------------------------------------ normals

COUNT = 2**21 + 1
LAGS = [1, 2, 3, noise._CHUNK, 2 * noise._CHUNK, (COUNT + 1) // 2]  # the last: from a cosine to its sine


@pytest.mark.parametrize("name", ["gaussian", "discrete"])
def test_the_noise_passes(name):
    x = source_named(name).draw(COUNT, 1.0, TestRandom(17)).numpy()
    assert convicting(batteries.of_normals(x, STEP, LAGS)) == set()


def test_the_secret_noise_passes_whatever_its_key():
    x = source_named("gaussian").draw(2**19, 1.0, SecretRandom()).numpy()
    assert convicting(batteries.of_normals(x, STEP, [1, 2, 2**18]), SECRET_ALARM) == set()


def test_the_noise_is_normal_out_to_five_standard_deviations():
    """Counts of 2^24 draws in cells from 3 to beyond 5, chi-square; false-alarm probability 1e-6."""
    from scipy.stats import norm

    random, edges = TestRandom(18), np.array([3, 3.25, 3.5, 3.75, 4, 4.25, 4.5, 4.75, 5, np.inf])
    counts = np.zeros(len(edges) - 1)
    for _ in range(16):
        counts += np.histogram(np.abs(noise.gaussian(2**20, 1.0, random).numpy()), edges)[0]
    expected = 2**24 * -np.diff(2 * norm.sf(edges))
    rest = 2**24 - counts.sum(), 2**24 - expected.sum()
    assert batteries.chi_square(np.append(counts, rest[0]), np.append(expected, rest[1])) > ALARM


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def on_grid(x: np.ndarray) -> np.ndarray:
    return np.round(x / STEP) * STEP


def reused_angle() -> np.ndarray:
    """Box-Muller that gives cosine and sine of one angle to two radii each."""
    radius, angle = np.sqrt(-2 * np.log(1 - rng().random(2**20))), np.repeat(rng().random(2**19), 2) * 2 * math.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


WRONG_NORMALS = {
    "a scale of 1.005": (lambda: on_grid(rng().standard_normal(2**20) * 1.005), {"moments"}),
    "float32": (lambda: rng().standard_normal(2**20, dtype=np.float32).astype(float), {"low bits", "lattice"}),
    "a coarse grid": (lambda: np.round(rng().standard_normal(2**20) * 2**20) / 2**20, {"low bits", "next bits", "lattice"}),
    "twelve uniforms": (lambda: on_grid(rng().random((2**20, 12)).sum(1) - 6), {"tails", "moments", "Anderson-Darling"}),
    "cut at 4": (lambda: on_grid(np.clip(rng().standard_normal(2**21), -4, 4)), {"tails"}),
    "Laplace": (lambda: on_grid(rng().laplace(scale=math.sqrt(0.5), size=2**18)), {"Kolmogorov-Smirnov"}),
    "one angle for two": (reused_angle, {"neighbours"}),
    "a lag": (lambda: on_grid(np.convolve(rng().standard_normal(2**20), [0.9999, 0.0141], "same")), {"lags"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NORMALS)
def test_wrong_normals_are_convicted(name):
    make, expected = WRONG_NORMALS[name]
    assert expected <= convicting(batteries.of_normals(make(), STEP, [1, 2, 3]))


def test_every_test_of_normals_convicts_somebody():
    names = set(batteries.of_normals(noise.gaussian(2**18, 1.0, TestRandom(1)).numpy(), STEP, [1]))
    assert set().union(*(expected for _, expected in WRONG_NORMALS.values())) == names
