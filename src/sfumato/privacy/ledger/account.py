"""The account of one data set, shared by all its runs: how many events of which kind each has reserved. [shell]

A run charges it *before* every entry of its ledger that charges, and notes how far the ledger was then. So of a run that
died, the account knows the last such entry or the one before it:

- a ledger that lacks more than the last entry does not hold what the account has noted: an older copy, refused;
- one that lacks the last entry alone may be such a copy, or the run died between the two files. Nobody can tell, so the
  events of that entry are *lost*: the ledger is charged for them when it is opened (``admit``), used or not.

What a ledger gave back of a block is given back here too, by the session that had charged it. Transactions are short; any
number of runs may be open.

**Limits.** An account may hold limits (epsilon, delta) on all its runs together. Each is a Rényi filter of one order
(``privacy.filters``), asked in the same transaction in which events are charged: so runs that go on side by side, or are
planned after the results of others were seen, cannot pass it together. A limit can be added, never raised or removed.
The adjacency is read there too, from the plans of all runs: a limit may be declared while a run goes on.
"""

import secrets
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.errors import BudgetExhausted, LedgerError, PrivacyRefused
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Adjacency, Event
from sfumato.privacy.filters import RenyiFilter
from sfumato.privacy.ledger.chain import RESTORE, History, canonical, decoded
from sfumato.privacy.ledger.storage import (
    ACCOUNT_TABLES,
    connect,
    create,
    header_text,
    transaction,
    translated,
)
from sfumato.privacy.plan import NotPrivate, PrivacyPlan
from sfumato.privacy.plan_json import plan_from_dict
from sfumato.privacy.private_plan import PrivatePlan

ACCOUNT_FORMAT = "sfumato-account/1"
_LIMITS = (
    "CREATE TABLE IF NOT EXISTS limits (epsilon REAL NOT NULL, delta REAL NOT NULL, rank REAL NOT NULL, "
    "after INTEGER NOT NULL)"
)


