"""manifest.json and signature.json as values: which files a bundle has, and who says so. Pure functions of bytes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sfumato.errors import VerificationFailed
from sfumato.release import canonical
from sfumato.release.keys import PublicKey, SigningKey

FORMAT = "sfumato-bundle"
VERSION = 1
MANIFEST, SIGNATURE = "manifest.json", "signature.json"
REPORTS = ("privacy.json", "quality.json", "audit.json", "cost.json", "provenance.json")
REQUIRED = (*REPORTS, "README.md")
LEDGER = "ledger.jsonl"  # of one training
LEDGERS = re.compile(r"ledgers/site-[1-9][0-9]{0,3}\.jsonl")  # of a federation, one for each site, in the place of that
MODEL = "model/"
MODEL_SUFFIXES = (".safetensors", ".json", ".txt")

MAX_FILES = 4_096
MAX_MANIFEST = 2 * 2**20  # bytes
MAX_SIGNATURE = 4_096
MAX_TEXT = 32 * 2**20  # of any file but weights
MAX_WEIGHTS = 2**40

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # names that some systems read as devices
_HEX64, _HEX128 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    size: int  # bytes
    sha256: str


def encode(files: Mapping[str, FileEntry]) -> bytes:
    """The canonical bytes of a manifest."""
    listed = {name: {"bytes": entry.size, "sha256": entry.sha256} for name, entry in files.items()}
    return canonical.encode({"format": FORMAT, "version": VERSION, "files": listed})


def read(data: bytes) -> dict[str, FileEntry]:
    """The files that a manifest lists. Raises VerificationFailed for any other encoding, name, size or version."""
    value = canonical.decode_canonical(data, MANIFEST)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise _bad(MANIFEST, f"format must be {FORMAT}")
    if type(value.get("version")) is not int or value["version"] != VERSION:
        raise VerificationFailed(
            f"{MANIFEST}: version = {str(value.get('version'))[:20]} · this program reads version {VERSION}",
            next="Use the version of Sfumato that the bundle was made with, or a newer one.",
        )
    listed = value.get("files")
    if set(value) != {"format", "version", "files"} or not isinstance(listed, dict) or len(listed) > MAX_FILES:
        raise _bad(MANIFEST, f"must hold format, version and at most {MAX_FILES} files")
    files: dict[str, FileEntry] = {}
    for name, entry in listed.items():
        check_name(name)
        if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise _bad(MANIFEST, f"{name}: needs bytes and sha256")
        size, sha256 = entry["bytes"], entry["sha256"]
        limit = MAX_WEIGHTS if name.endswith(".safetensors") else MAX_TEXT
        if type(size) is not int or not 0 <= size <= limit:
            raise _bad(MANIFEST, f"{name}: bytes must be a whole number between 0 and {limit}")
        if not isinstance(sha256, str) or not _HEX64.fullmatch(sha256):
            raise _bad(MANIFEST, f"{name}: sha256 must be 64 lower-case hexadecimal digits")
        files[name] = FileEntry(size, sha256)
    check_names(files)
    return files


def check_name(name: str) -> None:
    """Refuses whatever is not a file of a bundle: other names, other folders, ``..``, devices, hidden files."""
    segments = name.split("/")
    plain = all(_SEGMENT.fullmatch(s) and not s.endswith(".") and not _RESERVED.fullmatch(s) for s in segments)
    if not plain or len(segments) > 8 or len(name) > 512:
        raise _bad(f"file {name[:120]!a}", "is not a name that a bundle may have")
    known = name in (*REQUIRED, LEDGER) or LEDGERS.fullmatch(name) is not None
    if not known and not (name.startswith(MODEL) and name.endswith(MODEL_SUFFIXES)):
        raise _bad(f"file {name[:120]!a}", f"is no part of a bundle (model/ may hold {', '.join(MODEL_SUFFIXES)})")


def check_names(names: Iterable[str]) -> None:
    """Refuses a set of names in which something is missing, or that some file systems would merge."""
    names = list(names)
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise _bad("bundle", f"{', '.join(missing)} must be there")
    if (LEDGER in names) == any(LEDGERS.fullmatch(name) for name in names):
        raise _bad("bundle", f"must hold {LEDGER}, or in its place one ledger of every site, ledgers/site-N.jsonl")
    if not any(name.endswith(".safetensors") for name in names):
        raise _bad("bundle", "model/ must hold weights")
    paths = set(names) | {
        "/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)
    }
    if len({path.casefold() for path in paths}) != len(paths) or any(
        f"{name}/" in other for name in names for other in names if other.startswith(f"{name}/")
    ):
        raise _bad("bundle", "two names differ only by case, or a file is also a folder")


def sign(manifest: bytes, key: SigningKey) -> bytes:
    """The canonical bytes of signature.json: Ed25519 over the bytes of manifest.json as they are."""
    return canonical.encode(
        {"algorithm": "ed25519", "key_id": key.public.id, "signature": key.sign(manifest).hex(), "signs": MANIFEST}
    )


def check_signature(manifest: bytes, signature: bytes, trusted: Mapping[str, PublicKey]) -> PublicKey:
    """The trusted key that signed the manifest's bytes. Raises VerificationFailed if there is none."""
    value = canonical.decode_canonical(signature, SIGNATURE)
    if not isinstance(value, dict) or set(value) != {"algorithm", "key_id", "signature", "signs"}:
        raise _bad(SIGNATURE, "must hold algorithm, key_id, signature and signs")
    if value["algorithm"] != "ed25519" or value["signs"] != MANIFEST:
        raise _bad(SIGNATURE, f"must be an ed25519 signature of {MANIFEST}")
    key_id, hexadecimal = value["key_id"], value["signature"]
    if not isinstance(key_id, str) or not _HEX64.fullmatch(key_id):
        raise _bad(SIGNATURE, "key_id must be 64 lower-case hexadecimal digits")
    if not isinstance(hexadecimal, str) or not _HEX128.fullmatch(hexadecimal):
        raise _bad(SIGNATURE, "signature must be 128 lower-case hexadecimal digits")
    if key_id not in trusted:
        raise VerificationFailed(
            f"signer = {key_id} · is not a key that you trust",
            next="Get the signer's signing-key.pub.pem by a way that you trust and give it with --key.",
            code="unknown_signer",
        )
    if not trusted[key_id].accepts(bytes.fromhex(hexadecimal), manifest):
        raise _bad(SIGNATURE, "is not a signature of this manifest by this key")
    return trusted[key_id]


def _bad(name: str, why: str) -> VerificationFailed:
    return VerificationFailed(f"{name} · {why}", next="The bundle was changed or is not ours: ask for it again.")
