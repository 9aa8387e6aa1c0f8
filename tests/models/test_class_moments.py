"""Records drawn from noisy sums: what is counted, what is made of it, and what noise is taken for."""

import math

import numpy as np
import pytest
import torch

from sfumato.models.class_moments import NOTHING, ClassMomentsMaker, classes_of, fit, root, without_noise
from sfumato.models.settings import ClassMoments, Cosine, TermAxis
from sfumato.privacy import latents
from sfumato.privacy.plan import MeanEmbedding
from sfumato.randomness import TestRandom
from sfumato.records import Record

CLASSES = (
    TermAxis(name="t-shirt", more=("t shirt",)),
    TermAxis(name="shirt", more=("shirt",)),
    TermAxis(name="bag", more=("bag", "purse"), less=("no bag",)),
)
SHAPE = (8, 8, 1)


def maker(products: bool = True, longest: float = 2.0, level: float = 0.0) -> ClassMomentsMaker:
    settings = ClassMoments(classes=CLASSES, image=Cosine(kept=3), longest=longest, products=products, level=level)
    return ClassMomentsMaker(settings, SHAPE)


def records(count: int, seed: int = 0) -> list[Record]:
    """Smooth pictures, brighter to the right in class 1, below in class 2, of a random strength each."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, 8)
    made = []
    for i in range(count):
        number = i % 3
        strength = 60 + 20 * rng.normal()
        picture = 128 + strength * (ramp[None] if number == 1 else ramp[:, None] if number == 2 else 0.5)
        picture = np.broadcast_to(picture, (8, 8))[:, :, None].clip(0, 255).astype(np.uint8)
        made.append(
            Record(id=str(i), unit=f"{i:05d}", text=f"a {('t-shirt', 'shirt', 'purse')[number]}", image=picture)
        )
    return made


def released(of: ClassMomentsMaker, given: list[Record], noise: float = 0.0) -> tuple[torch.Tensor, float]:
    plan = MeanEmbedding(population=len(given), delta=1e-6, dimension=of.dimension, noise_multiplier=noise)
    total = latents.release_class_sums(
        of.encode(given), of.features, plan, TestRandom(1), classes=of.classes, products=of.settings.products
    )
    return total, noise / len(given)


def test_a_text_is_of_the_first_class_that_it_says():
    texts = ["a T-shirt", "a shirt", "two bags, one purse", "a purse, no bag", "nothing of it", None]
    assert classes_of(texts, CLASSES).tolist() == [0, 1, 2, NOTHING, NOTHING, NOTHING]


@pytest.mark.parametrize("products", [True, False])
def test_features_are_no_longer_than_one_and_nothing_where_there_is_none(products):
    given = records(6)
    given[0] = Record(id="0", unit="00000", text="a bag", image=np.full(SHAPE, 255, np.uint8))
    given[1] = Record(id="1", unit="00001", text=None, image=given[1].image)
    given[2] = Record(id="2", unit="00002", text="a bag")
    of = maker(products, longest=0.3)
    table = of.encode(given)
    rows, classes = of.features(table.batch(range(6), records_per_unit=1))
    lengths = rows.norm(dim=1)
    assert (lengths <= 1 + 1e-12).all() and lengths[0] == pytest.approx(1.0)
    assert not rows[1].any() and not rows[2].any()
    assert classes.tolist() == [2, NOTHING, NOTHING, 0, 1, 2]


def test_without_noise_means_and_covariances_are_those_of_the_classes():
    given, of = records(300), maker()
    total, std = released(of, given)
    found = fit(total, std, of.settings)
    entries = (of.encode(given).tensors["image"].double() - of.origin).numpy()
    assert found.shares.tolist() == pytest.approx([1 / 3] * 3, abs=1e-3)
    for number in range(3):
        mine = entries[number::3]
        np.testing.assert_allclose(found.means[number].numpy(), mine.mean(0), atol=2e-3)
        covariance = np.cov(mine.T, bias=True)
        made = (found.roots[number] @ found.roots[number]).numpy()
        np.testing.assert_allclose(made, covariance, atol=5e-3 * np.abs(covariance).max() + 2e-4)


def test_noise_alone_has_no_eigenvalues_left_and_a_signal_keeps_most_of_its_own():
    """60 entries, fixed seed; the largest eigenvalue of the noise passes the edge by a percent or so, if at all."""
    generator, d, std = torch.Generator().manual_seed(0), 60, 0.1
    square = torch.randn(d, d, generator=generator, dtype=torch.float64) * std
    noise = square.triu(1) + square.triu(1).T + torch.diag(square.diagonal() * math.sqrt(2))
    assert float(without_noise(noise, std).norm()) < 0.1 * float(noise.norm())
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    signal = 5.0 * direction[:, None] * direction
    kept = without_noise(signal + noise, std)
    assert float((kept - signal).norm()) < 0.5 * float(noise.norm())  # and raw it is off by all of the noise
    torch.testing.assert_close(without_noise(signal, 0.0), signal)


def test_a_root_squares_to_the_positive_part():
    matrix = torch.diag(torch.tensor([4.0, -1.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(root(matrix) @ root(matrix), torch.diag(torch.tensor([4.0, 0.0, 0.25]).double()))


@pytest.mark.parametrize("products", [True, False])
def test_records_are_drawn_for_texts_in_turn_and_look_like_their_class(products):
    of = maker(products)
    total, std = released(of, records(600), noise=0.5)
    made = of.draw(total, std, ["a bag", "a shirt"], 300, seed=0)
    assert [record.text for record in made[:3]] == ["a bag", "a shirt", "a bag"] and len(made) == 300
    pictures = np.stack([record.image for record in made if record.image is not None]).astype(float)[..., 0]
    down = pictures[:, 4:].mean((1, 2)) - pictures[:, :4].mean((1, 2))
    right = pictures[:, :, 4:].mean((1, 2)) - pictures[:, :, :4].mean((1, 2))
    assert (down[::2] > 20).mean() > 0.9 and (right[1::2] > 20).mean() > 0.9
    again = of.draw(total, std, ["a bag", "a shirt"], 300, seed=0)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(made, again, strict=True))  # pyright: ignore
    assert (pictures[::2].std(0).max() > 3) == products
    assert of.usable(["a bag", "of no class", "a shirt"]) == ["a bag", "a shirt"]


def test_a_class_that_is_lost_in_the_noise_is_drawn_as_all_are_together():
    """No record says the third class: its share is noise, and nothing is divided by it."""
    given = [record for record in records(600) if "purse" not in str(record.text)]
    of = maker()
    total, std = released(of, given, noise=0.5)
    found = fit(total, std, of.settings)
    others = found.means[:2] * found.shares[:2, None]
    torch.testing.assert_close(found.means[2], others.sum(0) / found.shares[:2].sum())
    assert torch.isfinite(found.roots).all()


def test_a_level_is_what_a_plain_picture_has():
    """A picture all at the public level is counted as nothing, in colour too."""
    settings = ClassMoments(classes=CLASSES, image=Cosine(kept=3), level=-1.0)
    of = ClassMomentsMaker(settings, (8, 8, 3))
    table = of.encode([Record(id="0", unit="0", text="a bag", image=np.zeros((8, 8, 3), np.uint8))])
    rows, _ = of.features(table.batch([0], records_per_unit=1))
    assert rows[0, 0] == pytest.approx(1 / 3) and float(rows[0, 1:].norm()) < 1e-6
