"""What an engine has charged: in the ledger that process 0 holds, and by its own count."""

from dataclasses import dataclass
from typing import Any

from sfumato.errors import UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.processes import Processes


@dataclass(frozen=True, slots=True)
class _Told:
    """What process 0 tells the others of its ledger."""

    sequence: int  # of the reservation
    position: dict[str, Any]
    spent: list[Event]


class Charges:
    """The events of one engine. Charged by process 0 for all; the others wait for how that ended.

    Attributes: events: by our own count, over all attempts that a loaded state knows of, equal ones merged.
    """

    def __init__(self, ledger: Ledger | None, processes: Processes) -> None:
        self.ledger = ledger
        self.processes = processes
        self.events: list[Event] = []
        self._told: _Told | None = None  # process 0's ledger, as the others heard of it

    @property
    def count(self) -> int:
        """How many events were charged, by our own count."""
        return sum(event.count for event in self.events)

    @property
    def in_a_ledger(self) -> bool:
        return self.ledger is not None or self._told is not None

    @property
    def spent(self) -> list[Event]:
        """By the ledger if there is one, else by our count."""
        if self.ledger is not None:
            return self.ledger.spent()
        return self._told.spent if self._told is not None else self.events

    @property
    def position(self) -> dict[str, Any] | None:
        """Where the ledger stands, for a checkpoint."""
        if self.ledger is not None:
            return self.ledger.position
        return self._told.position if self._told is not None else None

    def join(self) -> None:
        """All processes meet: the others hear of the ledger."""
        ledger = self.ledger
        self._told = self.processes.decide(lambda: ledger and _Told(ledger.sequence, ledger.position, ledger.spent()))

    def charge(self, event: Event, number: int, ahead: int) -> int | None:
        """One event for all processes. It is the one after ``number`` others, and the first of ``ahead`` in a row.

        Returns: the reservation, for ``commit``; None without a ledger.
        """

        def reserve() -> _Told | None:
            if self.ledger is None:
                return None
            sequence = self.ledger.reserve(event, number, ahead)
            return _Told(sequence, self.ledger.position, self.ledger.spent())

        self._told = self.processes.decide(reserve)
        self.events = list(accounting.merged([*self.events, event]))
        return None if self._told is None else self._told.sequence

    def commit(self, sequence: int) -> None:
        if self.ledger is not None:
            self.ledger.commit(sequence)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what was spent, up to where the ledger had come."""
        position = self.position
        return {
            "events": [event.to_dict() for event in self.events],
            "ledger_sequence": position["sequence"] if position is not None else None,
            **({"ledger_position": position} if position is not None else {}),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Raises LedgerError if the state is newer than the ledger, UsageError if more was charged here already."""
        if self.ledger is not None and state["ledger_sequence"] is not None:
            position = state.get("ledger_position") or {}  # the states of older versions say the number alone
            rest = {name: value for name, value in position.items() if name != "sequence"}
            self.ledger.require_at_least(int(state["ledger_sequence"]), **rest)
        events = [Event.from_dict(event) for event in state["events"]]
        told = sum(event.count for event in events)
        if told < self.count:
            raise UsageError(
                f"state = {told} events · this engine has charged {self.count} already, which nothing takes back",
                next="Load a state into a new engine, before its first step.",
            )
        self.events = events
