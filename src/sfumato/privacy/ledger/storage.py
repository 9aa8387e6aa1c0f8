"""SQLite, locks and the errors of the system, for ledgers and accounts. [shell]

**Durable**: write-ahead log with ``synchronous=FULL``, which syncs the log to disk at every COMMIT, before it returns.
That is one sync, about 1 to 8 ms; a rollback journal needs three or four (17 ms where this was measured). If the
file system cannot do write-ahead logging, SQLite falls back to a journal, and we to ``synchronous=EXTRA``: slower, as
durable.

**One writer**: a POSIX lock on ``<ledger>.lock`` that the operating system drops when the process dies, however it dies.
"""

import contextlib
import errno
import os
import secrets
import socket
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from sfumato.errors import BudgetExhausted, LedgerError, OutsideError, SfumatoError, UsageError
from sfumato.privacy.ledger.chain import LEDGER_FORMAT, RESTORE, History, beginning, canonical, decoded
from sfumato.privacy.plan import PrivacyPlan
from sfumato.privacy.plan_json import plan_to_dict

PATIENCE = 30.0  # seconds to wait for another process's short transaction

SIGNATURES = "CREATE TABLE IF NOT EXISTS signatures (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL)"
LEDGER_TABLES = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL)",
    SIGNATURES,
)
ACCOUNT_TABLES = (
    "CREATE TABLE runs (ledger TEXT PRIMARY KEY, run TEXT NOT NULL, plan TEXT NOT NULL, sequence INTEGER NOT NULL, "
    "head TEXT NOT NULL, closed INTEGER NOT NULL, block INTEGER NOT NULL, "
    "session TEXT NOT NULL)",
    "CREATE TABLE spent (ledger TEXT NOT NULL, event TEXT NOT NULL, count INTEGER NOT NULL, "
    "PRIMARY KEY (ledger, event))",
)
LAST = "SELECT sequence, hash FROM entries ORDER BY sequence DESC LIMIT 1"


def new_header(run: str, plan: PrivacyPlan | None, account: str | None) -> str:
    return canonical(
        {
            "format": LEDGER_FORMAT,
            "ledger": secrets.token_hex(16),
            "run": run,
            "plan": plan_to_dict(plan) if plan is not None else None,
            "account": account,
        }
    )


def create(path: Path, tables: tuple[str, ...], header: str) -> None:
    """Makes a database whole or not at all; if somebody else was first, theirs stays."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        connection = sqlite3.connect(fresh, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = EXTRA")
            with transaction(connection):
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


def connect(path: Path) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise LedgerError(f"ledger = {path} · is empty", next=RESTORE, code="ledger_torn")
    uri = f"file:{quote(str(path.absolute()))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=PATIENCE, check_same_thread=False)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = " + ("FULL" if mode == "wal" else "EXTRA"))
        connection.execute("PRAGMA fullfsync = ON")  # macOS: through the disk's own cache
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A reader may have to roll the log of a killed writer forward, so it opens for writing where it can."""
    if path.stat().st_size == 0:
        raise LedgerError(f"ledger = {path} · is empty", next=RESTORE, code="ledger_torn")
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK):
        how = "mode=rw"
    else:
        how = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    uri = f"file:{quote(str(path.absolute()))}?{how}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=PATIENCE)


def existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"ledger = {path} · must be a file", next="Give the ledger.db of a run, or an account.db.")
    return path


def header_text(connection: sqlite3.Connection, path: Path) -> str:
    rows = connection.execute("SELECT body FROM header").fetchall()
    if len(rows) != 1 or not isinstance(rows[0][0], str):
        raise LedgerError(f"ledger = {path} · has no header", next=RESTORE, code="ledger_torn")
    return rows[0][0]


def replay(connection: sqlite3.Connection, path: Path, seen: Callable[[History], None] | None = None) -> History:
    """Reads all entries, checks the chain from the header to the head, and that every signature is of an entry.

    ``seen`` is called after each entry.
    """
    try:
        history = beginning(header_text(connection, path))
        signed = signatures(connection, path)
        for sequence, body, digest in connection.execute("SELECT sequence, body, hash FROM entries ORDER BY sequence"):
            history.apply(body)
            if (sequence, digest) != (history.sequence, history.head):
                raise LedgerError(
                    f"ledger = {path} · the chain breaks at entry {sequence}", next=RESTORE, code="ledger_torn"
                )
            if sequence in signed and signed[sequence]["head"] != digest:
                raise LedgerError(
                    f"ledger = {path} · entry {sequence} is not the one that was signed",
                    next=RESTORE,
                    code="ledger_torn",
                )
            if seen is not None:
                seen(history)
    except (UsageError, BudgetExhausted) as error:
        raise LedgerError(f"ledger = {path} · {error.message}", next=RESTORE, code="ledger_torn") from None
    if signed and max(signed) > history.sequence:
        raise LedgerError(
            f"ledger = {path} · ends at entry {history.sequence}, but entry {max(signed)} was signed: its end was cut off",
            next=RESTORE,
            code="ledger_torn",
        )
    return history


def signatures(connection: sqlite3.Connection, path: Path) -> dict[int, dict[str, str]]:
    """What was signed, by the sequence number of the entry: algorithm, head, key_id, signature. No key is asked here."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'signatures'").fetchone():
        return {}
    found = {}
    for sequence, body in connection.execute("SELECT sequence, body FROM signatures").fetchall():
        value = decoded(body)
        if not is_signature(value, "head") or sequence < 1:
            raise LedgerError(f"ledger = {path} · signature {sequence} is none", next=RESTORE, code="ledger_torn")
        found[sequence] = value
    return found


def is_signature(value: Any, *more: str) -> bool:
    """Whether a value has the form of a signature, with ``more`` texts."""
    names = {"algorithm", "key_id", "signature", *more}
    return isinstance(value, dict) and set(value) == names and all(isinstance(text, str) for text in value.values())


def hash_at(connection: sqlite3.Connection, sequence: int) -> str:
    if sequence == 0:
        return ""
    row = connection.execute("SELECT hash FROM entries WHERE sequence = ?", (sequence,)).fetchone()
    return row[0] if row else ""


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors in our words."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerError(
                f"ledger = {path} · is busy for more than {PATIENCE:.0f} s ({error})",
                next="Wait for the other run, or stop it.",
                code="ledger_busy",
            ) from None
        outside = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if code & 0xFF in outside and code != sqlite3.SQLITE_IOERR_SHORT_READ:
            raise _outside(path, error) from None
        raise LedgerError(f"ledger = {path} · cannot be read ({error})", next=RESTORE, code="ledger_torn") from None
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


_HELD: "weakref.WeakValueDictionary[tuple[int, int], Lock]" = weakref.WeakValueDictionary()
_HELD_GUARD = threading.Lock()


class Lock:
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
