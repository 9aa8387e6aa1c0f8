"""Copies left out, common labels thinned, and that one unit away changes nobody else's records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.data.conftest import picture

from sfumato.data import copies
from sfumato.data.balance import own_number, thinned
from sfumato.data.card import stats
from sfumato.data.checking import content_digest
from sfumato.data.prepare import load
from sfumato.data.settings import Balance, DataSettings, Deduplicate
from sfumato.errors import DataError, PrivacyRefused, UsageError
from sfumato.records import Record

NOTHING = {"within_units": False, "against_public": False, "across_units": False}


def record(unit: str, text: str | None = None, **values) -> Record:
    record.count += 1  # type: ignore[attr-defined]
    return Record(id=f"{unit}/{record.count}", unit=unit, text=text, **values)  # type: ignore[attr-defined]


record.count = 0  # type: ignore[attr-defined]


def slow_within(private: list[Record]) -> list[int]:
    """Oracle: two loops."""
    return [
        i
        for i, r in enumerate(private)
        if not any(e.unit == r.unit and content_digest(e) == content_digest(r) for e in private[:i])
    ]


texts = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", "z"])), max_size=14)


@settings(deadline=None)
@given(texts)
def test_within_units_equals_two_loops(pairs):
    private = [record(unit, text) for unit, text in pairs]
    kept, counts = copies.without(private, [], Deduplicate(against_public=False))
    assert kept.tolist() == slow_within(private)
    assert counts == {"copies within a unit": len(private) - len(kept)}


@settings(deadline=None)
@given(texts, texts, st.booleans(), st.sampled_from("abcd"))
def test_one_unit_away_changes_nobody_elses_records(pairs, published, near, gone):
    """The claim of the two rules that are allowed under privacy, for every unit of every such data set."""
    private = [record(unit, text) for unit, text in pairs]
    public = [record(f"public {unit}", text) for unit, text in published]
    rule = Deduplicate(near=near)

    def kept(records: list[Record]) -> list[str]:
        return [records[i].id for i in copies.without(records, public, rule)[0]]

    others = [r for r in private if r.unit != gone]
    assert [name for name in kept(private) if not name.startswith(f"{gone}/")] == kept(others)


def test_across_units_one_unit_away_does_change_others():
    """Why that rule is refused: the attack that must succeed on it."""
    private = [record("a", "x"), record("b", "x"), record("c", "x")]
    rule = Deduplicate(across_units=True)
    assert [private[i].unit for i in copies.without(private, [], rule)[0]] == ["a"]
    assert [private[1:][i].unit for i in copies.without(private[1:], [], rule)[0]] == ["b"]


def test_copies_of_public_records_are_left_out_and_public_ones_never():
    private = [record("a", "x"), record("b", "y"), record("b", "y")]
    public = [record("p", "x"), record("q", "x")]
    kept, counts = copies.without(private, public, Deduplicate(within_units=False))
    assert kept.tolist() == [1, 2]
    assert counts == {"copies of public records": 1}


def test_near_copies_of_pictures_words_and_sounds():
    image = picture(1, size=32)
    brighter = np.clip(image.astype(int) + 6, 0, 255).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BOX))
    rng = np.random.default_rng(0)
    time = np.arange(8000) / 8000
    sound = (np.sin(2 * np.pi * (300 + 900 * time) * time) * np.exp(-3 * time)).astype(np.float32)
    other = rng.standard_normal(8000).astype(np.float32) * 0.1
    private = [
        record("u", "A Dog, running!", image=image),
        record("u", "a dog  running", image=brighter),  # 1: near 0
        record("u", "a dog running", image=smaller),  # 2: near 0
        record("u", "a cat running", image=image),  # 3: other words
        record("u", "a dog running", image=picture(2, size=32)),  # 4: another picture
        record("u", "a dog running"),  # 5: no picture
        record("u", audio=sound, sample_rate=8000),
        record("u", audio=0.4 * sound + 1e-4 * other, sample_rate=8000),  # 7: near 6
        record("u", audio=other, sample_rate=8000),  # 8: another sound
    ]
    against, _ = copies.without(private[1:], [private[0], private[6]], Deduplicate(within_units=False, near=True))
    assert sorted(set(range(8)) - set(against.tolist())) == [0, 1, 5, 6]  # 1, 2, 6 itself and 7
    exact, _ = copies.without(private, [], Deduplicate())
    assert len(exact) == len(private)
    kept, counts = copies.without(private, [], Deduplicate(near=True))
    assert sorted(set(range(9)) - set(kept.tolist())) == [1, 2, 7]
    assert counts["copies within a unit"] == 3


def test_silent_and_short_sounds_have_an_outline():
    for samples in (np.zeros(10, np.float32), np.zeros(4000, np.float32), np.ones(1, np.float32)):
        assert copies.outline(samples).shape == (64, 64, 1)


# -- thinning --


def labelled(count: int, label: str) -> list[Record]:
    return [record(f"{label}{i}", f"{label} {i}", metadata={"facts": {"kind": label}}) for i in range(count)]


def test_thinning_keeps_the_public_share():
    """Binomial(4000, .25); false-alarm probability 1e-6."""
    from scipy.stats import binom

    private = labelled(4000, "common") + labelled(50, "rare")
    kept = thinned(private, Balance(column="kind", keep={"common": 0.25}), seed=1)
    common = int((kept < 4000).sum())
    assert binom.ppf(5e-7, 4000, 0.25) <= common <= binom.ppf(1 - 5e-7, 4000, 0.25)
    assert (kept >= 4000).sum() == 50
    other = thinned(private, Balance(column="kind", keep={"common": 0.25}), seed=2)
    assert kept.tolist() != other.tolist()


def test_a_record_decides_for_itself_whatever_its_name_and_neighbours():
    private = labelled(60, "common")
    rule = Balance(column="kind", keep={"common": 0.5})
    stay = {private[i].text for i in thinned(private, rule, seed=0)}
    renamed = [Record(id=f"row {i}", unit=r.unit, text=r.text, metadata=r.metadata) for i, r in enumerate(private[7:])]
    assert {renamed[i].text for i in thinned(renamed, rule, seed=0)} == {r.text for r in renamed} & stay
    assert 0 <= own_number(private[0], 0) < 1


def test_equal_thins_to_the_rarest():
    private = labelled(600, "common") + labelled(40, "rare")
    kept = thinned(private, Balance(column="kind", equal=True), seed=0)
    assert (kept >= 600).sum() == 40
    assert 10 < (kept < 600).sum() < 90


def test_a_column_that_nobody_has_is_refused():
    with pytest.raises(UsageError, match="no record has it"):
        thinned(labelled(3, "x"), Balance(column="sort", keep={"x": 0.5}), seed=0)
    for wrong in ({}, {"keep": {"x": 0.5}, "equal": True}, {"keep": {"x": 1.5}}):
        with pytest.raises(UsageError):
            Balance(column="kind", **wrong)


# -- in a load --


def of(root: Path, **given) -> DataSettings:
    return DataSettings(**({"source": "folder", "path": str(root), "public_units": 0, "unit_column": "person"} | given))


@pytest.mark.parametrize(
    "preparation", [{"deduplicate": Deduplicate(across_units=True)}, {"balance": Balance(column="consent", equal=True)}]
)
def test_what_couples_units_is_refused_under_privacy_and_done_without(folder: Callable[..., Path], preparation):
    root = folder(change=lambda rows: [row.update(consent="yes") for row in rows])
    with pytest.raises(PrivacyRefused) as refused:
        load(of(root, **preparation), unit="person")
    assert refused.value.exit_code == 3
    assert refused.value.refusals[0]["code"] == "coupled_units"
    assert load(of(root, **preparation), unit="person", private=False).card["preparation"]


def test_units_are_those_of_the_guarantee(folder):
    """With a record as the unit two records of one person are two units: nothing is within a unit."""

    def copy(rows):
        rows[4].update({key: rows[0][key] for key in ("file_name", "text")})
        assert rows[4]["person"] == rows[0]["person"]

    root = folder(change=copy)
    assert len(load(of(root, deduplicate=Deduplicate()), unit="person").private) == 11
    assert len(load(of(root, deduplicate=Deduplicate()), unit="record").private) == 12


def test_a_load_that_leaves_nothing_is_refused(folder):
    root = folder(change=lambda rows: [row.update(kind="x") for row in rows])
    with pytest.raises(DataError, match="all were left out"):
        load(of(root, balance=Balance(column="kind", keep={"x": 0.0})), unit="person")


def test_a_small_sample_decodes_nothing_else(folder):
    root = folder(count=40, people=20)
    few = load(of(root, limit_units=3, public_units=2), unit="person")
    whole = load(of(root, public_units=2), unit="person")
    assert {r.unit for r in few.private} <= {r.unit for r in whole.private}
    assert [r.id for r in few.public] == [r.id for r in whole.public]
    seen = {r.unit for r in [*few.private, *few.public]}
    assert len(seen) == 5
    for i in range(40):
        if f"p{i % 20}" not in seen:
            (root / f"{i}.png").unlink()
    again = load(of(root, limit_units=3, public_units=2), unit="person")
    assert [r.id for r in again.private] == [r.id for r in few.private]
    with pytest.raises(DataError, match="does not exist"):
        load(of(root, public_units=2), unit="person")
    figures = stats(of(root, limit_units=3))
    assert figures["units"] == 3
    assert stats(root, unit_column="person", limit_units=3)["records"] == 6


# -- what a record must have --


def test_modalities_say_what_is_read_and_needed(folder, monkeypatch):
    root = folder()
    only_text = load(of(root, modalities=("text",)), unit="person").private
    assert all(r.image is None and r.text for r in only_text)
    (root / "3.png").unlink()
    assert len(load(of(root, modalities=("text",)), unit="person").private) == 12
    with pytest.raises(DataError, match="does not exist"):
        load(of(root), unit="person")
    with pytest.raises(DataError, match="column audio · is missing"):
        load(of(root, modalities=("text", "audio")), unit="person")


def test_a_record_may_lack_some_but_not_all(folder):
    def lack(rows):
        rows[0]["text"] = None
        rows[1]["file_name"] = ""

    root = folder(change=lack)
    with pytest.raises(DataError, match="2 bad records"):
        load(of(root), unit="person")
    prepared = load(of(root, may_lack=True), unit="person")
    assert [(r.text is None, r.image is None) for r in prepared.private[:3]] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    (root / "metadata.jsonl").write_text(
        '{"text": null, "file_name": null, "person": "p"}\n{"text": "x", "person": "q"}'
    )
    with pytest.raises(DataError, match="neither text nor image nor audio"):
        load(of(root, may_lack=True), unit="person")


def test_the_clinic_carries_sound_when_asked():
    data = DataSettings(units=3, public_units=2, modalities=("text", "audio"))
    prepared = load(data, unit="person")
    for r in [*prepared.private, *prepared.public]:
        assert r.image is None
        assert r.audio is not None
        assert (r.sample_rate, r.audio.shape) == (4000, (4000,))
        assert {"heart_rate", "murmur"} <= set(r.metadata)
        assert str(r.metadata["heart_rate"]) in (r.text or "")
    assert prepared.card["modalities"] == ["text", "audio"]
    silent = load(DataSettings(units=3, public_units=2), unit="person").private
    assert all(r.audio is None and r.image is not None for r in silent)


@pytest.mark.parametrize("wrong", [(), ("text", "text")])
def test_modalities_that_say_nothing_are_refused(wrong):
    with pytest.raises(UsageError, match="modalities"):
        DataSettings(modalities=wrong)


def test_another_column_may_hold_the_text(folder):
    def prompt(rows):
        for row in rows:
            row["prompt"] = f"draw {row['text']}"

    root = folder(change=prompt)
    (first, *_) = load(of(root, text_column="prompt"), unit="person").private
    assert first.text == "draw picture number 0"
    assert first.metadata["text"] == "picture number 0"
    with pytest.raises(DataError, match="column plot"):
        load(of(root, text_column="plot"), unit="person")
