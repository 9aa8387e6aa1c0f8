"""The real sets, on small stand-ins of the same format."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato.data import media
from sfumato.data.examples import CLOTHES, DIGITS, read_idx
from sfumato.data.fetch import IDX_FILES
from sfumato.data.prepare import load
from sfumato.data.settings import DataSettings
from sfumato.errors import DataError, UsageError
from sfumato.federation.simulate import split_by_site


def idx(values: np.ndarray) -> bytes:
    return (
        b"\x00\x00\x08"
        + bytes([values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.astype(np.uint8).tobytes()
    )


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (count, 28, 28))))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 10)))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "fact", "names"), [("mnist", "digit", DIGITS), ("fashion-mnist", "article", CLOTHES)]
)
def test_captions_and_facts_follow_the_labels(digits, source, fact, names):
    prepared = load(DataSettings(source=source, path=str(digits), image_size=28, public_units=15), unit="record")
    assert prepared.facts == {fact: names["en"]}
    assert (len(prepared.private), len(prepared.public)) == (60, 15)
    for number, record in enumerate(prepared.private):
        assert record.metadata["facts"] == {fact: names["en"][number % 10]}
        assert names["en"][number % 10] in record.text
        assert record.image.shape == (28, 28, 1)
    assert len({r.text for r in prepared.private}) > 25
    assert {r.id.split("/")[0] for r in prepared.public} == {"test"}
    assert prepared.card["pixels_are_the_published_ones"] is False


def test_captions_in_russian_and_chinese(digits):
    data = DataSettings(source="mnist", path=str(digits), languages=("ru", "zh"), public_units=0)
    for record in load(data, unit="record").private:
        word = DIGITS["en"].index(record.metadata["facts"]["digit"])
        assert DIGITS[record.metadata["language"]][word] in record.text


def test_articles_of_english_agree(digits):
    texts = [r.text for r in load(DataSettings(source="mnist", path=str(digits)), unit="record").private]
    assert not any(" a eight" in f" {text}" for text in texts)
    assert any("an eight" in text for text in texts)
    texts = [r.text for r in load(DataSettings(source="fashion-mnist", path=str(digits)), unit="record").private]
    assert not any(" a ankle" in f" {text}" or " a trousers" in f" {text}" for text in texts)


def test_a_folder_that_lacks_a_file_names_it(digits):
    (digits / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-images-idx3-ubyte"):
        load(DataSettings(source="mnist", path=str(digits)), unit="record")


def test_pictures_and_labels_of_different_numbers_are_refused(digits):
    (digits / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(59))))
    with pytest.raises(DataError, match="shapes"):
        load(DataSettings(source="mnist", path=str(digits)), unit="record")


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60), st.integers(0, 120))
def test_damaged_idx_files_are_data_errors(tmp_path_factory, junk, cut):
    whole = idx(np.arange(24).reshape(2, 3, 4))
    file = tmp_path_factory.mktemp("idx") / IDX_FILES[0]
    for body in (junk, whole[:cut], gzip.compress(whole)[:cut], whole + junk):
        file.write_bytes(body)
        try:
            values = read_idx(file)
        except DataError as error:
            named = IDX_FILES[0] in error.message
        else:
            named = values.dtype == np.uint8
        assert named


def test_read_idx_is_the_inverse_of_the_format(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(values))
    np.testing.assert_array_equal(read_idx(tmp_path / "x"), values)


EMOJI_GROUPS = ({"group": 0, "subgroup": 3}, {"group": 8, "subgroup": 90}, {"group": 3, "subgroup": 29}, {})


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """Four concepts; the last has no third style; names are spelt as each package spells them."""
    codes = [
        ("1f600", "1F600", "1f600"),
        ("0023-fe0f-20e3", "0023-FE0F-20E3", "0023-20e3"),
        ("1f98a", "1F98A", "1f98a"),
        ("1f34e", "1F34E", None),
    ]
    (tmp_path / "captions").mkdir()
    rows = [
        {"hexcode": code, "label": f"label {i}", "tags": [f"tag {i}{letter}" for letter in "abcdef"], **group}
        for i, ((_, code, _), group) in enumerate(zip(codes, EMOJI_GROUPS, strict=True))
    ]
    rows.append({"hexcode": "1F1E6", "label": "no picture"})
    (tmp_path / "captions" / "en.json").write_text(json.dumps(rows))
    for i, (name, _, third) in enumerate(codes):
        for style, file in (("flat", f"{name}.png"), ("shaded", f"{name}.png"), ("3d", f"{third}.webp")):
            if file != "None.webp":
                (tmp_path / style).mkdir(exist_ok=True)
                pixels = np.zeros((64, 64, 4), np.uint8)
                pixels[16:48, 16:48] = [40 * i, 100, 0, 255]
                Image.fromarray(pixels).save(tmp_path / style / file)
    return tmp_path


def test_emoji_are_joined_by_code_point_and_drawn_on_white(emoji):
    prepared = load(DataSettings(source="emoji", path=str(emoji), channels=3, public_units=0), unit="record")
    records = prepared.private
    assert len(records) == 11
    assert {r.metadata["concept"] for r in records} == {"1f600", "0023-20e3", "1f98a", "1f34e"}
    assert prepared.facts == {}
    for record in records:
        assert record.unit == record.id
        words = record.text.split(", ")
        assert words[0] == record.metadata["label"]
        assert words[-1] == record.metadata["style"]
        assert 2 <= len(words[1:-1]) <= 4
        assert (record.image[0, 0] == 255).all()
        assert abs(int(record.image[16, 16, 1]) - 100) < 8


def test_of_emoji_whose_words_alone_are_asked_for_no_picture_is_decoded(emoji, monkeypatch):
    monkeypatch.setattr(media, "read_image", None)
    data = DataSettings(source="emoji", path=str(emoji), public_units=0, modalities=("text",))
    records = load(data, unit="record").private
    assert len(records) == 11
    assert all(record.image is None and record.text for record in records)


def test_emoji_say_what_sites_may_be_made_of(emoji):
    """The house that drew it, what it is of: public properties, for ``data.site_column``."""
    records = load(DataSettings(source="emoji", path=str(emoji), channels=3, public_units=0), unit="record").private
    groups = {(r.metadata["concept"], r.metadata["group"], r.metadata["subgroup"]) for r in records}
    assert groups == {
        ("1f600", "smileys", "smileys 3"),
        ("0023-20e3", "symbols", "symbols 90"),
        ("1f98a", "animals", "animals 29"),
        ("1f34e", "letters", "letters"),
    }
    by_style = split_by_site(records, 3, "style")
    assert {name: len(part) for name, part in by_style.items()} == {"3d": 3, "flat": 4, "shaded": 4}
    assert all(r.metadata["style"] == name for name, part in by_style.items() for r in part)


def test_emoji_are_split_by_concept(emoji):
    prepared = load(DataSettings(source="emoji", path=str(emoji), channels=3, public_units=2), unit="record")
    private, public = ({r.metadata["concept"] for r in part} for part in (prepared.private, prepared.public))
    assert (len(private), len(public)) == (2, 2)
    assert not private & public
    with pytest.raises(UsageError, match="there are 4 concepts"):
        load(DataSettings(source="emoji", path=str(emoji), public_units=4), unit="record")


def test_a_language_whose_captions_are_missing_is_named(emoji):
    with pytest.raises(DataError, match=r"captions/ru\.json"):
        load(DataSettings(source="emoji", path=str(emoji), languages=("ru",)), unit="record")
