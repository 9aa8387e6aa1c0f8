"""The ledger as text for a bundle, run-length encoded, and back. [shell: reads the file]

Lines, each one JSON object in one spelling: a header; then the entries, of which

    steps   ``repeat`` times a reservation and its commit, steps counting up
    blocks  ``repeat`` times a block and its ``used`` entry, all of it handed out and committed

stand for many. There is one shortest form, and no other is accepted.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain as joined
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sfumato.errors import BudgetExhausted, LedgerError, UsageError, VerificationFailed
from sfumato.privacy.accounting import Event
from sfumato.privacy.ledger.chain import (
    History,
    beginning,
    canonical,
    commit_body,
    decoded,
    head_statement,
    used_body,
)
from sfumato.privacy.ledger.reading import Accepts, check_signature
from sfumato.privacy.ledger.storage import connect_to_read, existing, is_signature, replay, translated
from sfumato.privacy.plan import PrivacyPlan

MOST_ENTRIES = 5_000_000  # what the parser of an exported ledger is ready to read


def export_jsonl(path: Path | str, sign: Callable[[bytes], dict[str, str]] | None = None) -> str:
    """The ledger as text; ``events_of_jsonl`` reads it back and checks the chain.

    Args: sign: signs the head, as in ``Ledger.open``.
    """
    path = existing(path)
    with translated(path), contextlib.closing(connect_to_read(path)) as connection:
        history = replay(connection, path)
        first = {"kind": "ledger", "header": history.header, "entries": history.sequence, "head": history.head}
        if sign is not None:
            first["signature"] = sign(head_statement(history.header["ledger"], history.sequence, history.head))
        bodies = (
            body
            for (body,) in connection.execute(
                "SELECT body FROM entries WHERE sequence <= ? ORDER BY sequence", (history.sequence,)
            )
        )
        return "".join(canonical(line) + "\n" for line in joined([first], _shortened(bodies)))


@dataclass(frozen=True, slots=True)
class Exported:
    """What an exported ledger says, its chain checked.

    Attributes: ledger: its random id; run: whose it is; events: merged; plan: that it was kept under; sequence, head: of its last
      entry.
    """

    ledger: str
    run: str
    plan: PrivacyPlan | None
    events: list[Event]
    sequence: int
    head: str
    signature: dict[str, str] | None

    def signer(self, keys: Mapping[str, Accepts]) -> str | None:
        """The id of the key that has signed the head; None if nobody has.

        Raises: VerificationFailed for a signature that is none, or by none of ``keys``.
        """
        if self.signature is None:
            return None
        return check_signature(self.ledger, self.sequence, self.head, self.signature, keys)


def read_jsonl(text: str) -> Exported:
    """Reads what ``export_jsonl`` wrote. Raises VerificationFailed unless every line and the chain are right."""
    history, signature = _read(text)
    name, run = history.header["ledger"], history.header["run"]
    return Exported(name, run, history.plan, history.spent(), history.sequence, history.head, signature)


def events_of_jsonl(text: str) -> list[Event]:
    """The events of an exported ledger, merged. Raises VerificationFailed like ``read_jsonl``."""
    return read_jsonl(text).events


def plan_of_jsonl(text: str) -> PrivacyPlan | None:
    """The plan that an exported ledger was kept under. Raises VerificationFailed like ``read_jsonl``."""
    return read_jsonl(text).plan


def _shortened(bodies: Iterable[str]) -> Iterator[dict[str, Any]]:
    growing: dict[str, Any] | None = None  # the line that may stand for more still
    stream = enumerate(bodies, 1)
    held = next(stream, None)
    while held is not None:
        number, body = held
        held = next(stream, None)
        line = json.loads(body)
        if held is not None and held[1] == _partner(line, number):
            held = next(stream, None)
            line = {**line, "kind": _PAIRS[line["kind"]], "repeat": 1}
            if growing is not None and line == {**growing, "step": _after(growing), "repeat": 1}:
                growing["repeat"] += 1
                continue
        if growing is not None:
            yield growing
        growing = line if "repeat" in line else None
        if growing is None:
            yield line
    if growing is not None:
        yield growing


_PAIRS = {"reserve": "steps", "block": "blocks"}


def _partner(entry: dict[str, Any], number: int) -> str | None:
    """The entry that must follow for the two to be one line."""
    match entry["kind"]:
        case "reserve":
            return commit_body(number)
        case "block":
            return used_body(number, entry["count"], entry["count"])
    return None


def _after(line: dict[str, Any]) -> int:
    """The step after those of a line."""
    return line["step"] + line["repeat"] * (line["count"] if line["kind"] == "blocks" else 1)


def _read(text: str) -> tuple[History, dict[str, str] | None]:
    try:
        lines = text.split("\n")
        if lines.pop() != "":
            raise LedgerError("last line · must end with a newline")
        history, entries, head, signature = _first(decoded(lines[0] if lines else ""))
        again = (canonical(line) for line in _shortened(_entries(lines[1:], history, entries)))
        if any(line != same for line, same in zip_longest(lines[1:], again)):
            raise LedgerError("lines · are not in the one form that an export has")
        if (history.sequence, history.head) != (entries, head):
            raise LedgerError(
                f"entries = {history.sequence}, head = {history.head} · the header says {entries}, {head}"
            )
    except (LedgerError, UsageError, BudgetExhausted) as error:
        raise VerificationFailed(
            f"ledger.jsonl: {error.message}", next="The ledger was changed after its export; do not trust the bundle."
        ) from None
    return history, signature


def _first(line: Any) -> tuple[History, int, str, dict[str, str] | None]:
    """The state before the first entry, how many entries are to come, their head, and its signature."""
    match line:
        case {"kind": "ledger", "header": dict(header), "entries": int(entries), "head": str(head), **rest}:
            signature = rest.pop("signature", None)
            if rest or (signature is not None and not is_signature(signature)):
                raise LedgerError(f"first line = {str(line)[:200]} · must be the header")
        case other:
            raise LedgerError(f"first line = {str(other)[:200]} · must be the header")
    if not 0 <= entries <= MOST_ENTRIES or isinstance(entries, bool):
        raise LedgerError(f"entries = {entries} · must be between 0 and {MOST_ENTRIES}")
    return beginning(canonical(header)), entries, head, signature


def _entries(lines: list[str], history: History, entries: int) -> Iterator[str]:
    """The entries of all lines; ``history`` advances with them."""
    for line in lines:
        for body in _expanded(decoded(line), history, entries):
            history.apply(body)
            yield body


def _expanded(line: Any, history: History, entries: int) -> Iterator[str]:
    """The entries of one line; ``history`` advances between them."""
    if not isinstance(line, dict):
        raise LedgerError(f"line = {str(line)[:200]} · must be an object")
    if line.get("kind") not in ("steps", "blocks"):
        if history.sequence >= entries:
            raise LedgerError(f"entries = {entries} · there are more lines")
        yield canonical(line)
        return
    repeat, first, count = (line.get(name) for name in ("repeat", "step", "count"))
    if type(repeat) is not int or type(first) is not int or type(count) is not int:
        raise LedgerError(f"repeat = {repeat!r}, step = {first!r}, count = {count!r} · must be whole numbers")
    if not 1 <= repeat <= entries - history.sequence:
        raise LedgerError(f"repeat = {repeat} · is more than the {entries} entries that were announced")
    rest = {key: value for key, value in line.items() if key != "repeat"}
    for number in range(repeat):
        if line["kind"] == "steps":
            yield canonical({**rest, "kind": "reserve", "step": first + number})
            yield commit_body(history.sequence)
        else:
            yield canonical({**rest, "kind": "block", "step": first + number * count})
            yield used_body(history.sequence, count, count)
