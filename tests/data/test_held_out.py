"""What is measured stays unseen by a training on public records: by name, by tag, by code, and by copy."""

from dataclasses import replace

import numpy as np
import pytest

from sfumato.data.held_out import without_measured
from sfumato.records import Record


def record(name: str, *, seed: int = 0, text: str | None = None, **metadata) -> Record:
    picture = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Record(id=name, unit=name, text=text or name, image=picture, metadata=metadata)


MEASURED = [
    record("m1", seed=1, concept="1f408", label="cat", text="cat, pet, flat"),
    record("m2", seed=2, concept="1f3e0", label="House: small", text="house, flat"),
]


@pytest.mark.parametrize(
    ("metadata", "stays"),
    [
        ({"concept": "cat", "label": "Cat"}, False),
        ({"concept": "kitten", "label": "kitten", "tags": ["pet", "CAT"]}, False),
        ({"concept": "home", "label": "home", "code": "1f3e0"}, False),
        ({"concept": "house small"}, False),
        ({"concept": "house", "tags": ["small"]}, True),
        ({"concept": "catfish", "tags": ["cat food"]}, True),
        ({}, True),
    ],
)
def test_a_record_that_is_named_as_something_measured_is_left_out(metadata, stays):
    kept, counts = without_measured([record("a", seed=7), record("b", seed=8, **metadata)], MEASURED)
    assert kept.tolist() == ([0, 1] if stays else [0])
    assert counts == {"named as a measured concept": int(not stays), "copies of measured records": 0}


def test_a_near_copy_with_the_same_words_is_left_out_where_no_concept_is_named():
    measured = [replace(MEASURED[0], metadata={})]
    assert measured[0].image is not None
    paler = np.clip(measured[0].image.astype(int) + 2, 0, 255).astype(np.uint8)
    copy = Record(id="copy", unit="copy", text="Cat, pet; flat", image=paler)
    other = Record(id="other", unit="other", text="dog, pet, flat", image=paler)
    kept, counts = without_measured([other, copy], measured)
    assert kept.tolist() == [0] and counts["copies of measured records"] == 1


def test_the_tags_of_a_measured_record_hold_nothing_out():
    """Else every pet would go for the sake of one cat."""
    kept, _ = without_measured([record("a", seed=5, concept="pet")], [record("m", concept="cat", tags=["pet"])])
    assert kept.tolist() == [0]
