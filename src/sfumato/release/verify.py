"""Whether a bundle is what its signer says, recomputed by a stranger without torch, network or trust. [shell]

In this order, and nothing later is looked at before what it rests on holds:

1. layout      only the known files, plain files, no links, within the limits
2. signature   canonical manifest, known signer, valid Ed25519
3. files       exactly the manifest's files, with its sizes and hashes
4. the claims  release marker, taint of tensors, what may leave, plan, ledger, epsilon recomputed from the events
5. the recipe  makes the ledger's plan, made anew; and the card says what the reports say

What it cannot tell: that the training did what its ledger says. That is what the signature vouches for, and what
conformance tests and audits are for.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import SfumatoError, UsageError, VerificationFailed
from sfumato.release import (
    boundary,
    canonical,
    card,
    claims,
    keys,
    ledgers,
    manifest,
    plain_files,
    provenance,
    recomputed,
    tensors,
)
from sfumato.release.keys import PublicKey
from sfumato.release.manifest import FileEntry
from sfumato.release.refusing import AGAIN, failed, number

if TYPE_CHECKING:
    from sfumato.release.ledgers import Kept

TOLERANCE = 1e-6  # of epsilon: the grids of two versions of the accountant may differ in the last digits
MAX_CLAIM = 1_000.0  # of epsilon; larger claims say nothing, and recomputing them costs much memory

PRIVACY_KEYS = (
    "definition",
    "epsilon",
    "delta",
    "unit",
    "records_per_unit",
    "adjacency",
    "population",
    "accountants",
    "curve",
    "boundary",
    "trust_model",
    "mechanism",
    "estimates",
    "composed_with",
    "not_promised",
    "not_for_release",
    "taint",
    "covered_by",
    "sites",
)


def verify(
    bundle_dir: Path | str, *, key_file: Path | str | None = None, trusted_dir: Path | str | None = None
) -> dict[str, Any]:
    """Checks a bundle.

    Args:
      key_file: the signer's public key; no other is then accepted.
      trusted_dir: a folder of public keys; without both, the user's own list.

    Returns: valid, checks [{name, ok, detail}], epsilon and delta (recomputed; None if not reached), signer.
    Raises: UsageError where there is no such folder or the key cannot be read. A bad bundle is a result, not an
      exception; ``require_valid`` makes it one.
    """
    folder = Path(bundle_dir)
    if not folder.is_dir():
        raise UsageError(f"bundle = {folder} · must be a folder", next="Give the folder that holds manifest.json.")
    if key_file is not None:
        key = keys.read_public(Path(key_file))
        return verify_with(folder, {key.id: key})
    return verify_with(folder, keys.trusted(None if trusted_dir is None else Path(trusted_dir)))


def require_valid(result: Mapping[str, Any]) -> None:
    """Raises VerificationFailed (exit code 4) naming the first check that failed."""
    for check in result["checks"]:
        if not check["ok"]:
            raise VerificationFailed(
                f"{check['name']} · {check['detail']}",
                next=check.get("next", AGAIN),
                code=check.get("code", VerificationFailed.code),
            )


def verify_with(folder: Path, trusted: Mapping[str, PublicKey]) -> dict[str, Any]:
    """As ``verify``, with the keys that may have signed, by id."""
    result: dict[str, Any] = {"valid": False, "checks": [], "epsilon": None, "delta": None, "signer": None}
    bundle = _Bundle(folder, trusted)
    for name, step in (("layout", bundle.layout), ("signature", bundle.signature), ("files", bundle.files)):
        if not _record(result, name, step):
            return result
    result["signer"] = bundle.signer
    for name, step in (
        ("reports", bundle.reports),
        ("release marker", bundle.release_marker),
        ("taint", bundle.taint),
        ("what leaves", bundle.what_leaves),
        ("plan", bundle.plan),
        ("ledger", bundle.ledger),
        ("epsilon", bundle.epsilon),
    ):
        if not _record(result, name, step) and name == "reports":
            return result
    for name, step in (("recipe", bundle.recipe), ("card", bundle.card)):
        if all(check["ok"] for check in result["checks"]):  # what is wrong already is not worth comparing
            _record(result, name, step)
    result["epsilon"], result["delta"] = bundle.recomputed
    result["valid"] = all(check["ok"] for check in result["checks"])
    return result


def _record(result: dict[str, Any], name: str, step: Callable[[], str]) -> bool:
    """Runs one check; whatever is wrong with the bundle becomes its detail."""
    try:
        result["checks"].append({"name": name, "ok": True, "detail": step()})
        return True
    except VerificationFailed as error:
        failed = {"name": name, "ok": False, "detail": error.message, "next": error.next, "code": error.code}
    except OSError as error:
        failed = {"name": name, "ok": False, "detail": f"a file could not be read ({error.strerror})"}
    result["checks"].append(failed)
    return False


class _Bundle:
    """The bundle as read so far: each method is one check, and returns its detail in words."""

    def __init__(self, folder: Path, trusted: Mapping[str, PublicKey]) -> None:
        self.folder = folder
        self.trusted = trusted
        self.found: dict[str, int] = {}  # size by name, of every file but manifest and signature
        self.manifest_bytes = b""
        self.listed: dict[str, FileEntry] = {}
        self.signer: str | None = None
        self.text: dict[str, bytes] = {}  # the very bytes that were hashed, of all but weights
        self.weights: dict[str, dict[str, tuple[int, ...]] | None] = {}
        self.json: dict[str, dict[str, Any]] = {}
        self.kept: list[Kept] = []  # the one ledger, or that of every site
        self.recomputed: tuple[float | None, float | None] = (None, None)

    def layout(self) -> str:
        self.found = plain_files.walk(self.folder)
        for name in (manifest.MANIFEST, manifest.SIGNATURE):
            if name not in self.found:
                raise failed(f"{name} is not there")
            del self.found[name]
        for name in self.found:
            manifest.check_name(name)
        manifest.check_names(self.found)
        return f"{len(self.found) + 2} plain files, no links"

    def signature(self) -> str:
        self.manifest_bytes = plain_files.read(self.folder, manifest.MANIFEST, manifest.MAX_MANIFEST)
        signature = plain_files.read(self.folder, manifest.SIGNATURE, manifest.MAX_SIGNATURE)
        self.signer = manifest.check_signature(self.manifest_bytes, signature, self.trusted).id
        return f"Ed25519 by key {self.signer}"

    def files(self) -> str:
        self.listed = manifest.read(self.manifest_bytes)
        extra, missing = sorted(set(self.found) - set(self.listed)), sorted(set(self.listed) - set(self.found))
        if extra or missing:
            raise failed(
                f"not in the manifest: {', '.join(extra[:5]) or 'none'}; missing: {', '.join(missing[:5]) or 'none'}"
            )
        for name, entry in self.listed.items():
            if self.found[name] != entry.size:
                raise failed(f"{name} has {self.found[name]} bytes, the manifest says {entry.size}")
        for name, entry in self.listed.items():
            if name.endswith(".safetensors"):
                sha256 = self._read_weights(name, entry.size)
            else:
                self.text[name] = plain_files.read(self.folder, name, entry.size)
                sha256 = hashlib.sha256(self.text[name]).hexdigest()
            if sha256 != entry.sha256:
                raise failed(f"{name} is not the file that was signed")
        return f"{len(self.listed)} files have the signed sizes and SHA-256"

    def _read_weights(self, name: str, size: int) -> str:
        """Hashes a file of weights and reads its header in the same reading."""
        digest = hashlib.sha256()
        with plain_files.open_plain(self.folder, name) as file:
            first = file.read(8)
            digest.update(first)
            length = tensors.header_length(first, name)
            header = file.read(length)
            digest.update(header)
            data = 0
            while part := file.read(2**20):
                digest.update(part)
                data += len(part)
                if data > size:
                    raise failed(f"{name} grew while it was read")
        self.weights[name] = tensors.read_header(header, data, name)
        return digest.hexdigest()

    def reports(self) -> str:
        self.json = {name: canonical.decode_object(self.text[name], name) for name in manifest.REPORTS}
        privacy = self.json["privacy.json"]
        unknown = [key[:80] for key in privacy if key not in PRIVACY_KEYS]
        if unknown:
            raise failed(f"privacy.json: unknown entries {', '.join(map(ascii, unknown[:5]))}")
        for key in ("mechanism", "accountants", "taint"):
            if not isinstance(privacy.get(key), dict):
                raise failed(f"privacy.json: {key} must be an object")
        for key in ("epsilon", "delta"):
            if not number(privacy.get(key)) or not privacy[key] > 0:
                raise failed(f"privacy.json: {key} = {str(privacy.get(key))[:40]} must be a number > 0")
        for key in ("boundary", "not_promised"):
            if not isinstance(privacy.get(key), list) or not all(isinstance(item, str) for item in privacy[key]):
                raise failed(f"privacy.json: {key} must be a list of sentences")
        if privacy["delta"] >= 1 or privacy["epsilon"] > MAX_CLAIM:
            raise failed("privacy.json: the claim is void (delta >= 1, or epsilon too large to mean anything)")
        ledgers.check_rows(
            privacy.get("sites", []),
            [name for name in self.listed if name.startswith(ledgers.SITES)],
            privacy["epsilon"] if privacy.get("sites") else 0.0,
        )
        provenance_json = self.json["provenance.json"]
        for key in ("recipe", "code", "dependencies"):
            if not isinstance(provenance_json.get(key), dict):
                raise failed(f"provenance.json: {key} must be an object")
        return f"{len(self.json)} reports are plain JSON with the entries they need"

    def release_marker(self) -> str:
        privacy = self.json["privacy.json"]
        if privacy.get("not_for_release") != "":
            raise failed(f"NOT FOR RELEASE: {str(privacy.get('not_for_release'))[:200]}")
        if privacy.get("definition") != "(epsilon, delta)-DP":
            raise failed(f"definition = {str(privacy.get('definition'))[:60]!r}: there is no guarantee to verify")
        return "not marked as unfit for release"

    def taint(self) -> str:
        found = {name: self.weights.get(name) for name in self.listed if name.startswith(manifest.MODEL)}
        wrong = provenance.taint_problems(self.json["privacy.json"]["taint"], found)
        if wrong:
            raise failed("; ".join(wrong[:5]))
        count = sum(len(names) for names in found.values() if names is not None)
        return f"all {count} tensors are listed as dp-sgd, released, public or constant"

    def what_leaves(self) -> str:
        wrong = boundary.problems(self.json)
        if wrong:
            raise failed("; ".join(wrong[:5]))
        return "no internal figure, no outcome of an attack on members"

    def plan(self) -> str:
        """The recipe, the plan and the claim speak of one mechanism."""
        privacy, recipe = self.json["privacy.json"], self.json["provenance.json"]["recipe"]
        asked = recipe.get("privacy")
        if privacy["mechanism"].get("name") == "site_updates":
            return self._plan_of_updates(recipe)
        if not isinstance(asked, dict) or asked.get("mechanism", "none") == "none":
            raise failed("provenance.json: the recipe has no private mechanism")
        self._check_asked(asked, "unit", "records_per_unit", "adjacency")
        mechanism = claims.training_of(privacy["mechanism"], asked)
        if mechanism.get("name") not in claims.CLAIMS.get(str(asked["mechanism"]), ()):
            raise failed(
                f"mechanism: the recipe says {str(asked['mechanism'])[:40]!r}, the claim {str(mechanism.get('name'))[:40]!r}"
            )
        for key, nothing in claims.OF_STEPS.items() if mechanism.get("name") == "dp_sgd" else ():
            wanted, claimed = asked.get(key, nothing), mechanism.get(key, nothing)
            if wanted != claimed:
                raise failed(f"{key}: the recipe says {str(wanted)[:60]!r}, the claim {str(claimed)[:60]!r}")
        if claims.parts(asked) != claims.parts(mechanism):
            raise failed(
                f"parts: the recipe says {str(claims.parts(asked))[:60]!r}, the claim {str(claims.parts(mechanism))[:60]!r}"
            )
        self._check_public(recipe)
        return f"the claim is that of the recipe: per {privacy.get('unit')}, {privacy.get('adjacency')}"

    def _plan_of_updates(self, recipe: Mapping[str, Any]) -> str:
        """Of a federation whose unit is the site: what a recipe says of it stands under federation.mechanism."""
        privacy, federation = self.json["privacy.json"], recipe.get("federation")
        asked = federation.get("mechanism") if isinstance(federation, dict) else None
        if not isinstance(federation, dict) or not isinstance(asked, dict):
            raise failed("provenance.json: the recipe has no federation.mechanism")
        form = privacy["mechanism"].get("form")
        if asked.get("kind") != form or (form == "central") == bool(self.rows):
            raise failed(f"mechanism: the recipe says {str(asked.get('kind'))[:40]!r}, the claim {str(form)[:40]!r}")
        steps = recipe.get("privacy")
        if not isinstance(steps, dict) or steps.get("mechanism") != "none":
            raise failed(f"privacy.mechanism: the recipe must say none, or it could not be run with {form}")
        if privacy.get("unit") != "site" or privacy.get("population") != federation.get("sites"):
            raise failed(f"unit, population: the recipe has {str(federation.get('sites'))[:40]} sites, each a unit")
        self._check_asked(asked, "delta", "adjacency")
        self._check_public(recipe)
        return f"the claim is that of the recipe: per site, {privacy.get('adjacency')}, {form}"

    def _check_asked(self, asked: Mapping[str, Any], *keys: str) -> None:
        """What a section of the recipe and the claim both say, and that the claim is within the epsilon that was asked for."""
        privacy = self.json["privacy.json"]
        for key in keys:
            if asked.get(key) != privacy.get(key):
                raise failed(
                    f"{key}: the recipe says {str(asked.get(key))[:40]!r}, the claim {str(privacy.get(key))[:40]!r}"
                )
        target = asked.get("epsilon")
        if target is not None and not (number(target) and privacy["epsilon"] <= target + TOLERANCE):
            raise failed(f"epsilon: the recipe allowed {str(target)[:40]}, the claim is {privacy['epsilon']}")

    def _check_public(self, recipe: Mapping[str, Any]) -> None:
        """What is declared public: the number of units, and records that training began with."""
        privacy = self.json["privacy.json"]
        if recipe.get("public_start") is not None and not any(map(boundary.says_public_start, privacy["boundary"])):
            raise failed(
                "boundary: the recipe begins at public weights, the claim does not name what they were trained on"
            )
        population = privacy.get("population")
        if not (type(population) is int and 0 < population < 2**53):
            raise failed("population must be a whole number > 0")
        if privacy["delta"] >= 1 / population:
            raise failed(f"delta = {privacy['delta']} must be below 1/N = {1 / population:.3g}")

    def ledger(self) -> str:
        """Every ledger's chain, its plan and its events are those of the claim; of a federation, that of every site."""
        privacy = self.json["privacy.json"]
        total = planned = 0
        for row in self._claims():
            kept = ledgers.read(row["ledger"], self.text[row["ledger"]], self._signers(row), site=row["name"])
            total += ledgers.check(kept, row, privacy)
            planned += sum(kept.plan.allowance().values())
            self.kept.append(kept)
        ledgers.check_steps(self.kept, self.json["cost.json"].get("steps"))
        if not self.rows:
            claims.check_estimates(privacy.get("estimates", []), self.kept[0].plan)
            return f"{total} events of {planned} planned, the chain is whole"
        if privacy.get("estimates", []):
            raise failed("estimates: sites have none")
        ledgers.check_sites(self.kept, self.rows, privacy)
        largest = max(self._claims(), key=lambda row: row["epsilon"])
        ledgers.same("mechanism", privacy["mechanism"], largest["mechanism"])
        where = f"in {len(self.kept)} ledgers of {len(self.rows)} sites"
        return f"{total} events of {planned} planned, {where}; every chain is whole{self._own_keys()}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is claimed of every site; empty without sites."""
        return self.json["privacy.json"].get("sites", [])

    def _claims(self) -> list[dict[str, Any]]:
        """What is claimed of each ledger."""
        privacy = self.json["privacy.json"]
        one = {
            **{key: privacy.get(key) for key in ("population", "epsilon", "mechanism")},
            "name": "",
            "ledger": ledgers.ONE,
        }
        return [row for row in self.rows if row["ledger"] is not None] if self.rows else [one]

    def _signers(self, row: Mapping[str, Any]) -> dict[str, PublicKey]:
        """Who may have signed a ledger: a site elsewhere with its own key, which the signer of the bundle vouches for."""
        assert self.signer is not None  # nothing is read before its signature was checked
        own = ledgers.key_of(row)
        return {self.signer: self.trusted[self.signer]} if own is None else {own.id: own}

    def _own_keys(self) -> str:
        own = [kept for kept in self.kept if kept.signer != self.signer]
        known = [kept for kept in own if kept.signer in self.trusted]
        keys = len({kept.signer for kept in own})
        few = f" with {keys} key{'s' * (keys > 1)}" if keys < len(own) else ""
        return f"; {len(own)} signed by their sites{few}, {len(known)} of them with keys that you trust" if own else ""

    def epsilon(self) -> str:
        delta, claimed = self.json["privacy.json"]["delta"], self.json["privacy.json"]["epsilon"]
        if not self.kept:
            raise failed("there are no events to recompute it from")
        recomputed = 0.0
        for kept, row in zip(
            self.kept, self._claims(), strict=False
        ):  # a ledger that failed is not among them, nor what follows
            value = _epsilon(kept, delta)
            recomputed = max(recomputed, value)
            if row["epsilon"] + TOLERANCE < value:
                raise failed(
                    f"{kept.where}the claim is {row['epsilon']:.6f}, the events give {value:.6f} at delta = {delta:.3g}"
                )
        self.recomputed = (recomputed, delta)
        wrong = self._other_figures(delta, claimed)
        if wrong:
            raise failed("; ".join(wrong))
        largest = "" if not self.rows else ", the largest of the sites'"
        return f"{recomputed:.6f} at delta = {delta:.3g} by PLD{largest}; the claim is {claimed:.6f}"

    def _other_figures(self, delta: float, claimed: float) -> list[str]:
        """The claim's other accountants and its curve, held against the same events."""
        accountants, curve = self.json["privacy.json"]["accountants"], self.json["privacy.json"].get("curve")
        if accountants.get("pld") != claimed:
            return ["accountants: pld is not the claimed epsilon"]
        for name, value in accountants.items():
            if name not in ("pld", "rdp", "zcdp") or not (value is None or number(value)):
                return [f"accountants: {name[:20]!a} is not known, or no number"]
            expected = None if value is None else self._largest(delta, name)
            if value is not None and (expected is None or value + TOLERANCE < expected):
                return [f"accountants: {name} says {value}, the events give {expected}"]
        if not isinstance(curve, list) or len(curve) > 32:
            return ["curve must be a list of at most 32 points"]
        for point in curve:
            if not (isinstance(point, list) and len(point) == 2 and all(map(number, point)) and 0 < point[0] < 1):
                return ["curve: a point must be [delta, epsilon]"]
        for kept in self.kept:  # one after another: a distribution is made once for all deltas, and few are kept
            for point in curve:
                _epsilon(kept, point[0])
        for point in curve:
            expected = self._largest(point[0])
            if expected is None or point[1] + TOLERANCE < expected:
                return [f"curve: at delta = {point[0]:.3g} it says {point[1]}, the events give {expected}"]
        return []

    def _largest(self, delta: float, accountant: str = "pld") -> float | None:
        """Of all ledgers; None where one of them has none by this accountant."""
        from sfumato.privacy import accounting

        values = [accounting.epsilon(k.events, delta, accountant, k.plan.adjacency) for k in self.kept]
        known = [value for value in values if value is not None]
        return max(known) if len(known) == len(values) else None

    def recipe(self) -> str:
        """Every plan is the one that the recipe makes, stage by stage and field by field."""
        recipe = self.json["provenance.json"]["recipe"]
        if self.rows:
            populations = {row["name"]: row["population"] for row in self.rows}
            idle = {row["name"]: row["mechanism"] for row in self.rows if row["ledger"] is None}
            wrong = recomputed.problems_of_sites(
                recipe, {kept.site: kept.plan for kept in self.kept}, populations, idle
            )
        else:
            wrong = recomputed.problems(recipe, self.kept[0].plan)
        wrong = wrong or recomputed.problems_of_numbers(recipe, self.kept[0].plan, self.json["cost.json"])
        if wrong:
            raise failed("; ".join(wrong[:5]))
        if self.rows:
            return "the recipe makes, of the sites' sizes, the plans that their ledgers were kept under"
        return "the recipe makes the plan that the ledger was kept under"

    def card(self) -> str:
        wrong = card.problems(self.text["README.md"], self.json)
        if wrong:
            raise failed("README.md: " + "; ".join(wrong[:5]))
        return "the figures of README.md are those of the reports"


def _epsilon(kept: "Kept", delta: float) -> float:
    from sfumato.privacy import accounting

    try:
        value = accounting.epsilon(kept.events, delta, adjacency=kept.plan.adjacency)
    except (SfumatoError, ValueError, OverflowError) as error:
        raise failed(f"{kept.where}the events cannot be accounted ({str(error)[:200]})") from None
    if value is None or not math.isfinite(value):
        raise failed(f"{kept.where}the events give no finite epsilon")
    return value
