"""Folders and Parquet files as records; what is wrong with a row is that row's problem."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data.entries import Columns, Entry
from sfumato.data.folder import Folder
from sfumato.data.settings import DataSettings
from sfumato.data.sources import open_source, settings_for
from sfumato.data.tables import Parquet
from sfumato.errors import DataError, MissingDependency, UsageError


def picture(seed: int, size: int = 24, channels: int = 3) -> np.ndarray:
    """Smooth, and unlike the pictures of other seeds."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8).squeeze())
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(seed)).save(out, "PNG")
    return out.getvalue()


def test_a_folder_gives_text_picture_unit_and_the_rest_as_metadata(folder):
    source = open_source(DataSettings(source="folder", path=str(folder()), unit_column="person"))
    records = list(source)
    assert len(source) == len(records) == 12
    assert records[5].text == "picture number 5"
    assert records[5].unit == "p1"
    assert records[5].metadata == {"person": "p1", "license": "CC0"}
    np.testing.assert_array_equal(records[5].image, picture(5))


def test_without_a_unit_column_every_record_is_its_own_unit(folder):
    records = list(Folder(folder()))
    assert len({r.unit for r in records}) == 12


def test_caption_and_image_are_other_names_for_text_and_file_name(folder):
    def rename(rows):
        for row in rows:
            row["caption"], row["image"] = row.pop("text"), row.pop("file_name")

    assert [r.text for r in Folder(folder(change=rename))][3] == "picture number 3"


def test_a_missing_unit_column_names_the_columns_that_are_there(folder):
    with pytest.raises(DataError, match=r"column patient .* is missing") as refused:
        Folder(folder(), columns=Columns(unit="patient"))
    assert "file_name, license, person, text" in refused.value.next
    assert refused.value.exit_code == 2


BAD_ROWS = {
    "missing_file": [{"file_name": "nowhere.png"}, {"file_name": None}, {"file_name": ""}],
    "outside": [{"file_name": "../secret.png"}, {"file_name": "/etc/passwd"}, {"file_name": "a/../../b.png"}],
    "suffix": [{"file_name": "metadata.jsonl"}],
    "empty_text": [{"text": ""}, {"text": "  \n"}, {"text": None}],
    "text": [{"text": 7}, {"text": ["a"]}],
    "unit": [{"person": ""}, {"person": "  "}, {"person": None}],
    "row": [{"file_name": 3}],
}


@pytest.mark.parametrize(("code", "change"), [(code, change) for code, rows in BAD_ROWS.items() for change in rows])
def test_a_bad_row_is_named_with_its_reason_and_the_others_are_read(folder, code, change):
    entries = list(Folder(folder(change=lambda rows: rows[4].update(change)), columns=Columns(unit="person")).entries())
    for number, entry in enumerate(entries):
        if number != 4:
            assert entry.read().text
            continue
        with pytest.raises(DataError) as refused:
            entry.read()
        assert refused.value.code == code
        assert "metadata.jsonl:5" in refused.value.message
        assert refused.value.next


def test_a_row_without_the_column_that_others_have_is_bad(folder):
    entries = list(Folder(folder(change=lambda rows: rows[2].pop("person")), columns=Columns(unit="person")).entries())
    with pytest.raises(DataError, match="unit = ''"):
        entries[2].read()


