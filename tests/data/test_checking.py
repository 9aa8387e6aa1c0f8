"""``data check`` names every problem and drops nothing."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sfumato.data.checking import check, near_pairs
from sfumato.data.settings import DataSettings
from sfumato.errors import DataError


def codes(report) -> dict[str, str]:
    return {problem["record"]: problem["code"] for problem in report["problems"]}


def test_clean_records_have_no_problem(folder):
    report = check(folder(), unit_column="person")
    assert report["problems"] == []
    assert (report["records"], report["units"]) == (12, 4)
    assert report["modalities"] == {"text": 12, "image": 12, "audio": 0}


def test_every_kind_of_problem_is_found_and_every_record_counted(folder):
    def spoil(rows):
        rows[1]["text"] = ""
        rows[2]["file_name"] = "gone.png"
        rows[3]["person"] = ""
        rows[4].update(file_name="0.png", text=rows[0]["text"])  # an exact copy
        rows[5]["file_name"] = "near.jpg"
        rows[6]["split"], rows[10]["split"] = "train", "test"  # person 2 in both
        rows[8]["file_name"] = "grey.png"

    root = folder(change=spoil)
    first = Image.open(root / "0.png")
    first.resize((48, 48)).save(root / "near.jpg")
    (root / "9.png").write_bytes((root / "9.png").read_bytes()[:100])
    Image.open(root / "8.png").convert("L").save(root / "grey.png")
    report = check(root, unit_column="person")
    assert codes(report) == {
        "metadata.jsonl:2": "empty_text",
        "metadata.jsonl:3": "missing_file",
        "metadata.jsonl:4": "unit",
        "metadata.jsonl:5": "duplicate",
        "metadata.jsonl:6": "near_duplicate",
        "metadata.jsonl:9": "channels",
        "metadata.jsonl:10": "unreadable",
        "metadata.jsonl:11": "leak",
    }
    assert report["records"] == 12
    assert report["errors"] == 5
    assert report["warnings"] == 3
    assert all(problem["problem"] and problem["next"] for problem in report["problems"])
    assert json.loads(json.dumps(report)) == report


def test_a_near_copy_is_a_problem_only_under_another_unit(folder):
    root = folder(change=lambda rows: rows[4].update(file_name="0.png", text="another text"))
    report = check(root, unit_column="person")
    assert report["problems"] == []
    assert report["near_duplicates_within_units"] == 1
    (problem,) = check(root)["problems"]
    assert problem["problem"] == "looks like metadata.jsonl:1, a picture of another unit"


def test_wrong_rates_are_errors(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "breath").mkdir()
    for number, rate in enumerate((4000, 4000, 8000)):
        soundfile.write(tmp_path / "breath" / f"{number}.wav", np.full(100, number / 10), rate)
    assert codes(check(tmp_path)) == {"breath/2.wav": "rate"}


def test_pictures_without_captions_are_said(tmp_path, folder):
    root = folder(change=lambda rows: [row.pop("text") for row in rows])
    assert codes(check(root)) == {"all": "missing_column"}


def test_the_digest_follows_the_contents_not_the_place(folder, tmp_path):
    root = folder()
    before = check(root)["sha256"]
    shutil.move(root, tmp_path / "elsewhere")
    assert check(tmp_path / "elsewhere")["sha256"] == before
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "elsewhere" / "3.png")
    assert check(tmp_path / "elsewhere")["sha256"] != before


def test_near_pairs_are_those_of_the_slow_way():
    """Oracle: all pairs, one by one."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 60, dtype=np.uint64)
    for later in range(20, 60):
        flipped = rng.choice(64, rng.integers(0, 6), replace=False)
        hashes[later] = hashes[later - 20] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64), initial=0)
    thumbnails = [np.full((16, 16), 10 * (i % 20), np.uint8) for i in range(60)]
    slow = {}
    for later in range(60):
        for earlier in range(later):
            close = (int(hashes[later]) ^ int(hashes[earlier])).bit_count() <= 3
            if close and (thumbnails[later] == thumbnails[earlier]).all():
                slow[later] = earlier
                break
    assert len(slow) > 15
    assert near_pairs(hashes, thumbnails) == (sorted(slow.items()), True)


def test_the_same_hash_alone_is_no_duplicate():
    rng = np.random.default_rng(1)
    thumbnails = [rng.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(2)]
    assert near_pairs(np.array([5, 5], np.uint64), thumbnails) == ([], True)


def test_built_in_sets_can_be_checked_by_settings():
    report = check(DataSettings(units=30))
    assert report["name"] == "clinic"
    assert report["units"] == 30
    assert report["errors"] == 0


def test_a_source_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        check(tmp_path / "none")
