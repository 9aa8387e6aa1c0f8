"""What a ledger or an account holds, read without writing to it. [shell]

Every reader replays the whole chain. What a chain alone cannot show is that its *end* is missing: for that there are the
signature of the head (a signed entry that is gone), the account (which knows the head of every closed run), and a
checkpoint (which holds the position that it was made at).
"""

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sfumato.errors import LedgerError, VerificationFailed
from sfumato.privacy import accounting
from sfumato.privacy.ledger.account import ACCOUNT_FORMAT, account_runs, show_account
from sfumato.privacy.ledger.chain import History, head_statement
from sfumato.privacy.ledger.run import clock_notes
from sfumato.privacy.ledger.storage import connect_to_read, existing, header_text, replay, signatures, translated
from sfumato.privacy.private_plan import PrivatePlan

POINTS = 16  # of a trajectory


class Accepts(Protocol):
    """A public key (``release.keys.PublicKey``)."""

    def accepts(self, signature: bytes, message: bytes) -> bool: ...


def show(path: Path | str) -> dict[str, Any]:
    """What a ledger or an account holds. ``valid`` is False, with ``detail``, for a ledger whose chain is broken.

    Raises: UsageError (no such file), LedgerError (not a ledger at all).
    """
    path = existing(path)
    with translated(path), contextlib.closing(connect_to_read(path)) as connection:
        if _is_account(connection, path):
            return show_account(connection, path)
        try:
            history = replay(connection, path)
        except LedgerError as error:
            return _broken(path, error)
        signed = signatures(connection, path)
    plan, events = history.plan, history.spent()
    private = plan if isinstance(plan, PrivatePlan) else None
    figures = accounting.accountants(events, private.delta, private.adjacency) if private is not None else {}
    return {
        "kind": "ledger",
        "path": str(path),
        "run": history.header["run"],
        "events": [event.to_dict() for event in events],
        "epsilon": figures.get("pld"),
        "delta": private.delta if private is not None else None,
        "accountants": figures,
        "plan": history.header["plan"],
        "steps": history.total,
        "uncommitted": history.uncommitted_steps,
        "attempts": history.attempt,
        "entries": history.sequence,
        "head": history.head,
        "closed": history.closed,
        "signed_entries": max(signed, default=0),
        "notes": clock_notes(history.clock_back),
        "valid": True,
        "detail": f"{history.sequence} entries, the chain is whole",
    }


def other_runs(path: Path | str, account: Path | str) -> list[dict[str, Any]]:
    """The runs on an account but the one whose ledger this is, as ``Ledger.other_runs`` has them of one that is open."""
    own, path = Path(path), existing(account)
    with translated(own), contextlib.closing(connect_to_read(own)) as connection:
        name = replay(connection, own).header["ledger"]
    with translated(path), contextlib.closing(connect_to_read(path)) as connection:
        return [run for run in account_runs(connection) if run["ledger"] != name]


def verify(path: Path | str, keys: Mapping[str, Accepts]) -> dict[str, Any]:
    """``show``, and whether the signatures of the head are by one of ``keys`` (by id).

    ``signer`` is the key of the last signature. ``valid`` is False for a broken chain, for signed entries that are changed
    or gone, for a signature that is none, or by a key that is not among ``keys``. A ledger without any signature is
    valid, and ``detail`` says so: nothing shows then whether entries are missing at its end.

    Raises: UsageError (no such file), LedgerError or OutsideError where it cannot be read now.
    """
    try:
        shown = show(path)
    except LedgerError as error:
        if error.code not in ("ledger_torn", "ledger_format", "account_torn"):
            raise
        shown = _broken(Path(path), error)
    if not shown["valid"] or shown["kind"] != "ledger":
        return {**shown, "signer": None}
    with translated(Path(path)), contextlib.closing(connect_to_read(Path(path))) as connection:
        name = replay(connection, Path(path)).header["ledger"]
        signed = signatures(connection, Path(path))
    signer = None
    for sequence, signature in sorted(signed.items()):
        try:
            signer = check_signature(name, sequence, signature["head"], signature, keys)
        except VerificationFailed as error:
            return {**shown, "signer": None, "valid": False, "detail": str(error)}
    entries = shown["entries"]
    if signer is None:
        words = "not signed: nothing shows whether entries are missing at the end"
    elif shown["signed_entries"] == entries:
        words = f"signed whole by {signer}"
    else:
        words = (
            f"signed up to entry {shown['signed_entries']} by {signer}; what follows is of a run that goes on, was killed, "
            "or was closed without the key"
        )
    return {**shown, "signer": signer, "detail": f"{shown['detail']}; {words}"}


def check_signature(
    ledger: str, sequence: int, head: str, signature: Mapping[str, str], keys: Mapping[str, Accepts]
) -> str:
    """The id of the key that has signed a ledger up to ``sequence``. Raises VerificationFailed."""
    key_id = signature["key_id"]
    if signature["algorithm"] != "ed25519":
        raise VerificationFailed(f"algorithm = {signature['algorithm'][:40]!r} · must be ed25519", next=_RESIGN)
    if key_id not in keys:
        raise VerificationFailed(
            f"signer = {key_id[:64]} · is not a key that you trust",
            next="Get the signer's signing-key.pub.pem by a way that you trust and give it with --key.",
            code="unknown_signer",
        )
    try:
        raw = bytes.fromhex(signature["signature"])
    except ValueError:
        raw = b""
    if len(raw) != 64 or not keys[key_id].accepts(raw, head_statement(ledger, sequence, head)):
        raise VerificationFailed(f"signature of entry {sequence} · is not one of this ledger by this key", next=_RESIGN)
    return key_id


_RESIGN = "Find out who changed the ledger; do not rely on what it says."


def verify_chain(path: Path | str) -> dict[str, Any]:
    """Reads every entry and checks the chain. Returns entries and head. Raises LedgerError for what is broken."""
    path = existing(path)
    with translated(path), contextlib.closing(connect_to_read(path)) as connection:
        history = replay(connection, path)
    return {"entries": history.sequence, "head": history.head, "valid": True}


def trajectory(path: Path | str) -> list[list[float]]:
    """[[events charged, epsilon], ...] at up to 16 moments of a run's ledger, by RDP: cheap, and above PLD's.

    Empty for an account, a ledger without delta, one that is broken, or events of which RDP knows nothing.
    """
    path = existing(path)
    with translated(path), contextlib.closing(connect_to_read(path)) as connection:
        if _is_account(connection, path):
            return []
        (entries,) = connection.execute("SELECT count(*) FROM entries").fetchone()
        moments = {-(-entries * part // POINTS) for part in range(1, POINTS + 1)}
        spent: list[list[Any]] = []

        def seen(history: History) -> None:
            if history.sequence in moments and (not spent or spent[-1] != history.spent()):
                spent.append(history.spent())

        try:
            plan = replay(connection, path, seen).plan
        except LedgerError:
            return []
    if not isinstance(plan, PrivatePlan):
        return []
    points = [
        (sum(event.count for event in events), accounting.epsilon(events, plan.delta, "rdp", plan.adjacency))
        for events in spent
    ]
    return [[steps, epsilon] for steps, epsilon in points if steps and epsilon is not None]


def _is_account(connection: sqlite3.Connection, path: Path) -> bool:
    return f'"format":"{ACCOUNT_FORMAT}"' in header_text(connection, path)


def _broken(path: Path, error: LedgerError) -> dict[str, Any]:
    return {
        "kind": "ledger",
        "path": str(path),
        "events": [],
        "epsilon": None,
        "delta": None,
        "notes": [],
        "valid": False,
        "detail": str(error),
    }
