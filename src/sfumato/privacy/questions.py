"""What can be asked of a data set at once, and how far one unit can move the answer. Values only; ``estimate`` asks.

Every question is a sum over units of a contribution in a set S that holds zero, and everything between zero and a
contribution, coordinate by coordinate (so that rounding towards zero stays in S). Two lengths say all about privacy:

radius    the longest contribution: how far adding, removing or blanking one unit moves the sum
diameter  the longest distance of two contributions: how far exchanging one unit moves it

| question  | contribution of a unit                                     | radius           | diameter              |
| UnitCount | 1                                                          | 1                | N is public           |
| Histogram | how many of its at most k records are of each category     | k                | k sqrt(2)             |
| Total     | the sum of its at most k values, each in [low, high]       | k max(|l|, |h|)  | k (max(h,0)-min(l,0)) |
| Mean      | the mean of its at most k values, less (low + high) / 2    | (high - low) / 2 | high - low            |
| Quantile  | 1[value <= t] - gamma, for every threshold t that is tried | max(g, 1 - g)    | 1                     |
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sfumato import checks
from sfumato.errors import UsageError

_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitCount:
    """How many units there are, where that is not public. Defined under add_or_remove alone."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    kind: Literal["unit_count"] = "unit_count"

    def radius(self, records_per_unit: int) -> float:
        return 1.0

    def diameter(self, records_per_unit: int) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How many records are of each category; of a unit at most k. ``categories`` are public names, not found in the data."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    categories: tuple[str, ...]
    kind: Literal["histogram"] = "histogram"

    def __post_init__(self) -> None:
        if len(self.categories) < 2 or len(set(self.categories)) < len(self.categories):
            raise UsageError(
                f"categories = {len(self.categories)} · must be two or more different names",
                next="Name all categories that a record may have, whether one has or not.",
            )

    def radius(self, records_per_unit: int) -> float:
        return float(records_per_unit)

    def diameter(self, records_per_unit: int) -> float:
        return records_per_unit * math.sqrt(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """The sum of values, each clipped to the public range [low, high]; of a unit at most k."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    low: float
    high: float
    kind: Literal["total"] = "total"

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def radius(self, records_per_unit: int) -> float:
        return records_per_unit * max(abs(self.low), abs(self.high))

    def diameter(self, records_per_unit: int) -> float:
        return records_per_unit * (max(self.high, 0.0) - min(self.low, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The mean over units of a value in the public range [low, high]; the sum is divided by the plan's N, a public constant."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    low: float
    high: float
    kind: Literal["mean"] = "mean"

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    @property
    def middle(self) -> float:
        return self.low + (self.high - self.low) / 2

    def radius(self, records_per_unit: int) -> float:
        return (self.high - self.low) / 2

    def diameter(self, records_per_unit: int) -> float:
        return self.high - self.low


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantile:
    """The least threshold of a public grid that at least a share ``quantile`` of the units does not exceed.

    Found by bisection: ``halvings`` noisy counts, each threshold chosen after the answers before. Against one noisy
    histogram of all 2^h cells this needs noise of sqrt(h) max(g, 1 - g) on each count where the sum of half of the
    histogram's cells has sqrt(2^(h-1)): 1.4 against 11 for the median and h = 8. No N is needed: the counts are
    compared with zero.

    Attributes:
      quantile: gamma, in (0, 1).
      low, high: the public range; what is outside counts as its ends.
      halvings: h; the grid has 2^h cells.
      spacing: geometric (equal ratios; low > 0) or linear.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    quantile: float
    low: float
    high: float
    halvings: int = 8
    spacing: Literal["geometric", "linear"] = "geometric"
    kind: Literal["quantile"] = "quantile"

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        checks.one_of(("geometric", "linear"), spacing=self.spacing)
        if not 0 < self.quantile < 1:
            raise UsageError(
                f"quantile = {self.quantile} · must be between 0 and 1, both excluded", next="Take 0.5, the median."
            )
        if isinstance(self.halvings, bool) or not 1 <= self.halvings <= 30:
            raise UsageError(f"halvings = {self.halvings} · must be 1 to 30", next="Take 8, which is 256 cells.")
        if self.spacing == "geometric":
            checks.positive(low=self.low, next="Take spacing: linear for a range that holds zero.")

    def edge(self, number: int) -> float:
        """Threshold ``number`` of 0 .. 2^h."""
        share = number / 2**self.halvings
        if number == 2**self.halvings:
            return self.high
        if self.spacing == "linear":
            return self.low + share * (self.high - self.low)
        return math.exp((1 - share) * math.log(self.low) + share * math.log(self.high))

    def radius(self, records_per_unit: int) -> float:
        return max(self.quantile, 1 - self.quantile)

    def diameter(self, records_per_unit: int) -> float:
        return 1.0


Question = UnitCount | Histogram | Total | Mean | Quantile


def sums_of(question: Question) -> int:
    """How many sums are asked, one after another, of the same units."""
    return question.halvings if isinstance(question, Quantile) else 1


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)):
        raise UsageError(
            f"low = {low}, high = {high} · must be finite, low below high",
            next="Give a public range, not the data's own.",
        )
