"""Folders that ``datasets`` saved, memory-mapped; held against what ``datasets`` itself reads."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tests.data.conftest import picture

from sfumato.data.entries import Columns
from sfumato.data.prepare import load
from sfumato.data.settings import DataSettings
from sfumato.data.sources import settings_for
from sfumato.data.tables import Arrow
from sfumato.errors import DataError


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(seed)).save(out, "PNG")
    return out.getvalue()


def rows(count: int = 6, first: int = 0) -> dict[str, list[Any]]:
    numbers = range(first, first + count)
    return {
        "image": [{"bytes": png(i), "path": None} for i in numbers],
        "text": [f"number {i}" for i in numbers],
        "who": [i % 3 for i in numbers],
        "kind": [i % 2 if i else -1 for i in numbers],
    }


def save(folder: Path, *, parts: int = 1, stream: bool = True, info: bool = True) -> Path:
    """What ``save_to_disk`` lays down."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    for number, name in enumerate(names):
        table = pa.table(rows(3, first=3 * number))
        with pa.OSFile(str(folder / name), "wb") as file:
            with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
                writer.write_table(table)
    if info:
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        features = {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "who": {"dtype": "int64"}}
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_a_saved_folder_gives_records_and_class_labels_as_facts(tmp_path, stream):
    source = Arrow(save(tmp_path / "set", parts=2, stream=stream), columns=Columns(unit="who"))
    records = list(source)
    assert len(source) == 6
    assert source.facts == {"kind": ("cat", "dog")}
    assert [r.text for r in records] == [f"number {i}" for i in range(6)]
    assert [r.unit for r in records] == ["0", "1", "2", "0", "1", "2"]
    assert [r.metadata.get("facts") for r in records[:3]] == [None, {"kind": "dog"}, {"kind": "cat"}]
    np.testing.assert_array_equal(records[4].image, picture(4))
    assert source.entry(4).read().text == "number 4"


def test_splits_of_a_saved_dictionary(tmp_path):
    for name in ("train", "validation"):
        save(tmp_path / "set" / name)
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert [r.metadata["split"] for r in Arrow(tmp_path / "set")] == ["train"] * 3 + ["validation"] * 3
    assert settings_for(tmp_path / "set").source == "arrow"
    prepared = load(DataSettings(source="arrow", path=str(tmp_path / "set"), public_units=2), unit="record")
    assert (len(prepared.private), len(prepared.public)) == (3, 2)


def test_it_reads_what_datasets_saves(tmp_path):
    """Oracle: the library whose format it is."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "who": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    theirs = datasets.Dataset.from_dict(rows(5), features=features)
    theirs.save_to_disk(str(tmp_path / "set"), num_shards=2)
    records = list(Arrow(tmp_path / "set"))
    again = datasets.load_from_disk(str(tmp_path / "set"))
    assert [r.text for r in records] == list(again["text"])
    assert [r.metadata["who"] for r in records] == list(again["who"])
    for record, row in zip(records, again, strict=True):
        np.testing.assert_array_equal(record.image, np.asarray(row["image"]))


def test_what_is_no_saved_set_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no \.arrow files"):
        tmp_path.joinpath("empty").mkdir()
        Arrow(tmp_path / "empty")
    folder = save(tmp_path / "set")
    with pytest.raises(DataError, match="column nobody"):
        Arrow(folder, columns=Columns(unit="nobody"))
    file = next(folder.glob("*.arrow"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable Arrow file"):
        Arrow(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(DataError, match="outside the folder"):
        Arrow(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match="does not exist"):
        Arrow(folder)


def test_a_class_that_has_no_name_is_the_rows_problem(tmp_path):
    folder = save(tmp_path / "set")
    info = {"features": {"kind": {"names": ["cat"], "_type": "ClassLabel"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    entries = list(Arrow(folder).entries())
    assert entries[0].read().text == "number 0"
    with pytest.raises(DataError, match="kind = 1"):
        entries[1].read()
