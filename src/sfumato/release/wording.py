"""Numbers as people read them, the same in the card and on the page."""

import math
from decimal import ROUND_CEILING, Context
from typing import Any


def number(value: Any) -> str:
    """Four significant digits; text as it is; "none" for what is not there."""
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:d}" if isinstance(value, int) else f"{value:.4g}"


def bound(value: Any) -> str:
    """An upper bound on privacy loss: four significant digits, rounded up, so that what is printed still holds."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return number(value)
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(value))):.4g}"


def small(value: Any) -> str:
    """As ``bound``, with a power of ten written out where there is one: 3.2 × 10⁻⁶."""
    text = bound(value)
    mantissa, mark, exponent = text.partition("e")
    if not mark or not mantissa[-1:].isdigit():  # "none" has an e too
        return text
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def figure(value: Any) -> str:
    """A measured figure in a column: three decimals for what lies between -1 and 1, else four digits."""
    return f"{value:.3f}" if isinstance(value, float) and -1 <= value <= 1 else number(value)


def neighbours(adjacency: Any, unit: str) -> str:
    """What two data sets differ in that the guarantee cannot tell apart."""
    return {
        "add_or_remove": f"one {unit} is added or removed",
        "replace_one": f"the data of one {unit} are replaced by any others",
        "zero_out": f"one {unit} gives its data, or none",
    }.get(str(adjacency), str(adjacency))


def count(value: Any) -> str:
    """A whole number with thin spaces between thousands, as tables have it."""
    return (
        number(value) if not isinstance(value, int) or isinstance(value, bool) else f"{value:,}".replace(",", "\u202f")
    )


def duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(value: Any) -> str:
    """Bytes in binary units."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def percent(share: float) -> str:
    """A share in [0, 1]; never rounded up to certainty nor down to nothing."""
    if share >= 1:
        return "100 %"
    if share > 0.999:
        digits = min(8, 1 - math.floor(math.log10((1 - share) * 100)))
        return f"{math.floor(share * 100 * 10**digits) / 10**digits:.{digits}f} %"
    return f"{share * 100:.3g} %"
