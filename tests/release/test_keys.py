"""The signing key is made once, is nobody else's to read, and never shows itself."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.errors import OutsideError, PrivacyRefused, UsageError
from sfumato.release import keys


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_key_is_made_at_first_use_in_the_config_folder_and_then_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    old = os.umask(0)
    try:
        first = keys.own()
    finally:
        os.umask(old)
    folder = tmp_path / "config" / "sfumato"
    assert sorted(path.name for path in folder.iterdir()) == ["signing-key.pem", "signing-key.pub.pem"]
    assert mode(folder / "signing-key.pem") == 0o600
    assert mode(folder) == 0o700
    assert keys.own().public == first.public
    assert keys.trusted() == {first.public.id: first.public}


def test_without_xdg_config_home_the_key_is_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/path"):  # a relative one is to be ignored, says the XDG specification
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert keys.config_dir() == tmp_path / ".config" / "sfumato"


def test_a_signature_is_of_these_bytes_by_this_key() -> None:
    key, other = keys.SigningKey.generate(), keys.SigningKey.generate()
    signature = key.sign(b"manifest")
    assert key.public.accepts(signature, b"manifest")
    assert not key.public.accepts(signature, b"manifesT")
    assert not other.public.accepts(signature, b"manifest")
    assert not key.public.accepts(signature + b"\0", b"manifest")


def test_a_signature_with_another_s_of_the_same_residue_is_refused() -> None:
    """Ed25519's S must be below the group's order, else signatures have a second encoding (RFC 8032, 5.1.7)."""
    key = keys.SigningKey.generate()
    signature = key.sign(b"x")
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(signature[32:], "little") + order
    assert not key.public.accepts(signature[:32] + s.to_bytes(32, "little"), b"x")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys.own(tmp_path)
    (tmp_path / "signing-key.pem").chmod(0o640)
    with pytest.raises(PrivacyRefused, match="mode 640") as error:
        keys.own(tmp_path)
    assert error.value.code == "key_permissions"


def test_the_private_key_is_in_no_repr_and_no_error(tmp_path: Path) -> None:
    key = keys.own(tmp_path)
    pem = (tmp_path / "signing-key.pem").read_text()
    assert pem.splitlines()[1] not in repr(key)
    with pytest.raises(UsageError, match="is a private key") as error:
        keys.read_public(tmp_path / "signing-key.pem")
    assert pem.splitlines()[1] not in str(error.value)


@pytest.mark.parametrize("data", [b"", b"x" * 50_000, b"-----BEGIN PUBLIC KEY-----\nMA==\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_key_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_bytes(data)
    with pytest.raises(UsageError, match="Ed25519 public key"):
        keys.read_public(tmp_path / "key.pem")
    with pytest.raises(UsageError, match="readable file"):
        keys.read_public(tmp_path / "none.pem")


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import x25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = x25519.X25519PrivateKey.generate()
    (tmp_path / "x.pem").write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UsageError, match="Ed25519"):
        keys.read_public(tmp_path / "x.pem")
    path = tmp_path / "signing-key.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(UsageError, match="Ed25519"):
        keys.own(tmp_path)


def test_a_broken_key_in_the_trust_list_is_named_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "broken.pem").write_text("nothing")
    with pytest.raises(UsageError, match=r"broken\.pem"):
        keys.trusted(tmp_path)


def test_processes_that_make_the_key_at_once_agree_on_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from sfumato.release import keys;"
        "print(keys.own(Path(sys.argv[1])).public.id)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(keys.__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "config"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(4)
    ]
    made = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert made == {keys.own(tmp_path / "config").public.id}
    assert sorted(path.name for path in (tmp_path / "config").iterdir()) == ["signing-key.pem", "signing-key.pub.pem"]


def test_a_folder_that_cannot_be_made_is_outside(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutsideError) as error:
        keys.own(tmp_path / "file" / "config")
    assert error.value.exit_code == 5
