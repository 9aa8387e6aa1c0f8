"""The phantom clinic: deterministic, and its text, picture, sound and facts say the same."""

import re

import numpy as np
import pytest

from sfumato.data.clinic import FACTS, SITES, Clinic
from sfumato.data.histories import LANGUAGES
from sfumato.errors import UsageError


@pytest.fixture(scope="module")
def records():
    return list(Clinic(patients=1500, seed=3))


def test_the_first_patients_are_the_same_however_many_follow(records):
    few = list(Clinic(patients=40, seed=3))
    assert [r.text for r in few] == [r.text for r in records[: len(few)]]
    for one, other in zip(few, records, strict=False):
        assert one.metadata == other.metadata
        np.testing.assert_array_equal(one.image, other.image)
    assert records[len(few)].unit == "patient-000040"


def test_a_count_beyond_one_block_continues_the_names(records):
    assert len(records) == len(Clinic(patients=1500, seed=3))
    units = list(dict.fromkeys(r.unit for r in records))
    assert units == [f"patient-{i:06d}" for i in range(1500)]
    assert len({r.id for r in records}) == len(records)


def test_another_seed_and_the_public_stream_are_other_patients():
    first = {r.image.tobytes() for r in Clinic(patients=50, seed=0)}
    assert not first & {r.image.tobytes() for r in Clinic(patients=50, seed=1)}
    public = list(Clinic(patients=50, seed=0, public=True))
    assert not first & {r.image.tobytes() for r in public}
    assert all(r.unit.startswith("public-") for r in public)


def test_patients_have_one_to_four_records_and_keep_what_does_not_change(records):
    by_unit = {}
    for record in records:
        by_unit.setdefault(record.unit, []).append(record)
    assert {len(rows) for rows in by_unit.values()} == {1, 2, 3, 4}
    changed = 0
    for rows in by_unit.values():
        for name in ("sex", "site", "age"):
            assert len({r.metadata[name] for r in rows}) == 1
        assert len({r.metadata["facts"]["heart"] for r in rows}) == 1
        assert [r.metadata["visit"] for r in rows] == list(range(1, len(rows) + 1))
        changed += len({r.metadata["facts"]["zone"] for r in rows}) > 1
    assert changed > 100


def test_every_label_occurs_and_sites_differ(records):
    for name, labels in FACTS.items():
        counts = {label: sum(r.metadata["facts"][name] == label for r in records) for label in labels}
        assert min(counts.values()) > len(records) / 8, (name, counts)
    share = {
        site.name: np.mean(
            [r.metadata["facts"]["kind"] == "cavity" for r in records if r.metadata["site"] == site.name]
        )
        for site in SITES
    }
    assert share["B"] > share["C"] + 0.15


WORDS = {  # in English, what says each label, and what would say another
    "side": {"left": r"\bleft\b", "right": r"\bright\b"},
    "zone": {"upper": r"\bupper\b", "middle": r"\bmid(dle)?\b", "lower": r"\blower\b"},
    "kind": {"nodule": "nodule", "consolidation": "consolidation", "cavity": "cavity"},
    "view": {"frontal": "frontal", "lateral": "lateral"},
    "heart": {"enlarged": r"(?<!not )enlarged|increased|cardiomegaly", "normal": r"normal|not enlarged"},
    "effusion": {
        "none": r"(no|without)( pleural)? (effusion|fluid)",
        "present": r"(?<!no )(?<!without )(?<!no pleural )(pleural (effusion|fluid)|a pleural effusion)",
    },
}


def test_english_histories_state_every_fact_once_and_no_other(records):
    for record in records:
        text = record.text.lower()
        for fact, label in record.metadata["facts"].items():
            for other, pattern in WORDS[fact].items():
                assert bool(re.search(pattern, text)) == (other == label), (fact, label, other, record.text)
        assert re.search(rf"\b{record.metadata['age']}\b", text)
        size = record.metadata["size_mm"]
        assert f"{size} mm" in text or f"{size / 10:g} cm" in text


def test_histories_vary(records):
    without_numbers = {re.sub(r"\d+(\.\d+)?", "#", r.text) for r in records}
    assert len(without_numbers) > 0.95 * len(records)


