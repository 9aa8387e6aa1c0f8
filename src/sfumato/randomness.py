"""Where chance comes from: a secret source for what a guarantee rests on, and a repeatable one for tests.

Both are the key stream of AES-256 in counter mode. ``SecretRandom`` takes its key from the operating system and
tells it to nobody: it cannot be seeded, copied, pickled or put into a checkpoint, because a noise that can be drawn a
second time cancels exactly. ``TestRandom`` takes its key from a seed; whoever uses it marks the result NOT FOR RELEASE.

A block of key stream is AES(key, counter). The counter starts at 0 under a fresh key and only grows, so a pair (key,
counter) never occurs twice. After ``_BYTES_PER_KEY`` bytes, and in a forked child, ``SecretRandom`` takes a new key.
"""

import hashlib
import os
import threading
from typing import Any, NoReturn, Protocol

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError

_BYTES_PER_KEY = 2**36  # 2^32 blocks: the chance to tell the stream from a random one stays below 2^-65


class Random(Protocol):
    """What a mechanism draws from.

    (Expected) guarantee: the bytes of one object are never given out twice, and are independent and uniform.
    """

    @property
    def for_release(self) -> bool: ...

    def bytes(self, count: int) -> bytearray: ...

    def uniform(self, count: int) -> np.ndarray: ...

    def integers(self, count: int, high: int) -> np.ndarray: ...

    def apart(self) -> "Random":
        """Another stream of the same kind, for chance of another kind: what is drawn from one does not move the other."""
        ...


class _KeyStream:
    """The bytes of one AES-256-CTR key stream, each given out once; safe to share between threads."""

    def __init__(self, key: bytes) -> None:
        self._lock = threading.Lock()
        self._set_key(key)

    def _set_key(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import CTR

        self._encryptor = Cipher(AES(key), CTR(b"\0" * 16)).encryptor()
        self._given = 0

    def _renew(self, count: int) -> None:
        """Called under the lock before ``count`` bytes are drawn."""

    def bytes(self, count: int) -> bytearray:
        """``count`` fresh bytes, in a buffer that the caller may keep and change."""
        checks.non_negative(count=count)
        out = bytearray(count)
        with self._lock:
            self._renew(count)
            self._encryptor.update_into(bytes(count), out)  # the key stream is the encryption of zeros
            self._given += count
        return out

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64, uniform on the multiples of 2^-53 in [0, 1)."""
        words = np.frombuffer(self.bytes(8 * count), dtype="<u8")
        return (words >> np.uint64(11)) * 2.0**-53

    def integers(self, count: int, high: int) -> np.ndarray:
        """(count,) int64, exactly uniform on 0 .. high - 1 (words that would favour small numbers are redrawn)."""
        if not 1 <= high <= 2**63 - 1:
            raise UsageError(f"high = {high} · must be between 1 and 2^63 - 1", next="Give the number of values.")
        limit = 2**64 - 2**64 % high
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            words = np.frombuffer(self.bytes(8 * (count - filled)), dtype="<u8")
            words = words[words <= np.uint64(limit - 1)]
            out[filled : filled + len(words)] = (words % np.uint64(high)).astype(np.int64)
            filled += len(words)
        return out


class SecretRandom(_KeyStream):
    """The source of a run that may be released: which units were drawn, and the noise.

    Guarantee: no two objects, processes, forks or resumed runs ever share key stream, but for a collision of two
    256-bit keys of the operating system.
    """

    for_release = True

    def __init__(self) -> None:
        self._process = os.getpid()
        super().__init__(os.urandom(32))

    def _renew(self, count: int) -> None:
        if os.getpid() != self._process or self._given + count > _BYTES_PER_KEY:
            self._process = os.getpid()
            self._set_key(os.urandom(32))

    def apart(self) -> "SecretRandom":
        return SecretRandom()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "SecretRandom · cannot be copied, pickled or put into a checkpoint: noise drawn twice cancels exactly",
            next="Make a new SecretRandom() after a resume or in a new process.",
        )


class TestRandom(_KeyStream):
    """The same face, repeatable from a seed. Nothing that was drawn from it may be released."""

    __test__ = False  # not a test class, whatever pytest thinks of the name
    for_release = False

    def __init__(self, seed: int | str) -> None:
        self._seed = seed
        super().__init__(hashlib.sha256(f"sfumato test source {seed}".encode()).digest())

    def apart(self) -> "TestRandom":
        """Repeatable: the same for the same seed, whatever was drawn before."""
        return TestRandom(f"{self._seed}, apart")