class Account:
    """One run's hand on the account of its data set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session = secrets.token_hex(8)
        self._covered: dict[Event, int] = {}  # what the account has charged this run for
        with translated(path):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                header = canonical({"format": ACCOUNT_FORMAT, "account": secrets.token_hex(16)})
                create(path, ACCOUNT_TABLES, header)
            self._connection = connect(path)
            try:
                self.identity = account_identity(self._connection, path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def admit(
        self,
        history: History,
        hash_at: Callable[[int], str],
        limit: tuple[float, float] | None = None,
    ) -> list[Event]:
        """Registers the run; refuses a ledger or an account that was set back, and a run that would pass a limit.

        Args: limit: (epsilon, delta) of all runs together, added to those that the account has.

        Returns: what is charged here and is not in the ledger. Somebody may have used it: the ledger must be charged for it
          before anything else.
        """
        name = history.header["ledger"]
        with translated(self.path), transaction(self._connection):
            row = self._connection.execute(
                "SELECT sequence, head, block FROM runs WHERE ledger = ?", (name,)
            ).fetchone()
            if limit is not None:
                self._declare(limit, history)
            if row is None:
                if history.attempt:
                    raise self._older(f"does not know the run {history.header['run']!r}")
                self._check_room(history)
                values = (name, history.header["run"], canonical(history.header["plan"]), 0, "", 0, 0, self._session)
                self._connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
                return []
            charged = self._charged(name)
            missing = [event for event, count in history.counts.items() if charged.get(event, 0) < count]
            if missing:
                raise self._older(
                    f"holds {charged.get(missing[0], 0)} events of a run that has spent {history.counts[missing[0]]}"
                )
            sequence, head, block = row
            ahead = sum(charged.values()) - history.total > block
            if ahead or sequence > history.sequence or hash_at(sequence) != head:
                raise LedgerError(
                    f"ledger = {history.total} events · the account {self.path} has {sum(charged.values())} of this run: "
                    "the ledger is an older copy",
                    next=RESTORE,
                    code="ledger_set_back",
                )
            self._connection.execute("UPDATE runs SET closed = 0, session = ? WHERE ledger = ?", (self._session, name))
            self._covered = charged
        lost = {event: count - history.counts.get(event, 0) for event, count in charged.items()}
        return [replace(event, count=count) for event, count in lost.items() if count]

    def cover(self, history: History, event: Event, most: int) -> int:
        """Charges the run for all that its ledger holds and for ``event`` on top, and notes where the ledger is.

        Called before every entry of the ledger that charges: so an account is ahead of a ledger by one such entry at most.

        Args:
          most: how many of the event with count 1 are wanted, at least ``event.count``; a limit may allow fewer.

        Returns: for how many there is room, between ``event.count`` and ``most``; so many are charged.
        Raises: BudgetExhausted where a limit of the account leaves no room for ``event.count``; PrivacyRefused where no
          figure bounds its runs together.
        """
        name, one = history.header["ledger"], replace(event, count=1)
        with translated(self.path), transaction(self._connection):
            self._check_session(name)
            count = self._within_limits(history, one, most, event.count)
            covered = {**history.counts, one: history.counts.get(one, 0) + count}
            self._charge(name, covered)
            self._connection.execute(
                "UPDATE runs SET block = ?, sequence = ?, head = ? WHERE ledger = ?",
                (count, history.sequence, history.head, name),
            )
        self._covered = covered
        return count

    def settle(self, history: History) -> None:
        """At a clean end: what the ledger holds, and the ledger's head."""
        name = history.header["ledger"]
        with translated(self.path), transaction(self._connection):
            self._check_session(name)
            self._charge(name, history.counts)
            self._connection.execute(
                "UPDATE runs SET sequence = ?, head = ?, closed = 1, block = 0 WHERE ledger = ?",
                (history.sequence, history.head, name),
            )
        self._covered = dict(history.counts)

    def runs(self) -> list[dict[str, Any]]:
        return account_runs(self._connection)

    # -- inside --

    def _charge(self, name: str, counts: Mapping[Event, int]) -> None:
        """Writes what has changed since this session wrote last. It can be less: what a ledger gave back of a block."""
        rows = [
            (name, canonical(event.to_dict()), count)
            for event, count in counts.items()
            if self._covered.get(event) != count
        ]
        self._connection.executemany(
            "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (ledger, event) DO UPDATE SET count = excluded.count", rows
        )

    def _declare(self, limit: tuple[float, float], history: History) -> None:
        """The order of the filter is fixed now, for events like those of this plan."""
        self._connection.execute(_LIMITS)
        if limit not in [known[:2] for known in limits(self._connection)]:
            (after,) = self._connection.execute("SELECT coalesce(sum(count), 0) FROM spent").fetchone()
            like = [replace(event, count=count) for event, count in (history.allowed or {}).items()]
            order = RenyiFilter.of(*limit, self._adjacency(history), like).order
            self._connection.execute("INSERT INTO limits VALUES (?, ?, ?, ?)", (*limit, order, after))

    def _check_room(self, history: History) -> None:
        """Whether all of a new run's plan fits within every limit: a run that cannot end is not begun. One that was begun
        goes on to where the limit is."""
        found = limits(self._connection)
        if not found:
            return
        adjacency = self._adjacency(history)
        rest = [replace(event, count=count) for event, count in (history.allowed or {}).items()]
        everything = self._everything()
        for epsilon, delta, order, _ in found:
            gate = RenyiFilter.at(epsilon, delta, order, adjacency)
            if gate.admits([*everything, *rest]):
                continue
            room = " and ".join(f"{gate.room(everything, event)} of {event.count} steps" for event in rest)
            raise PrivacyRefused(
                f"account_epsilon = {epsilon:g} at delta = {delta:.3g} · all runs together have spent "
                f"{gate.share(everything):.1%} of it; of this plan there is room for {room}",
                next="Plan fewer steps or more noise. A limit that was declared cannot be raised.",
                code="account_limit",
            )

    def _adjacency(self, history: History) -> Adjacency:
        """Of all runs on the account and of this one. Not kept: others begin while this one goes on.

        Raises: PrivacyRefused where they have no figure together.
        """
        header = history.header
        others = [run for run in runs_of(self._connection) if run["ledger"] != header["ledger"]]
        runs = [*others, described(header["run"], header["ledger"], history.plan, [])]
        mixed = mixture(runs)
        if mixed:
            raise PrivacyRefused(
                f"account = {self.path} · has a limit, and {mixed}: no single figure bounds them together",
                next="Keep one account for each unit, and no run without privacy on an account that has a limit.",
                code="account_mixed",
            )
        return adjacency_of(runs)

    def _within_limits(self, history: History, one: Event, wanted: int, least: int) -> int:
        """How many of ``wanted`` the limits leave room for, at least ``least``; others' charges, and ours without this."""
        found = limits(self._connection)
        if not found:
            return wanted
        adjacency = self._adjacency(history)
        name, spent = history.header["ledger"], history.counts.get(one, 0)
        others = [
            replace(event, count=count - (0 if (ledger, event) != (name, one) else count))
            for ledger, event, count in self._rows()
        ]
        others.append(replace(one, count=spent))
        for epsilon, delta, order, _ in found:
            gate = RenyiFilter.at(epsilon, delta, order, adjacency)
            wanted = min(wanted, gate.room(others, one))
            if wanted < least:
                raise BudgetExhausted(
                    f"account_epsilon = {epsilon:g} at delta = {delta:.3g} · all runs of {self.path} together have spent "
                    f"{gate.share(others):.1%} of it, and this step does not fit",
                    next="The run is done: what was learnt so far can be released. A limit cannot be raised.",
                    code="account_limit",
                )
        return wanted

    def _everything(self) -> list[Event]:
        return [replace(event, count=count) for _, event, count in self._rows()]

    def _rows(self) -> list[tuple[str, Event, int]]:
        rows = self._connection.execute("SELECT ledger, event, count FROM spent").fetchall()
        return [(ledger, Event.from_dict(decoded(event)), count) for ledger, event, count in rows]

    def _charged(self, ledger: str) -> dict[Event, int]:
        return {event: count for name, event, count in self._rows() if name == ledger}

    def _check_session(self, ledger: str) -> None:
        row = self._connection.execute("SELECT session FROM runs WHERE ledger = ?", (ledger,)).fetchone()
        if row is None or row[0] != self._session:
            raise LedgerError(
                f"account = {self.path} · another copy of this run's ledger has been opened since",
                next="Stop one of the two; a run's folder must not be copied and continued twice.",
                code="ledger_copied",
            )

    def _older(self, what: str) -> LedgerError:
        return LedgerError(
            f"account = {self.path} · {what}: it is an older copy",
            next="Restore the account of this data set from a copy that is whole.",
            code="account_set_back",
        )


