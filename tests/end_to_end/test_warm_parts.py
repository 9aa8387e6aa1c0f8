"""Pictures and sounds in one Gaussian: what each part's noise adds up to against the best distinguisher."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato import warm_parts, warming, workflow
from sfumato.privacy import latents
from sfumato.privacy.releases import MeanEmbedding
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable
from sfumato.warm_parts import Part

N = 50


class _Rows:
    """A part of which every record is one vector of length 1, alone in its class."""

    def __init__(self, entries: int, classes: int = 0) -> None:
        self.entries, self.classes = entries, classes
        self.shape = (classes, entries) if classes else (entries,)
        self.dimension = math.prod(self.shape)

    def release(self, records, plan, random):
        rows = torch.zeros(max(len(records), 1), self.entries, dtype=torch.float64)
        rows[: len(records), 0] = 1.0
        table = UnitTable({"x": rows}, [record.unit for record in records] or ["empty"])

        def features(batch: Batch):
            x = batch.tensors["x"]
            return (x, torch.zeros(len(x), dtype=torch.int64)) if self.classes else x

        if self.classes:
            return latents.release_class_sums(table, features, plan, random, classes=self.classes, products=False)
        return latents.release_mean(table, features, plan, random)


class _One:
    unit = "u"


def statistics(parts, plan, records, runs, seed):
    """The likelihood ratio's logarithm but for a constant: the best that can be asked of both parts together."""
    random, found = TestRandom(seed), []
    for _ in range(runs):
        released = warm_parts.release(parts, records, plan, random)
        found.append(sum(float(released[p.name].flatten()[0]) / N / p.std(plan) ** 2 for p in parts))
    return np.array(found)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_both_parts_together_tell_a_unit_apart_as_one_gaussian_of_the_plans_noise(share):
    """d' of the best test must be 1 / sigma = .5. From 3,000 runs with the unit and 3,000 without it is off by 5 of its standard
    deviations, .13, in one test of 10^6; were each part noised as if alone it would be .71."""
    parts = (Part("mean", _Rows(4), 1 - share), Part("sounds", _Rows(3, classes=2), share))  # type: ignore[arg-type]
    plan = MeanEmbedding(population=N, delta=1e-5, dimension=warm_parts.dimension(parts), noise_multiplier=2.0)
    with_it, without = (statistics(parts, plan, records, 3_000, seed) for records, seed in (([_One()], 1), ([], 2)))
    spread = math.sqrt((with_it.var() + without.var()) / 2)
    apart = (with_it.mean() - without.mean()) / spread
    assert apart == pytest.approx(1 / plan.noise_multiplier, abs=5 * math.sqrt(2 / 3_000))


def test_the_precisions_of_the_parts_add_up_to_the_plans():
    recipe = workflow.resolve("hospitals")
    parts = warming.parts(recipe)
    assert [part.name for part in parts] == ["mean", "sounds"] and sum(part.weight for part in parts) == 1
    plan = MeanEmbedding(population=N, delta=1e-5, dimension=warm_parts.dimension(parts), noise_multiplier=0.7)
    assert sum(part.plan(plan).noise_multiplier ** -2 for part in parts) == pytest.approx(0.7**-2)
    assert sum(part.plan(plan).dimension for part in parts) == plan.dimension
    (alone,) = warm_parts.some_of(parts, ["mean"])
    assert alone == replace(parts[0], weight=1.0) and alone.plan(plan).noise_multiplier == 0.7


def test_every_part_releases_what_it_says_and_draws_of_it():
    """Of a few records of the case, with its own makers: shapes, a record for every text, both modalities."""
    from sfumato.data.clinic import HOSPITALS, Clinic

    recipe = workflow.resolve(
        "hospitals", ["model.warm_start.release.steps=2", "model.warm_start.release.texts_at_once=32"]
    )
    records = [r for r in Clinic(patients=12, seed=1, audio=True, sites=HOSPITALS) if r.audio is not None][:12]
    pictures = {r.image.shape for r in records if r.image is not None}
    assert len(pictures) == 1
    side = next(iter(pictures))[0]
    recipe = replace(recipe, data=replace(recipe.data, image_size=side))
    parts = warming.parts(recipe)
    plan = MeanEmbedding(
        population=100, delta=1e-5, unit="person", records_per_unit=2,
        dimension=warm_parts.dimension(parts), noise_multiplier=1.0,
    )  # fmt: skip
    released = warm_parts.release(parts, records, plan, TestRandom(0))
    assert {name: tuple(t.shape) for name, t in released.items()} == {p.name: p.maker.shape for p in parts}
    stds = {part.name: part.std(plan) for part in parts}
    texts = [r.text for r in records if r.text]
    drawn = warm_parts.draw(parts, released, stds, texts, 20, 0, lambda model, table, steps: True)
    assert drawn is not None and [r.text for r in drawn] == [texts[i % len(texts)] for i in range(20)]
    assert all(r.image is not None and r.audio is not None and r.audio.shape == (4_000,) for r in drawn)
    some = warm_parts.draw(parts, {"mean": released["mean"]}, stds, texts, 3, 0, lambda model, table, steps: True)
    assert some is not None and all(r.audio is None and r.image is not None for r in some)
    assert warm_parts.draw(parts, released, stds, texts, 3, 0, lambda model, table, steps: False) is None
