"""Small checks whose failures say what was given, what was expected and what to do next."""

import math

from sfumato.errors import UsageError


def positive(*, next: str = "Give a larger value.", **values: float) -> None:
    """Raises UsageError unless every value is a finite number > 0 (NaN is refused)."""
    for name, value in values.items():
        if not (value > 0 and _is_finite(value)):
            raise UsageError(f"{name} = {value} · must be a finite number > 0", next=next)


def non_negative(*, next: str = "Give zero or more.", **values: float) -> None:
    """Raises UsageError unless every value is a finite number >= 0 (NaN is refused)."""
    for name, value in values.items():
        if not (value >= 0 and _is_finite(value)):
            raise UsageError(f"{name} = {value} · must be a finite number >= 0", next=next)


def probability(*, next: str = "Give a number between 0 and 1.", **values: float) -> None:
    """Raises UsageError unless every value is in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} = {value} · must be in [0, 1]", next=next)


def one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raises UsageError unless every value is one of ``allowed``."""
    for name, value in values.items():
        if value not in allowed:
            raise UsageError(f"{name} = {value!r} · must be one of {', '.join(allowed)}", next="Choose one of these.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
