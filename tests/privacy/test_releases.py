"""Plans of one-shot releases and of compositions: what they allow, cost, say, and refuse."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from sfumato.errors import UsageError
from sfumato.privacy import accounting, gaussian
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.plan import (
    Codebook,
    Composition,
    DpSgd,
    Estimate,
    LatentModality,
    LatentRelease,
    MeanEmbedding,
    NotPrivate,
)
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.privacy.questions import Histogram
from sfumato.privacy.releases import noise_multiplier_of, split_noise

WHOM = {"population": 10_000, "delta": 1e-5, "unit": "person", "records_per_unit": 2}
MODALITIES = (
    LatentModality(name="image", dimension=36, max_norm=2.0),
    LatentModality(name="text", dimension=8, max_norm=1.0, weight=3.0),
)
LATENTS = LatentRelease.calibrated(epsilon=8.0, modalities=MODALITIES, **WHOM)
MEAN = MeanEmbedding(dimension=100, noise_multiplier=20.0, **WHOM)
STEPS = DpSgd(expected_batch_size=200.0, steps=50, noise_multiplier=1.1, **WHOM)
COUNT = Estimate(name="patients by view", question=Histogram(categories=("a", "b")), noise_multiplier=30.0, **WHOM)
BOTH = Composition.of(MEAN, COUNT, STEPS)
PLANS = [LATENTS, MEAN, STEPS, COUNT, BOTH, Codebook(categories=64, noise=0.2, **WHOM)]


def test_the_noise_is_split_as_no_other_split_could_do_better():
    """The oracle: a numerical minimum of sum w d sigma^2 under the constraint, from ten starts."""
    ours = split_noise(MODALITIES, 1.3)
    assert noise_multiplier_of(ours) == pytest.approx(1.3)

    def cost(stds: np.ndarray) -> float:
        return sum(m.weight * m.dimension * s**2 for m, s in zip(MODALITIES, stds, strict=True))

    def spare(log_stds: np.ndarray) -> float:
        return 1.3**-2 - sum((m.max_norm / math.exp(s)) ** 2 for m, s in zip(MODALITIES, log_stds, strict=True))

    found = [
        minimize(
            lambda s: math.log(cost(np.exp(s))), start, constraints={"type": "ineq", "fun": spare}, method="SLSQP",
            options={"ftol": 1e-14},
        )
        for start in np.random.default_rng(0).normal(1, 1, (10, 2))
    ]  # fmt: skip
    best = min((f for f in found if f.success), key=lambda f: f.fun)
    stds = [m.noise_std for m in ours if m.noise_std is not None]
    assert cost(np.array(stds)) == pytest.approx(math.exp(best.fun), rel=1e-6)
    assert np.exp(best.x) == pytest.approx(stds, rel=1e-3)


@pytest.mark.parametrize(("adjacency", "sensitivity"), [("zero_out", 1.0), ("replace_one", 2.0)])
def test_a_latent_release_is_calibrated_by_the_analytic_gaussian(adjacency, sensitivity):
    """k = 2 rows: mu = sqrt(2) sensitivity / sigma, and sum_m (sensitivity C_m / sigma_m)^2 of a row is mu^2 / 2."""
    plan = LatentRelease.calibrated(epsilon=8.0, modalities=MODALITIES, adjacency=adjacency, **WHOM)
    mu = gaussian.mu_of(8.0, 1e-5)
    assert sum((sensitivity * m.max_norm / m.noise_std) ** 2 for m in plan.modalities) * 2 <= mu**2
    assert 7.998 < plan.epsilon() <= 8.0


def test_noise_that_the_user_splits_is_taken_and_charged_as_it_is():
    given = tuple(replace(m, noise_std=3.0) for m in MODALITIES)
    plan = LatentRelease(modalities=given, noise_multiplier=noise_multiplier_of(given), **WHOM)
    assert plan.events()[0].noise_multiplier == pytest.approx((4 / 9 + 1 / 9) ** -0.5)
    with pytest.raises(UsageError, match="the modalities' noise makes"):
        LatentRelease(modalities=given, noise_multiplier=2.0, **WHOM)


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": ()},
        {"modalities": (MODALITIES[0], MODALITIES[0])},
        {"form": "shared"},
        {"form": "joint"},
        {"adjacency": "add_or_remove"},
        {"noise_multiplier": 0.0},
        {"modalities": (replace(MODALITIES[0], noise_std=1.0), MODALITIES[1])},
    ],
)
def test_a_release_that_cannot_be_is_refused(change):
    with pytest.raises(UsageError):
        LatentRelease(**{"modalities": MODALITIES, "noise_multiplier": 1.0, **WHOM, **change})


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_plans_survive_a_round_trip_and_no_other_form_is_read(plan):
    values = json.loads(json.dumps(plan_to_dict(plan)))
    assert plan_from_dict(values) == plan
    for change in ({"more": 1}, {"population": "10000"}, {"population": 10_000.5}, {"delta": 2.0}, {"kind": "other"}):
        with pytest.raises(UsageError):
            plan_from_dict({**values, **change})


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_every_plan_claims_what_its_events_cost(plan):
    claim = guarantee(plan, plan.events(), boundary=[])
    assert claim.epsilon == pytest.approx(accounting.epsilon(plan.events(), plan.delta, adjacency=plan.adjacency))
    assert claim.epsilon == pytest.approx(plan.epsilon()) and claim.adjacency == plan.adjacency
    assert json.loads(json.dumps(claim.mechanism)) == plan.mechanism(plan.events())
    with pytest.raises(UsageError, match="is not an event of the plan"):
        guarantee(plan, [replace(plan.events()[0], noise_multiplier=0.987)], boundary=[])


def test_a_composition_costs_its_events_together_and_allows_each_its_number():
    assert BOTH.epsilon() == accounting.epsilon([*MEAN.events(), *COUNT.events(), *STEPS.events()], 1e-5)
    assert max(MEAN.epsilon(), STEPS.epsilon()) < BOTH.epsilon() < MEAN.epsilon() + COUNT.epsilon() + STEPS.epsilon()
    assert sorted(BOTH.allowance().values()) == [1, 1, 50]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: type(plan).__name__)
def test_a_claim_without_what_was_released_once_is_refused(plan):
    """Steps may be fewer than planned; a release, an estimate, a sum was made, or the run would not have finished."""
    steps = [replace(STEPS.event(), count=7)]
    spent = steps if isinstance(plan, DpSgd | Composition) else []
    missing = [stage for stage in (plan.stages if isinstance(plan, Composition) else (plan,)) if stage is not STEPS]
    assert len(plan.not_charged(spent)) == len(missing)
    assert plan.not_charged(plan.events()) == []
    if missing:
        with pytest.raises(UsageError, match="lacks what this plan releases"):
            guarantee(plan, spent, boundary=[])
    else:
        assert guarantee(plan, spent, boundary=[]).epsilon


def test_the_last_stage_is_calibrated_to_what_the_first_left():
    whole = DpSgd.calibrated(epsilon=3.0, before=MEAN.events(), expected_batch_size=200.0, steps=50, **WHOM)
    together = Composition.of(MEAN, whole, target_epsilon=3.0)
    assert 2.998 < together.epsilon() <= 3.0 < 3.0 + 1e-3
    alone = DpSgd.calibrated(epsilon=3.0, expected_batch_size=200.0, steps=50, **WHOM)
    assert whole.noise_multiplier > alone.noise_multiplier


def test_stages_with_equal_events_share_them_in_order():
    twice = Composition.of(MEAN, replace(MEAN, max_norm=2.0))
    assert twice.allowance() == {MEAN.events()[0]: 2}
    assert [len(part) for part in twice.spent_of(MEAN.events())] == [1, 0]
    assert [len(part) for part in twice.spent_of(twice.events())] == [1, 1]


@pytest.mark.parametrize(
    "stages",
    [
        (STEPS,),
        (STEPS, replace(MEAN, population=9_999)),
        (STEPS, replace(MEAN, delta=1e-6)),
        (STEPS, replace(MEAN, unit="record", records_per_unit=1)),
        (STEPS, LATENTS),
    ],
)
def test_stages_that_protect_different_things_are_not_composed(stages):
    with pytest.raises(UsageError):
        Composition.of(*stages)


def test_latents_and_steps_compose_under_one_adjacency():
    steps = replace(STEPS, adjacency="zero_out")
    both = Composition.of(LATENTS, steps)
    assert both.epsilon() > LATENTS.epsilon()
    assert both.epsilon() == accounting.epsilon([*LATENTS.events(), *steps.events()], 1e-5, adjacency="zero_out")


def test_bands_charge_one_event_a_cycle_at_the_rate_of_a_group():
    plan = replace(STEPS, bands=4)
    assert plan.event().count == 13 and plan.event().sampling_rate == pytest.approx(0.08)
    assert plan.epsilon(4) == plan.epsilon(1) < plan.epsilon(5)
    assert plan.mechanism([plan.event(13)])["steps_spent"] == 50


@pytest.mark.parametrize(
    "change",
    [
        {"bands": 0}, {"bands": 51}, {"bands": 60}, {"bands": 4, "clipping": "adaptive"}, {"bands": 4, "adjacency": "replace_one"},
        {"noise": "laplace"},
        {"bands": 4, "largest_batch": 300, "adjacency": "zero_out"}, {"largest_batch": 300},
        {"largest_batch": 100, "adjacency": "zero_out"}, {"adjacency": "none"},
    ],
)  # fmt: skip
def test_steps_that_contradict_themselves_are_refused(change):
    with pytest.raises(UsageError):
        replace(STEPS, **change)


def test_without_privacy_nothing_is_allowed_to_be_a_stage():
    with pytest.raises((UsageError, AttributeError)):
        Composition.of(STEPS, NotPrivate(population=10_000, expected_batch_size=200.0, steps=3))  # pyright: ignore
