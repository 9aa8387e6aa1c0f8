"""The signing key of this user, made at first use, and the public keys that this user trusts. [shell]

    $XDG_CONFIG_HOME/sfumato (or ~/.config/sfumato)
      signing-key.pem        private, Ed25519 (PKCS 8), readable by its owner only
      signing-key.pub.pem    its public half: give this file to those who verify; trusted on this machine
      trusted/*.pem          public keys of others; put a file here to trust its owner

A key id is the SHA-256 of the 32 raw public bytes, in lower-case hexadecimal.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import OutsideError, PrivacyRefused, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

MAX_KEY_FILE = 16_384  # bytes


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Who may have signed. ``raw`` is the 32 bytes of an Ed25519 public key."""

    raw: bytes

    @property
    def id(self) -> str:
        return hashlib.sha256(self.raw).hexdigest()

    def accepts(self, signature: bytes, message: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self._key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self._key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def _key(self) -> "Ed25519PublicKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        return Ed25519PublicKey.from_public_bytes(self.raw)


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """A private key. Its bytes are in no message and no ``repr``."""

    _private: "Ed25519PrivateKey"

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._private.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)

    @classmethod
    def generate(cls) -> "SigningKey":
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return cls(Ed25519PrivateKey.generate())


def config_dir() -> Path:
    """The user's configuration folder of Sfumato; not created here."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "sfumato"


def own(folder: Path | None = None) -> SigningKey:
    """This user's key, made now if there is none. Of two processes that make it at once, both return the same key."""
    folder = config_dir() if folder is None else folder
    path = folder / "signing-key.pem"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _create(path)
        key = _load_private(path)
        _publish(folder / "signing-key.pub.pem", key.public)
    except OSError as error:
        raise OutsideError(
            f"signing key = {path} · must be readable and its folder writable ({error.strerror})",
            next="Correct its permissions, or set XDG_CONFIG_HOME to a folder of yours.",
        ) from None
    return key


def existing(folder: Path | None = None) -> SigningKey | None:
    """This user's key, if there is one; none is made."""
    folder = config_dir() if folder is None else folder
    return own(folder) if (folder / "signing-key.pem").exists() else None


def signer(key: SigningKey) -> Callable[[bytes], dict[str, str]]:
    """What a ledger signs its head with: bytes -> algorithm, key_id, signature (hexadecimal)."""

    def sign(message: bytes) -> dict[str, str]:
        return {"algorithm": "ed25519", "key_id": key.public.id, "signature": key.sign(message).hex()}

    return sign


def read_public(path: Path) -> PublicKey:
    """Reads a public key from a PEM file. Raises UsageError for anything else; a private key is refused by name."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"key = {path} · must be a readable file ({error.strerror})", next="Give the signer's signing-key.pub.pem."
        ) from None
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"key = {path} · is a private key",
            next="Give its public half, signing-key.pub.pem, and keep this one to yourself.",
        )
    try:
        key = load_pem_public_key(data) if len(data) <= MAX_KEY_FILE else None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            f"key = {path} · must be an Ed25519 public key in PEM", next="Give the signer's signing-key.pub.pem."
        )
    return PublicKey(key.public_bytes_raw())


def trusted(folder: Path | None = None) -> dict[str, PublicKey]:
    """Trusted public keys by id: the files ``*.pem`` of ``folder``; without it, the user's list and own key."""
    paths: list[Path] = []
    if folder is None:
        folder = config_dir() / "trusted"
        own_public = config_dir() / "signing-key.pub.pem"
        paths = [own_public] if own_public.exists() else []
    if folder.is_dir():
        paths += sorted(folder.glob("*.pem"))
    keys = [read_public(path) for path in paths]
    return {key.id: key for key in keys}


def _create(path: Path) -> None:
    """Writes a new key so that it appears complete or not at all, and never replaces one."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = SigningKey.generate()
    pem = key._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    temporary = _write_beside(path, pem, mode=0o600)
    try:
        os.link(temporary, path)  # fails, unlike a rename, where another process was faster
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)


def _publish(path: Path, key: PublicKey) -> None:
    """Makes ``path`` hold the public key, whatever it held before."""
    pem = key.pem()
    if not path.exists() or path.read_bytes() != pem:
        os.replace(_write_beside(path, pem, mode=0o644), path)


def _write_beside(path: Path, data: bytes, *, mode: int) -> str:
    """A durable temporary file in the folder of ``path``; mkstemp makes it readable by its owner only."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary


def _load_private(path: Path) -> SigningKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    with open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        data = file.read(MAX_KEY_FILE)
    if mode & 0o077:
        raise PrivacyRefused(
            f"signing key = {path}, mode {mode:o} · must be readable by its owner only",
            next=f"chmod 600 {path}; if others may have read it, remove it and tell those who trust it.",
            code="key_permissions",
        )
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"signing key = {path} · must be an unencrypted Ed25519 private key in PEM",
            next="Move it away; a new key is made at the next release.",
        )
    return SigningKey(key)
