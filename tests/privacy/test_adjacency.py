"""Events under the three adjacencies: the factor 2 once and in one place, and kinds that are never mixed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from sfumato.errors import UsageError
from sfumato.privacy import gaussian
from sfumato.privacy.accounting import calibrate, epsilon, gdp, trajectory
from sfumato.privacy.events import Event
from sfumato.privacy.plan import Codebook, DpSgd

GAUSSIAN = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=2.0)
SAMPLED = Event(sampling_rate=0.05, noise_multiplier=1.0, count=100)
TRUNCATED = Event(
    mechanism="truncated_poisson_gaussian", sampling_rate=0.05, noise_multiplier=1.0, count=100,
    population=2_000, largest_batch=130,
)  # fmt: skip
DELTA = 1e-5


def spent(events, accountant="pld", adjacency="add_or_remove") -> float:
    value = epsilon(events, DELTA, accountant, adjacency)
    assert value is not None
    return value


def test_replacing_doubles_the_sensitivity_for_every_accountant_alike():
    """Golden: GaussianDpEvent(2) under replacement is 4.377; of dp_accounting's RDP accountant 2.166, a factor 2 too low."""
    assert spent([GAUSSIAN], adjacency="replace_one") == pytest.approx(4.377, abs=1e-3)
    half = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1.0)
    for accountant in ("pld", "rdp", "zcdp"):
        assert spent([GAUSSIAN], accountant, "replace_one") == pytest.approx(spent([half], accountant), rel=1e-9)
        assert spent([GAUSSIAN], accountant, "replace_one") >= 4.37


def hockey_stick(p, q, step: float, eps: float) -> float:
    return float(np.maximum(p - math.exp(eps) * q, 0).sum() * step)


