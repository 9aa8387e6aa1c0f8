"""Private estimates: counts, histograms, sums, means over public constants, quantiles; each charged before it looks.

One answer, in the order of ``charged`` (the only part that touches a ledger):

1. Charged. The plan's event is reserved, durably.
2. Sampled. Every unit, or each with the plan's rate by its own coin. Who was drawn is secret.
3. Bounded. Of a unit's records at most k are kept, chosen by chance; which ones is secret. ``units`` is trusted to say
   whose a record is.
4. Clipped. Values to the question's public range. Nothing is refused because of what a record says, since a refusal
   would tell: infinite values count as the range's ends; a value that is no number counts as zero in a sum, as the
   middle in a mean, and as larger than everything in a quantile; a category out of range counts nowhere.
5. Summed and noised. ``noisy_sum``: in whole multiples of the noise's own grid, so exactly, whatever the order.
6. Post-processing: division by N, a public constant, never by a number of units that was counted; intervals; bisection.

A confidence interval is about the noise: it covers the answer that the clipped values, of the records that were kept,
would have without noise (with probability ``confidence``, the chance of the noise alone); for a sampled quantile, that
of all units. It does not say how far the people in the data are from other people.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy.noise import gaussian, spacing
from sfumato.privacy.questions import Histogram, Mean, Quantile, Question, Total, UnitCount
from sfumato.privacy.releases import Estimate
from sfumato.privacy.sampling import poisson_units
from sfumato.randomness import Random
from sfumato.records import ranks

if TYPE_CHECKING:
    from sfumato.privacy.ledger import Ledger

CONFIDENCE = 0.95
MOST_UNITS = 2**26  # so many times 2^36 grid points still fit into 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One released number. ``low`` and ``high``: the interval; each of its ends is wrong with probability at most
    (1 - confidence) / 2.

    ``std`` is the noise's standard deviation, in units of ``value``; for a quantile in units of rank, on each count.
    """

    value: float
    std: float
    low: float
    high: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Source(Protocol):
    """Who can be asked."""

    @property
    def num_units(self) -> int: ...

    def column(self, units: np.ndarray) -> "Column":
        """The records of these units (numbers from 0). Nothing may be read of others."""
        ...


@dataclass(frozen=True, slots=True)
class Column:
    """Values with their owners, in any order.

    Attributes:
      values: (R,) numbers; codes of categories for a histogram; for a count they are not looked at.
      units: (R,) whose each is, any names.
    """

    values: np.ndarray
    units: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values))
        object.__setattr__(self, "units", np.asarray(self.units))
        if self.values.ndim != 1 or self.values.shape != self.units.shape:
            raise UsageError(
                f"values.shape = {self.values.shape}, units.shape = {self.units.shape} · must be (R,) both",
                next="Give one value and one unit for every record.",
            )

    @property
    def num_units(self) -> int:
        return len(np.unique(self.units))

    def column(self, units: np.ndarray) -> "Column":
        owners = np.unique(self.units, return_inverse=True)[1]
        chosen = np.isin(owners, units)
        return Column(self.values[chosen], self.units[chosen])


def charged(
    plan: Estimate,
    source: Source,
    *,
    ledger: "Ledger | None",
    random: Random,
    confidence: float = CONFIDENCE,
    step: int = 0,
) -> dict[str, Answer]:
    """The answer to the plan's question, by name; reserved in the ledger before the source is asked.

    Guarantee: (epsilon, delta)-private as ``plan`` says, under its adjacency. Without a ledger nobody keeps count but you.
    If asking fails, the reservation stays spent.

    Raises: BudgetExhausted where the ledger has no room for it; LedgerError, OutsideError. Then nothing was touched.
    """
    (event,) = plan.events()
    sequence = ledger.reserve(event, step) if ledger is not None else None
    units = (
        np.arange(source.num_units)
        if plan.sampling_rate == 1
        else poisson_units(source.num_units, plan.sampling_rate, random)
    )
    found = answer(plan, source.column(units), random, confidence)
    if ledger is not None and sequence is not None:
        ledger.commit(sequence)
    return found


