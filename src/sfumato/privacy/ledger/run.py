"""The ledger of one run: what was spent, written down before it is spent. [shell]

The order of a step is RESERVE, durable -> touch the data -> optimiser step -> COMMIT. A crash can waste a reservation,
it can never hide one: whatever was reserved counts as spent, committed or not.

**A ledger** is one SQLite file of one run: a header and entries (``chain``). It has one writer (``storage.Lock``).
Commit marks are written together with the next reservation, because a lost one only makes us pessimistic.

**Blocks.** Where steps are short, one entry reserves several of them (``blocks``), and they are handed out from memory. All
of a block is charged from its entry on. What was not handed out is free again once a ``used`` entry says so, which
only the process that reserved it can write, and only while nothing came after it (``chain`` has the argument).

**Where a checkpoint stands** is a *position*: the last entry and its hash, and how much of the block in hand was handed out.
A ledger that does not hold that very entry, or has given back steps that the checkpoint has taken, hides spending.

**Signed.** At a clean end the head is signed by the user's key where there is one: entries cannot be cut off the end of
what was signed, nor changed by somebody without the key.

**The clock** is written down about once a minute, and never relied on. One that goes back by more than a minute is
reported (``notes``, ``show``), not refused: clocks are set right, too.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.errors import LedgerError, SfumatoError, UsageError
from sfumato.privacy.accounting import Event
from sfumato.privacy.ledger.account import Account
from sfumato.privacy.ledger.blocks import Block, Pace
from sfumato.privacy.ledger.chain import (
    CLOCK_STEP,
    canonical,
    commit_body,
    head_statement,
    must_fit,
    reserve_body,
    used_body,
)
from sfumato.privacy.ledger.storage import (
    LAST,
    LEDGER_TABLES,
    SIGNATURES,
    Lock,
    connect,
    create,
    hash_at,
    is_signature,
    new_header,
    replay,
    transaction,
    translated,
)
from sfumato.privacy.plan import PrivacyPlan
from sfumato.privacy.plan_json import plan_to_dict

Sign = Callable[[bytes], dict[str, str]]  # bytes -> algorithm, key_id, signature


class Ledger:
    """A run's ledger, open for writing. Use as a context manager; see the module's text for what it keeps.

    Guarantee: when ``reserve`` returns, the event survives a kill, a crash and a loss of power; when it raises, nothing
    was charged to this ledger. The total never passes the plan's.
    """

    def __init__(
        self,
        path: Path,
        lock: Lock,
        connection: sqlite3.Connection,
        account: Account | None,
        sign: Sign | None,
        clock: bool = True,
    ) -> None:
        self.path = path
        self._lock = lock
        self._connection = connection
        self._account = account
        self._sign = sign
        self._clocked = clock
        self._guard = threading.RLock()
        self._process = os.getpid()
        self._pending: list[int] = []  # committed, not yet written
        self._blocks: dict[int, Block] = {}  # by sequence; the last one may have steps to hand out
        self._pace = Pace()
        self._stale = False
        self._closed = False
        self._history = replay(connection, path)
        self._found = self._begun = self._history.sequence
        self._attempt: int | None = None  # ours, once it is open
        self._lost_events = 0  # at the beginning of this attempt

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        run: str,
        plan: PrivacyPlan | None = None,
        account: Path | str | None = None,
        account_limit: tuple[float, float] | None = None,
        create: bool = True,
        sign: Sign | None = None,
        clock: bool = True,
    ) -> "Ledger":
        """Opens a run's ledger for writing, and makes it at the first time.

        Args:
          run: the run's name; an existing ledger must bear it.
          plan: the limit. It is written into a new ledger; an existing one must hold the same (None takes its own).
            A ledger without a plan has no limit: it only keeps count.
          account: the account of the data set, made at first use. A ledger that began with one continues with it.
          account_limit: (epsilon, delta) of all runs on the account together, from now on; it is added to those that the
            account has, and binds every later run as well.
          create: whether a missing ledger is made; give False when resuming, when a missing one is a loss.
          sign: signs the head at a clean end (``release.keys.signer``).
          clock: False writes down no time (0), where how long something took would tell what the guarantee keeps secret.

        Raises: LedgerError (busy, torn, not this run's), PrivacyRefused (a limit of the account), OutsideError (disk).
        """
        path = Path(path)
        with translated(path):
            if not path.exists() and not create:
                raise LedgerError(
                    f"ledger = {path} · does not exist", next="Resume with the run's own ledger, or begin a new run.",
                    code="ledger_missing",
                )  # fmt: skip
            if account_limit is not None and account is None:
                raise UsageError(
                    f"account_limit = {account_limit} · is kept in an account, and there is none",
                    next="Give the account too.",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = Lock(path, run)
            with contextlib.ExitStack() as undo:
                undo.callback(lock.release)
                if account is not None and path.exists() and not Path(account).exists():
                    raise LedgerError(
                        f"account = {account} · does not exist, though the ledger {path} was begun with one",
                        next="Restore the account of this data set from a copy: a new one would hide what was spent.",
                        code="account_missing",
                    )
                book = Account(Path(account)) if account is not None else None
                if book is not None:
                    undo.callback(book.close)
                if not path.exists():
                    _create(path, new_header(run, plan, book.identity if book else None))
                    undo.callback(path.unlink, missing_ok=True)  # where it is refused, nothing is in it
                connection = connect(path)
                undo.callback(connection.close)
                ledger = cls(path, lock, connection, book, sign, clock)
                ledger._check_identity(run, plan)
                ledger._begin(ledger._lost(account_limit))
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

    def reserve(self, event: Event, step: int, ahead: int = 1) -> int:
        """Charges ``event`` durably, before the data is touched for ``step``.

        Args:
          ahead: of how many steps in a row, this one included, the same event will be asked for. Where steps are short,
            some of them are then charged with this one, and need no write of their own.

        Returns: the sequence number of the reservation, for ``commit``; the steps of a block share it.
        Raises: BudgetExhausted if the plan or a limit of the account has no room, PrivacyRefused, LedgerError, OutsideError;
          then nothing was charged here.
        """
        if step < 0:
            raise UsageError(f"step = {step} · must be at least 0", next="Count steps from 0.")
        with self._guard, translated(self.path):
            self._ready()
            now = time.monotonic()
            self._pace.asked(now)
            block = self._in_hand
            if block is None or not block.holds(event, step):
                sequence = self._reserve(event, int(step), ahead)
                self._pace.wrote(time.monotonic() - now)
            else:
                sequence = block.sequence
            if sequence in self._blocks:
                self._blocks[sequence].taken += 1
            self._pace.gave(time.monotonic())
            return sequence

    def commit(self, sequence: int) -> None:
        """Marks a reservation as used. Written with the next reservation or at close; it changes no figure."""
        with self._guard:
            block = self._blocks.get(sequence)
            if block is not None and block.committed < block.taken:
                block.committed += 1
                return
            if sequence not in self._history.uncommitted or sequence in self._pending:
                raise LedgerError(
                    f"sequence = {sequence} · is not an open reservation", next="Commit each reservation once.",
                    code="ledger_sequence",
                )  # fmt: skip
            self._pending.append(sequence)

    def close(self) -> None:
        """Writes what is pending, gives unused steps and blocks back, signs the head, and lets the next writer in.

        Raises: OutsideError if that could not be written; the ledger is released all the same, and what could not be
        written only makes the figures larger (marks missing, a block still charged).
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True  # from here on no step of a block is handed out
            try:
                if os.getpid() == self._process:
                    with translated(self.path):
                        self._refresh()
                        self._append([*self._marks(everything=True), *self._ending()], sign=True)
                        if self._account is not None:
                            self._account.settle(self._history)
            finally:
                self._release()

    def require_at_least(self, sequence: int, head: str | None = None, block: int = 0, taken: int = 0) -> None:
        """Raises LedgerError if a checkpoint made at this ``position`` is newer than the ledger, or of another history.

        Without ``head`` (a checkpoint of an older version) only the number is compared.
        """
        with self._guard, translated(self.path):
            if head is None:
                known = sequence <= self._found or self._reserved_here(sequence)
            else:
                known = hash_at(self._connection, sequence) == head
        if not known:
            raise LedgerError(
                f"sequence = {self._found} when the ledger was opened · the checkpoint was made at {sequence}: the "
                "ledger is older than the checkpoint, so it hides spending",
                next="Restore the ledger that belongs to the checkpoint, or resume from a checkpoint that is older.",
                code="ledger_older_than_checkpoint",
            )
        if taken > self._history.given_back.get(block, taken):
            raise LedgerError(
                f"steps = {self._history.given_back[block]} of block {block} · the checkpoint has taken {taken}: the ledger "
                "has given back what the checkpoint has used",
                next="Restore the ledger that belongs to the checkpoint; a machine must not be continued twice.",
                code="ledger_older_than_checkpoint",
            )

    @property
    def position(self) -> dict[str, Any]:
        """Where the ledger stands, for a checkpoint: what ``require_at_least`` takes."""
        block = self._in_hand
        here: dict[str, Any] = {"sequence": self._history.sequence, "head": self._history.head}
        return here if block is None else {**here, "block": block.sequence, "taken": block.taken}

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
    def notes(self) -> list[str]:
        """What a person should know: what an earlier attempt has lost, where the clock went back."""
        lost = self._lost_events
        return [
            *(
                [
                    f"events = {lost} charged in the account, not in this ledger · they count as spent: the last attempt died "
                    "between the two files, or the ledger is an older copy"
                ]
                if lost
                else []
            ),
            *clock_notes(self._history.clock_back),
        ]

    @property
    def spent_steps(self) -> int:
        """Events of all kinds that are charged; all of the block in hand is."""
        return self._history.total

    @property
    def remaining_steps(self) -> int:
        """What a plan of one kind of event has left. Raises UsageError for a ledger without a private plan."""
        allowed = self._history.allowed
        if not allowed:
            raise UsageError("plan = none · a ledger without a private plan has no limit", next="Open it with a plan.")
        if len(allowed) > 1:
            raise UsageError(
                f"plan = {len(allowed)} kinds of events · has no one number of steps left", next="Ask remaining(event)."
            )
        return self.remaining(next(iter(allowed)))

    def remaining(self, event: Event) -> int:
        """How many times more the plan allows ``event`` (as if its count were 1): 0 for an event that is not the plan's.

        Raises: UsageError for a ledger without a private plan.
        """
        allowed = self._history.allowed
        if not allowed:
            raise UsageError("plan = none · a ledger without a private plan has no limit", next="Open it with a plan.")
        one, block = replace(event, count=1), self._in_hand
        rest = block.rest if block is not None and block.event == one else 0
        return allowed.get(one, 0) - self._history.counts.get(one, 0) + rest

    def spent(self) -> list[Event]:
        """Everything reserved, committed or not, equal events merged; all of the block in hand is in it."""
        return self._history.spent()

    def other_runs(self) -> list[dict[str, Any]]:
        """The other runs on the same account, as a guarantee's ``composed_with`` wants them."""
        if self._account is None:
            return []
        with translated(self._account.path):
            return [run for run in self._account.runs() if run["ledger"] != self._history.header["ledger"]]

    # -- inside --

    @property
    def _in_hand(self) -> Block | None:
        """The block of which steps can still be handed out."""
        newest = next(reversed(self._blocks.values()), None)
        return newest if newest is not None and newest.rest and not self._closed else None

    @property
    def _unfinished(self) -> bool:
        """Whether the newest block has a rest that can be given back."""
        newest = self._blocks.get(self._history.newest[0]) if self._history.newest is not None else None
        return newest is not None and newest.taken < newest.size

    def _reserve(self, event: Event, step: int, ahead: int) -> int:
        """One durable entry for the event, or for several of it."""
        if self._unfinished:
            self._append(self._marks())  # a block of other steps: its rest is given back, and may make room
        history, one = self._history, replace(event, count=1)
        must_fit(event, history)
        count = event.count
        if count == 1 and history.allowed is not None and not history.first_format:
            left = self.remaining(event)
            count = self._pace.at_once(left, min(ahead, left))
        if self._account is not None:
            count = self._account.cover(history, event, count)
        kind = "reserve" if count == event.count else "block"
        self._append(
            [*self._marks(), *self._clock(), reserve_body(replace(event, count=count), history.attempt, step, kind)]
        )
        sequence = self._history.sequence
        if kind == "block":
            self._blocks[sequence] = Block(sequence, one, step, count)
        return sequence

    def _marks(self, *, everything: bool = False) -> list[str]:
        """What is to be said of earlier reservations, so that a new one can follow or the ledger be closed."""
        bodies = [commit_body(sequence) for sequence in self._pending]
        newest = self._history.newest[0] if self._history.newest is not None else 0
        for block in self._blocks.values():
            if block.told or (block.taken < block.size and block.sequence != newest):
                continue  # of the second kind after a failed write only: the rest stays spent
            if everything or block.taken < block.size or block.committed == block.size:
                bodies.append(used_body(block.sequence, block.taken, block.committed))
        return bodies

    def _marked(self, bodies: list[str]) -> None:
        """After ``bodies`` were written."""
        written = set(bodies)
        self._pending = [sequence for sequence in self._pending if commit_body(sequence) not in written]
        for block in list(self._blocks.values()):
            block.told = block.told or used_body(block.sequence, block.taken, block.committed) in written
            if block.told and block.committed == block.taken:
                del self._blocks[block.sequence]

    def _clock(self) -> list[str]:
        """A mark of the time, if the last one is more than a minute from now."""
        before = self._history.time
        if before is None or abs(self._time() - before) < CLOCK_STEP:
            return []
        return [self._timed({"kind": "time"})]

    def _ending(self) -> list[str]:
        return [] if self._history.first_format else [self._timed({"kind": "close"})]

    def _timed(self, entry: dict[str, Any]) -> str:
        return canonical(entry if self._history.first_format else {**entry, "time": self._time()})

    def _time(self) -> int:
        return max(0, int(time.time())) if self._clocked else self._history.time or 0

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
            self._history = replay(self._connection, self.path)
            if self._history.attempt != self._attempt:
                raise self._foreign(f"attempt {self._history.attempt}, ours is {self._attempt}")
            self._pending = [sequence for sequence in self._pending if sequence in self._history.uncommitted]
            for sequence, block in self._blocks.items():
                block.told = sequence not in self._history.blocks
            self._stale = False

    def _append(self, bodies: Iterable[str], *, sign: bool = False) -> None:
        """Writes entries in one durable transaction; the state in memory follows only when that has succeeded."""
        bodies = list(bodies)
        after = self._history.copy()
        rows = []
        for body in bodies:
            after.apply(body)
            rows.append((after.sequence, body, after.head))
        signed = self._signature(after.header["ledger"], after.sequence, after.head) if sign else None
        try:
            with transaction(self._connection):
                last = self._connection.execute(LAST).fetchone() or (0, "")
                if self._history.sequence and tuple(last) != (self._history.sequence, self._history.head):
                    raise self._foreign(f"entry {last[0]}, expected {self._history.sequence}")
                self._connection.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
                if signed is not None:
                    self._connection.execute(SIGNATURES)
                    self._connection.execute(
                        "INSERT OR REPLACE INTO signatures VALUES (?, ?)", (after.sequence, canonical(signed))
                    )
        except BaseException:
            self._stale = True  # a failed COMMIT may or may not have reached the disk
            for block in self._blocks.values():
                block.dropped = True  # ... and with it that the rest was given back: nobody gets it any more
            raise
        self._history = after
        self._marked(bodies)

    def _foreign(self, what: str) -> LedgerError:
        return LedgerError(
            f"ledger = {self.path} · somebody else has written to it ({what})",
            next="Stop the other run; do not remove the lock file of a running one.",
            code="ledger_busy",
        )

    def _signature(self, ledger: str, sequence: int, head: str) -> dict[str, str] | None:
        if self._sign is None:
            return None
        signature = self._sign(head_statement(ledger, sequence, head))
        assert is_signature(signature)  # ours to give
        return {**signature, "head": head}

    def _reserved_here(self, sequence: int) -> bool:
        """Whether an entry is a reservation that this object has made."""
        if sequence <= self._begun:
            return False
        row = self._connection.execute("SELECT body FROM entries WHERE sequence = ?", (sequence,)).fetchone()
        return row is not None and ('"kind":"reserve"' in row[0] or '"kind":"block"' in row[0])

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

    def _lost(self, limit: tuple[float, float] | None) -> list[Event]:
        """What the account has charged this run for, and this ledger does not hold."""
        if self._account is None:
            return []
        return self._account.admit(self._history, lambda number: hash_at(self._connection, number), limit)

    def _begin(self, lost: list[Event]) -> None:
        """An attempt. What is lost is charged with it, and never committed: this may be an older copy of the ledger."""
        attempt, step = self._history.attempt + 1, self._history.total
        opened = self._timed({"kind": "open", "attempt": attempt})
        self._append([opened, *(reserve_body(event, attempt, step) for event in lost)])
        self._attempt, self._begun = attempt, self._history.sequence
        self._lost_events = sum(event.count for event in lost)

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


def clock_notes(clock_back: list[tuple[int, int]]) -> list[str]:
    """Where the clock went back, in words."""
    return [
        f"clock = {seconds} s back at entry {entry} · the machine's clock was set, or the ledger was continued elsewhere"
        for entry, seconds in clock_back
    ]


def _create(path: Path, header: str) -> None:
    create(path, LEDGER_TABLES, header)
