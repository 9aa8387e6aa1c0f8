"""The ledgers of a bundle, checked one by one: the ledger of a training, or that of every site of a federation.

Each is a chain of entries, its head signed, kept under a plan; its events are of that plan and no more than it allows. What is
claimed of it, a report says: of one ledger ``privacy.json`` itself, of a site its row there. Pure functions of bytes and values; no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato.errors import SfumatoError
from sfumato.release.keys import PublicKey
from sfumato.release.refusing import failed

if TYPE_CHECKING:
    from sfumato.privacy.accounting import Event
    from sfumato.privacy.private_plan import PrivatePlan

MAX_EVENTS = 100_000
ONE = "ledger.jsonl"  # of one training
SITES = "ledgers/"  # of a federation: ledgers/site-1.jsonl, ...
ROW = ("name", "population", "epsilon", "mechanism", "ledger", "key")  # what a claim says of a site (``privacy.joint``)

_HEX64 = re.compile(r"[0-9a-f]{64}")
_LATER = {"clipping": "flat", "parts": []}  # entries of a mechanism that older bundles were written without
_OF_ALL = ("delta", "unit", "records_per_unit", "adjacency")  # what one claim says of every ledger


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A ledger that was read. Attributes: site: whose; "" of one training. ledger: its random id. run: that it was kept for. signer:
    the key that signed its head, if any did."""

    file: str
    site: str
    ledger: str
    run: str
    plan: "PrivatePlan"
    events: "Sequence[Event]"
    signer: str | None

    @property
    def where(self) -> str:
        return f"{self.file}: " if self.site else ""


def read(file: str, text: bytes, trusted: Mapping[str, PublicKey], *, site: str = "") -> Kept:
    """Raises VerificationFailed for a broken chain, a signature by none of ``trusted``, no private plan, no events or too many."""
    from sfumato.privacy import ledger
    from sfumato.privacy.private_plan import PrivatePlan

    try:
        exported = ledger.read_jsonl(text.decode("utf-8"))
        signer = exported.signer(trusted)  # none in bundles of older versions
    except (SfumatoError, ValueError, RecursionError) as error:
        raise failed(f"{file}: {str(error)[:300]}") from None
    if not isinstance(exported.plan, PrivatePlan):
        raise failed(f"{file} was kept under no private plan")
    if not exported.events or len(exported.events) > MAX_EVENTS:
        raise failed(f"{file} has {len(exported.events)} kinds of events; between 1 and {MAX_EVENTS} were expected")
    if site and signer is None:
        raise failed(f"{file}: nobody signed the ledger of site {site[:60]!a}")
    return Kept(
        file=file,
        site=site,
        ledger=exported.ledger,
        run=exported.run,
        plan=exported.plan,
        events=exported.events,
        signer=signer,
    )


def check(kept: Kept, claim: Mapping[str, Any], privacy: Mapping[str, Any]) -> int:
    """Holds a ledger against what is claimed of it. Returns how many events it charges.

    Args: claim: with ``population`` and ``mechanism``; privacy: what is claimed of all ledgers.
    Raises: VerificationFailed.
    """
    plan, mechanism = kept.plan, claim["mechanism"]
    for key in _OF_ALL:
        same(kept.where + key, privacy.get(key), getattr(plan, key))
    same(kept.where + "population", claim.get("population"), plan.population)
    own = plan.mechanism(kept.events)
    for key in sorted((set(own) | set(mechanism)) - {"accountant", "grid"}):  # of how it was computed then
        same(kept.where + key, mechanism.get(key, _LATER.get(key)), own.get(key))
    allowed, spent = plan.allowance(), charged(kept)
    for event, count in spent.items():
        if event not in allowed:
            raise failed(f"{kept.where}an event of the ledger is not one of its plan")
        if count > allowed[event]:
            raise failed(f"{kept.where}the ledger charges {count} events, its plan allows {allowed[event]}")
    missing = [] if kept.site else plan.not_charged(kept.events)  # a site may have been silent when the others released
    if missing:
        raise failed(f"released, but not in the ledger: {', '.join(missing[:5])}")
    return sum(spent.values())


