"""No pair of key and counter is ever used twice: the ciphers that the sources really make are watched, through draws,
renewals, threads, forks and new processes."""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from typing import ClassVar

import pytest
import torch
from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from sfumato import randomness
from sfumato.errors import UsageError
from sfumato.privacy.discrete import discrete_gaussian
from sfumato.privacy.noise import gaussian
from sfumato.privacy.sampling import CyclicPoisson, poisson_units
from sfumato.randomness import SecretRandom, TestRandom

REAL = ciphers.Cipher


class Watched:
    """In place of ``Cipher``: writes down key and byte range of every piece of key stream, then lets the real one do it."""

    seen: ClassVar[list[tuple[str, int, int]]] = []  # key, first byte, last byte + 1; the counter is the byte / 16
    bytes_of: ClassVar[dict[tuple[str, int, int], bytes]] = {}

    def __init__(self, algorithm: algorithms.AES, mode: modes.CTR) -> None:
        assert isinstance(algorithm, algorithms.AES) and algorithm.key_size == 256
        assert isinstance(mode, modes.CTR) and mode.nonce == bytes(16)  # the counter begins at 0 under every key
        self.key = algorithm.key.hex()
        self.position = 0
        self.real = REAL(algorithm, mode).encryptor()

    def encryptor(self) -> "Watched":
        return self

    def update_into(self, data: bytes, buffer: bytearray) -> int:
        assert not any(data)  # key stream, not something encrypted
        start, self.position = self.position, self.position + len(data)
        written = self.real.update_into(data, buffer)
        Watched.seen.append((self.key, start, self.position))
        Watched.bytes_of[Watched.seen[-1]] = bytes(buffer[:64])
        return written


@pytest.fixture(autouse=True)
def watch(monkeypatch) -> None:
    monkeypatch.setattr(Watched, "seen", [])
    monkeypatch.setattr(Watched, "bytes_of", {})
    monkeypatch.setattr(ciphers, "Cipher", Watched)


def overlaps(seen: list[tuple[str, int, int]]) -> int:
    ranges = defaultdict(list)
    for key, start, stop in seen:
        if stop > start:
            ranges[key].append((start, stop))
    return sum(b[0] < a[1] for held in ranges.values() for a, b in itertools.pairwise(sorted(held)))


def true_stream(key: str, start: int, stop: int) -> bytes:
    """AES of the counters, in its plainest form."""
    plain = REAL(algorithms.AES(bytes.fromhex(key)), modes.ECB()).encryptor()
    blocks = b"".join(number.to_bytes(16, "big") for number in range(start // 16, -(-stop // 16)))
    return plain.update(blocks)[start % 16 :][: stop - start]


def use(random: SecretRandom) -> None:
    """Everything that a training draws."""
    poisson_units(1000, 0.1, random)
    sampler = CyclicPoisson(300, 3, 0.5, random)
    for _ in range(4):
        sampler.next()
        gaussian(1001, 1.0, random, plus=torch.zeros(1001))
        discrete_gaussian(501, 3.5, random)
        random.integers(7, 10)
        random.bytes(3)


def test_the_record_is_of_the_true_counters():
    random = SecretRandom()
    use(random)
    assert len(Watched.seen) > 20 and len({key for key, _, _ in Watched.seen}) == 1
    for (key, start, stop), given in Watched.bytes_of.items():
        assert given == true_stream(key, start, min(stop, start + 64))


def test_one_source_uses_every_counter_once():
    use(SecretRandom())
    assert overlaps(Watched.seen) == 0
    stops = [0, *(stop for _, _, stop in Watched.seen)]
    assert [start for _, start, _ in Watched.seen] == stops[:-1]  # nor is any left out


def test_the_watch_sees_a_source_that_begins_again():
    for _ in range(2):
        TestRandom(1).bytes(100)  # what a seed is for, and why it is NOT FOR RELEASE
    assert overlaps(Watched.seen) == 1


def test_many_sources_have_keys_of_their_own():
    for _ in range(50):
        SecretRandom().bytes(1000)
    assert len({key for key, _, _ in Watched.seen}) == 50 and overlaps(Watched.seen) == 0


def test_a_key_is_left_before_it_is_used_up(monkeypatch):
    """2^36 bytes, here 4,096."""
    assert randomness._BYTES_PER_KEY == 2**36  # 2^32 blocks: the counter of 2^128 never comes round
    monkeypatch.setattr(randomness, "_BYTES_PER_KEY", 4096)
    random = SecretRandom()
    for size in [1000] * 50 + [4096, 1, 4096, 4095, 1, 1]:
        random.bytes(size)
    assert overlaps(Watched.seen) == 0
    assert max(stop for _, _, stop in Watched.seen) <= 4096
    assert len({key for key, _, _ in Watched.seen}) > 12


def test_threads_that_share_a_source_never_get_the_same_counter(monkeypatch):
    monkeypatch.setattr(randomness, "_BYTES_PER_KEY", 2**16)
    random, got = SecretRandom(), []
    ready = threading.Barrier(8)

    def work() -> None:
        ready.wait()
        got.extend(bytes(random.bytes(32 + i % 100)) for i in range(300))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2400 and len(set(got)) == 2400
    assert overlaps(Watched.seen) == 0 and len({key for key, _, _ in Watched.seen}) > 2


def test_forks_and_forks_of_forks_never_get_the_same_counter():
    random = SecretRandom()
    random.bytes(100)
    read, write = os.pipe()
    inherited = len(Watched.seen)
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            random.bytes(100)
            if os.fork() == 0:
                random.bytes(100)
            os.write(write, (json.dumps(Watched.seen[inherited:]) + "\n").encode())
            os._exit(0)
    random.bytes(100)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = [json.loads(line) for line in pipe.read().splitlines()]
    for child in children:  # not just any child: other tests' helpers live on
        os.waitpid(child, 0)
    everything = {tuple(entry) for line in lines for entry in line} | set(Watched.seen)
    assert len(lines) == 6
    assert overlaps([(str(key), int(start), int(stop)) for key, start, stop in everything]) == 0
    assert len({key for key, _, _ in everything}) == 7  # the parent's, and one for each of six children


RESTART = """
import json, sys
from cryptography.hazmat.primitives import ciphers
from tests.test_counters import Watched
ciphers.Cipher = Watched
from sfumato.randomness import SecretRandom
random = SecretRandom()
random.bytes(1000)
random.bytes(24)
print(json.dumps(Watched.seen))
"""


def test_restarts_never_get_the_same_counter():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    seen = []
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", RESTART], env=environment, capture_output=True, text=True, check=True
        )
        seen += [(str(key), int(start), int(stop)) for key, start, stop in json.loads(out.stdout)]
    assert len(seen) == 6 and len({key for key, _, _ in seen}) == 3 and overlaps(seen) == 0


def test_a_source_cannot_be_taken_over_a_restart():
    with pytest.raises(UsageError, match="noise drawn twice cancels"):
        SecretRandom().__reduce_ex__(4)
