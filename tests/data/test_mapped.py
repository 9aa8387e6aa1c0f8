"""Records and tensors on disk: the same as in memory, private, made anew when anything changes, removed when asked."""

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sfumato.data import mapped
from sfumato.data.places import cache_of, clear
from sfumato.data.prepare import load
from sfumato.data.settings import DataSettings, Deduplicate
from sfumato.errors import DataError, OutsideError, UsageError
from sfumato.records import Record, UnitTable


def of(root: Path, **settings) -> DataSettings:
    given = {"source": "folder", "path": str(root), "public_units": 2, "unit_column": "person", "store": "mapped"}
    return DataSettings(**(given | settings))


def same(a: Record, b: Record) -> bool:
    pictures = (a.image is None and b.image is None) or np.array_equal(a.image, b.image)  # type: ignore[arg-type]
    sounds = (a.audio is None and b.audio is None) or np.array_equal(a.audio, b.audio)  # type: ignore[arg-type]
    return (a.id, a.unit, a.text, a.sample_rate, dict(a.metadata)) == (
        b.id, b.unit, b.text, b.sample_rate, dict(b.metadata)
    ) and pictures and sounds  # fmt: skip


def encode(records: Sequence[Record]) -> UnitTable:
    """Mean of the picture and length of the text; a text may be missing."""
    return UnitTable(
        {
            "image": torch.tensor([[0.0 if r.image is None else float(r.image.mean())] for r in records]),
            "length": torch.tensor([len(r.text or "") for r in records]),
        },
        [r.unit for r in records],
        {"length": torch.tensor([r.text is not None for r in records], dtype=torch.bool)},
    )


def folders(data: DataSettings, kind: str = "records") -> list[Path]:
    return sorted(cache_of(data).glob(f"{kind}-*"))


@pytest.mark.parametrize("unit", ["person", "record"])
def test_stored_records_are_those_in_memory(folder, unit):
    root = folder(count=40, people=10)
    slow = load(of(root, store="memory", limit_units=6), unit=unit)
    fast = load(of(root, limit_units=6), unit=unit)
    for one, other in ((slow.private, fast.private), (slow.public, fast.public)):
        assert len(one) == len(other)
        assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert fast.card == slow.card
    assert isinstance(fast.private, mapped.Stored)
    assert same(fast.private[-1], slow.private[-1])
    assert [r.id for r in fast.private[3:7]] == [r.id for r in slow.private[3:7]]
    with pytest.raises(IndexError):
        fast.private[len(fast.private)]


def test_batches_on_disk_are_joined_in_order(folder, monkeypatch):
    monkeypatch.setattr(mapped, "ROWS", 7)
    root = folder(count=40, people=10)
    slow, fast = (load(of(root, store=store, seed=3), unit="person") for store in ("memory", "mapped"))
    assert [r.id for r in fast.private] == [r.id for r in slow.private]
    assert all(same(fast.private[i], slow.private[i]) for i in range(len(slow.private)))
    table, expected = mapped.encoded(fast.private, encode, settings={}), encode(slow.private)
    for name in ("image", "length"):
        torch.testing.assert_close(table.tensors[name], expected.tensors[name])
        torch.testing.assert_close(table.present[name], expected.present[name])
    assert table.unit_names == expected.unit_names
    drawn, wanted = (t.batch([0, 3, 5], records_per_unit=2) for t in (table, expected))
    torch.testing.assert_close(drawn.tensors["image"], wanted.tensors["image"])


