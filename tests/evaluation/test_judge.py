import numpy as np
import pytest

from sfumato.errors import UsageError
from sfumato.evaluation import agreement, judge


def columns(records):
    images = np.stack([record.image for record in records])
    return images, {fact: [r.metadata["facts"][fact] for r in records] for fact in records[0].metadata["facts"]}


@pytest.mark.parametrize(("pixels", "channels"), [(32, 1), (28, 1), pytest.param(64, 3, marks=pytest.mark.slow)])
def test_the_judge_reads_visible_facts_of_pictures_it_has_not_seen(make_records, pixels, channels):
    images, facts = columns(make_records(160, seed=1, pixels=pixels, channels=channels))
    reader = judge.train(images, facts, seconds=20, seed=0)
    held_out, expected = columns(make_records(200, seed=2, pixels=pixels, channels=channels))
    for fact, (value, low, high) in agreement.facts(expected, reader.read(held_out)).items():
        assert value > 0.85, fact
        assert low <= value <= high
    assert reader.features(held_out).shape == (200, judge.FEATURES)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(make_records):
    images, facts = columns(make_records(64, seed=1))
    first, again, other = (judge.train(images, facts, seconds=60, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert not first.stopped_early
    assert first.name == f"judge-cnn, sha256 {first.sha256}"


def test_the_name_changes_with_any_weight(make_records):
    import torch

    images, facts = columns(make_records(16, seed=1))
    reader = judge.train(images, facts, seconds=60, seed=0)
    with torch.no_grad():
        next(reader.network.parameters()).view(-1)[0] += 1e-6
    assert judge.sha256_of(reader.network) != reader.sha256


def test_training_stops_at_its_time_box_and_says_so(make_records):
    images, facts = columns(make_records(240, seed=1))
    assert judge.train(images, facts, seconds=0.2, seed=0).stopped_early


def test_an_unknown_fact_teaches_nothing_but_does_no_harm(make_records):
    images, facts = columns(make_records(240, seed=1))
    facts["side"] = [value if index % 2 else None for index, value in enumerate(facts["side"])]
    reader = judge.train(images, facts, seconds=20, seed=0)
    held_out, expected = columns(make_records(200, seed=2))
    assert agreement.facts(expected, reader.read(held_out))["side"][0] > 0.85


def test_augmentation_keeps_left_on_the_left():
    import torch

    pictures = torch.zeros(50, 1, 32, 32)
    pictures[:, :, :, :12] = 1
    moved = judge.augment(pictures, torch.Generator().manual_seed(0))
    assert (moved[..., :10].mean((1, 2, 3)) > moved[..., 22:].mean((1, 2, 3)) + 0.5).all()


def test_no_pictures_give_no_readings(make_records):
    images, facts = columns(make_records(16, seed=1))
    reader = judge.train(images, facts, seconds=60, seed=0)
    assert reader.read(images[:0]) == {fact: [] for fact in facts}


def test_wrong_use_is_refused_by_name(make_records):
    images, facts = columns(make_records(16, seed=1))
    with pytest.raises(UsageError, match="images = float64"):
        judge.train(images / 255, facts, seconds=1, seed=0)
    with pytest.raises(UsageError, match=r"facts\['side'\] = 3 values"):
        judge.train(images, {"side": ["left"] * 3}, seconds=1, seed=0)
    with pytest.raises(UsageError, match="at least one fact"):
        judge.train(images, {}, seconds=1, seed=0)
    reader = judge.train(images, facts, seconds=60, seed=0)
    with pytest.raises(UsageError, match="the judge learnt from"):
        reader.read(np.zeros((2, 28, 28, 1), np.uint8))