def answer(plan: Estimate, column: Column, random: Random, confidence: float = CONFIDENCE) -> dict[str, Answer]:
    """The noised answer for these records, by name: ``value``, or the categories of a histogram. Charges nothing."""
    _check_confidence(confidence)
    match plan.question:
        case Quantile():
            return {"value": _quantile(plan, plan.question, column, random, confidence)}
        case Histogram() as question:
            sums = _noised(plan, contributions(question, column, plan.records_per_unit, random), random)
            each = 1 - (1 - confidence) / len(question.categories)  # all intervals hold together
            found = (_around(float(total), plan.noise_std, each, confidence) for total in sums)
            return dict(zip(question.categories, found, strict=True))
        case Mean() as question:
            sums = _noised(plan, contributions(question, column, plan.records_per_unit, random), random)
            value, std = question.middle + float(sums[0]) / plan.population, plan.noise_std / plan.population
            return {"value": _around(value, std, confidence, confidence)}
        case UnitCount() | Total() as question:
            sums = _noised(plan, contributions(question, column, plan.records_per_unit, random), random)
            return {"value": _around(float(sums[0]), plan.noise_std, confidence, confidence)}


def safe_population(count: Answer) -> int:
    """An N to plan with, of an estimated number of units: the interval's upper end.

    It is below the true number with probability (1 - confidence) / 2. Too large an N makes delta smaller and batches smaller
    than asked; too small a one makes batches larger: the rate q = B / N is what is drawn and charged in any case.
    Where N enters the guarantee itself (delta < 1/N, truncated sampling) only an N that is not too small will do.
    """
    return max(1, math.ceil(count.high))


def contributions(
    question: Question, column: Column, records_per_unit: int, random: Random, threshold: float = math.nan
) -> np.ndarray:
    """What each unit adds to the sum, (U, d) float64, units in the order of their names.

    Guarantee: whatever the records hold, every row has L2 norm at most ``question.radius(k)``, two rows are at most
    ``question.diameter(k)`` apart, and a row depends on its own unit's records and fresh chance alone.

    Args: threshold: of a quantile.
    """
    values, owners, count = _bounded(column, records_per_unit, random)
    match question:
        case UnitCount():
            return np.ones((count, 1))
        case Histogram(categories=categories):
            out = np.zeros((count, len(categories)))
            with np.errstate(invalid="ignore"):
                known = (values >= 0) & (values < len(categories)) & (values == np.floor(values))
            np.add.at(out, (owners[known], values[known].astype(np.int64)), 1.0)
            return out
        case Total(low=low, high=high):
            clipped = np.where(np.isnan(values), 0.0, np.clip(values, low, high))
            out = np.bincount(owners, weights=clipped, minlength=count)
            return np.clip(out, records_per_unit * min(low, 0.0), records_per_unit * max(high, 0.0))[:, None]
        case Mean(low=low, high=high):
            clipped = np.where(np.isnan(values), question.middle, np.clip(values, low, high))
            radius = question.radius(records_per_unit)
            out = _means(clipped, owners, count) - question.middle
            return np.clip(out, -radius, radius)[:, None]
        case Quantile(quantile=quantile, low=low, high=high):
            means = _means(
                np.clip(values, low, high), owners, count
            )  # no number stays none, and is above every threshold
            return np.where(means <= threshold, 1 - quantile, -quantile)[:, None]


def noisy_sum(contributions: np.ndarray, radius: float, std: float, random: Random) -> np.ndarray:
    """(U, d) -> (d,): the sum over units plus N(0, std^2) on every coordinate.

    Guarantee: what is added up are whole multiples of the grid of the noise (``noise.spacing``), each contribution rounded
    towards zero: a unit moves the sum by no more than its contribution, whatever the others hold and in whatever order
    they come (floating-point sums do not keep that: Casacuberta et al. 2022, arXiv:2207.10635), and which numbers can
    come out does not depend on the data. With ``std`` = 0 there is no noise and no guarantee.
    """
    if len(contributions) > MOST_UNITS:
        raise UsageError(f"units = {len(contributions)} · must be at most {MOST_UNITS}", next="Take a sample.")
    step = spacing(std if std > 0 else radius)
    total = np.trunc(contributions / step).astype(np.int64).sum(axis=0)
    noise = gaussian(contributions.shape[1], std, random).numpy()
    return (total + np.rint(noise / step).astype(np.int64)) * step