def test_missing_modalities_and_sounds_survive(tmp_path):
    soundfile.write(tmp_path / "s.wav", np.linspace(-0.5, 0.5, 300), 8000, subtype="FLOAT")
    rows = [{"text": "one", "audio": "s.wav"}, {"text": None, "audio": "s.wav"}, {"text": "three", "audio": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"unit_column": None, "modalities": ("text", "audio"), "may_lack": True, "public_units": 0}
    slow, fast = (load(of(tmp_path, store=s, **settings), unit="record").private for s in ("memory", "mapped"))
    assert [r.text for r in fast] == ["one", None, "three"]
    assert [r.audio is None for r in fast] == [False, False, True]
    assert all(same(a, b) for a, b in zip(slow, fast, strict=True))


def test_only_the_owner_can_look_into_the_cache(folder):
    root = folder()
    cache_of(of(root)).mkdir(parents=True, mode=0o755)  # made by somebody else, open to everybody
    before = os.umask(0)
    try:
        prepared = load(of(root), unit="person")
        mapped.encoded(prepared.private, encode, settings={})  # type: ignore[arg-type]
    finally:
        os.umask(before)
    home = cache_of(of(Path(prepared.account_home)))
    for path in [home, *home.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == 0o700 if path.is_dir() else mode & 0o077 == 0


def test_it_is_written_once_and_anew_when_a_file_or_a_setting_changes(folder, monkeypatch):
    root = folder()
    load(of(root), unit="person")
    (first,) = folders(of(root))
    monkeypatch.setattr(mapped, "_write", None)
    load(of(root), unit="person")  # not written again
    load(of(root, public_units=1, limit_units=1), unit="record")  # neither for another choice among the same records
    monkeypatch.undo()
    load(of(root, image_size=16), unit="person")
    assert len(folders(of(root))) == 2
    assert first in folders(of(root))
    os.utime(root / "3.png", ns=(1, 1))
    prepared = load(of(root), unit="person")
    assert first not in folders(of(root))
    assert len(prepared.private) == 6


def test_encoded_tensors_belong_to_their_records_and_settings(folder):
    root = folder()
    prepared = load(of(root), unit="person")
    calls: list[int] = []

    def counted(records: Sequence[Record]) -> UnitTable:
        calls.append(len(records))
        return encode(records)

    mapped.encoded(prepared.private, counted, settings={"a": 1})  # type: ignore[arg-type]
    mapped.encoded(prepared.private, counted, settings={"a": 1})  # type: ignore[arg-type]
    assert len(calls) == 1
    mapped.encoded(prepared.private, counted, settings={"a": 2})  # type: ignore[arg-type]
    fewer = load(of(root, limit_units=1), unit="person").private
    table = mapped.encoded(fewer, counted, settings={"a": 1})  # type: ignore[arg-type]
    assert len(calls) == 3
    assert table.num_units == 1
    os.utime(root / "3.png", ns=(1, 1))
    load(of(root), unit="person")
    assert folders(of(root), "encoded") == []  # they were of files that have changed


def test_writing_to_a_tensor_of_the_table_changes_nothing_on_disk(folder):
    prepared = load(of(folder()), unit="person")
    table = mapped.encoded(prepared.private, encode, settings={})  # type: ignore[arg-type]
    table.tensors["image"].zero_()
    again = mapped.encoded(prepared.private, encode, settings={})  # type: ignore[arg-type]
    assert float(again.tensors["image"].sum()) > 0


def test_another_process_is_told_the_files_not_the_tensors(folder):
    prepared = load(of(folder(count=40, people=10)), unit="person")
    assert isinstance(prepared.private, mapped.Stored)
    table = mapped.encoded(prepared.private, wide, settings={})
    told = pickle.dumps(table)
    assert len(told) < 4_000 < table.tensors["image"].numel() * 4
    again = pickle.loads(told)
    torch.testing.assert_close(again.tensors["image"], table.tensors["image"])
    assert again.unit_names == table.unit_names


def wide(records: Sequence[Record]) -> UnitTable:
    return UnitTable({"image": torch.rand(len(records), 1000)}, [r.unit for r in records])


def test_a_codec_whose_rows_have_no_one_shape_is_refused(folder, monkeypatch):
    monkeypatch.setattr(mapped, "ROWS", 4)
    prepared = load(of(folder()), unit="person")

    def uneven(records: Sequence[Record]) -> UnitTable:
        return UnitTable({"text": torch.zeros(len(records), len(records[0].id))}, [r.unit for r in records])

    with pytest.raises(UsageError, match="row shape"):
        mapped.encoded(prepared.private, uneven, settings={})  # type: ignore[arg-type]
    assert folders(of(Path(prepared.account_home)), "encoded") == []


def test_bad_records_leave_no_cache(folder):
    root = folder(change=lambda rows: rows[5].update(text=""))
    with pytest.raises(DataError, match=r"metadata\.jsonl:6"):
        load(of(root), unit="person")
    assert list(cache_of(of(root)).iterdir()) == []


KILLED = """
import os, signal, sys
from sfumato.data import mapped
from sfumato.data.prepare import load
from sfumato.data.settings import DataSettings
write = mapped._write
def die(part, records):
    write(part, records)
    os.kill(os.getpid(), signal.SIGKILL)
mapped._write = die
load(DataSettings(source="folder", path=sys.argv[1], public_units=1, store="mapped"), unit="record")
"""


def test_what_a_killed_process_left_is_swept(folder):
    root = folder()
    child = subprocess.run([sys.executable, "-c", KILLED, str(root)], check=False)
    assert child.returncode == -9
    (part,) = cache_of(of(root)).iterdir()
    assert part.name.startswith(".part-")
    load(of(root), unit="person")
    assert [p.name.split("-")[0] for p in cache_of(of(root)).iterdir()] == ["records"]


def test_clear_removes_the_cache_and_leaves_the_account(folder):
    root = folder()
    load(of(root), unit="person")
    (root / ".sfumato" / "account.db").write_text("what was spent")
    told = clear(of(root))
    assert told["bytes"] > 0
    assert not cache_of(of(root)).exists()
    assert (root / ".sfumato" / "account.db").is_file()
    assert clear(of(root))["removed"] == []


def test_a_damaged_cache_is_named(folder):
    root = folder()
    load(of(root), unit="person")
    (made,) = folders(of(root))
    (made / "records.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(OutsideError, match="cannot be read") as refused:
        load(of(root), unit="person")
    assert "data clear" in refused.value.next


def test_what_is_left_out_is_the_same_from_disk(folder):
    def copy(rows):
        rows[4]["file_name"], rows[4]["text"] = rows[0]["file_name"], rows[0]["text"]

    root = folder(change=copy)
    for store in ("memory", "mapped"):
        prepared = load(of(root, store=store, public_units=0, deduplicate=Deduplicate()), unit="person")
        assert len(prepared.private) == 11
        assert prepared.card["left_out"]["copies within a unit"] == 1


def test_generated_sets_are_stored_by_their_settings(tmp_path):
    data = DataSettings(units=6, public_units=3, store="mapped")
    one, other = load(data, unit="person"), load(DataSettings(units=6, public_units=3), unit="person")
    assert all(same(a, b) for a, b in zip(one.private, other.private, strict=True))
    assert all(same(a, b) for a, b in zip(one.public, other.public, strict=True))
    assert str(cache_of(data)).startswith(str(tmp_path / "share"))
