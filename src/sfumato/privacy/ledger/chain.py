"""The entries of a ledger, the chain of their hashes, and the state that they lead to. No file is touched here.

Entries, each one JSON object in one spelling (``canonical``):

    open     attempt, time                          a process begins to write
    reserve  attempt, step, the event               charged: ``count`` of the event, at once
    commit   reserve                                that reservation was used
    block    attempt, step, the event               charged: ``count`` >= 2 steps, handed out one by one from memory
    used     block, steps, committed                so many of the block were handed out; the rest is free again
    time     time                                   a coarse clock, about once a minute
    close    time                                   a clean end

hash = SHA-256(hash before, entry), the first over the header, which holds a random id, the run, the plan and the account.
Format 1 (until version 0.1) had ``open`` without a time, ``reserve`` and ``commit``; it is read, and continued, as such.

**What a ``used`` entry may give back.** The rest of a block is free again only if nothing was reserved or opened after
that block: then the process that reserved it is the process that says how much of it was used. What follows:

- a crash gives nothing back: the next ``open`` ends the block, and its rest stays spent;
- a copy of a ledger made while a block was open gives nothing back either: whoever continues the copy opens it first;
- the process that reserved it first forgets what it has left, then writes ``used``: after the entry it can hand out none;
- a copy made *before* the ``used`` entry says more than was spent, never less.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from sfumato.errors import BudgetExhausted, LedgerError, UsageError
from sfumato.privacy.accounting import Event
from sfumato.privacy.plan import NotPrivate, PrivacyPlan
from sfumato.privacy.plan_json import plan_from_dict
from sfumato.privacy.private_plan import PrivatePlan

LEDGER_FORMAT = "sfumato-ledger/2"
FIRST_FORMAT = "sfumato-ledger/1"
CLOCK_STEP = 60  # seconds between two marks of time; a clock that goes back by more is reported
RESTORE = "Restore the ledger from a copy that is whole; if there is none, count the plan's full epsilon as spent."


@dataclass(kw_only=True)
class History:
    """The state after some entries. ``apply`` is the only way on, and refuses what cannot follow."""

    header: dict[str, Any]
    plan: PrivacyPlan | None
    allowed: dict[Event, int] | None  # how often each event (with count = 1) may be charged; None for no limit
    head: str
    sequence: int = 0
    attempt: int = 0
    counts: dict[Event, int] = field(default_factory=dict)  # by event with count = 1
    uncommitted: set[int] = field(default_factory=set)  # reservations
    blocks: dict[int, int] = field(default_factory=dict)  # of which nothing is said yet: how many steps each has
    unused: dict[int, int] = field(
        default_factory=dict
    )  # handed out and never committed, of blocks that were given back
    newest: tuple[int, Event] | None = None  # a block, if nothing was reserved or opened since
    given_back: dict[int, int] = field(default_factory=dict)  # blocks whose rest is free: how many steps were used
    time: int | None = None  # the latest mark of the clock, UTC seconds
    clock_back: list[tuple[int, int]] = field(default_factory=list)  # (entry, seconds) where the clock went back
    closed: bool = False  # the last entry is a clean end

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def uncommitted_steps(self) -> int:
        """Reservations, and steps of blocks, of which nothing says that they were used."""
        return len(self.uncommitted) + sum(self.blocks.values()) + sum(self.unused.values())

    @property
    def first_format(self) -> bool:
        return self.header["format"] == FIRST_FORMAT

    def spent(self) -> list[Event]:
        return [replace(event, count=count) for event, count in self.counts.items() if count]

    def copy(self) -> "History":
        return replace(
            self,
            counts=dict(self.counts),
            uncommitted=set(self.uncommitted),
            blocks=dict(self.blocks),
            unused=dict(self.unused),
            given_back=dict(self.given_back),
            clock_back=list(self.clock_back),
        )

    def apply(self, body: str) -> None:
        entry = decoded(body)
        closed = False
        if self.closed and not (isinstance(entry, dict) and entry.get("kind") == "open"):
            raise self._unfit(body)
        match entry:
            case {"kind": "reserve", "attempt": attempt, "step": step, **values} if self._now(attempt) and _whole(step):
                self._charge(_event(values))
                self.uncommitted.add(self.sequence + 1)
                self.newest = None
            case {"kind": "commit", "reserve": reserve, **rest} if (
                not rest and type(reserve) is int and reserve in self.uncommitted
            ):
                self.uncommitted.remove(reserve)
            case {"kind": "open", "attempt": attempt, **rest} if _next(attempt, self.attempt) and self._timed(rest):
                self.attempt = attempt
                self.newest = None
                self.unused.update(self.blocks)  # of an attempt that died: nobody can say any more what was used
                self.blocks.clear()
            case _ if self.first_format:
                raise self._unfit(body)
            case {"kind": "block", "attempt": attempt, "step": step, **values} if self._now(attempt) and _whole(step):
                event = _event(values)
                if event.count < 2:
                    raise self._unfit(body)
                one = self._charge(event)
                self.blocks[self.sequence + 1] = event.count
                self.newest = (self.sequence + 1, one)
            case {"kind": "used", "block": block, "steps": steps, "committed": committed, **rest} if (
                not rest
                and type(block) is int
                and _whole(steps)
                and _whole(committed)
                and self._use(block, steps, committed)
            ):
                pass
            case {"kind": "time", **rest} if self._timed(rest):
                pass
            case {"kind": "close", **rest} if self.attempt and self._timed(rest):
                closed = True
                self.newest = None
            case _:
                raise self._unfit(body)
        self.closed = closed
        self.sequence += 1
        self.head = link(self.head, body)

    def _charge(self, event: Event) -> Event:
        must_fit(event, self)
        one = event if event.count == 1 else replace(event, count=1)
        self.counts[one] = self.counts.get(one, 0) + event.count
        return one

    def _use(self, block: int, steps: int, committed: int) -> bool:
        """Whether so many steps of the block can have been used; then they are all that it costs."""
        size = self.blocks.get(block, -1)
        if not committed <= steps <= size:
            return False
        if steps < size:
            if self.newest is None or self.newest[0] != block:
                return False
            self.counts[self.newest[1]] -= size - steps
            self.given_back[block] = steps
            self.newest = None
        del self.blocks[block]
        if steps > committed:
            self.unused[block] = steps - committed
        return True

    def _now(self, attempt: Any) -> bool:
        return type(attempt) is int and attempt == self.attempt >= 1

    def _timed(self, rest: dict[str, Any]) -> bool:
        """Whether an entry carries the time, and nothing else; format 1 has none."""
        if self.first_format:
            return not rest
        time = rest.get("time")
        if len(rest) != 1 or type(time) is not int or not 0 <= time < 2**53:
            return False
        if self.time is not None and time < self.time - CLOCK_STEP:
            self.clock_back.append((self.sequence + 1, self.time - time))
        self.time = time
        return True

    def _unfit(self, body: str) -> LedgerError:
        return LedgerError(
            f"entry {self.sequence + 1} = {body[:200]} · cannot follow what is before it",
            next=RESTORE,
            code="ledger_torn",
        )


def _whole(number: Any) -> bool:
    return type(number) is int and number >= 0  # True is an int to Python, not to us


def _next(number: Any, before: int) -> bool:
    return type(number) is int and number == before + 1


_EVENTS: dict[Any, Event] = {}  # a ledger has few different events, in very many entries


def _event(values: dict[str, Any]) -> Event:
    key = tuple((name, type(value), value) for name, value in values.items())
    try:
        event = _EVENTS.get(key)
    except TypeError:  # a list or an object: no event has one that could be looked up
        return Event.from_dict(values)
    if event is None:
        event = Event.from_dict(values)
        if len(_EVENTS) >= 1000:
            _EVENTS.clear()
        _EVENTS[key] = event
    return event


def beginning(header_text: str) -> History:
    """The state before the first entry. Raises LedgerError for a header that we did not write."""
    header = decoded(header_text)
    if not isinstance(header, dict) or set(header) != {"format", "ledger", "run", "plan", "account"}:
        raise LedgerError(f"header = {header_text[:200]} · is not one of ours", next=RESTORE, code="ledger_torn")
    if header["format"] not in (FIRST_FORMAT, LEDGER_FORMAT):
        raise LedgerError(
            f"format = {header['format']!r} · must be {LEDGER_FORMAT} or {FIRST_FORMAT}",
            next="Use the version of sfumato that wrote it.",
            code="ledger_format",
        )
    texts = (header["ledger"], header["run"], "" if header["account"] is None else header["account"])
    if not all(isinstance(text, str) for text in texts):
        raise LedgerError(f"header = {header_text[:200]} · names must be text", next=RESTORE, code="ledger_torn")
    plan = None if header["plan"] is None else plan_from_dict(header["plan"])
    return History(header=header, plan=plan, allowed=allowance(plan), head=link(header["format"], header_text))


def allowance(plan: PrivacyPlan | None) -> dict[Event, int] | None:
    """How often each event (with count = 1) may be charged; None for no limit."""
    if isinstance(plan, PrivatePlan):
        return plan.allowance()
    return None if plan is None else {}


def must_fit(event: Event, history: History) -> None:
    """Raises BudgetExhausted or LedgerError if the plan has no room for the event."""
    if event.count < 1:
        raise UsageError(f"count = {event.count} · a reservation is of at least one event", next="Reserve 1 or more.")
    plan, allowed = history.plan, history.allowed
    if isinstance(plan, NotPrivate):
        raise LedgerError(
            "plan = none · a run without privacy has nothing to reserve",
            next="Do not reserve.",
            code="ledger_not_private",
        )
    if allowed is None or plan is None:
        return
    one = event if event.count == 1 else replace(event, count=1)
    if one not in allowed:
        raise LedgerError(
            f"event = {event.to_dict()} · must be the plan's, {', '.join(str(kind.to_dict()) for kind in allowed)}",
            next="Take rate and noise from the plan that the ledger was opened with.",
            code="ledger_event",
        )
    spent = history.counts.get(one, 0)
    if spent + event.count > allowed[one]:
        raise BudgetExhausted(
            f"steps = {spent} spent + {event.count} · the plan ends at {allowed[one]}, where epsilon is "
            f"{plan.target_epsilon if plan.target_epsilon is not None else plan.epsilon():.4g}",
            next="The run is done: what was learnt so far can be released. More steps need a new plan.",
        )


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def decoded(text: Any) -> Any:
    """JSON in the one spelling that we write; anything else is a change."""
    try:
        value = json.loads(text)
        same = canonical(value) == text
    except (TypeError, ValueError, RecursionError):
        same, value = False, None
    if not same:
        raise LedgerError(
            f"entry = {str(text)[:200]!r} · is not in the form we write", next=RESTORE, code="ledger_torn"
        )
    return value


def link(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()


def reserve_body(event: Event, attempt: int, step: int, kind: str = "reserve") -> str:
    return canonical({"kind": kind, "attempt": attempt, "step": step, **event.to_dict()})


def commit_body(reserve: int) -> str:
    return canonical({"kind": "commit", "reserve": reserve})


def used_body(block: int, steps: int, committed: int) -> str:
    return canonical({"kind": "used", "block": block, "steps": steps, "committed": committed})


def head_statement(ledger: str, sequence: int, head: str) -> bytes:
    """What is signed: all entries of this ledger up to ``sequence``."""
    return canonical({"format": "sfumato-ledger-head/1", "ledger": ledger, "sequence": sequence, "head": head}).encode()
