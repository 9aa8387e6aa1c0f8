from dataclasses import replace

import pytest

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.federation.settings import FederationSettings
from sfumato.federation.site_plans import site_plan, site_plans
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.planning import automatic_delta
from sfumato.privacy.settings import PrivacySettings


def test_a_sites_plan_covers_all_rounds_and_its_own_population_only():
    settings = PrivacySettings(unit="person", records_per_unit=4, epsilon=8.0)
    rounds = FederationSettings(rounds=3, local_steps=5)
    plan = site_plan(settings, rounds, expected_batch_size=200, population=2000)
    assert (plan.steps, plan.population, plan.records_per_unit) == (15, 2000, 4)
    assert plan.population_from_data
    assert 7.9 < plan.epsilon() <= 8
    public = replace(rounds, populations=(2000, 900, 800))
    given = site_plan(settings, public, expected_batch_size=200, population=2000)
    assert given == replace(plan, population_from_data=False)


def test_one_public_number_for_all_sites_is_refused_and_so_are_too_few_of_them():
    settings, sizes = PrivacySettings(epsilon=8.0, population=30_000), {"expected_batch_size": 200, "population": 2000}
    with pytest.raises(UsageError, match="population = 30000 · is of one training on all units"):
        site_plan(settings, FederationSettings(), **sizes)
    with pytest.raises(UsageError, match="populations = 2 numbers"):
        FederationSettings(sites=3, populations=(100, 200))
    with pytest.raises(UsageError, match="populations = 0"):
        FederationSettings(sites=2, populations=(100, 0))


def test_all_sites_have_one_delta_that_suits_all_their_persons_together():
    """Or a claim at the delta of one site would say nothing to the persons of another."""
    populations = {"large": 12_000, "small": 800}
    plans = plans_of(PrivacySettings(epsilon=8.0), populations)
    assert {plan.delta for plan in plans.values()} == {automatic_delta(12_800)}
    assert all(7.9 < plan.epsilon() <= 8 for plan in plans.values())
    assert [plan.expected_batch_size for plan in plans.values()] == [300, 20]
    assert plans["small"].noise_multiplier >= plans["large"].noise_multiplier
    given = plans_of(PrivacySettings(epsilon=8.0, delta=1e-6), populations)
    assert {plan.delta for plan in given.values()} == {1e-6}


def plans_of(privacy, populations):
    plans = site_plans(privacy, FederationSettings(rounds=3, local_steps=5), populations, expected_batch_size=320)
    assert all(isinstance(plan, DpSgd) for plan in plans.values())
    return plans


@pytest.mark.parametrize("delta", [1e-3, 8e-5])
def test_a_delta_that_is_too_large_for_all_units_together_is_refused(delta):
    """The second would do for each site alone: 1/12,000 is 8.3e-5."""
    with pytest.raises(
        PrivacyRefused, match=r"must be below 1/N = 7\.81e-05, of the 12800 records of all sites"
    ) as refused:
        plans_of(PrivacySettings(epsilon=8.0, delta=delta), {"large": 12_000, "small": 800})
    assert refused.value.code == "delta_too_large"


def test_a_refusal_says_whose_plan_it_is():
    with pytest.raises(PrivacyRefused, match="site small: population = 64 persons") as refused:
        plans_of(PrivacySettings(unit="person", epsilon=8.0), {"large": 12_000, "small": 64})
    assert refused.value.refusals[0]["message"] == refused.value.message


@pytest.mark.parametrize(("bands", "local_steps"), [(4, 6), (8, 4)])
def test_a_round_that_would_end_within_a_cycle_of_correlated_noise_is_not_planned(bands, local_steps):
    settings, sizes = PrivacySettings(epsilon=8.0, bands=bands), {"expected_batch_size": 20, "population": 2000}
    with pytest.raises(
        UsageError, match=f"local_steps = {local_steps} · must be a multiple of privacy.bands = {bands}"
    ):
        site_plan(settings, FederationSettings(rounds=4, local_steps=local_steps), **sizes)
    plan = site_plan(settings, FederationSettings(rounds=4, local_steps=8), **sizes)
    assert isinstance(plan, DpSgd) and plan.event().count == 4 * plan.events_of(8)
