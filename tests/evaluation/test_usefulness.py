"""Train on synthetic, test on real."""

import math

import numpy as np
import pytest

from sfumato.errors import UsageError
from sfumato.evaluation.usefulness import NETWORKS, make_network, train_on_synthetic, wilson


def stack(records):
    return np.stack([r.image for r in records]), [r.metadata["facts"]["side"] for r in records]


@pytest.mark.parametrize("network", NETWORKS)
def test_what_learns_from_good_pictures_reads_real_ones(make_records, network):
    good, real = stack(make_records(300, seed=1, pixels=16)), stack(make_records(200, seed=2, pixels=16))
    found = train_on_synthetic(*good, *real, network=network, epochs=40 if network == "logistic_regression" else 8)
    assert found.value > 0.9
    assert found.low < found.value < found.high or found.value == found.high == 1
    assert 0.4 < found.majority < 0.62
    assert (found.trained_on, found.tested_on, found.chosen_by) == (300, 200, "fixed number of passes")
    assert set(found.by_label) == {"left", "right"}
    mean = np.average(list(found.by_label.values()), weights=[real[1].count(side) for side in found.by_label])
    assert mean == pytest.approx(found.value)
    assert len(found.network.split("sha256 ")[1]) == 64


def test_labels_that_say_nothing_of_their_pictures_teach_nothing(make_records):
    pictures, labels = stack(make_records(300, seed=1, pixels=16))
    shuffled = list(np.random.default_rng(0).permutation(labels))
    found = train_on_synthetic(
        pictures, shuffled, *stack(make_records(200, seed=2, pixels=16)), network="mlp", epochs=5
    )
    assert found.value < 0.68  # of 200 at chance: above it with probability 1e-7


def test_the_test_pictures_choose_nothing(make_records):
    """Whatever is tested on, the network is the same: by its sha256."""
    good = stack(make_records(120, seed=1, pixels=16))
    real, others = stack(make_records(60, seed=2, pixels=16)), stack(make_records(40, seed=3, pixels=16))
    for held_out in (0.0, 0.25):
        first, second = (
            train_on_synthetic(*good, *test, network="mlp", epochs=4, seed=3, held_out=held_out)
            for test in (real, (255 - others[0], others[1]))
        )
        assert (first.network, first.epochs) == (second.network, second.epochs)
    another = train_on_synthetic(*good, *real, network="mlp", epochs=4, seed=4, held_out=0.25)
    assert another.network != first.network
    assert another.trained_on == 90 and "30 held-out training pictures" in another.chosen_by
    assert 1 <= another.epochs <= 4


def test_a_label_that_was_never_seen_is_never_right(make_records):
    good, real = stack(make_records(60, seed=1, pixels=16)), stack(make_records(40, seed=2, pixels=16))
    found = train_on_synthetic(good[0], good[1], real[0], ["elsewhere"] * 40, network="logistic_regression", epochs=3)
    assert found.value == 0 and found.by_label == {"elsewhere": 0.0} and found.majority == 1


def test_whole_numbers_are_labels_too(make_records):
    good, real = stack(make_records(60, seed=1, pixels=16)), stack(make_records(40, seed=2, pixels=16))
    words = train_on_synthetic(*good, *real, network="logistic_regression", epochs=3)
    numbers = train_on_synthetic(
        good[0], np.array([side == "right" for side in good[1]], int), real[0], [int(side == "right") for side in real[1]],
        network="logistic_regression", epochs=3,
    )  # fmt: skip
    assert numbers.network == words.network and numbers.value == words.value


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (9_640, 10_000)])
def test_the_interval_is_wilsons(hits, count):
    """Its ends are the shares p whose score test gives exactly z: |hits/count - p| = z sqrt(p (1 - p) / count)."""
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(hits / count - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": "resnet"}, "network = 'resnet' · must be one of cnn, mlp, logistic_regression"),
        ({"held_out": 0.9}, "held_out = 0.9"),
        ({"held_out": 0.01}, "leaves a part empty"),
        ({"epochs": 0}, "epochs = 0"),
    ],
)
def test_what_does_not_fit_is_refused(make_records, change, words):
    good = stack(make_records(10, seed=1, pixels=16))
    with pytest.raises(UsageError, match=words):
        train_on_synthetic(*good, *good, **change)


def test_shapes_and_counts_must_fit(make_records):
    pictures, labels = stack(make_records(10, seed=1, pixels=16))
    with pytest.raises(UsageError, match=r"labels = 9 · must be one for each"):
        train_on_synthetic(pictures, labels[:9], pictures, labels)
    with pytest.raises(UsageError, match=r"test_pictures.shape\[1:\] = \(8, 8, 1\)"):
        train_on_synthetic(pictures, labels, pictures[:, :8, :8], labels)
    with pytest.raises(UsageError, match=r"test_pictures = float64"):
        train_on_synthetic(pictures, labels, pictures / 255, labels)
    with pytest.raises(UsageError, match="cnn needs 4 x 4"):
        make_network("cnn", (3, 3, 1), 2)
