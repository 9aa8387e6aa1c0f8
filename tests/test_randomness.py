"""The statistical tests fix their seed; each states the probability with which it would reject a perfect source."""

import copy
import os
import pickle

import numpy as np
import pytest
from scipy.stats import chi2

from sfumato import randomness
from sfumato.errors import UsageError
from sfumato.randomness import SecretRandom, TestRandom


def test_the_stream_is_aes_of_the_counter_under_a_key_made_of_the_seed():
    """Oracle: AES in its plainest form on the counters 0, 1, 2, ..."""
    import hashlib

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = hashlib.sha256(b"sfumato test source 7").digest()
    counters = b"".join(number.to_bytes(16, "big") for number in range(5))
    plain = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    assert bytes(TestRandom(7).bytes(80)) == plain.update(counters)


def test_draws_of_any_size_continue_one_stream_so_that_no_byte_is_given_out_twice():
    random = TestRandom(1)
    parts = [bytes(random.bytes(count)) for count in (1, 0, 15, 16, 17, 100, 3)]
    assert b"".join(parts) == bytes(TestRandom(1).bytes(152))


def test_two_secret_sources_have_nothing_in_common():
    assert SecretRandom().bytes(32) != SecretRandom().bytes(32)


def test_a_forked_child_takes_a_new_key():
    random = SecretRandom()
    random.bytes(8)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, random.bytes(32))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        childs = pipe.read()
    assert len(childs) == 32
    assert childs != bytes(random.bytes(32))


def test_a_new_key_is_taken_before_the_old_one_is_used_up(monkeypatch):
    monkeypatch.setattr(randomness, "_BYTES_PER_KEY", 64)
    random = SecretRandom()
    first = random._encryptor
    random.bytes(64)
    assert random._encryptor is first
    blocks = bytes(random.bytes(32)) + bytes(random.bytes(64))
    assert random._encryptor is not first
    assert len({blocks[i : i + 16] for i in range(0, 96, 16)}) == 6


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_secret_source_cannot_be_written_down_or_copied(duplicate):
    with pytest.raises(UsageError, match="noise drawn twice cancels"):
        duplicate(SecretRandom())


def test_a_secret_source_takes_no_seed():
    with pytest.raises(TypeError):
        SecretRandom(1)  # type: ignore[call-arg]


def test_only_the_secret_source_is_for_release():
    assert SecretRandom().for_release
    assert not TestRandom(0).for_release


def test_uniform_numbers_fill_the_unit_interval_evenly_down_to_the_lowest_bits():
    """Two chi-square tests with 256 bins on 200,000 draws; false-alarm probability 1e-6 each."""
    draws = TestRandom(3).uniform(200_000)
    assert draws.dtype == np.float64
    assert draws.min() >= 0 and draws.max() < 1
    words = (draws * 2**53).astype(np.uint64)
    for bins in (words >> np.uint64(45), words & np.uint64(255)):
        counts = np.bincount(bins.astype(np.int64), minlength=256)
        statistic = ((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum()
        assert chi2.ppf(5e-7, 255) < statistic < chi2.ppf(1 - 5e-7, 255)


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform_below_high(high):
    """Chi-square on 50,000 draws; false-alarm probability 1e-6."""
    draws = TestRandom(high).integers(50_000, high)
    assert draws.min() >= 0 and draws.max() < high
    counts = np.bincount(draws, minlength=high)
    statistic = ((counts - 50_000 / high) ** 2 / (50_000 / high)).sum()
    assert statistic <= chi2.ppf(1 - 1e-6, max(high - 1, 1))


def test_integers_redraw_the_words_that_would_favour_small_numbers():
    """With high = 3 * 2^61 a quarter of all words is redrawn; without, P(x < 2^61) would be 1/2 instead of 1/3."""
    draws = TestRandom(11).integers(30_000, 3 * 2**61)
    share = (draws < 2**61).mean()
    assert abs(share - 1 / 3) < 4.9 * np.sqrt(2 / 9 / 30_000)  # false-alarm probability 1e-6


@pytest.mark.parametrize("high", [0, -1, 2**63])
def test_impossible_ranges_of_integers_are_refused_by_name(high):
    with pytest.raises(UsageError, match=f"high = {high}"):
        TestRandom(0).integers(1, high)
