"""WebDataset shards: an index once, any record without those before it, and torn shards named with the offset."""

import io
import json
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tests.data.conftest import picture

from sfumato.data import shards
from sfumato.data.entries import Columns
from sfumato.data.prepare import check, load
from sfumato.data.settings import DataSettings
from sfumato.data.shards import WebDataset
from sfumato.errors import DataError


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(seed)).save(out, "PNG")
    return out.getvalue()


def wav() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(400), 8000, format="WAV")
    return out.getvalue()


def write(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def members(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(first, first + count)
        for member in (
            (f"a/{i:03d}.png", png(i)),
            (f"a/{i:03d}.txt", f"number {i}".encode()),
            (f"a/{i:03d}.json", json.dumps({"person": f"p{i % 3}", "license": "CC0"}).encode()),
        )
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    write(root / "0.tar", members(5))
    write(root / "1.tar", members(4, first=5), form=tarfile.PAX_FORMAT)
    return root


def opened(root: Path, **columns) -> WebDataset:
    return WebDataset(root, index=root / ".sfumato" / "cache", columns=Columns(**columns))


def test_records_are_neighbouring_files_of_one_name(folder):
    records = list(opened(folder, unit="person"))
    assert [r.text for r in records] == [f"number {i}" for i in range(9)]
    assert [r.unit for r in records] == [f"p{i % 3}" for i in range(9)]
    assert records[6].id == "1.tar:a/006"
    assert records[6].metadata == {"person": "p0", "license": "CC0"}
    np.testing.assert_array_equal(records[6].image, picture(6))


def test_any_record_without_those_before_it(folder, monkeypatch):
    source = opened(folder)
    whole = [record.text for record in source]
    monkeypatch.setattr(shards, "_members", None)  # no shard is walked through any more
    again = opened(folder)
    assert [again.entry(i).read().text for i in (8, 0, 5, 4)] == [whole[i] for i in (8, 0, 5, 4)]
    with pytest.raises(DataError, match="from 0 to 8"):
        again.entry(9)


def test_the_index_is_private_and_made_anew_when_the_shard_changes(folder):
    opened(folder)
    cache = folder / ".sfumato" / "cache"
    first = sorted(file.name for file in cache.iterdir())
    assert len(first) == 2
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in cache.iterdir()} == {0o600}
    write(folder / "1.tar", members(2, first=20))
    assert [r.text for r in opened(folder)][5:] == ["number 20", "number 21"]
    assert len(list(cache.iterdir())) == 2  # the old one is gone


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.77, 0.99])
def test_a_torn_shard_is_named_with_its_offset(folder, cut):
    file = folder / "0.tar"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * cut) // 512 * 512 + (100 if cut < 0.9 else 0)].rstrip(b"\0"))
    with pytest.raises(DataError, match=r"0\.tar: offset = \d+ · the shard is torn") as refused:
        opened(folder)
    assert refused.value.code == "unreadable"
    assert not list((folder / ".sfumato").rglob("*.arrow"))


def test_a_damaged_header_in_the_middle_does_not_end_the_shard_quietly(folder):
    """tarfile alone stops there without a word, and the records behind it are lost."""
    file = folder / "0.tar"
    body = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[6].offset
    body[offset + 10] ^= 0xFF
    file.write_bytes(bytes(body))
    with tarfile.open(file) as tar:
        assert len(tar.getmembers()) == 6
    with pytest.raises(DataError, match=f"offset = {offset} "):
        opened(folder)


def test_a_compressed_shard_is_refused(folder):
    with tarfile.open(folder / "2.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"2\.tar: offset = 0"):
        opened(folder)


def test_what_is_wrong_with_a_record_is_its_problem_alone(folder):
    link = tarfile.TarInfo("b/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, body in [
            ("b/good.txt", b"good"),
            ("b/pickle.pyd", b"cos\nsystem\n"),
            ("b/two.png", png(1)),
            ("b/two.jpg", png(2)),
            ("b/words.txt", b"\xff\xfe"),
            ("b/json.json", b"{"),
            ("b/list.json", b"[1]"),
            ("b/empty.txt", b" "),
            ("b/good.json", b"{}"),
            ("b/sound.wav", wav()),
            ("b/last.cls", b"3"),
            ("b/last.txt", b"three"),
            (".hidden.txt", b"not a record"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        tar.addfile(link)
    (folder / "1.tar").unlink()
    found: dict[str, str] = {}
    for entry in opened(folder).entries():
        try:
            record = entry.read()
        except DataError as error:
            found[entry.id.split("/")[1]] = error.code
        else:
            found[entry.id.split("/")[1]] = str(record.metadata.get("facts", "read"))
    assert list(found.items())[1:] == [
        ("pickle", "suffix"),
        ("two", "row"),
        ("words", "text"),
        ("json", "row"),
        ("list", "row"),
        ("empty", "empty_text"),
        ("sound", "read"),
        ("last", "{'label': '3'}"),
        ("link", "outside"),
    ]
    assert found["good"] == "row"  # its second file is far from its first: the later of the two is refused


def test_text_may_come_from_the_json(folder):
    write(folder / "0.tar", [("x.json", json.dumps({"caption": "a", "long": "b"}).encode()), ("x.png", png(0))])
    (folder / "1.tar").unlink()
    assert [r.text for r in opened(folder)] == ["a"]
    (record,) = opened(folder, text="long")
    assert (record.text, record.metadata) == ("b", {"caption": "a"})
    (bare,) = opened(folder, modalities=("image",))
    assert bare.text is None


def test_shards_are_checked_and_loaded_by_their_path(folder):
    assert check(folder)["errors"] == 0
    data = DataSettings(source="webdataset", path=str(folder), unit_column="person", public_units=1)
    prepared = load(data, unit="person")
    assert (len(prepared.private), len(prepared.public)) == (6, 3)
    assert prepared.private[0].image.shape == (32, 32, 1)
    with pytest.raises(DataError, match=r"must be a \.tar"):
        opened(folder / "none.tar")