def _noised(plan: Estimate, rows: np.ndarray, random: Random) -> np.ndarray:
    return noisy_sum(rows, plan.question.radius(plan.records_per_unit), plan.noise_std, random)


def _quantile(plan: Estimate, question: Quantile, column: Column, random: Random, confidence: float) -> Answer:
    """Bisection: is the sum of 1[value <= t] - gamma below zero? Then the quantile is above t.

    ``value`` is the upper edge of the cell that is left. Of the interval's ends, ``low`` is the highest threshold that is below
    the quantile but for an error of the noise, ``high`` the lowest that is not; each of the T comparisons may err in one
    direction alone, with probability (1 - confidence) / 2T at most. Sampling adds the variance N q (1 - q) gamma (1 - gamma),
    exact for the thresholds at the quantile, with the plan's N and the normal distribution for the binomial one.
    """
    kept = _bounded_column(column, plan.records_per_unit, random)
    rate, gamma = plan.sampling_rate, question.quantile
    sampling = plan.population * rate * (1 - rate) * gamma * (1 - gamma)
    margin = _normal_quantile(1 - (1 - confidence) / (2 * question.halvings)) * math.sqrt(plan.noise_std**2 + sampling)
    below, above = 0, 2**question.halvings  # the cell's edges, by number
    low, high = question.low, question.high
    for _ in range(question.halvings):
        middle = (below + above) // 2
        rows = contributions(question, kept, plan.records_per_unit, random, question.edge(middle))
        excess = float(_noised(plan, rows, random)[0])
        below, above = (middle, above) if excess < 0 else (below, middle)
        if excess + margin < 0:
            low = max(low, question.edge(middle))
        if excess - margin >= 0:
            high = min(high, question.edge(middle))
    value = question.edge(above)
    return Answer(value=value, std=plan.noise_std, low=min(low, value), high=max(high, value), confidence=confidence)


def _around(value: float, std: float, each: float, together: float) -> Answer:
    margin = _normal_quantile((1 + each) / 2) * std
    return Answer(value=value, std=std, low=value - margin, high=value + margin, confidence=together)


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence = {confidence} · must be between 0 and 1, both excluded", next="Give 0.95.")


def _bounded_column(column: Column, records_per_unit: int, random: Random) -> Column:
    values, owners, _ = _bounded(column, records_per_unit, random)
    return Column(values, owners)


def _bounded(column: Column, records_per_unit: int, random: Random) -> tuple[np.ndarray, np.ndarray, int]:
    """At most k records of each unit, a uniformly drawn subset.

    Returns: values (R,) float64, owners (R,) from 0 to the number of units, which comes last.
    """
    checks.positive(records_per_unit=records_per_unit)
    names, owners = np.unique(column.units, return_inverse=True)
    order = np.argsort(owners, kind="stable")
    owners, values = owners[order], column.values[order].astype(np.float64)
    counts = np.bincount(owners, minlength=len(names))
    place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    if len(counts) and counts.max() > records_per_unit:
        keep = ranks(owners, place, random) < records_per_unit
        values, owners = values[keep], owners[keep]
    return values, owners, len(names)


def _means(values: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owners, weights=values, minlength=count) / np.bincount(owners, minlength=count)


def figures(answers: dict[str, Answer], plan: Estimate) -> list[dict[str, Any]]:
    """What may be released, as plain values: paid for."""
    return [
        {"of": plan.name, "name": name, **found.to_dict(), "covered_by": "charged"} for name, found in answers.items()
    ]
