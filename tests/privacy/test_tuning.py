"""The best of a random number of trials, held against the formulas of the paper."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import UsageError
from sfumato.privacy import accounting, tuning
from sfumato.privacy.accounting import Event
from sfumato.privacy.tuning import Trials
from sfumato.randomness import SecretRandom, TestRandom

GAUSSIAN = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=5.0)
DELTA = 1e-6


def converted(order: float, rdp: float, delta: float = DELTA) -> float:
    """Proposition 12 of arXiv:2004.00010."""
    return rdp + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def least(of_order) -> float:
    return min(converted(order, of_order(order)) for order in np.linspace(1.01, 200, 40_000))


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0])
def test_truncated_negative_binomial_is_theorem_2(shape):
    """eps' = eps(l) + (1+eta)(1-1/l^)eps(l^) + (1+eta) log(1/gamma)/l^ + log E[K]/(l-1), the best l and l^ of a fine grid."""
    trials = Trials(mean=10.0, shape=shape)
    rho = 1 / (2 * 5.0**2)  # eps(l) = l rho
    orders = np.linspace(1, 3000, 600_000)
    constant = (1 + shape) * np.min((1 - 1 / orders) * orders * rho - math.log(trials.gamma) / orders)
    wanted = least(lambda order: order * rho + constant + math.log(10) / (order - 1))
    found = tuning.epsilon([GAUSSIAN], DELTA, trials)
    assert wanted - 1e-6 <= found <= wanted * 1.02  # dp_accounting has fewer orders: above, and near


def test_poisson_is_theorem_6():
    """eps' = eps(l) + mu delta^ + log(mu)/(l-1), where the mechanism is (log(1 + 1/(l-1)), delta^)-DP by its own RDP."""
    mean, rho = 10.0, 1 / (2 * 5.0**2)
    best = math.inf
    for order in np.linspace(1.5, 100, 400):
        level = math.log1p(1 / (order - 1))
        ours = np.linspace(1.01, 500, 5000)
        delta = np.exp(np.minimum((ours - 1) * (ours * rho - level + np.log1p(-1 / ours)) - np.log(ours), 0)).min()
        best = min(best, converted(order, order * rho + mean * delta + math.log(mean) / (order - 1)))
    found = tuning.epsilon([GAUSSIAN], DELTA, Trials(mean=mean, shape=math.inf))
    assert best * 0.99 <= found <= best * 1.05


@settings(deadline=None, max_examples=25)
@given(
    noise=st.floats(1.0, 50.0),
    rate=st.sampled_from([0.01, 0.2, 1.0]),
    count=st.integers(1, 100),
    mean=st.floats(1.0, 100.0),
    shape=st.sampled_from([0.0, 0.5, 1.0, math.inf]),
)
def test_the_best_of_several_never_costs_less_than_one(noise, rate, count, mean, shape):
    events = [Event(sampling_rate=rate, noise_multiplier=noise, count=count)]
    one = accounting.epsilon(events, DELTA, "rdp")
    found = tuning.epsilon(events, DELTA, Trials(mean=mean, shape=shape))
    assert one is not None and found >= one * (1 - 1e-9)


def test_it_costs_less_than_all_of_them_and_more_with_more_trials():
    few, many = (tuning.epsilon([GAUSSIAN], DELTA, Trials(mean=mean)) for mean in (10.0, 100.0))
    hundred = accounting.epsilon(
        [Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=5.0, count=100)], DELTA
    )
    assert few < many < hundred


def test_what_it_says_where_there_is_no_bound():
    unnoised = Event(sampling_rate=0.1, noise_multiplier=0.0)
    assert tuning.epsilon([unnoised], DELTA, Trials(mean=2.0)) == math.inf
    sampled = Event(sampling_rate=0.1, noise_multiplier=1.0)
    assert tuning.epsilon([sampled], DELTA, Trials(mean=2.0), "replace_one") is None


@pytest.mark.parametrize(
    ("mean", "shape"), [(10.0, 0.0), (10.0, 0.5), (10.0, 1.0), (3.0, 4.0), (10.0, math.inf), (1.0, 1.0)]
)
def test_the_distribution_is_one_and_has_its_mean(mean, shape):
    trials = Trials(mean=mean, shape=shape)
    weights = [trials.probability(number) for number in range(3000)]
    assert math.fsum(weights) == pytest.approx(1, abs=1e-9)
    assert math.fsum(number * weight for number, weight in enumerate(weights)) == pytest.approx(mean, rel=1e-6)
    if not math.isinf(shape):
        from dp_accounting.rdp import rdp_privacy_accountant as theirs

        assert trials.gamma == pytest.approx(theirs._gamma_truncated_negative_binomial(shape, mean), rel=1e-9)


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_the_numbers_that_are_drawn_are_of_the_distribution(shape):
    """Chi-square on 4000 draws in at most 12 classes; false-alarm probability 1e-6, seed fixed."""
    from scipy.stats import chi2

    trials, random, draws = Trials(mean=4.0, shape=shape), TestRandom(7), 4000
    drawn = np.bincount([min(trials.draw(random), 11) for _ in range(draws)], minlength=12)
    expected = np.array([trials.probability(number) for number in range(11)])
    expected = draws * np.append(expected, 1 - expected.sum())
    kept = expected > 5
    statistic = float(((drawn - expected)[kept] ** 2 / expected[kept]).sum())
    assert statistic < chi2.ppf(1 - 1e-6, kept.sum() - 1)
    assert drawn[~kept].sum() <= 40


def test_a_release_draws_from_the_secret_source():
    random = SecretRandom()
    assert random.for_release and 1 <= Trials(mean=5.0).draw(random) < 10_000


@pytest.mark.parametrize("values", [{"mean": 0.5}, {"mean": math.nan}, {"mean": 1e9}, {"mean": 2.0, "shape": -0.5}])
def test_a_distribution_that_is_none_is_refused(values):
    with pytest.raises(UsageError):
        Trials(**values)
