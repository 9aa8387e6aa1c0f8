"""Loading: resized, split by unit, refused at bad records; and the card of what was loaded."""

import os
from pathlib import Path

import numpy as np
import pytest

from sfumato.data.card import personal_identifiers, public_card, stats
from sfumato.data.prepare import check, load
from sfumato.data.settings import DataSettings
from sfumato.errors import DataError, UsageError
from sfumato.records import Record


def of(root: Path, **settings) -> DataSettings:
    return DataSettings(
        **({"source": "folder", "path": str(root), "public_units": 1, "unit_column": "person"} | settings)
    )


def test_the_clinic_is_private_and_public_patients_in_one_array():
    prepared = load(DataSettings(units=40, public_units=10), unit="person")
    assert len({r.unit for r in prepared.private}) == 40
    assert len({r.unit for r in prepared.public}) == 10
    assert prepared.facts["zone"] == ("upper", "middle", "lower")
    assert prepared.private[0].image.base is prepared.private[-1].image.base
    assert prepared.card["phantom"] is True
    assert "PHANTOM" in prepared.card["description"]
    assert "No patient in it exists" in prepared.card["warning"]


def test_the_public_part_does_not_depend_on_how_many_are_private():
    few, more = (load(DataSettings(units=units, public_units=10), unit="person") for units in (5, 60))
    assert [r.text for r in few.public] == [r.text for r in more.public]


def test_records_as_units():
    prepared = load(DataSettings(units=20, public_units=5), unit="record")
    assert all(r.unit == r.id for r in prepared.private + prepared.public)


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (64, 1)])
def test_pictures_get_the_asked_size_and_channels(folder, size, channels):
    prepared = load(of(folder(), image_size=size, channels=channels), unit="person")
    assert {r.image.shape for r in prepared.private + prepared.public} == {(size, size, channels)}
    assert load(DataSettings(units=2, public_units=1, image_size=size, channels=channels), unit="person").private[
        0
    ].image.shape == (size, size, channels)


def test_a_unit_is_on_one_side_and_nothing_is_lost(folder):
    prepared = load(of(folder(count=40, people=10), public_units=3), unit="person")
    private, public = ({r.unit for r in part} for part in (prepared.private, prepared.public))
    assert not private & public
    assert (len(private), len(public)) == (7, 3)
    assert len(prepared.private) + len(prepared.public) == 40
    as_records = load(of(Path(prepared.account_home), public_units=3), unit="record")
    assert {r.metadata["person"] for r in as_records.public} == public
    assert len({r.unit for r in as_records.private}) == 28


def test_taking_a_private_unit_away_moves_nobody(folder):
    root = folder(count=40, people=20)
    before = load(of(root, public_units=5), unit="person")
    gone = before.private[0].unit
    lines = [line for line in (root / "metadata.jsonl").read_text().splitlines() if f'"{gone}"' not in line]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    after = load(of(root, public_units=5), unit="person")
    assert [r.text for r in after.public] == [r.text for r in before.public]
    assert [r.text for r in after.private] == [r.text for r in before.private if r.unit != gone]


def test_declared_splits_are_kept(folder):
    def declare(rows):
        for row in rows:
            row["split"] = "train" if row["person"] in ("p0", "p1") else "test"

    prepared = load(of(folder(change=declare)), unit="person")
    assert {r.unit for r in prepared.private} == {"p0", "p1"}
    assert len({r.unit for r in prepared.public}) == 1
    assert prepared.card["splits"] == {"private": 6, "public": 3, "held out, not used": 3}


def test_a_unit_in_two_splits_is_refused(folder):
    def leak(rows):
        for number, row in enumerate(rows):
            row["split"] = "train" if number < 6 else "val"

    with pytest.raises(DataError, match="'p0' · is in the splits train, validation"):
        load(of(folder(change=leak)), unit="person")


def test_a_small_sample_first(folder):
    root = folder(count=40, people=20)
    prepared = load(of(root, limit_units=4), unit="person")
    assert len({r.unit for r in prepared.private}) == 4
    assert (
        len({r.unit for r in load(DataSettings(units=50, limit_units=6, public_units=1), unit="person").private}) == 6
    )


def test_bad_records_stop_a_load_and_the_first_are_named(folder):
    def spoil(rows):
        rows[2]["text"] = ""
        rows[7]["file_name"] = "gone.png"

    with pytest.raises(DataError) as refused:
        load(of(folder(change=spoil)), unit="person")
    assert "2 bad records" in refused.value.message
    assert "metadata.jsonl:3" in refused.value.message
    assert "metadata.jsonl:8" in refused.value.message
    assert "data check" in refused.value.next
    assert refused.value.exit_code == 2