def check_sites(kept: Sequence[Kept], rows: Sequence[Mapping[str, Any]], privacy: Mapping[str, Any]) -> None:
    """Raises VerificationFailed unless the ledgers are those of different sites in one run, and N is the number of their units; of
    sites as the unit, of all the sites that there are."""
    seen: dict[str, str] = {}
    for one in kept:
        if seen.setdefault(one.ledger, one.file) != one.file:
            raise failed(f"{one.where}is the same ledger as {seen[one.ledger]}: every site has its own")
        if one.run != kept[0].run:
            raise failed(f"{one.where}is of run {one.run[:60]!a}, {kept[0].file} of {kept[0].run[:60]!a}")
    if privacy["unit"] != "site":
        return same("population", privacy.get("population"), sum(row["population"] for row in rows))
    same("population", privacy.get("population"), kept[0].plan.population)
    same("number of sites", len(rows), kept[0].plan.population)
    for row in rows:
        same(f"population of {row['name'][:60]!a}", row["population"], kept[0].plan.population)


def check_steps(kept: Sequence[Kept], trained: Any) -> None:
    """Raises VerificationFailed where more steps were trained, at all sites together, than the ledgers charge."""
    from sfumato.privacy.plan import DpSgd

    steps = [(stage, charged(one).get(stage.event(1), 0)) for one in kept for stage in stages(one.plan)
             if isinstance(stage, DpSgd)]  # fmt: skip
    if not steps:
        return
    most = sum(stage.bands * events for stage, events in steps)
    if type(trained) is not int or trained > most:
        events = sum(events for _, events in steps)
        raise failed(f"{str(trained)[:40]} steps were trained, the ledger charges {events} events")


def charged(kept: Kept) -> "dict[Event, int]":
    """How often each event, taken once, was charged."""
    return {replace(event, count=1): event.count for event in kept.events}


def check_rows(rows: Any, files: Sequence[str], epsilon: float) -> None:
    """Raises VerificationFailed unless every site has a row, every ledger is of one of them, and the claim is the largest."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) == set(ROW) for row in rows):
        raise failed(f"privacy.json: each of the sites must have {', '.join(ROW)}")
    for row in rows:
        if not (row["key"] is None or (isinstance(row["key"], str) and _HEX64.fullmatch(row["key"]))):
            raise failed("privacy.json: the key of a site must be 64 lower-case hexadecimal digits, or null")
        if (
            not isinstance(row["name"], str)
            or not 0 < len(row["name"]) <= 200
            or not isinstance(row["mechanism"], dict)
        ):
            raise failed("privacy.json: a site must have a name and a mechanism")
        if type(row["population"]) is not int or not 0 < row["population"] < 2**53:
            raise failed(f"privacy.json: population of site {row['name'][:60]!a} must be a whole number > 0")
        spent = type(row["epsilon"]) in (int, float) and 0 < row["epsilon"] <= epsilon
        if not (spent and isinstance(row["ledger"], str)) and not (row["epsilon"] is None and row["ledger"] is None):
            raise failed(
                f"privacy.json: site {row['name'][:60]!a} must have an epsilon of at most the claim and a ledger, or neither"
            )
    names, found = [row["name"] for row in rows], [row["ledger"] for row in rows if row["ledger"] is not None]
    if len(set(names)) < len(names) or sorted(found) != sorted(files):
        raise failed("privacy.json: every site must have its own name, and its own ledger among the files")
    if rows and max((row["epsilon"] or 0.0) for row in rows) != epsilon:
        raise failed("privacy.json: the claim is not the largest epsilon of its sites")


def key_of(row: Mapping[str, Any]) -> PublicKey | None:
    """The key that signed a site's ledger at the site; None where it was the signer of the bundle."""
    return None if row.get("key") is None else PublicKey(bytes.fromhex(row["key"]))


def stages(plan: Any) -> Sequence[Any]:
    return getattr(plan, "stages", (plan,))


def same(key: str, claimed: Any, kept: Any) -> None:
    if claimed != kept or isinstance(claimed, bool) != isinstance(kept, bool):
        raise failed(f"{key}: the claim says {str(claimed)[:40]}, the ledger {str(kept)[:40]}")
