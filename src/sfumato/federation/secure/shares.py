"""Shamir's secret sharing of 32-byte secrets: any t of n shares give the secret, fewer say nothing about it.

A secret is a number below 2^256, and the constant term of a polynomial of degree t − 1 over the integers modulo
p = 2^256 + 297 (the smallest prime above 2^256) whose other coefficients are uniform; a share is its value at a public point
other than 0. Source: Shamir 1979, "How to share a secret", 10.1145/359168.359176.

Guarantee: t − 1 shares of a secret are uniform and independent of it, in the information-theoretic sense. A share says
nothing of whether it is right: who rebuilds a secret must know what to compare it with (``server.py`` does).
"""

import secrets
from collections.abc import Mapping, Sequence

from sfumato.errors import UsageError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """One share of 33 bytes (big-endian) for each point.

    Args: secret: 32 bytes. points: distinct, 1 <= point < p. threshold: 1 <= t <= number of points.
    """
    _check_points(points)
    if len(secret) != SECRET_BYTES:
        raise UsageError(f"secret = {len(secret)} bytes · must be {SECRET_BYTES}", next="Share a key.")
    if not 1 <= threshold <= len(points):
        raise UsageError(
            f"threshold = {threshold} · must be between 1 and the {len(points)} points", next="Lower the threshold."
        )
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    found = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):  # Horner
            value = (value * point + coefficient) % PRIME
        found.append(value.to_bytes(SHARE_BYTES, "big"))
    return found


def at_zero(points: Sequence[int]) -> list[int]:
    """Lagrange's coefficients: the value at 0 of a polynomial of degree < len(points) is their sum over its values, mod p."""
    return at(points, 0)


def at(points: Sequence[int], place: int) -> list[int]:
    """The same, of the value at ``place``."""
    _check_points(points)
    found = []
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * (place - other) % PRIME
                below = below * (point - other) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def join(shares: Mapping[int, bytes], coefficients: Sequence[int] | None = None) -> bytes | None:
    """The 32-byte secret of exactly t shares, by point; None where they are no shares of any 32-byte secret.

    Args: coefficients: ``at_zero(list(shares))``, for those who join many secrets at the same points.
    """
    if coefficients is None:
        coefficients = at_zero(list(shares))
    secret = _sum(shares, coefficients)
    return None if secret is None or secret >= 2**256 else secret.to_bytes(SECRET_BYTES, "big")


def value(shares: Mapping[int, bytes], coefficients: Sequence[int]) -> bytes | None:
    """The share that belongs to these where ``coefficients`` say (``at``); None where they are no shares."""
    found = _sum(shares, coefficients)
    return None if found is None else found.to_bytes(SHARE_BYTES, "big")


def _sum(shares: Mapping[int, bytes], coefficients: Sequence[int]) -> int | None:
    values = [int.from_bytes(share, "big") for share in shares.values()]
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(value >= PRIME for value in values):
        return None
    return sum(c * value for c, value in zip(coefficients, values, strict=True)) % PRIME


def _check_points(points: Sequence[int]) -> None:
    if not points or len(set(points)) != len(points) or not all(1 <= point < PRIME for point in points):
        raise UsageError(
            f"points = {len(points)} numbers · must be distinct, at least one, and between 1 and p − 1",
            next="Number the sites from 1.",
        )
