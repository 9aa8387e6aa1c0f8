"""What a bundle is refused with, wherever in it the fault is found."""

import math
from typing import Any

from sfumato.errors import VerificationFailed

AGAIN = "Do not use this bundle; ask its signer for it again."  # what to do next


def number(value: Any) -> bool:
    """A plain finite number; a truth value is none."""
    return type(value) in (int, float) and math.isfinite(value)


def failed(detail: str) -> VerificationFailed:
    return VerificationFailed(detail, next=AGAIN)