def test_a_sampled_gaussian_under_replacement_against_integrals_of_its_two_densities():
    """One step: the released sum is +C or -C with the sampled unit's chance, 0 else; the pair of Zhu et al. 2022."""
    q, sigma = 0.3, 1.3
    event = Event(sampling_rate=q, noise_multiplier=sigma)
    x, step = np.linspace(-20, 20, 400_001, retstep=True)
    p = (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    r = (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, -1, sigma)
    eps = spent([event], adjacency="replace_one")
    assert hockey_stick(p, r, step, eps) <= DELTA < hockey_stick(p, r, step, eps - 2e-3)


def test_zero_out_costs_what_add_or_remove_costs_and_replacement_more():
    assert spent([SAMPLED, GAUSSIAN], adjacency="zero_out") == pytest.approx(spent([SAMPLED, GAUSSIAN]), rel=1e-6)
    assert spent([SAMPLED], adjacency="replace_one") > 1.3 * spent([SAMPLED])
    assert epsilon([SAMPLED], DELTA, "rdp", "replace_one") is None  # no bound is known to it, and none is invented


def test_a_plan_under_replacement_is_calibrated_to_its_target():
    values = {"epsilon": 3.0, "delta": DELTA, "sampling_rate": 0.05, "steps": 100}
    noise = calibrate(**values, adjacency="replace_one")
    assert noise > 1.3 * calibrate(**values)
    event = Event(sampling_rate=0.05, noise_multiplier=noise, count=100)
    assert 3.0 * (1 - 5e-4) <= spent([event], adjacency="replace_one") <= 3.0


def test_truncated_poisson_costs_a_little_more_and_is_not_defined_for_adding_a_unit():
    """At 160 of an expected 100, 6 standard deviations, near the plain one and never below; at 130 half as much again."""
    plain = spent([SAMPLED], adjacency="zero_out")
    rarely = spent([replace(TRUNCATED, largest_batch=160)], adjacency="zero_out")
    assert plain - 1e-3 <= rarely < 1.01 * plain
    assert 1.3 * plain < spent([TRUNCATED], adjacency="zero_out") < 1.6 * plain
    with pytest.raises(UsageError, match=r"add_or_remove · is not defined for truncated_poisson_gaussian"):
        epsilon([TRUNCATED], DELTA)
    assert epsilon([TRUNCATED], DELTA, "rdp", "zero_out") is None


def test_randomised_response_is_what_its_probabilities_say():
    """K = 16, kept with e^2 / (e^2 + 15): pure epsilon 2 under replacement, whatever delta."""
    plan = Codebook.calibrated(epsilon=2.0, population=1_000, delta=1e-9, categories=16)
    assert plan.keep_probability == pytest.approx(math.e**2 / (math.e**2 + 15))
    assert plan.epsilon() == pytest.approx(2.0, abs=1e-3)
    four = Codebook.calibrated(epsilon=2.0, population=1_000, delta=1e-9, categories=16, codes=4)
    assert four.epsilon() <= 2.0 + 1e-3
    with pytest.raises(UsageError, match="add_or_remove"):
        Codebook(population=1_000, delta=1e-9, categories=16, noise=0.5, adjacency="add_or_remove")


def test_a_code_that_is_told_as_it_is_has_no_bound():
    event = Event(mechanism="randomized_response", sampling_rate=1.0, noise_multiplier=0.0, categories=4)
    assert spent([event], adjacency="replace_one") == math.inf


@pytest.mark.parametrize(
    "values",
    [
        {"mechanism": "gaussian", "sampling_rate": 1.0, "categories": 3},
        {"mechanism": "randomized_response", "sampling_rate": 1.0},
        {"mechanism": "randomized_response", "sampling_rate": 1.0, "categories": 1},
        {"mechanism": "randomized_response", "sampling_rate": 0.5, "categories": 3},
        {"mechanism": "truncated_poisson_gaussian", "sampling_rate": 0.5, "population": 10},
        {"mechanism": "truncated_poisson_gaussian", "sampling_rate": 0.5, "population": 10, "largest_batch": 0},
        {"sampling_rate": 0.5, "population": 10},
    ],
)
def test_an_event_with_what_it_cannot_have_is_refused(values):
    with pytest.raises(UsageError):
        Event(noise_multiplier=0.5, **values)


@pytest.mark.parametrize("event", [SAMPLED, GAUSSIAN, TRUNCATED, Codebook(
    population=10, delta=1e-3, categories=3, noise=0.2).events()[0]])  # fmt: skip
def test_every_kind_survives_a_round_trip(event):
    assert Event.from_dict(event.to_dict()) == event
    for values in ({**event.to_dict(), "more": 1}, {**event.to_dict(), "categories": 3.0}):
        with pytest.raises(UsageError):
            Event.from_dict(values)


def test_an_event_of_old_is_written_as_it_always_was():
    assert set(SAMPLED.to_dict()) == {"mechanism", "sampling_rate", "noise_multiplier", "count"}


def test_mu_says_everything_of_gaussians_and_one_point_of_sampled_ones():
    assert gdp([GAUSSIAN, GAUSSIAN], DELTA) == {"mu": pytest.approx(math.sqrt(2) / 2), "exact": True}
    found = gdp([SAMPLED], DELTA)
    assert not found["exact"] and gaussian.epsilon_of(found["mu"], DELTA) == pytest.approx(spent([SAMPLED]), rel=1e-6)
    assert gdp([Event(sampling_rate=1.0, noise_multiplier=0.0)], DELTA)["mu"] == math.inf


def test_a_trajectory_rises_from_nothing_to_the_whole():
    plan = DpSgd(population=2_000, expected_batch_size=100, steps=100, noise_multiplier=1.0, delta=DELTA)
    points = trajectory(lambda n: [plan.event(plan.events_of(n))], plan.steps, DELTA, points=5)
    assert [step for step, _ in points] == [0, 20, 40, 60, 80, 100]
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert points[-1][1] == plan.epsilon()


def test_hopeless_replacement_is_infinite_and_not_a_crash():
    assert spent([Event(sampling_rate=0.07, noise_multiplier=0.05, count=4_000)], adjacency="replace_one") == math.inf