@pytest.mark.parametrize("language", ["ru", "zh"])
def test_other_languages_tell_the_same_facts(language, records):
    told = list(Clinic(patients=300, seed=3, languages=(language,)))
    phrases = LANGUAGES[language]
    for record, english in zip(told, records, strict=False):
        assert record.metadata["facts"] == english.metadata["facts"]
        np.testing.assert_array_equal(record.image, english.image)
        facts = record.metadata["facts"]
        assert any(sentence in record.text for sentence in phrases.heart[facts["heart"]])
        assert any(sentence in record.text for sentence in phrases.effusion[facts["effusion"]])
        other = "left" if facts["side"] == "right" else "right"
        assert phrases.words["side"][facts["side"]][0] in record.text
        assert phrases.words["side"][other][0] not in record.text
        assert any(kind in record.text.lower() for kind in phrases.words["kind"][facts["kind"]])
        assert "{" not in record.text
        assert not re.search("[a-z]", record.text)


def test_several_languages_are_mixed_record_by_record():
    told = [r.metadata["language"] for r in Clinic(patients=200, languages=("en", "ru", "zh"))]
    assert min(told.count(language) for language in ("en", "ru", "zh")) > len(told) / 5


def mean_of(records, **facts):
    chosen = [r.image[:, :, 0] for r in records if all(r.metadata["facts"][k] == v for k, v in facts.items())]
    return np.mean(chosen, axis=0)


def test_facts_are_where_the_conventions_say(records):
    """Left is on the viewer's right in frontal views; in lateral ones the spine is, so they mirror each other."""
    left = mean_of(records, view="frontal", side="left", kind="nodule", zone="upper", effusion="none", heart="normal")
    right = mean_of(records, view="frontal", side="right", kind="nodule", zone="upper", effusion="none", heart="normal")
    lower = mean_of(records, view="frontal", side="left", kind="nodule", zone="lower", effusion="none", heart="normal")
    assert (left - right)[8:11, 21:24].mean() > 40
    assert (right - left)[8:11, 8:11].mean() > 40
    assert (lower - left)[19:22, 22:25].mean() > 40
    frontal, large = (mean_of(records, view="frontal", heart=h, effusion="none") for h in ("normal", "enlarged"))
    assert (large - frontal)[18:22, 21:24].mean() > 15
    wet = mean_of(records, view="frontal", effusion="present", side="right")
    dry = mean_of(records, view="frontal", effusion="none", side="right")
    assert (wet - dry)[21:24, 4:7].mean() > 40
    one, other = (mean_of(records, view="lateral", side=side) for side in ("left", "right"))
    assert np.abs(one - other).mean() > 15
    assert np.abs(one - other[:, ::-1]).mean() < 6


def test_a_cavity_has_a_dark_middle_and_a_nodule_has_none(records):
    where = {"view": "frontal", "side": "right", "zone": "middle", "effusion": "none", "heart": "normal"}
    assert mean_of(records, kind="nodule", **where)[14, 8] - mean_of(records, kind="cavity", **where)[14, 8] > 60


@pytest.mark.parametrize("size", [32, 48, 128])
def test_pictures_have_the_asked_size(size):
    record = next(iter(Clinic(patients=1, image_size=size)))
    assert record.image.shape == (size, size, 1)
    assert record.image.dtype == np.uint8
    assert 40 < record.image.mean() < 160


def test_a_size_that_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="image_size = 16"):
        Clinic(patients=1, image_size=16)


def test_sound_is_made_when_asked_and_carries_rate_murmur_and_wheeze():
    records = list(Clinic(patients=120, audio=True))
    assert all(r.audio.shape == (4000,) and r.audio.dtype == np.float32 and r.sample_rate == 4000 for r in records)
    assert all(np.abs(r.audio).max() <= 1 for r in records)
    power = np.abs(np.fft.rfft([r.audio for r in records])) ** 2
    tone = power[:, 250:900].max(1) / np.median(power[:, 250:900], axis=1)
    wheeze = np.array([r.metadata["wheeze"] for r in records])
    assert tone[wheeze].min() > tone[~wheeze].max()
    assert "murmur" in records[0].text
    assert next(iter(Clinic(patients=1))).audio is None
