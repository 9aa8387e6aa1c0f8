"""The ledgers of sites on other machines. [shell: reads what was kept]

After the last round every such site gives its ledger, signed with its own key, so that a stranger can add up.

What a ledger says is the plan, the events charged and when it was open: functions of what the server asked, of no record. A site may
still say no (``may_say`` in its policy); then the run's claim counts every round that it was asked for, and no bundle can be made.

The server does not take a site's word for everything: the chain must be whole, the signature the site's, the plan the one that the recipe
makes for it, and what is charged no less than the rounds whose updates were used. A site that charges less than it did hurts its own
people; this notices the plain cases, not a site that lies about when it trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.errors import LedgerError, SfumatoError
from sfumato.federation.messages import Ask, Reply
from sfumato.privacy import ledger
from sfumato.privacy.events import Event
from sfumato.privacy.plan import PrivacyPlan
from sfumato.release.keys import PublicKey

KIND = "ledger"
NO_LEDGER = "no_ledger"  # a site's word for: nothing was charged here
FILE = "ledger.json"  # beside where the ledger of a site on this machine would be: the text and the key
MAX_TEXT = 2**20  # bytes of a ledger: run-length encoded, some kB


@dataclass(frozen=True, kw_only=True)
class Given:
    """A site's ledger. Attributes: text: as exported and signed; key: its public key, 64 hexadecimal digits; ledger: its random id."""

    text: str
    key: str
    ledger: str
    events: Sequence[Event]


NOTHING = Given(
    text="", key="", ledger="", events=()
)  # of a site that says that it charged nothing, and of which nothing was used


def asks(sites: Sequence[str], *, run: str, round: int) -> dict[str, Ask]:
    """Args: round: after the last."""
    return {site: Ask(run=run, round=round, exchange=0, kind=KIND) for site in sites}


def read(reply: Reply | None, plan: PrivacyPlan, *, run: str, least: Sequence[Event]) -> "Given | str":
    """The ledger that came, or why none was taken; `NOTHING` where a site that refused every round has none.

    Args: plan: that the recipe makes for this site; least: events it must charge.
    """
    if reply is None:
        return "it was silent"
    if reply.refused is not None:
        none = reply.refused.code == NO_LEDGER and not any(event.count for event in least)
        return NOTHING if none else reply.refused.message
    text, key = reply.values.get("ledger"), reply.values.get("key")
    if not isinstance(text, str) or not isinstance(key, str) or len(text) > MAX_TEXT:
        return f"it sent no text of at most {MAX_TEXT} characters and no key"
    try:
        return given(text, key, plan, run=run, least=least)
    except (SfumatoError, ValueError, RecursionError) as error:
        return str(error)[:300]


def given(text: str, key: str, plan: PrivacyPlan, *, run: str, least: Sequence[Event] = ()) -> Given:
    """Raises SfumatoError or ValueError for a ledger that is not that of this plan and run, or is not signed by this key."""
    public = key_of(key)
    exported = ledger.read_jsonl(text)
    if exported.signer({public.id: public}) is None:
        raise ValueError("its head is not signed")
    if exported.plan != plan:
        raise ValueError("it was kept under another plan than the recipe makes")
    if exported.run != run:
        raise ValueError(f"it is of another run, {exported.run[:60]!a}")
    if lacks := lacking(exported.events, least):
        raise ValueError(f"it {lacks}")
    return Given(text=text, key=key, ledger=exported.ledger, events=exported.events)


def lacking(events: Sequence[Event], least: Sequence[Event]) -> str:
    """What a ledger does not charge, in words; "" if it charges ``least`` or more of each."""
    charged = {replace(event, count=1): event.count for event in events}
    for event in least:
        if (found := charged.get(replace(event, count=1), 0)) < event.count:
            return f"charges {found} events ({event.mechanism}), and {event.count} were used"
    return ""


def load(path: Path, plan: PrivacyPlan, *, run: str) -> Given:
    """What `federated_reports.gather` kept. Raises LedgerError for a file that was changed since."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["ledger"] == value["key"] == "":
            return NOTHING
        return given(value["ledger"], value["key"], plan, run=run)
    except (OSError, KeyError, TypeError, ValueError, SfumatoError) as error:
        raise LedgerError(
            f"{path} · is not the ledger that the site gave ({str(error)[:200]})",
            next="Remove it and run again with --resume: the site is asked for it again.",
        ) from None


def key_of(text: str) -> PublicKey:
    """Raises ValueError unless it is 64 hexadecimal digits."""
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("its key is not 64 hexadecimal digits")
    return PublicKey(bytes.fromhex(text))


def values_of(text: str, key: PublicKey) -> Mapping[str, str]:
    """What a site answers."""
    return {"ledger": text, "key": key.raw.hex()}
