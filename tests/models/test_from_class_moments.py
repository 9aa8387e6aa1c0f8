"""Pictures drawn from Gaussians of released sums: cells, what is released of them, what an attacker sees, what is saved."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.test_class_moments import CLASSES, SHAPE, records

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.from_class_moments import FromClassMoments
from sfumato.models.settings import ClassMoments, Cosine, ModelSettings, Sampling, Terms
from sfumato.privacy import latents
from sfumato.privacy.plan import MeanEmbedding
from sfumato.privacy.planning import make_plan
from sfumato.privacy.settings import MeanEmbeddingSettings, PrivacySettings
from sfumato.randomness import TestRandom
from sfumato.recipe import Recipe
from sfumato.records import Record
from sfumato.release import recomputed

MOMENTS = ClassMoments(classes=CLASSES, image=Cosine(kept=3), longest=2.0, directions=1, draws=200)


def built(**changes: Any) -> FromClassMoments:
    moments = replace(MOMENTS, **changes)
    settings = ModelSettings(image=Cosine(kept=3), text=Terms(axes=CLASSES), class_moments=moments)
    return models.build_for_release("from_class_moments", settings, picture_shape=SHAPE)


def sums(model: FromClassMoments, features: Any, given: list[Record], count: int, noise: float, units: int = 0) -> Any:
    dimension = model.maker.dimension // model.maker.classes * count
    plan = MeanEmbedding(population=units or len(given), delta=1e-6, dimension=dimension, noise_multiplier=noise)
    table = model.encode(given)
    return latents.release_class_sums(table, features, plan, TestRandom(1), classes=count, products=model.of.products)


def received(given: list[Record], noise: float = 0.0, **changes: Any) -> FromClassMoments:
    model, std = built(**changes), noise / len(given)
    if model.of.directions:
        model.take_first(sums(model, model.first_features, given, 3, noise), std)
    model.receive(sums(model, model.features, given, model.maker.cells, noise), std)
    model.fit(0)
    return model


def test_a_cell_is_the_side_of_its_classs_mean_in_the_direction_of_most_variance():
    """Oracle: numpy's eigenvectors of the covariance of each class's own records."""
    given = records(300)
    model = built()
    model.take_first(sums(model, model.first_features, given, 3, 0.0), 0.0)
    table = model.encode(given)
    _, cells = model.features(table.batch(range(300), records_per_unit=1))
    away = (table.tensors["image"].double() - model.maker.origin).numpy()
    for number in range(3):
        mine = away[number::3]
        _, vectors = np.linalg.eigh(np.cov(mine.T))
        sides = (mine - mine.mean(0)) @ vectors[:, -1] > 0
        found = cells[number::3].numpy() - 2 * number
        assert set(found.tolist()) == {0, 1}
        assert max(np.mean(found == sides), np.mean(found != sides)) > 0.97  # which side is 1 is nobody's choice


def test_what_has_no_class_or_no_picture_is_in_no_cell():
    given = records(6)
    given[0] = replace(given[0], text="nothing of it")
    given[1] = replace(given[1], image=None)
    model = built()
    model.take_first(sums(model, model.first_features, records(60), 3, 0.0), 0.0)
    rows, cells = model.features(model.encode(given).batch(range(6), records_per_unit=1))
    assert (cells[:2] == -1).all() and (cells[2:] >= 0).all()
    assert not rows[:2].any()


@pytest.mark.parametrize("which", ["last", "bright", "other class"])
def test_a_unit_more_moves_the_sums_over_cells_by_one_at_most(which):
    """The sensitivity that is charged, given what was released before. Exact: sums are of whole numbers."""
    given = records(40)
    model = built(longest=0.05)  # every picture is shortened: features are as long as they can be
    model.take_first(sums(model, model.first_features, given, 3, 0.5), 0.5 / 40)
    extra = {
        "last": given[-1],
        "bright": replace(given[0], image=np.full(SHAPE, 255, np.uint8)),
        "other class": replace(given[0], text="a purse"),
    }[which]
    more = [*given, replace(extra, id="more", unit="zzz")]
    without, with_it = (sums(model, model.features, some, 6, 0.0, units=1) for some in (given, more))
    moved = float((with_it - without).square().sum().sqrt())
    assert 0.9 < moved <= 1.0


def test_pictures_are_those_of_the_class_and_cells_make_two_kinds_of_it():
    model = received(records(600), noise=0.5, passes=4)
    drawn = model.generate(["a shirt"] * 200 + ["a purse"] * 200, seed=0).astype(float)
    right, below = (
        drawn[:200, :, 4:].mean() - drawn[:200, :, :4].mean(),
        drawn[200:, 4:].mean() - drawn[200:, :4].mean(),
    )
    assert right > 30 and below > 30
    assert abs(drawn[:200, 4:].mean() - drawn[:200, :4].mean()) < 15
    shares = model.moments.gaussians().shares
    assert shares.shape == (6,) and float(shares.sum()) == pytest.approx(1.0, abs=0.05)


def test_a_text_without_a_class_is_drawn_of_all_as_often_as_they_are():
    model = received(records(300))
    drawn = model.generate([None] * 300, seed=0).astype(float)
    kinds = [drawn[:, :, 4:].mean((1, 2, 3)) - drawn[:, :, :4].mean((1, 2, 3)) > 30]
    kinds.append(drawn[:, 4:].mean((1, 2, 3)) - drawn[:, :4].mean((1, 2, 3)) > 30)
    for kind in kinds:
        assert 0.2 < kind.mean() < 0.45  # a third, 5 standard deviations


def test_the_same_seed_draws_the_same_and_what_is_saved_comes_back(tmp_path):
    model = received(records(120), noise=0.01, passes=2)
    texts = ["a shirt", None, "a purse"]
    model.save(tmp_path)
    back = models.load(tmp_path)
    for seed in (0, 1):
        assert np.array_equal(back.generate(texts, seed=seed), model.generate(texts, seed=seed))
    assert not np.array_equal(model.generate(texts, seed=0), model.generate(texts, seed=1))
    assert model.generate([], seed=0).shape == (0, *SHAPE)
    assert np.array_equal(model.generate(texts, seed=0, sampling=Sampling(steps=3)), model.generate(texts, seed=0))


@pytest.mark.parametrize("changes", [{}, {"directions": 0}, {"directions": 0, "products": False}])
def test_an_attacker_knows_members_by_sums_without_noise_and_not_by_noisy_ones(changes):
    """AUC of 60 members of 60 records. Positive control above .7. The other bounds: 5 standard deviations of a blind attacker."""
    noise_of = np.random.default_rng(3)

    def told(count: int, name: str) -> list[Record]:
        pictures = noise_of.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        texts = ["a t-shirt", "a shirt", "a purse"]
        return [
            Record(id=f"{name}{i}", unit=f"{name}{i:04d}", text=texts[i % 3], image=p) for i, p in enumerate(pictures)
        ]

    inside, outside = told(60, "in"), told(60, "out")
    model = built(**changes)

    def auc() -> float:
        chance = torch.Generator().manual_seed(0)
        losses = [
            model.row_losses(model.encode(some).batch(range(60), records_per_unit=1), 1, chance).numpy()
            for some in (inside, outside)
        ]
        return float((losses[0][:, None] < losses[1][None]).mean())

    model.control_table(model.encode(inside))
    assert auc() > 0.7
    if model.of.directions:
        model.take_first(sums(model, model.first_features, inside, 3, 20.0), 20 / 60)
    model.receive(sums(model, model.features, inside, model.maker.cells, 20.0), 20 / 60)
    assert abs(auc() - 0.5) < 5 * (121 / (12 * 3600)) ** 0.5


def test_the_plan_of_two_sums_spends_what_was_asked_and_is_made_again_from_the_recipe():
    privacy = PrivacySettings(mechanism="mean_embedding", epsilon=3.0, mean_embedding=MeanEmbeddingSettings(first=0.25))
    model = built()
    values = {"steps": 1, "expected_batch_size": 10, "population": 5_000, "dimensions": model.dimensions}
    plan = make_plan(privacy, **values)
    assert plan.epsilon() == pytest.approx(3.0, abs=2e-3) and plan.epsilon() <= 3.0
    first, last = plan.stages
    assert (first.dimension, last.dimension) == (3 * 55, 6 * 55)
    assert (last.noise_multiplier / first.noise_multiplier) ** 2 == pytest.approx(0.25 / 0.75)
    recipe = {
        "privacy": {"mechanism": "mean_embedding", "epsilon": 3.0, "mean_embedding": {"first": 0.25}},
        "training": {"steps": 1, "expected_batch_size": 10},
    }
    assert recomputed.problems(recipe, plan) == []
    recipe["privacy"]["mean_embedding"] = {"first": 0.3}
    assert any("noise_multiplier" in problem for problem in recomputed.problems(recipe, plan))
    recipe["privacy"]["mean_embedding"] = {}
    assert recomputed.problems(recipe, plan)


def test_a_recipe_says_both_halves_of_it():
    settings = ModelSettings(image=Cosine(kept=3), text=Terms(axes=CLASSES), class_moments=MOMENTS)
    flat = replace(settings, class_moments=replace(MOMENTS, directions=0))
    private = PrivacySettings(mechanism="mean_embedding", epsilon=1.0)
    with pytest.raises(UsageError, match="directions = 1, first = 0"):
        Recipe(name="x", model=settings, privacy=private)
    first = replace(private, mean_embedding=MeanEmbeddingSettings(first=0.1))
    Recipe(name="x", model=settings, privacy=first)
    Recipe(name="x", model=flat, privacy=private)
    with pytest.raises(UsageError, match=r"directions = 0, first = 0\.1"):
        Recipe(name="x", model=flat, privacy=first)
    with pytest.raises(UsageError, match=r"mean_embedding.first = 0.1 · is for cells"):
        Recipe(name="x", privacy=first)
    with pytest.raises(UsageError, match="not by dp_sgd"):
        Recipe(name="x", model=flat)
    with pytest.raises(UsageError, match="leaves nothing"):
        MeanEmbeddingSettings(first=1.0)
    with pytest.raises(UsageError, match="class_moments · must say"):
        models.build_for_release("from_class_moments", replace(flat, class_moments=None), picture_shape=SHAPE)
