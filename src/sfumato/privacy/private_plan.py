"""What every private plan says: whom it protects, from whom, and by how much at most."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.events import ADJACENCIES, Adjacency, Event, merged


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivatePlan:
    """The base of all private plans.

    Attributes:
      population: N, the number of units, a public constant.
      delta: the slack of the guarantee.
      unit: record, person or site: whose contribution is bounded and hidden.
      records_per_unit: k, public: at most so many records of a unit are used.
      adjacency: how neighbouring data sets differ (``events``); one for the whole plan.
      target_epsilon: what was asked for, if the noise was calibrated to it.
      population_from_data: N was counted in the data and is hereby declared public.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    population: int
    delta: float
    unit: str = "record"
    records_per_unit: int = 1
    adjacency: Adjacency = "add_or_remove"
    target_epsilon: float | None = None
    population_from_data: bool = False

    def events(self) -> tuple[Event, ...]:
        """The most that may ever be spent."""
        raise NotImplementedError

    def mechanism(self, spent: Sequence[Event]) -> dict[str, Any]:
        """What was done, in plain values, for the claim: all that a reader needs, ``spent`` included."""
        raise NotImplementedError

    def allowance(self) -> dict[Event, int]:
        """How often each event, taken once, may happen at most."""
        return {replace(event, count=1): event.count for event in merged(self.events())}

    def not_charged(self, spent: Sequence[Event]) -> list[str]:
        """What is released once and must have been, in every finished run, but is not among the events spent."""
        charged = {replace(event, count=1): event.count for event in merged(spent)}
        return [
            f"{event.mechanism} {most - charged.get(event, 0)} times"
            for event, most in self.allowance().items()
            if charged.get(event, 0) < most
        ]

    def epsilon(self) -> float:
        """Of the whole plan, by PLD."""
        value = accounting.epsilon(self.events(), self.delta, adjacency=self.adjacency)
        assert value is not None  # PLD always applies
        return value

    def spending(self, spent: Sequence[Event]) -> dict[str, Any]:
        """The end of every ``mechanism``."""
        return {
            "events_spent": sum(event.count for event in spent),
            "target_epsilon": self.target_epsilon,
            "accountant": "pld",
            "grid": accounting.GRID,
        }

    def check_common(self) -> None:
        check_units(self)
        checks.one_of(ADJACENCIES, adjacency=self.adjacency)
        if not 0 < self.delta < 1:
            raise UsageError(
                f"delta = {self.delta} · must be between 0 and 1, both excluded", next="Give about 1/(N ln N)."
            )


def check_units(plan: Any) -> None:
    whole(1, population=plan.population, records_per_unit=plan.records_per_unit)
    checks.one_of(("record", "person", "site"), unit=plan.unit)
    if plan.unit == "record" and plan.records_per_unit != 1:
        raise UsageError(
            f"records_per_unit = {plan.records_per_unit} · must be 1 when unit is record", next="Set unit: person."
        )


def whole(least: int, **named: Any) -> None:
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} = {value!r} · must be a whole number >= {least}", next="Give a larger number.")
