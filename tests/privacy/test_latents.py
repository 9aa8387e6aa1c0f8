"""Releases of latents, codes and means: bounds on hostile inputs, noise, order; and wrong variants that must be caught.

Three checks judge a release of latents, whoever wrote it: *moved* (two neighbouring tables, the same chance: how far the
release moves in units of its noise), *fit* (release minus clipped latents must be the promised noise, coordinate by
coordinate), *told* (nothing about presence in shapes, zeros or masks). Seeds are fixed; false-alarm rates are stated.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sfumato.errors import UsageError
from sfumato.privacy import latents
from sfumato.privacy.noise import gaussian
from sfumato.privacy.plan import Codebook, LatentModality, LatentRelease, MeanEmbedding
from sfumato.privacy.releases import split_noise
from sfumato.randomness import Random, TestRandom
from sfumato.records import Batch, UnitTable

Release = Callable[[UnitTable, LatentRelease, Random], dict[str, Tensor]]
WHOM: dict[str, Any] = {"population": 200, "delta": 1e-4, "unit": "person", "records_per_unit": 2}
MODALITIES = (LatentModality(name="image", dimension=6, max_norm=2.0), LatentModality(name="text", dimension=3))
PLAN = LatentRelease(noise_multiplier=0.9, modalities=MODALITIES, **WHOM)
HOSTILE = [0.0, 1e-320, 1e-9, 1.0, 1e9, 1e300, -1e308, math.inf, -math.inf, math.nan]


def table(
    rows: int = 380, *, seed: int = 0, scale: float = 5.0, names: Callable[[int], str] = "u{:04d}".format
) -> UnitTable:
    """Two records each for 190 of 200 units: ten units have none, the population is public all the same."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, generator=generator) < 0.8
    tensors = {
        m.name: torch.randn(rows, m.dimension, generator=generator).double()
        * scale
        * torch.rand(rows, 1, generator=generator)
        for m in MODALITIES
    }
    return UnitTable(tensors, [names(i // 2) for i in range(rows)], {"text": present})


def changed(before: UnitTable, unit: int, value: float | None) -> UnitTable:
    """The same table with all rows of one unit set to ``value``; None blanks the unit."""
    tensors = {name: tensor.clone() for name, tensor in before.tensors.items()}
    present = {name: mask.clone() for name, mask in before.present.items()}
    for row in before.rows_of(unit):
        for name in tensors:
            tensors[name][row] = 99.0 if value is None else value  # what is absent is not looked at
            present[name][row] = value is not None
    owners = np.repeat(before.unit_names, before.records_per_unit()).tolist()
    assert len(owners) == before.num_records
    return UnitTable(tensors, owners, present)


# -- the three checks --


def moved(release: Release, plan: LatentRelease, blank: bool) -> float:
    """The largest distance between the releases of two neighbouring tables under the same chance, over what is charged:
    sqrt(sum over rows and modalities (|difference| / sigma_m)^2) times the noise multiplier / (sqrt(k) times the
    adjacency's factor). At most 1 for a right mechanism, for every pair."""
    base, worst = table(), 0.0
    stds = {m.name: m.noise_std for m in plan.modalities}
    for value in [*HOSTILE, 7.0]:
        other = changed(base, 17, None if blank else -3.0)
        pair = [release(each, plan, TestRandom(3)) for each in (changed(base, 17, value), other)]
        if any(pair[0][name].shape != pair[1][name].shape for name in stds):
            return math.inf
        square = sum(float(((pair[0][name] - pair[1][name]) / std).square().sum()) for name, std in stds.items() if std)
        if not math.isfinite(square):
            return math.inf
        worst = max(worst, math.sqrt(square))
    return worst * plan.noise_multiplier / math.sqrt(plan.records_per_unit) / (1.0 if blank else 2.0)


def fit(release: Release, plan: LatentRelease) -> float:
    """The least p-value of Kolmogorov-Smirnov and chi-square tests of (release - clipped latent) / sigma, by modality. Rows
    come in random order, so the table has one and the same latent, longer than its bound, in every row. An error of 2 % in a standard
    deviation fails."""
    rows = 8_000
    plan = replace(plan, population=rows // 2)
    tensors = {m.name: torch.full((rows, m.dimension), 9.0) for m in plan.modalities}
    released = release(UnitTable(tensors, [f"u{i // 2:05d}" for i in range(rows)]), plan, TestRandom(5))
    least = 1.0
    for m in plan.modalities:
        assert m.noise_std is not None
        residual = ((released[m.name] - m.max_norm / math.sqrt(m.dimension)) / m.noise_std).flatten().numpy()
        square = float((residual**2).sum())
        two_sided = 2 * min(stats.chi2.cdf(square, residual.size), stats.chi2.sf(square, residual.size))
        least = min(least, float(stats.kstest(residual, "norm").pvalue), float(two_sided))
    return least


def told(release: Release, plan: LatentRelease) -> bool:
    """Whether shapes, exact zeros or anything but the modalities tell what was present."""
    full, empty = table(), UnitTable({m.name: torch.zeros(0, m.dimension) for m in MODALITIES}, [])
    expected = {m.name: (plan.population * plan.records_per_unit, m.dimension) for m in plan.modalities}
    for each in (full, empty):
        released = release(each, plan, TestRandom(7))
        if {name: tuple(tensor.shape) for name, tensor in released.items()} != expected:
            return True
        if any(bool((tensor == 0).all(dim=1).any()) for tensor in released.values()):
            return True
    return False


FIT = 1e-7  # false-alarm probability of one p-value; four of them

FORMS = {
    "split by the formula": PLAN,
    "by the user": LatentRelease(
        noise_multiplier=(4 / 9 + 1 / 4) ** -0.5,
        modalities=(
            LatentModality(name="image", dimension=6, max_norm=2.0, noise_std=3.0),
            LatentModality(name="text", dimension=3, noise_std=2.0),
        ),
        **WHOM,
    ),
    "shared": LatentRelease(
        noise_multiplier=0.8,
        form="shared",
        modalities=(LatentModality(name="image", dimension=6, max_norm=2.0),),
        **WHOM,
    ),
}


@pytest.mark.parametrize("plan", FORMS.values(), ids=FORMS)
def test_one_unit_moves_the_release_by_what_is_charged_at_most(plan):
    """Zero-out by C, replace-one by 2C, for zeros, tiny, huge, infinite and undefined records; and the bound is reached."""
    assert 0.999 < moved(latents.release_latents, plan, blank=True) <= 1.0 + 1e-6
    assert 0.999 < moved(latents.release_latents, plan, blank=False) <= 1.0 + 1e-6


@pytest.mark.parametrize("plan", FORMS.values(), ids=FORMS)
def test_what_is_added_is_the_promised_noise(plan):
    """False-alarm probability 1e-7 a p-value, at most four of them."""
    assert fit(latents.release_latents, plan) > FIT


@pytest.mark.parametrize("plan", FORMS.values(), ids=FORMS)
def test_presence_is_not_told(plan):
    assert not told(latents.release_latents, plan)


def rows_of(table: UnitTable, plan: LatentRelease) -> dict[str, Tensor]:
    """N k rows, absent ones zero, without anything protected: what wrong variants start from."""
    (slots,) = [values for _, values, _ in latents._rows(table, plan, TestRandom(0))]
    return slots


def clips_after_noise(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    def one(z: Tensor, m: LatentModality) -> Tensor:
        noisy = torch.nan_to_num(z.double()) + gaussian(z.numel(), m.noise_std or 0, random).view_as(z)
        return latents.clip(noisy, m.max_norm)

    return {m.name: one(rows_of(table, plan)[m.name], m) for m in plan.modalities}


def clips_all_modalities_to_the_first_bound(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    first = plan.modalities[0].max_norm
    rows = rows_of(table, plan)
    return {m.name: noisy(latents.clip(rows[m.name], first), m, random) for m in plan.modalities}


def noisy(z: Tensor, m: LatentModality, random: Random) -> Tensor:
    return gaussian(z.numel(), m.noise_std or 0, random, plus=z.reshape(-1)).view_as(z)


def leaves_the_condition_without_noise(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    rows = {m.name: latents.clip(rows_of(table, plan)[m.name], m.max_norm) for m in plan.modalities}
    return {m.name: noisy(rows[m.name], m, random) if m.name == "image" else rows[m.name] for m in plan.modalities}


def noises_by_the_bound_alone(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    """sigma C for each modality, as if each were released alone: the joint charge is forgotten."""
    rows = {m.name: latents.clip(rows_of(table, plan)[m.name], m.max_norm) for m in plan.modalities}
    std = plan.noise_multiplier
    return {
        m.name: gaussian(rows[m.name].numel(), std * m.max_norm, random, plus=rows[m.name].reshape(-1)).view_as(
            rows[m.name]
        )
        for m in plan.modalities
    }


def leaves_absent_rows_without_noise(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    rows = rows_of(table, plan)
    released = latents.release_latents(table, plan, random)
    return {name: z * (rows[name] != 0).any(dim=1, keepdim=True) for name, z in released.items()}


def leaks_the_mask(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    rows = rows_of(table, plan)
    present = {f"{name} present": (z != 0).any(dim=1) for name, z in rows.items()}
    return {**latents.release_latents(table, plan, random), **present}


def leaves_absent_units_out(table: UnitTable, plan: LatentRelease, random: Random) -> dict[str, Tensor]:
    released = latents.release_latents(table, plan, random)
    return {name: z[: 2 * table.num_units] for name, z in released.items()}


@pytest.mark.parametrize(
    ("wrong", "by"),
    [
        (clips_after_noise, "fit"),
        (clips_all_modalities_to_the_first_bound, "moved"),
        (leaves_the_condition_without_noise, "fit"),
        (noises_by_the_bound_alone, "fit"),
        (leaves_absent_rows_without_noise, "told"),
        (leaks_the_mask, "told"),
        (leaves_absent_units_out, "told"),
    ],
)
def test_wrong_releases_are_caught(wrong, by):
    match by:
        case "moved":
            assert moved(wrong, PLAN, blank=True) > 1.1
        case "fit":
            assert fit(wrong, PLAN) < FIT
        case "told":
            assert told(wrong, PLAN)


# -- clipping --


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=6),
    st.floats(min_value=1e-100, max_value=1e100),
)
def test_clipped_rows_are_within_the_bound_whatever_they_were(values, bound):
    clipped = latents.clip(torch.tensor([values], dtype=torch.float64), bound)[0].tolist()
    assert math.hypot(*clipped) <= bound
    if not all(map(math.isfinite, values)):
        assert clipped == [0.0] * len(values)
    elif math.hypot(*values) < bound * (1 - 1e-11):
        assert clipped == values


def test_clipping_keeps_the_direction():
    z = torch.tensor([[3.0, 4.0], [3e200, 4e200], [0.3, 0.4]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.3, 0.4]], dtype=torch.float64)
    assert torch.allclose(latents.clip(z, 1.0), expected, rtol=1e-11, atol=0)


# -- order --


def test_a_row_lies_anywhere_whatever_its_unit_is_called():
    """Chi-square of the place of the alphabetically first unit's rows in 300 releases, eight bins; false-alarm 1e-6."""
    tight = LatentRelease(
        noise_multiplier=0.05, form="shared", modalities=(LatentModality(name="image", dimension=1),), population=100,
        delta=1e-4,
    )  # fmt: skip
    rows = torch.zeros(100, 1)
    rows[0] = 1.0
    one = UnitTable({"image": rows}, [f"u{i:03d}" for i in range(100)])
    places = [int(latents.release_latents(one, tight, TestRandom(seed))["image"].argmax()) for seed in range(300)]
    counts = np.bincount(np.array(places) * 8 // 100, minlength=8)
    share = np.array([len([p for p in range(100) if p * 8 // 100 == b]) for b in range(8)]) / 100
    statistic = float(((counts - 300 * share) ** 2 / (300 * share)).sum())
    assert statistic < stats.chi2.ppf(1 - 1e-6, 7)
    assert stats.chi2.ppf(1 - 1e-6, 7) < 300  # a fixed place would give 300 (1 / share - 1) > 2,000


def test_all_modalities_of_a_row_belong_together():
    rows = torch.arange(200.0)[:, None] / 200
    quiet = LatentRelease(
        noise_multiplier=0.05, population=200, delta=1e-4,
        modalities=tuple(LatentModality(name=name, dimension=1, max_norm=1.0) for name in ("image", "text")),
    )  # fmt: skip
    both = latents.release_latents(
        UnitTable({"image": rows, "text": rows}, [str(i) for i in range(200)]), quiet, TestRandom(0)
    )
    assert np.corrcoef(both["image"][:, 0], both["text"][:, 0])[0, 1] > 0.9


def test_more_records_than_k_are_a_random_choice_and_more_units_than_n_are_refused():
    rows = torch.cat([torch.full((50, 1), -1.0), torch.full((50, 1), 1.0)])
    plan = LatentRelease(
        noise_multiplier=0.05, form="shared", modalities=(LatentModality(name="image", dimension=1),), population=100,
        delta=1e-4, unit="person", records_per_unit=2,
    )  # fmt: skip
    means = []
    for seed in range(60):
        released = latents.release_latents(UnitTable({"image": rows}, ["one"] * 100), plan, TestRandom(seed))["image"]
        means.append(float(released[released.abs() > 0.5].sum()))
    assert len({round(value) for value in means}) > 1 and max(map(abs, means)) < 2.5
    with pytest.raises(UsageError, match="population = 100"):
        latents.release_latents(
            UnitTable({"image": torch.ones(101, 1)}, [f"u{i}" for i in range(101)]), plan, TestRandom(0)
        )
    with pytest.raises(UsageError, match="image = "):
        latents.release_latents(
            UnitTable({"image": torch.ones(100, 2)}, [f"u{i}" for i in range(100)]), plan, TestRandom(0)
        )


def test_what_a_release_is_worth_is_one_over_the_root_of_the_dimension():
    """docs/privacy.md: at epsilon = 10 the amplitude of a coordinate over its noise is about 1 / sqrt(d), under replace_one;
    twice that under zero_out."""
    for adjacency, worth in (("replace_one", 1.0), ("zero_out", 2.0)):
        plan = LatentRelease.calibrated(
            epsilon=10.0, form="shared", modalities=(LatentModality(name="z", dimension=64),), population=10_000, delta=1e-5,
            adjacency=adjacency,
        )  # fmt: skip
        (m,) = split_noise(plan.modalities, plan.noise_multiplier)
        assert m.noise_std is not None
        assert (m.max_norm / 8) / m.noise_std == pytest.approx(worth / 8, rel=0.01)


# -- codes --

CODES = Codebook.calibrated(epsilon=2.0, categories=5, codes=1, population=20_000, delta=1e-6)


def test_randomised_response_has_exactly_the_promised_odds():
    """Chi-square of 200,000 answers to every one of the K inputs; false-alarm probability 1e-6 each."""
    keep, other = CODES.keep_probability, CODES.noise / 5
    assert keep / other == pytest.approx(math.exp(2.0), rel=1e-12)
    for code in range(5):
        answers = latents.respond(np.full(200_000, code), 5, CODES.noise, TestRandom(code))
        expected = np.where(np.arange(5) == code, keep, other) * 200_000
        assert float(((np.bincount(answers, minlength=5) - expected) ** 2 / expected).sum()) < stats.chi2.ppf(
            1 - 1e-6, 4
        )


def test_a_response_that_never_lies_about_one_code_is_caught():
    """The same statistic convicts 'replaced by another one' charged as 'replaced by a uniform one'."""
    random = TestRandom(1)
    replaced = random.uniform(200_000) < CODES.noise
    another = 1 + random.integers(200_000, 4)
    expected = np.where(np.arange(5) == 0, CODES.keep_probability, CODES.noise / 5) * 200_000
    wrong = np.bincount(np.where(replaced, another, 0), minlength=5)
    assert float(((wrong - expected) ** 2 / expected).sum()) > stats.chi2.ppf(1 - 1e-6, 4)


def test_frequencies_are_unbiased():
    """The mean of 40 estimates lies within 6 of its standard errors of the truth: false-alarm probability 1e-8 a code."""
    truth = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    codes = np.repeat(np.arange(5), (truth * 20_000).astype(int))
    found = np.stack(
        [latents.frequencies(latents.respond(codes, 5, CODES.noise, TestRandom(s)), 5, CODES.noise) for s in range(40)]
    )
    assert (np.abs(found.mean(0) - truth) < 6 * found.std(0, ddof=1) / math.sqrt(40)).all()
    naive = np.bincount(latents.respond(codes, 5, CODES.noise, TestRandom(0)), minlength=5) / 20_000
    assert np.abs(naive - truth).max() > 10 * found.std(0, ddof=1).max()
    with pytest.raises(UsageError):
        latents.frequencies(codes, 5, 1.0)


def test_codes_have_one_shape_and_nonsense_is_code_zero():
    plan = Codebook.calibrated(epsilon=40.0, categories=4, codes=2, population=120, delta=1e-4)
    for given_codes in (np.full((120, 2), 99), np.full((120, 2), -1), np.full((120, 2), np.nan), np.zeros((120, 2))):
        rows = UnitTable({"codes": torch.from_numpy(given_codes)}, [f"u{i:03d}" for i in range(120)])
        released = latents.release_codes(rows, plan, TestRandom(0))
        assert released.shape == (120, 2)
        assert (released == 0).mean() > 0.99  # at this epsilon nearly all are told as they are
    with pytest.raises(UsageError, match="codes = "):
        wide = UnitTable({"codes": torch.zeros(10, 3)}, [str(i) for i in range(10)])
        latents.release_codes(wide, plan, TestRandom(0))


@pytest.mark.parametrize(
    "rows",
    [
        UnitTable({"codes": torch.zeros(0, 1)}, []),
        UnitTable(
            {"codes": torch.full((20_000, 1), 3)},
            [f"{i:05d}" for i in range(20_000)],
            {"codes": torch.zeros(20_000) > 0},
        ),
    ],
)
def test_a_unit_without_a_record_answers_by_chance_alone(rows):
    """Chi-square against the uniform law, which is what zero_out is accounted with; false-alarm probability 1e-6. The code
    of a blank, told like a code, would have passed for it and cost more: it fails."""
    counts = np.bincount(latents.release_codes(rows, CODES, TestRandom(8)).reshape(-1), minlength=5)
    assert float(((counts - 4_000) ** 2 / 4_000).sum()) < stats.chi2.ppf(1 - 1e-6, 4)
    wrong = np.bincount(latents.respond(np.zeros(20_000), 5, CODES.noise, TestRandom(8)), minlength=5)
    assert float(((wrong - 4_000) ** 2 / 4_000).sum()) > stats.chi2.ppf(1 - 1e-6, 4)


def test_what_codes_cost_under_zero_out_is_the_loss_against_chance():
    blank = replace(CODES, adjacency="zero_out")
    worst = max(math.log(CODES.keep_probability * 5), math.log(1 / CODES.noise))
    assert blank.epsilon() == pytest.approx(worst, abs=1e-3) and blank.epsilon() < CODES.epsilon()
    assert CODES.epsilon() == pytest.approx(2.0, abs=1e-3)


# -- means --

MEAN = MeanEmbedding(noise_multiplier=0.7, dimension=6, max_norm=1.5, **WHOM)


def raw(batch: Batch) -> Tensor:
    return torch.where(batch.present["image"][:, None], batch.tensors["image"].double(), 0.0)


def test_one_unit_moves_the_sum_by_its_bound_at_most():
    """All records of the unit hostile, the same chance in both releases: blanking moves by C, replacing by 2C."""
    base = table()
    for value in [*HOSTILE, 7.0]:
        pair = [changed(base, 17, value), changed(base, 17, None), changed(base, 17, -3.0)]
        here, blank, other = (latents.release_mean(each, raw, MEAN, TestRandom(2)) * MEAN.population for each in pair)
        assert float((here - blank).norm()) <= MEAN.max_norm * (1 + 1e-8)
        assert float((here - other).norm()) <= 2 * MEAN.max_norm * (1 + 1e-8)
    assert float((blank - other).norm()) == pytest.approx(MEAN.max_norm)


def test_a_unit_moves_the_sum_by_the_same_number_in_any_company():
    """Doubles do not: 0.1 added to 1e4 is not what it is alone. Bit for bit, over a population that divides exactly."""
    plan = replace(MEAN, population=2**14, noise_multiplier=0.0, unit="record", records_per_unit=1)
    rows = torch.randn(9_000, 6, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 1, 9_000)[:, None]
    names = [f"{i:05}" for i in range(9_000)]

    def total(kept: slice) -> Tensor:
        return latents.release_mean(UnitTable({"image": rows[kept]}, names[kept]), raw, plan, TestRandom(0))

    whole = total(slice(None))
    for i in (0, 4_500, 8_999):
        rest = (
            total(slice(0, i)) + total(slice(i + 1, None))
            if 0 < i < 8_999
            else total(slice(1, None) if i == 0 else slice(0, i))
        )
        assert torch.equal(whole - rest, total(slice(i, i + 1)))


def test_the_mean_is_over_the_public_population_and_has_the_promised_noise():
    """No record at all leaves the noise alone, of standard deviation sigma C / N; 3,000 releases, chi-square, 1e-6."""
    empty = UnitTable({"image": torch.zeros(0, 6)}, [])
    drawn = torch.stack([latents.release_mean(empty, raw, MEAN, TestRandom(s)) for s in range(500)])
    square = float((drawn * MEAN.population / (0.7 * 1.5)).square().sum())
    assert stats.chi2.ppf(5e-7, 3_000) < square < stats.chi2.ppf(1 - 5e-7, 3_000)
    one = UnitTable({"image": torch.full((1, 6), 100.0)}, ["u"])
    alone = latents.release_mean(one, raw, MEAN, TestRandom(3)) - latents.release_mean(empty, raw, MEAN, TestRandom(3))
    assert torch.allclose(alone, torch.full((6,), 1.5 / math.sqrt(6) / 200, dtype=torch.float64), rtol=1e-6)


def test_a_sum_that_clips_records_and_not_units_is_caught():
    """Two records of one unit, each within C: their sum is not."""
    base = table()

    def wrong(each: UnitTable) -> Tensor:
        batch = each.batch(range(each.num_units), records_per_unit=2)
        return latents.clip(raw(batch), MEAN.max_norm).sum(0)

    assert float((wrong(changed(base, 17, 7.0)) - wrong(changed(base, 17, None))).norm()) > 1.9 * MEAN.max_norm


def test_features_of_another_width_are_refused():
    with pytest.raises(UsageError, match="features = "):
        latents.release_mean(table(), lambda batch: batch.tensors["text"], MEAN, TestRandom(0))