def account_identity(connection: sqlite3.Connection, path: Path) -> str:
    header = decoded(header_text(connection, path))
    match header:
        case {"format": str(form), "account": str(identity)} if form == ACCOUNT_FORMAT and len(header) == 2:
            return identity
    raise LedgerError(
        f"account = {path} · is not an account of ours", next="Check privacy.account.", code="account_torn"
    )


def limits(connection: sqlite3.Connection) -> list[tuple[float, float, float, int]]:
    """(epsilon, delta, order of the filter, events that were spent before it was declared) of every limit."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'limits'").fetchone():
        return []
    return connection.execute("SELECT epsilon, delta, rank, after FROM limits ORDER BY rowid").fetchall()


def account_runs(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Each run with its events (reserved ones included) and epsilon at its own delta."""
    found = runs_of(connection)
    for run in found:
        if run["delta"] is not None:
            events = [Event.from_dict(event) for event in run["events"]]
            run["epsilon"] = accounting.epsilon(events, run["delta"], adjacency=run["adjacency"])
    return found


def runs_of(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """The same without the figures, which take long: ``epsilon`` is None."""
    found = []
    for ledger, run, plan_text in connection.execute("SELECT ledger, run, plan FROM runs ORDER BY rowid").fetchall():
        values = decoded(plan_text)
        rows = connection.execute("SELECT event, count FROM spent WHERE ledger = ?", (ledger,)).fetchall()
        events = [replace(Event.from_dict(decoded(event)), count=count) for event, count in rows if count]
        found.append(described(run, ledger, None if values is None else plan_from_dict(values), events))
    return found


def described(run: str, ledger: str, plan: PrivacyPlan | None, events: list[Event]) -> dict[str, Any]:
    return {
        "run": run,
        "ledger": ledger,
        "private": not isinstance(plan, NotPrivate),
        "unit": plan.unit if plan is not None else None,
        "records_per_unit": plan.records_per_unit if plan is not None else None,
        "adjacency": plan.adjacency if isinstance(plan, PrivatePlan) else None,
        "events": [event.to_dict() for event in events],
        "epsilon": None,
        "delta": plan.delta if isinstance(plan, PrivatePlan) else None,
    }


def mixture(runs: list[dict[str, Any]]) -> str:
    """Why runs have no epsilon together, in words; nothing if they have one."""
    if any(not run["private"] for run in runs):
        return "a run without privacy is among its runs"
    for name in ("unit", "adjacency"):
        values = sorted({run[name] for run in runs if run[name] is not None})
        if len(values) > 1:
            return f"its runs differ in {name} ({', '.join(values)})"
    return ""


def adjacency_of(runs: list[dict[str, Any]]) -> Adjacency:
    """The adjacency of runs that do not differ in it."""
    return next((run["adjacency"] for run in runs if run["adjacency"] is not None), "add_or_remove")


def show_account(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """All runs, and what bounds them together: one figure as if their plans had been fixed beforehand, and the limits."""
    runs = account_runs(connection)
    events = accounting.merged([Event.from_dict(event) for run in runs for event in run["events"]])
    deltas = [run["delta"] for run in runs if run["delta"] is not None]
    reason = mixture(runs) or ("" if deltas else "no run on it has a delta")
    adjacency = adjacency_of(runs)
    figure = None if reason else accounting.epsilon(events, max(deltas), "rdp", adjacency)
    if figure is None and not reason:
        reason = f"RDP has no bound for its events under {adjacency}"
    held = []
    for epsilon, delta, order, after in limits(connection):
        share = RenyiFilter.at(epsilon, delta, order, adjacency).share(events)
        held.append({"epsilon": epsilon, "delta": delta, "order": order, "spent": share, "declared_after": after})
    return {
        "kind": "account",
        "path": str(path),
        "account": account_identity(connection, path),
        "runs": runs,
        "events": [event.to_dict() for event in events],
        "epsilon": figure,
        "delta": max(deltas) if figure is not None else None,
        "accountant": "rdp",
        "limits": held,
        "valid": True,
        "detail": _detail(reason, held),
    }


def _detail(reason: str, held: list[dict[str, Any]]) -> str:
    if reason:
        return f"no epsilon for all together: {reason}"
    if not held:
        return (
            "epsilon is that of all runs together, had their plans been fixed beforehand; for plans that were chosen after "
            "earlier results, a bound needs a limit declared before the first (privacy.account_epsilon)"
        )
    late = [limit for limit in held if limit["declared_after"]]
    words = "; ".join(f"epsilon <= {limit['epsilon']:g} at delta = {limit['delta']:.3g}" for limit in held)
    return f"whatever is planned, all runs together keep {words}" + (
        f"; declared after {late[0]['declared_after']} events had been spent, as if these had been planned with it"
        if late
        else ""
    )