def test_many_bad_records_are_not_all_named(folder):
    with pytest.raises(DataError, match="at least 5 bad records"):
        load(of(folder(change=lambda rows: [row.update(text=" ") for row in rows])), unit="person")


def test_a_needed_modality_that_is_missing_is_refused(folder):
    root = folder(change=lambda rows: [row.pop("text") for row in rows])
    with pytest.raises(DataError, match="column text · is missing"):
        load(of(root), unit="person")
    assert load(of(root), unit="person", need=("image",)).private[0].text is None


def test_settings_that_cannot_be_honoured_are_refused(folder, tmp_path):
    root = folder()
    with pytest.raises(UsageError, match="public_units = 4 · there are 4 units"):
        load(of(root, public_units=4), unit="person")
    with pytest.raises(UsageError, match="needs the column"):
        load(of(root, unit_column=None), unit="person")
    with pytest.raises(UsageError, match="chosen languages"):
        load(of(root, languages=("ru",)), unit="person")
    with pytest.raises(UsageError, match="unit_column"):
        load(DataSettings(unit_column="x"), unit="person")
    with pytest.raises(UsageError, match="names no persons"):
        load(DataSettings(source="mnist", path=str(tmp_path)), unit="person")
    with pytest.raises(UsageError, match="up to 128"):
        load(DataSettings(image_size=256), unit="person")


def test_the_account_is_beside_the_data_or_in_the_users_folder(folder, tmp_path, monkeypatch):
    root = folder()
    assert load(of(root), unit="person").account_home == root
    built_in = load(DataSettings(units=1, public_units=0), unit="person").account_home
    assert built_in == tmp_path / "share" / "sfumato" / "clinic-0"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    elsewhere = load(of(root), unit="person").account_home
    assert elsewhere.parent == tmp_path / "share" / "sfumato"
    assert elsewhere.name.startswith("records-")


def test_the_card_counts_and_the_public_card_leaves_private_counts_out(folder):
    def tell(rows):
        rows[0]["text"] = "write to jane.doe@example.org"
        for row in rows:
            row["consent"] = "yes"

    card = load(of(folder(change=tell), public_units=1, seed=1), unit="person").card
    assert card["records"] == 9
    assert card["units"] == 3
    assert card["records_per_unit"] == {"3": 3}
    assert card["rights"]["license"] == {"CC0": 9}
    assert card["rights"]["consent"] == {"yes": 9}
    shown = public_card(card)
    assert not {"records", "units", "personal_identifiers", "rights", "splits", "records_per_unit"} & set(shown)
    assert shown["public_units"] == 1
    assert "modalities" not in shown  # one record more can change it
    assert not any(value == 9 or isinstance(value, dict) for value in shown.values())
    generated = public_card(load(DataSettings(units=5, public_units=2), unit="person").card)
    assert generated["units"] == 5


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mail a.b+c@host.example.com now", "e-mail addresses"),
        ("call +49 170 123 4567", "telephone numbers"),
        ("call (030) 123-4567", "telephone numbers"),
        ("insured 1234567890", "long digit strings"),
        ("A 54-year-old man, 4.9 cm nodule, 51 mm, 120 over 80", None),
    ],
)
def test_personal_identifiers_are_counted_by_records(text, found):
    counts = personal_identifiers(
        [Record(id="1", unit="1", text=text), Record(id="2", unit="2", metadata={"note": text})]
    )
    assert {name for name, count in counts.items() if count} == ({found} if found else set())
    assert all(count in (0, 2) for count in counts.values())


def test_stats_count_what_is_there_and_what_is_not_readable(folder):
    root = folder(change=lambda rows: rows[0].update(text=""))
    figures = stats(root, unit_column="person")
    assert figures["sha256"] == check(root)["sha256"]
    assert (figures["records"], figures["unreadable"], figures["units"]) == (12, 1, 4)
    assert [problem["code"] for problem in figures["problems"]] == ["empty_text"]
    assert figures["image"]["width"] == {"min": 24, "median": 24, "max": 24}
    assert figures["text"]["words"]["median"] == 3
    assert figures["records_per_unit"] == {"2": 1, "3": 3}


def test_stats_of_the_clinic_have_its_labels():
    figures = stats(DataSettings(units=60))
    assert sum(figures["labels"]["side"].values()) == figures["records"]
    assert set(figures["labels"]["site"]) == {"A", "B", "C"}
    assert sum(figures["records_per_unit"].values()) == 60


def test_smaller_pictures_are_averages_of_the_drawn_ones():
    small, drawn = (
        load(DataSettings(units=1, public_units=0, image_size=s), unit="person").private[0].image for s in (16, 32)
    )
    blocks = drawn[:, :, 0].reshape(16, 2, 16, 2).mean((1, 3))
    np.testing.assert_allclose(small[:, :, 0], blocks, atol=1)
