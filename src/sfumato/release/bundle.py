"""Writes what is released: weights, reports reduced to what may leave, the ledger's events, and a signature. [shell]

manifest.json    sha256 and size of every other file but signature.json; format version
signature.json   Ed25519 over the bytes of manifest.json
model/           safetensors and their settings
privacy.json     the claim, and by what each tensor is covered
quality.json audit.json cost.json provenance.json
ledger.jsonl     the events from which anybody recomputes the claim; of a federation ledgers/site-1.jsonl, ..., those of every site
README.md        the model card
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sfumato.errors import OutsideError, PrivacyRefused, UsageError
from sfumato.release import boundary, canonical, card, gate, keys, manifest, provenance, verify
from sfumato.release.keys import PublicKey, SigningKey
from sfumato.release.manifest import FileEntry
from sfumato.release.settings import ReleaseSettings


def write(run_dir: Path, out_dir: Path, key: SigningKey, *, settings: ReleaseSettings | None = None) -> Path:
    """Writes and signs the bundle of a run, approved by the gate before and accepted by ``verify`` after.

    The folder appears complete or not at all. An older bundle at ``out_dir`` is replaced; anything else there is not.

    Raises: PrivacyRefused with every reason of the gate; UsageError where ``out_dir`` holds something else;
      OutsideError where the disk does not take it.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    approved, reasons = gate.check(run_dir, settings or ReleaseSettings())
    if not approved:
        raise PrivacyRefused(
            f"release of {run_dir} · {'; '.join(reason['message'] for reason in reasons)}",
            next=reasons[0]["next"],
            code=reasons[0]["code"],
            refusals=reasons,
        )
    if (out_dir.exists() or out_dir.is_symlink()) and not _is_bundle(out_dir):
        raise UsageError(
            f"out = {out_dir} · holds something else than a bundle", next="Name a folder that does not exist yet."
        )
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise _disk(out_dir, error) from None
    try:
        _fill(temporary, run_dir, key)
        _check(temporary, key.public)
        temporary.chmod(0o755)
        _put_in_place(temporary, out_dir)
    except OSError as error:
        raise _disk(out_dir, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already moved away where all went well
    return out_dir


def reports(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of a bundle by name, reduced to what may leave. Raises UsageError for a missing report."""
    everything = provenance.collect(run_dir)
    recipe = everything["recipe"]
    guarantee = _report(run_dir, "privacy")
    sites = guarantee.pop("sites", [])  # only where there are any: what reads older bundles does not know the entry
    told = {**guarantee, "sites": sites} if sites else guarantee
    return {
        "privacy.json": {**told, "taint": _taint(run_dir), "covered_by": "charged"},
        "quality.json": boundary.quality(_report(run_dir, "quality", needed=False)),
        "audit.json": boundary.audit(_report(run_dir, "audit", needed=False) or None, recipe, guarantee),
        "cost.json": boundary.cost(_report(run_dir, "cost"), recipe, federated=_is_federated(run_dir)),
        "provenance.json": {
            **everything,
            "recipe": boundary.recipe(recipe),
            "data_card": boundary.data_card(everything["data_card"]),
        },
    }


def _fill(folder: Path, run_dir: Path, key: SigningKey) -> None:
    values = reports(run_dir)
    files: dict[str, FileEntry] = {}
    for name, value in values.items():
        files[name] = _write(folder / name, canonical.encode_readable(value))
    for name, path in gate.ledgers_of(run_dir, values["privacy.json"]).items():
        events = gate.ledger_text(path, keys.signer(key))
        files[name] = _write(folder / name, events.encode("utf-8"))
    files["README.md"] = _write(folder / "README.md", card.render(values).encode("utf-8"))
    for source in sorted((run_dir / "model").rglob("*")):
        if source.is_file():
            name = manifest.MODEL + source.relative_to(run_dir / "model").as_posix()
            files[name] = _copy(source, folder / name)
    manifest.check_names(files)
    for name in files:
        manifest.check_name(name)
    listing = manifest.encode(files)
    _write(folder / manifest.MANIFEST, listing)
    _write(folder / manifest.SIGNATURE, manifest.sign(listing, key))


def _check(folder: Path, key: PublicKey) -> None:
    """A bundle that we ourselves would refuse does not leave; the reason is one of the run, not of a stranger."""
    result = verify.verify_with(folder, {key.id: key})
    wrong = [check for check in result["checks"] if not check["ok"]]
    if wrong:
        reasons = [
            {"code": "own_verification", "message": f"{c['name']}: {c['detail']}", "next": "Correct the run's reports."}
            for c in wrong
        ]
        raise PrivacyRefused(
            f"the finished bundle · does not pass its own verification: {reasons[0]['message']}",
            next="Correct the run's reports; nothing was written.",
            code="own_verification",
            refusals=reasons,
        )


def _is_federated(run_dir: Path) -> bool:
    return (run_dir / "reports" / "federation.json").is_file()


def _taint(run_dir: Path) -> dict[str, Any]:
    """The run's taint list, its names as they are in the bundle."""
    taint = provenance.read_json(run_dir / "taint.json") or {}
    return {
        part: {manifest.MODEL + name: value for name, value in (taint.get(part) or {}).items()}
        for part in ("tensors", "files")
    }


def _report(run_dir: Path, name: str, *, needed: bool = True) -> dict[str, Any]:
    value = provenance.read_json(run_dir / "reports" / f"{name}.json")
    if value is None and needed:
        raise UsageError(f"reports/{name}.json · is not there", next="Finish the training of this run.")
    return value or {}


def _is_bundle(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (not any(path.iterdir()) or (path / manifest.MANIFEST).is_file())


def _put_in_place(temporary: Path, out_dir: Path) -> None:
    if not out_dir.exists():
        temporary.rename(out_dir)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.old.", dir=out_dir.parent)) / "bundle"
    out_dir.rename(old)
    temporary.rename(out_dir)
    shutil.rmtree(old.parent)


def _write(path: Path, data: bytes) -> FileEntry:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def _copy(source: Path, target: Path) -> FileEntry:
    """Copies and hashes in one reading, so that the hash is of what was written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while part := reader.read(2**20):
            digest.update(part)
            size += len(part)
            writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())
    return FileEntry(size, digest.hexdigest())


def _disk(path: Path, error: OSError) -> OutsideError:
    return OutsideError(
        f"bundle = {path} · could not be written ({error.strerror})",
        next="Make room or choose another folder; nothing was left there.",
    )