@settings(deadline=None, max_examples=80)
@given(
    line=st.text(max_size=80) | st.recursive(st.none() | st.integers() | st.text(max_size=9), st.lists).map(json.dumps)
)
def test_any_line_of_metadata_is_read_or_is_a_data_error(tmp_path_factory, line):
    root = tmp_path_factory.mktemp("any")
    (root / "metadata.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + line, encoding="utf-8", errors="replace")
    entries = list(Folder(root).entries())
    assert entries[0].read().text == "good"
    for entry in entries[1:]:
        refusal = refusal_of(entry)
        assert refusal is None or entry.id in refusal.message


def refusal_of(entry: Entry) -> DataError | None:
    try:
        entry.read()
    except DataError as error:
        return error
    return None


def test_a_table_that_is_not_text_is_a_data_error(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(DataError, match="UTF-8"):
        Folder(tmp_path)


def test_csv_metadata(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "metadata.csv").write_text('file_name,text,who\na.png,"one, two",x\na.png,short\n')
    good, bad = Folder(tmp_path, columns=Columns(unit="who")).entries()
    assert good.read().text == "one, two"
    with pytest.raises(DataError, match="cells"):
        bad.read()


def test_class_folders_become_captions_and_labels(tmp_path):
    for name, seed in (("sitting_cat", 1), ("dog", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(seed))
    source = Folder(tmp_path)
    assert source.facts == {"label": ("dog", "sitting cat")}
    assert [(r.text, r.metadata["facts"]["label"]) for r in source] == [("dog",) * 2, ("sitting cat",) * 2]
    with pytest.raises(DataError, match="no columns"):
        Folder(tmp_path, columns=Columns(unit="person"))


def test_audio_folders_are_read_and_other_files_are_named(tmp_path):
    (tmp_path / "crackle").mkdir()
    soundfile.write(tmp_path / "crackle" / "1.wav", np.zeros(800), 8000)
    (tmp_path / "crackle" / "notes.txt").write_text("?")
    sound, other = Folder(tmp_path).entries()
    record = sound.read()
    assert (record.text, record.sample_rate, len(record.audio)) == ("crackle", 8000, 800)
    with pytest.raises(DataError, match=r"notes\.txt"):
        other.read()


@pytest.mark.parametrize("table", [True, False])
def test_splits_are_folders(tmp_path, table):
    for number, split in enumerate(("train", "val")):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / f"{number}.png").write_bytes(png(number))
        if table:
            (tmp_path / split / "metadata.jsonl").write_text(
                json.dumps({"file_name": f"cat/{number}.png", "text": "a cat"})
            )
    assert [r.metadata["split"] for r in Folder(tmp_path)] == ["train", "validation"]
    if table:
        (tmp_path / "val" / "metadata.jsonl").unlink()
        with pytest.raises(DataError, match="missing in val"):
            Folder(tmp_path)


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no metadata\.jsonl"):
        Folder(tmp_path)
    with pytest.raises(DataError, match="must be a folder"):
        Folder(tmp_path / "none")
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no records"):
        Folder(tmp_path)


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "struct path"])
def test_parquet_in_its_forms(tmp_path, form):
    def cell(i: int):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        data, path = png(i), f"{i}.png"
        return {
            "bytes": data,
            "struct": {"bytes": data, "path": "x"},
            "path": path,
            "struct path": {"bytes": None, "path": path},
        }[form]

    table = pa.table({"image": [cell(i) for i in range(3)], "caption": ["a", "b", "c"], "who": [7, 7, 8]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = Parquet(tmp_path / "t.parquet", columns=Columns(unit="who"))
    records = list(source)
    assert len(source) == 3
    assert [r.unit for r in records] == ["7", "7", "8"]
    np.testing.assert_array_equal(records[2].image, picture(2))


def test_parquet_that_is_not_what_it_says(tmp_path):
    file = tmp_path / "t.parquet"
    file.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable Parquet"):
        Parquet(file)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(DataError, match="text, image or audio"):
        Parquet(file)
    pq.write_table(pa.table({"text": ["x", ""], "image": [png(1), None]}), file)
    with pytest.raises(DataError, match="column who"):
        Parquet(file, columns=Columns(unit="who"))
    good, bad = Parquet(file).entries()
    assert good.read().image is not None
    with pytest.raises(DataError, match="nothing that it describes"):
        bad.read()


def test_without_pyarrow_the_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match="pyarrow") as refused:
        Parquet(tmp_path / "t.parquet")
    assert refused.value.exit_code == 5


def test_what_data_check_is_given(tmp_path: Path):
    assert settings_for("mnist").source == "mnist"
    (tmp_path / "a.parquet").write_bytes(b"")
    assert settings_for(tmp_path).source == settings_for(tmp_path / "a.parquet").source == "parquet"
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert settings_for(tmp_path).source == "folder"
    with pytest.raises(UsageError, match=r"\.parquet"):
        settings_for(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        settings_for(tmp_path / "none")
