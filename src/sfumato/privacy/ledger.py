"""What was spent, written down before it is spent. [shell]

The order of a step is RESERVE, durable -> touch the data -> optimiser step -> COMMIT. A crash can waste a reservation,
it can never hide one: whatever was reserved counts as spent, committed or not.

**A ledger** is one SQLite file of one run: a header (a random id, the run, the plan, the account) and entries (open,
reserve, commit), each with hash = SHA-256(hash before, entry), the first over the header. It has one writer, who holds
a POSIX lock on ``<ledger>.lock`` that the operating system drops when the process dies, however it dies.

**An account** is one SQLite file for one data set, shared by all its runs: how many events of which kind each run has
reserved. Its transactions are short. A run takes events from it in blocks of ``BLOCK`` *before* its ledger uses them,
and gives the rest of a block back when it closes; after a crash the rest stays charged until the run is resumed.

**Durable**: write-ahead log with ``synchronous=FULL``, which syncs the log to disk at every COMMIT, before it returns.
That is one sync, about 1 to 8 ms; a rollback journal needs three or four (17 ms where this was measured). If the
file system cannot do write-ahead logging, SQLite falls back to a journal, and we to ``synchronous=EXTRA``: slower, as
durable. Commit marks are written together with the next reservation, because a lost one only makes us pessimistic.

**Budget**: all events of a plan are equal and epsilon grows with their number, so at most ``plan.steps`` of them keep
epsilon at most the plan's; the check costs no accounting.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from sfumato.errors import (
    BudgetExhausted,
    LedgerError,
    OutsideError,
    SfumatoError,
    UsageError,
    VerificationFailed,
)
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict

LEDGER_FORMAT = "sfumato-ledger/1"
ACCOUNT_FORMAT = "sfumato-account/1"
BLOCK = 64  # events that a run takes from its account at once
MOST_ENTRIES = 5_000_000  # what the parser of an exported ledger is ready to read
_PATIENCE = 30.0  # seconds to wait for another process's short transaction


# ---- entries and their chain: no file below this line and above `class Ledger` ----


@dataclass(kw_only=True)
class _History:
    """The state after some entries. ``apply`` is the only way on, and refuses what cannot follow."""

    header: dict[str, Any]
    plan: PrivacyPlan | None
    head: str
    sequence: int = 0
    attempt: int = 0
    counts: dict[Event, int] = field(default_factory=dict)  # by event with count = 1
    uncommitted: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def spent(self) -> list[Event]:
        return [replace(event, count=count) for event, count in self.counts.items()]

    def apply(self, body: str) -> None:
        entry = _decoded(body)
        match entry:
            case {"kind": "open", "attempt": int(attempt), **rest} if not rest and _next(attempt, self.attempt):
                self.attempt = attempt
            case {"kind": "reserve", "attempt": int(attempt), "step": int(step), **values} if (
                _next(attempt, self.attempt - 1) and attempt >= 1 and type(step) is int and step >= 0
            ):
                event = Event.from_dict(values)
                _must_fit(event, self)
                one = replace(event, count=1)
                self.counts[one] = self.counts.get(one, 0) + event.count
                self.uncommitted.add(self.sequence + 1)
            case {"kind": "commit", "reserve": int(reserve), **rest} if (
                not rest and type(reserve) is int and reserve in self.uncommitted
            ):
                self.uncommitted.remove(reserve)
            case _:
                raise LedgerError(
                    f"entry {self.sequence + 1} = {body[:200]} · cannot follow what is before it",
                    next=_RESTORE,
                    code="ledger_torn",
                )
        self.sequence += 1
        self.head = _link(self.head, body)


_RESTORE = "Restore the ledger from a copy that is whole; if there is none, count the plan's full epsilon as spent."


def _next(number: int, before: int) -> bool:
    return type(number) is int and number == before + 1  # True is an int to Python, not to us


def _beginning(header_text: str) -> _History:
    """The state before the first entry. Raises LedgerError for a header that we did not write."""
    header = _decoded(header_text)
    if not isinstance(header, dict) or set(header) != {"format", "ledger", "run", "plan", "account"}:
        raise LedgerError(f"header = {header_text[:200]} · is not one of ours", next=_RESTORE, code="ledger_torn")
    if header["format"] != LEDGER_FORMAT:
        raise LedgerError(
            f"format = {header['format']!r} · must be {LEDGER_FORMAT}",
            next="Use the version of sfumato that wrote it.",
            code="ledger_format",
        )
    texts = (header["ledger"], header["run"], "" if header["account"] is None else header["account"])
    if not all(isinstance(text, str) for text in texts):
        raise LedgerError(f"header = {header_text[:200]} · names must be text", next=_RESTORE, code="ledger_torn")
    plan = None if header["plan"] is None else plan_from_dict(header["plan"])
    return _History(header=header, plan=plan, head=_link(LEDGER_FORMAT, header_text))


def _must_fit(event: Event, history: _History) -> None:
    """Raises BudgetExhausted or LedgerError if the plan has no room for the event."""
    plan = history.plan
    if event.count < 1:
        raise UsageError(f"count = {event.count} · a reservation is of at least one event", next="Reserve 1 or more.")
    if isinstance(plan, NotPrivate):
        raise LedgerError(
            "plan = none · a run without privacy has nothing to reserve",
            next="Do not reserve.",
            code="ledger_not_private",
        )
    if isinstance(plan, DpSgd):
        if replace(event, count=1) != plan.event(1):
            raise LedgerError(
                f"event = {event.to_dict()} · must be the plan's, {plan.event(1).to_dict()}",
                next="Take rate and noise from the plan that the ledger was opened with.",
                code="ledger_event",
            )
        if history.total + event.count > plan.steps:
            raise BudgetExhausted(
                f"steps = {history.total} spent + {event.count} · the plan ends at {plan.steps}, where epsilon is "
                f"{plan.target_epsilon if plan.target_epsilon is not None else plan.epsilon():.4g}",
                next="The run is done: what was learnt so far can be released. More steps need a new plan.",
            )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _decoded(text: Any) -> Any:
    """JSON in the one spelling that we write; anything else is a change."""
    try:
        value = json.loads(text)
        same = _canonical(value) == text
    except (TypeError, ValueError, RecursionError):
        same, value = False, None
    if not same:
        raise LedgerError(
            f"entry = {str(text)[:200]!r} · is not in the form we write", next=_RESTORE, code="ledger_torn"
        )
    return value


def _link(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()


def _reserve_body(event: Event, attempt: int, step: int) -> str:
    return _canonical({"kind": "reserve", "attempt": attempt, "step": step, **event.to_dict()})


def _commit_body(reserve: int) -> str:
    return _canonical({"kind": "commit", "reserve": reserve})


# ---- the ledger of one run ----


class Ledger:
    """A run's ledger, open for writing. Use as a context manager; see the module's text for what it keeps.

    Guarantee: when ``reserve`` returns, the event survives a kill, a crash and a loss of power; when it raises, nothing
    was charged to this ledger. The total never passes the plan's.
    """

    def __init__(self, path: Path, lock: "_Lock", connection: sqlite3.Connection, account: "_Account | None") -> None:
        self.path = path
        self._lock = lock
        self._connection = connection
        self._account = account
        self._guard = threading.RLock()
        self._process = os.getpid()
        self._pending: list[int] = []  # committed, not yet written
        self._handed: set[int] = set()  # sequence numbers given out by this object
        self._stale = False
        self._closed = False
        self._history = _replay(connection, path)
        self._found = self._history.sequence

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        run: str,
        plan: PrivacyPlan | None = None,
        account: Path | str | None = None,
        create: bool = True,
    ) -> "Ledger":
        """Opens a run's ledger for writing, and makes it at the first time.

        Args:
          run: the run's name; an existing ledger must bear it.
          plan: the limit. It is written into a new ledger; an existing one must hold the same (None takes its own).
            A ledger without a plan has no limit: it only keeps count.
          account: the account of the data set, made at first use. A ledger that began with one continues with it.
          create: whether a missing ledger is made; give False when resuming, when a missing one is a loss.

        Raises: LedgerError (busy, torn, not this run's), OutsideError (disk).
        """
        path = Path(path)
        with _translated(path):
            if not path.exists() and not create:
                raise LedgerError(
                    f"ledger = {path} · does not exist", next="Resume with the run's own ledger, or begin a new run.",
                    code="ledger_missing",
                )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _Lock(path, run)
            with contextlib.ExitStack() as undo:
                undo.callback(lock.release)
                if account is not None and path.exists() and not Path(account).exists():
                    raise LedgerError(
                        f"account = {account} · does not exist, though the ledger {path} was begun with one",
                        next="Restore the account of this data set from a copy: a new one would hide what was spent.",
                        code="account_missing",
                    )
                book = _Account(Path(account)) if account is not None else None
                if book is not None:
                    undo.callback(book.close)
                if not path.exists():
                    _create(path, _LEDGER_TABLES, _new_header(run, plan, book.identity if book else None))
                connection = _connect(path)
                undo.callback(connection.close)
                ledger = cls(path, lock, connection, book)
                ledger._check_identity(run, plan)
                ledger._check_account()
                ledger._append([_canonical({"kind": "open", "attempt": ledger._history.attempt + 1})])
                undo.pop_all()
        return ledger

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except SfumatoError as closing:
            if error is None:
                raise
            error.add_note(f"Closing the ledger failed too: {closing}")  # pessimistic at worst: see close()

    def reserve(self, event: Event, step: int) -> int:
        """Charges ``event`` durably, before the data is touched for ``step``.

        Returns: the sequence number of the reservation; a checkpoint made with this step holds it.
        Raises: BudgetExhausted if the plan has no room, LedgerError, OutsideError; then nothing was charged here.
        """
        if step < 0:
            raise UsageError(f"step = {step} · must be at least 0", next="Count steps from 0.")
        with self._guard, _translated(self.path):
            self._ready()
            _must_fit(event, self._history)
            if self._account is not None:
                self._account.cover(self._history, event)
            self._append([*map(_commit_body, self._pending), _reserve_body(event, self._history.attempt, int(step))])
            self._pending.clear()
            self._handed.add(self._history.sequence)
            return self._history.sequence

    def commit(self, sequence: int) -> None:
        """Marks a reservation as used. Written with the next reservation or at close; it changes no figure."""
        with self._guard:
            if sequence not in self._history.uncommitted or sequence in self._pending:
                raise LedgerError(
                    f"sequence = {sequence} · is not an open reservation", next="Commit each reservation once.",
                    code="ledger_sequence",
                )  # fmt: skip
            self._pending.append(sequence)

    def close(self) -> None:
        """Writes what is pending, gives unused blocks back to the account, and lets the next writer in.

        Raises: OutsideError if that could not be written; the ledger is released all the same, and what could not be
        written only makes the figures larger (marks missing, a block still charged to the account).
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
            try:
                if os.getpid() == self._process:
                    with _translated(self.path):
                        self._refresh()
                        if self._pending:
                            self._append(map(_commit_body, self._pending))
                            self._pending.clear()
                        if self._account is not None:
                            self._account.settle(self._history)
            finally:
                self._release()

    def require_at_least(self, sequence: int) -> None:
        """Raises LedgerError if a checkpoint that holds ``sequence`` is newer than this ledger."""
        if sequence > self._found and sequence not in self._handed:
            raise LedgerError(
                f"sequence = {self._found} when the ledger was opened · the checkpoint was made at {sequence}: the "
                "ledger is older than the checkpoint, so it hides spending",
                next="Restore the ledger that belongs to the checkpoint, or resume from a checkpoint that is older.",
                code="ledger_older_than_checkpoint",
            )

    @property
    def run(self) -> str:
        return self._history.header["run"]

    @property
    def plan(self) -> PrivacyPlan | None:
        return self._history.plan

    @property
    def sequence(self) -> int:
        """The number of the last durable entry."""
        return self._history.sequence

    @property
    def head(self) -> str:
        """The hash of the last durable entry, which covers all before it."""
        return self._history.head

    @property
    def attempt(self) -> int:
        """How often this ledger was opened for writing."""
        return self._history.attempt

    @property
    def spent_steps(self) -> int:
        return self._history.total

    @property
    def remaining_steps(self) -> int:
        """What the plan has left. Raises UsageError for a ledger without a private plan."""
        if not isinstance(self.plan, DpSgd):
            raise UsageError("plan = none · a ledger without a private plan has no limit", next="Open it with a plan.")
        return self.plan.steps - self._history.total

    def spent(self) -> list[Event]:
        """Everything reserved, committed or not, equal events merged."""
        return self._history.spent()

    def other_runs(self) -> list[dict[str, Any]]:
        """The other runs on the same account, as a guarantee's ``composed_with`` wants them."""
        if self._account is None:
            return []
        with _translated(self._account.path):
            return [run for run in self._account.runs() if run["ledger"] != self._history.header["ledger"]]

    # -- inside --

    def _ready(self) -> None:
        if self._closed:
            raise LedgerError(f"ledger = {self.path} · is closed", next="Open it again.", code="ledger_closed")
        if os.getpid() != self._process:
            raise LedgerError(
                f"ledger = {self.path} · was opened by process {self._process}, not by this one",
                next="Reserve in the process that opened it; SQLite and the lock do not survive a fork.",
                code="ledger_forked",
            )
        self._refresh()

    def _refresh(self) -> None:
        """After a failed write: read again what is really there."""
        if self._stale:
            self._history = _replay(self._connection, self.path)
            self._stale = False

    def _append(self, bodies: Iterable[str]) -> None:
        """Writes entries in one durable transaction; the state in memory follows only when that has succeeded."""
        after = replace(self._history, counts=dict(self._history.counts), uncommitted=set(self._history.uncommitted))
        rows = []
        for body in bodies:
            after.apply(body)
            rows.append((after.sequence, body, after.head))
        try:
            with _transaction(self._connection):
                last = self._connection.execute(_LAST).fetchone() or (0, "")
                if self._history.sequence and tuple(last) != (self._history.sequence, self._history.head):
                    raise LedgerError(
                        f"ledger = {self.path} · somebody else has written to it (entry {last[0]}, expected "
                        f"{self._history.sequence})",
                        next="Stop the other run; do not remove the lock file of a running one.",
                        code="ledger_busy",
                    )
                self._connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
        except BaseException:
            self._stale = True  # a failed COMMIT may or may not have reached the disk
            raise
        self._history = after

    def _check_identity(self, run: str, plan: PrivacyPlan | None) -> None:
        if self.run != run:
            raise LedgerError(
                f"run = {run!r} · the ledger {self.path} belongs to {self.run!r}",
                next="Give each run its own folder.",
                code="ledger_not_ours",
            )
        if plan is not None and plan != self.plan:
            held = plan_to_dict(self.plan) if self.plan is not None else {}
            asked = plan_to_dict(plan)
            changed = [key for key in {**asked, **held} if held.get(key, "nothing") != asked.get(key, "nothing")]
            raise LedgerError(
                f"plan = another than the ledger's (different: {', '.join(changed)}) · a run keeps its plan",
                next="Resume with the plan in the run's folder, or begin a new run.",
                code="ledger_plan",
            )
        identity = self._account.identity if self._account is not None else None
        if identity != self._history.header["account"]:
            raise LedgerError(
                f"account = {identity} · the ledger {self.path} is kept with {self._history.header['account']}",
                next="Give the account that the run began with (privacy.account).",
                code="ledger_account",
            )

    def _check_account(self) -> None:
        if self._account is not None:
            self._account.admit(self._history, lambda number: _hash_at(self._connection, number))

    def _release(self) -> None:
        for action in (
            lambda: self._connection.execute("PRAGMA busy_timeout = 0"),
            lambda: self._connection.execute("PRAGMA journal_mode = DELETE"),  # one plain file, easy to copy
            self._connection.close,
            self._account.close if self._account is not None else lambda: None,
        ):
            with contextlib.suppress(sqlite3.Error):  # everything that counts is already durable
                action()
        self._lock.release()


# ---- the account of one data set ----


class _Account:
    """Connections are short transactions; any number of runs may hold one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session = secrets.token_hex(8)
        self._covered: dict[Event, int] = {}  # what the account has charged this run for
        with _translated(path):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                header = _canonical({"format": ACCOUNT_FORMAT, "account": secrets.token_hex(16)})
                _create(path, _ACCOUNT_TABLES, header)
            self._connection = _connect(path)
            try:
                self.identity = _account_identity(self._connection, path)
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def admit(self, history: _History, hash_at: Any) -> None:
        """Registers the run, and refuses a ledger or an account that was set back to an older copy."""
        name = history.header["ledger"]
        with _translated(self.path), _transaction(self._connection):
            row = self._connection.execute(
                "SELECT sequence, head, closed, block FROM runs WHERE ledger = ?", (name,)
            ).fetchone()
            if row is None:
                if history.attempt:
                    raise self._older(f"does not know the run {history.header['run']!r}")
                values = (name, history.header["run"], _canonical(history.header["plan"]), 0, "", 0, 0, self._session)
                self._connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
                return
            charged = sum(self._charged(name).values())
            if charged < history.total:
                raise self._older(f"holds {charged} events of a run that has spent {history.total}")
            sequence, head, closed, block = row
            ahead = charged - history.total > (0 if closed else block)
            if ahead or (closed and (sequence > history.sequence or hash_at(sequence) != head)):
                raise LedgerError(
                    f"ledger = {history.total} events · the account {self.path} has {charged} of this run: the ledger "
                    "is an older copy",
                    next=_RESTORE,
                    code="ledger_set_back",
                )
            self._connection.execute("UPDATE runs SET closed = 0, session = ? WHERE ledger = ?", (self._session, name))
            self._covered = self._charged(name)

    def cover(self, history: _History, event: Event) -> None:
        """Makes sure that the account has charged the run for all it has spent, and ``event`` on top."""
        name, one = history.header["ledger"], replace(event, count=1)
        needed = history.counts.get(one, 0) + event.count
        if self._covered.get(one, 0) >= needed:
            return
        block = event.count
        if isinstance(history.plan, DpSgd):
            block = max(event.count, min(BLOCK, history.plan.steps - history.total))
        upto = history.counts.get(one, 0) + block
        with _translated(self.path), _transaction(self._connection):
            self._check_session(name)
            self._connection.execute(
                "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (ledger, event) DO UPDATE SET count = excluded.count",
                (name, _canonical(one.to_dict()), upto),
            )
            self._connection.execute("UPDATE runs SET block = ? WHERE ledger = ?", (block, name))
        self._covered[one] = upto

    def settle(self, history: _History) -> None:
        """At a clean end: exactly what the ledger holds, and the ledger's head."""
        name = history.header["ledger"]
        with _translated(self.path), _transaction(self._connection):
            self._check_session(name)
            self._connection.execute("DELETE FROM spent WHERE ledger = ?", (name,))
            rows = [(name, _canonical(event.to_dict()), count) for event, count in history.counts.items()]
            self._connection.executemany("INSERT INTO spent VALUES (?, ?, ?)", rows)
            self._connection.execute(
                "UPDATE runs SET sequence = ?, head = ?, closed = 1, block = 0 WHERE ledger = ?",
                (history.sequence, history.head, name),
            )

    def _check_session(self, ledger: str) -> None:
        row = self._connection.execute("SELECT session FROM runs WHERE ledger = ?", (ledger,)).fetchone()
        if row is None or row[0] != self._session:
            raise LedgerError(
                f"account = {self.path} · another copy of this run's ledger has been opened since",
                next="Stop one of the two; a run's folder must not be copied and continued twice.",
                code="ledger_copied",
            )

    def runs(self) -> list[dict[str, Any]]:
        return _account_runs(self._connection)

    def _charged(self, ledger: str) -> dict[Event, int]:
        rows = self._connection.execute("SELECT event, count FROM spent WHERE ledger = ?", (ledger,)).fetchall()
        return {Event.from_dict(_decoded(event)): count for event, count in rows}

    def _older(self, what: str) -> LedgerError:
        return LedgerError(
            f"account = {self.path} · {what}: it is an older copy",
            next="Restore the account of this data set from a copy that is whole.",
            code="account_set_back",
        )


def _account_identity(connection: sqlite3.Connection, path: Path) -> str:
    header = _decoded(_header_text(connection, path))
    match header:
        case {"format": str(form), "account": str(identity)} if form == ACCOUNT_FORMAT and len(header) == 2:
            return identity
    raise LedgerError(
        f"account = {path} · is not an account of ours", next="Check privacy.account.", code="account_torn"
    )


def _account_runs(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """Each run with its events (reserved ones included) and epsilon at its own delta."""
    found = []
    for ledger, run, plan_text in connection.execute("SELECT ledger, run, plan FROM runs ORDER BY rowid").fetchall():
        values = _decoded(plan_text)
        plan = None if values is None else plan_from_dict(values)
        rows = connection.execute("SELECT event, count FROM spent WHERE ledger = ?", (ledger,)).fetchall()
        events = [replace(Event.from_dict(_decoded(event)), count=count) for event, count in rows]
        delta = plan.delta if isinstance(plan, DpSgd) else None
        found.append(
            {
                "run": run,
                "ledger": ledger,
                "private": not isinstance(plan, NotPrivate),
                "unit": plan.unit if plan is not None else None,
                "records_per_unit": plan.records_per_unit if plan is not None else None,
                "events": [event.to_dict() for event in events],
                "epsilon": accounting.epsilon(events, delta) if delta is not None else None,
                "delta": delta,
            }
        )
    return found


# ---- reading without writing ----


def show(path: Path | str) -> dict[str, Any]:
    """What a ledger or an account holds. ``valid`` is False, with ``detail``, for a ledger whose chain is broken.

    Raises: UsageError (no such file), LedgerError (not a ledger at all).
    """
    path = _existing(path)
    with _translated(path), contextlib.closing(_connect_to_read(path)) as connection:
        header = _header_text(connection, path)
        if f'"format":"{ACCOUNT_FORMAT}"' in header:
            return _show_account(connection, path)
        shown: dict[str, Any] = {"kind": "ledger", "path": str(path)}
        try:
            history = _replay(connection, path)
        except LedgerError as error:
            return {**shown, "events": [], "epsilon": None, "delta": None, "valid": False, "detail": str(error)}
    plan, events = history.plan, history.spent()
    figures = accounting.accountants(events, plan.delta) if isinstance(plan, DpSgd) else {}
    return {
        **shown,
        "run": history.header["run"],
        "events": [event.to_dict() for event in events],
        "epsilon": figures.get("pld"),
        "delta": plan.delta if isinstance(plan, DpSgd) else None,
        "accountants": figures,
        "plan": history.header["plan"],
        "steps": history.total,
        "uncommitted": len(history.uncommitted),
        "attempts": history.attempt,
        "entries": history.sequence,
        "head": history.head,
        "valid": True,
        "detail": f"{history.sequence} entries, the chain is whole",
    }


def verify_chain(path: Path | str) -> dict[str, Any]:
    """Reads every entry and checks the chain. Returns entries and head. Raises LedgerError for what is broken."""
    path = _existing(path)
    with _translated(path), contextlib.closing(_connect_to_read(path)) as connection:
        history = _replay(connection, path)
    return {"entries": history.sequence, "head": history.head, "valid": True}


def export_jsonl(path: Path | str) -> str:
    """The ledger as text for a bundle, run-length encoded; ``events_of_jsonl`` reads it back and checks the chain.

    Lines: a header; then ``open``; ``steps`` (``repeat`` times a reservation and its commit, steps counting up);
    ``reserve`` and ``commit`` on their own where a crash came between.
    """
    path = _existing(path)
    with _translated(path), contextlib.closing(_connect_to_read(path)) as connection:
        history = _replay(connection, path)
        bodies = [body for (body,) in connection.execute("SELECT body FROM entries ORDER BY sequence")]
    first = {"kind": "ledger", "header": history.header, "entries": history.sequence, "head": history.head}
    return "".join(_canonical(line) + "\n" for line in [first, *_shortened(bodies)])


def _shortened(bodies: list[str]) -> Iterator[dict[str, Any]]:
    steps: dict[str, Any] | None = None  # the line that is still growing
    number = 0
    while number < len(bodies):
        entry = json.loads(bodies[number])
        following = bodies[number + 1] if number + 1 < len(bodies) else ""
        if entry["kind"] == "reserve" and following == _commit_body(number + 1):
            number += 2
            line = {**entry, "kind": "steps", "repeat": 1}
            if steps is not None and line == {**steps, "step": steps["step"] + steps["repeat"], "repeat": 1}:
                steps["repeat"] += 1
                continue
        else:
            number += 1
            line = entry
        if steps is not None:
            yield steps
        steps = line if line["kind"] == "steps" else None
        if steps is None:
            yield line
    if steps is not None:
        yield steps


def events_of_jsonl(text: str) -> list[Event]:
    """The events of an exported ledger, merged. Raises VerificationFailed unless every line and the chain are right."""
    return _read_jsonl(text).spent()


def plan_of_jsonl(text: str) -> PrivacyPlan | None:
    """The plan that an exported ledger was kept under. Raises VerificationFailed like ``events_of_jsonl``."""
    return _read_jsonl(text).plan


def _read_jsonl(text: str) -> _History:
    try:
        lines = text.split("\n")
        if lines.pop() != "":
            raise LedgerError("last line · must end with a newline")
        match _decoded(lines[0] if lines else ""):
            case {"kind": "ledger", "header": dict(header), "entries": int(entries), "head": str(head), **rest} if (
                not rest
            ):
                pass
            case other:
                raise LedgerError(f"first line = {str(other)[:200]} · must be the header")
        if not 0 <= entries <= MOST_ENTRIES or isinstance(entries, bool):
            raise LedgerError(f"entries = {entries} · must be between 0 and {MOST_ENTRIES}")
        history = _beginning(_canonical(header))
        bodies: list[str] = []
        for line in lines[1:]:
            for body in _expanded(_decoded(line), history, entries):
                history.apply(body)
                bodies.append(body)
        if (history.sequence, history.head) != (entries, head):
            raise LedgerError(
                f"entries = {history.sequence}, head = {history.head} · the header says {entries}, {head}"
            )
        if lines[1:] != [_canonical(line) for line in _shortened(bodies)]:
            raise LedgerError("lines · are not in the one form that an export has")
    except (LedgerError, UsageError, BudgetExhausted) as error:
        raise VerificationFailed(
            f"ledger.jsonl: {error.message}", next="The ledger was changed after its export; do not trust the bundle."
        ) from None
    return history


def _expanded(line: Any, history: _History, entries: int) -> Iterator[str]:
    """The entries of one line; ``history`` advances between them."""
    if not isinstance(line, dict):
        raise LedgerError(f"line = {str(line)[:200]} · must be an object")
    if line.get("kind") != "steps":
        yield _canonical(line)
        return
    repeat, first = line.get("repeat"), line.get("step")
    if type(repeat) is not int or type(first) is not int or not 1 <= repeat <= entries - history.sequence:
        raise LedgerError(f"repeat = {repeat!r}, step = {first!r} · must be whole numbers within the entries")
    rest = {key: value for key, value in line.items() if key != "repeat"}
    for offset in range(repeat):
        yield _canonical({**rest, "kind": "reserve", "step": first + offset})
        yield _commit_body(history.sequence)


def _show_account(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    runs = _account_runs(connection)
    events = [Event.from_dict(event) for run in runs for event in run["events"]]
    deltas = [run["delta"] for run in runs if run["delta"] is not None]
    units = {run["unit"] for run in runs if run["private"]}
    comparable = bool(deltas) and len(units) == 1 and all(run["private"] for run in runs)
    return {
        "kind": "account",
        "path": str(path),
        "account": _account_identity(connection, path),
        "runs": runs,
        "events": [event.to_dict() for event in accounting.merged(events)],
        # Later runs are chosen after seeing earlier ones: RDP allows that (Feldman & Zrnic 2021), PLD does not.
        "epsilon": accounting.epsilon(events, max(deltas), "rdp") if comparable else None,
        "delta": max(deltas) if comparable else None,
        "accountant": "rdp",
        "valid": True,
    }


# ---- SQLite and the operating system ----

_LEDGER_TABLES = ("CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",)
_ACCOUNT_TABLES = (
    "CREATE TABLE runs (ledger TEXT PRIMARY KEY, run TEXT NOT NULL, plan TEXT NOT NULL, sequence INTEGER NOT NULL, "
    "head TEXT NOT NULL, closed INTEGER NOT NULL, block INTEGER NOT NULL, "
    "session TEXT NOT NULL)",
    "CREATE TABLE spent (ledger TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL, "
    "PRIMARY KEY (ledger, event))",
)
_LAST = "SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1"


def _new_header(run: str, plan: PrivacyPlan | None, account: str | None) -> str:
    return _canonical(
        {
            "format": LEDGER_FORMAT,
            "ledger": secrets.token_hex(16),
            "run": run,
            "plan": plan_to_dict(plan) if plan is not None else None,
            "account": account,
        }
    )


def _create(path: Path, tables: tuple[str, ...], header: str) -> None:
    """Makes a database whole or not at all; if somebody else was first, theirs stays."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        connection = sqlite3.connect(fresh, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = EXTRA")
            with _transaction(connection):
                connection.execute("CREATE TABLE header (body TEXT NOT NULL)")
                connection.execute("INSERT INTO header VALUES (?)", (header,))
                for table in tables:
                    connection.execute(table)
        finally:
            connection.close()
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.replace(fresh, path)  # a file system without hard links
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, must survive a loss of power
    finally:
        os.close(folder)


def _connect(path: Path) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise LedgerError(f"ledger = {path} · is empty", next=_RESTORE, code="ledger_torn")
    uri = f"file:{quote(str(path.absolute()))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_PATIENCE, check_same_thread=False)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = " + ("FULL" if mode == "wal" else "EXTRA"))
        connection.execute("PRAGMA fullfsync = ON")  # macOS: through the disk's own cache
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    """A reader may have to roll the log of a killed writer forward, so it opens for writing where it can."""
    if path.stat().st_size == 0:
        raise LedgerError(f"ledger = {path} · is empty", next=_RESTORE, code="ledger_torn")
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        how = "mode=rw"
    else:
        how = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    uri = f"file:{quote(str(path.absolute()))}?{how}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_PATIENCE)


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"ledger = {path} · must be a file", next="Give the ledger.db of a run, or an account.db.")
    return path


def _header_text(connection: sqlite3.Connection, path: Path) -> str:
    rows = connection.execute("SELECT body FROM header").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise LedgerError(f"ledger = {path} · has no header", next=_RESTORE, code="ledger_torn")
    return rows[0][0]


def _replay(connection: sqlite3.Connection, path: Path) -> _History:
    """Reads all entries and checks the chain from the header to the head."""
    try:
        history = _beginning(_header_text(connection, path))
        for sequence, body, digest in connection.execute("SELECT sequence, body, hash FROM entries ORDER BY sequence"):
            history.apply(body)
            if (sequence, digest) != (history.sequence, history.head):
                raise LedgerError(
                    f"ledger = {path} · the chain breaks at entry {sequence}", next=_RESTORE, code="ledger_torn"
                )
    except (UsageError, BudgetExhausted) as error:
        raise LedgerError(f"ledger = {path} · {error.message}", next=_RESTORE, code="ledger_torn") from None
    return history


def _hash_at(connection: sqlite3.Connection, sequence: int) -> str:
    if sequence == 0:
        return ""
    row = connection.execute("SELECT hash FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    return row[0] if row else ""


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors in our words."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerError(
                f"ledger = {path} · is busy for more than {_PATIENCE:.0f} s ({error})",
                next="Wait for the other run, or stop it.",
                code="ledger_busy",
            ) from None
        outside = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if code & 0xFF in outside and code != sqlite3.SQLITE_IOERR_SHORT_READ:
            raise _outside(path, error) from None
        raise LedgerError(f"ledger = {path} · cannot be read ({error})", next=_RESTORE, code="ledger_torn") from None
    except OSError as error:
        if isinstance(error, SfumatoError):
            raise
        raise _outside(path, error) from None


def _outside(path: Path, error: Exception) -> OutsideError:
    full = "full" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return OutsideError(
        f"ledger = {path} · could not be written ({error}); the data was not touched for this event",
        next="Free some space on the disk and resume."
        if full
        else "Check the disk and the rights on the folder, and resume.",
        code="disk_full" if full else "disk",
    )


_HELD: "weakref.WeakValueDictionary[tuple[int, int], _Lock]" = weakref.WeakValueDictionary()
_HELD_GUARD = threading.Lock()


class _Lock:
    """One writer per ledger. POSIX locks belong to a process and end with it, even by kill -9; children do not inherit
    them. Within one process they do not exclude, and closing any handle drops them: hence the table of held locks."""

    def __init__(self, ledger: Path, run: str) -> None:
        try:
            import fcntl
        except ImportError:
            raise OutsideError(
                "fcntl · is missing on this system", next="Use Linux or macOS.", code="no_locks"
            ) from None
        path = ledger.with_name(ledger.name + ".lock")
        self.holder = f"run {run!r}, process {os.getpid()} on {socket.gethostname()}"
        with _HELD_GUARD:
            if path.exists() and (held := _HELD.get(_inode(os.stat(path)))) is not None:
                raise self._busy(ledger, held.holder)
            self._file: IO[str] = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until released
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self._file.seek(0)
                holder = self._file.read(300).strip() or "another process"
                self._file.close()
                raise self._busy(ledger, holder) from None
            self._file.truncate(0)
            self._file.write(self.holder)
            self._file.flush()
            self._key = _inode(os.fstat(self._file.fileno()))
            _HELD[self._key] = self

    def release(self) -> None:
        with _HELD_GUARD:
            if not self._file.closed:
                _HELD.pop(self._key, None)
                self._file.close()

    @staticmethod
    def _busy(ledger: Path, holder: str) -> LedgerError:
        return LedgerError(
            f"ledger = {ledger} · is being written by {holder}",
            next="Wait until that run ends, or stop it; a ledger has one writer.",
            code="ledger_busy",
        )


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
