import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, norm

from sfumato.auditing import bounds
from sfumato.errors import UsageError
from sfumato.privacy import gaussian


def test_clopper_pearson_equals_the_beta_quantiles_at_every_count():
    for trials in (1, 7, 50):
        counts = np.arange(trials + 1)
        upper = np.where(counts < trials, beta.ppf(0.975, counts + 1, np.maximum(trials - counts, 1e-9)), 1)
        lower = np.where(counts > 0, beta.ppf(0.025, np.maximum(counts, 1e-9), trials - counts + 1), 0)
        np.testing.assert_allclose(bounds.clopper_pearson_upper(counts, trials, 0.025), upper, rtol=1e-9)
        np.testing.assert_allclose(bounds.clopper_pearson_lower(counts, trials, 0.025), lower, rtol=1e-6, atol=1e-12)


@given(trials=st.integers(1, 200), p=st.floats(1e-6, 1 - 1e-6), alpha=st.floats(0.001, 0.2))
def test_clopper_pearson_misses_the_truth_at_most_as_often_as_it_says(trials, p, alpha):
    """Exactly, by summing over all outcomes."""
    counts = np.arange(trials + 1)
    missed = bounds.clopper_pearson_upper(counts, trials, alpha) < p - 1e-9
    assert binom.pmf(counts, trials, p)[missed].sum() <= alpha * (1 + 1e-6)


def test_a_test_with_no_errors_of_n_reaches_the_known_cap():
    """privacy.md § 4: with zero false positives of n at one-sided 2.5 % the cap is about ln(n / 3.69)."""
    upper = bounds.clopper_pearson_upper(0, 1000, 0.025)
    assert float(upper) == pytest.approx(3.69 / 1000, rel=0.01)
    assert float(bounds.epsilon_of_errors(0.0, upper, 0.0)) == pytest.approx(np.log(1000 / 3.69), abs=0.01)


def test_perfect_separation_is_bounded_as_its_size_allows_and_delta_lowers_it():
    members, nonmembers = np.arange(1000.0) + 5000, np.arange(1000.0)
    bound = bounds.epsilon_lower_bound(members, nonmembers, delta=0, confidence=0.95, seed=0)
    rate = 1 - (0.05 / 4) ** (1 / 500)
    assert bound == pytest.approx(np.log((1 - rate) / rate), rel=1e-9)
    assert bounds.epsilon_lower_bound(members, nonmembers, delta=0.3, confidence=0.95, seed=0) < bound


def test_a_rare_sure_sign_of_a_member_and_of_a_nonmember_is_found_in_either_direction():
    rng = np.random.default_rng(0)
    members, nonmembers = rng.normal(size=(2, 2000))
    marked = members.copy()
    marked[:400] = 50
    assert bounds.epsilon_lower_bound(marked, nonmembers, delta=0, confidence=0.95, seed=0) > 2
    marked = nonmembers.copy()
    marked[:400] = -50
    assert bounds.epsilon_lower_bound(members, marked, delta=0, confidence=0.95, seed=0) > 2


def test_under_the_null_the_bound_is_above_zero_no_more_often_than_promised():
    """1,000 null runs at 95 %. If the chance were 5 %, more than 80 alarms have probability 2e-5."""
    rng = np.random.default_rng(0)
    alarms = sum(
        bounds.epsilon_lower_bound(*rng.normal(size=(2, 200)), delta=0, confidence=0.95, seed=run) > 0
        for run in range(1000)
    )
    assert alarms <= 80


def test_the_threshold_is_not_chosen_on_the_scores_that_measure_it():
    """500 null runs at confidence 60 %: 1.4 % alarms as it is (four bounds at once are careful), 33 % with one set of scores
    for both. More than 30 have probability < 1e-9 at 1.4 %."""
    rng = np.random.default_rng(0)
    alarms = sum(
        bounds.epsilon_lower_bound(*rng.normal(size=(2, 400)), delta=0, confidence=0.6, seed=run) > 0
        for run in range(500)
    )
    assert alarms <= 30


def test_randomised_response_of_known_epsilon_is_not_refuted_more_often_than_promised():
    """True epsilon 1, the hardest case: 600 runs; more than 55 bounds above 1 have probability < 1e-4 at 5 %."""
    rng = np.random.default_rng(1)
    keep = np.e / (1 + np.e)
    above = total = 0
    for run in range(600):
        members = (rng.random(400) < keep).astype(float)
        nonmembers = (rng.random(400) < 1 - keep).astype(float)
        bound = bounds.epsilon_lower_bound(members, nonmembers, delta=0, confidence=0.95, seed=run)
        above += bound > 1
        total += bound
    assert above <= 55
    assert total / 600 > 0.4  # and the bound is worth something


def test_gaussian_mechanism_of_known_delta_is_not_refuted():
    """mu = 1 has epsilon 1.27 at delta 0.05 (Balle & Wang 2018, Theorem 5); 300 runs; over 30 alarms: probability < 1e-4."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    epsilon = brentq(lambda e: norm.cdf(0.5 - e) - np.exp(e) * norm.cdf(-0.5 - e) - 0.05, 0, 10)
    rng = np.random.default_rng(2)
    above = sum(
        bounds.epsilon_lower_bound(rng.normal(1, 1, 400), rng.normal(0, 1, 400), delta=0.05, confidence=0.95, seed=run)
        > epsilon
        for run in range(300)
    )
    assert above <= 30


def slow_auc(a, b):
    """The share of pairs that are the right way round, ties counting half."""
    return np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])


def test_auc_equals_a_count_of_pairs_and_its_interval_covers_the_truth():
    """Normal scores a distance 1 apart: AUC = Phi(1 / sqrt 2). 300 intervals; fewer than 265 hits: probability < 1e-5."""
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    truth, hits = norm.cdf(1 / np.sqrt(2)), 0
    for repetition in range(300):
        a, b = rng.normal(1, 1, 80), rng.normal(0, 1, 100)
        value, low, high = bounds.auc(a, b)
        if repetition < 10:
            assert value == pytest.approx(slow_auc(a, b), abs=1e-12)
        hits += low <= truth <= high
    assert hits >= 265


def test_auc_counts_ties_as_half_and_keeps_an_interval_at_perfect_separation():
    assert bounds.auc(np.ones(30), np.ones(40))[0] == 0.5
    value, low, high = bounds.auc(np.ones(30), np.zeros(40))
    assert value == high == 1 and 0.85 < low < 0.9
    value, low, high = bounds.auc(np.zeros(30), np.ones(40))
    assert value == low == 0 and 0.1 < high < 0.15


def test_roc_points_lie_on_the_curve_and_are_few():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    points = np.array(bounds.roc(a, b))
    assert len(points) <= 205
    assert points[0].tolist() == [0, 0] and points[-1].tolist() == [1, 1]
    assert (np.diff(points, axis=0) >= 0).all()
    curve = {
        (round((b >= t).mean() * 3000), round((a >= t).mean() * 3000)) for t in [*a, *b, np.inf]
    }  # threshold by threshold
    assert {(round(x * 3000), round(y * 3000)) for x, y in points} <= curve


def test_true_positives_at_a_level_never_pass_it():
    members, nonmembers = np.array([1.0, 2, 3, 4]), np.array([0.0, 0, 0, 3.5])
    assert bounds.tpr_at_fpr(members, nonmembers, 0.01) == 0.25  # only the score above 3.5
    assert bounds.tpr_at_fpr(members, nonmembers, 0.25) == 1


def test_nan_scores_are_refused():
    with pytest.raises(UsageError, match="none of them NaN"):
        bounds.auc(np.array([1, np.nan]), np.array([0.0, 1]))


# ------------------------------------------------------------------------------------------------ bounds from one run


def test_the_bounds_from_one_run_are_the_published_numbers():
    """m = 1000, r = 100, v = 95, delta = 1e-5, p = .05; and what all right guesses are worth."""
    assert bounds.one_run_epsilon(1000, 100, 95, delta=1e-5) == pytest.approx(2.165, abs=5e-4)
    mu = bounds.one_run_gdp(1000, 100, 95)
    assert gaussian.epsilon_of(mu, 1e-5) == pytest.approx(3.323, abs=5e-4)
    for right, cap in ((100, 3.49), (1_000, 5.81), (10_000, 8.11)):
        assert bounds.one_run_epsilon(right, right, right, delta=0) == pytest.approx(cap, abs=5e-3)
    assert bounds.one_run_epsilon(100_000, 10_000, 10_000, delta=1e-5) == pytest.approx(5.82, abs=5e-3)


def test_gdp_of_errors_inverts_the_trade_off_curve():
    for mu in (0.3, 1.0, 4.0):
        fpr = norm.sf(np.linspace(-2, 4, 9))
        fnr = norm.cdf(norm.ppf(1 - fpr) - mu)
        np.testing.assert_allclose(bounds.gdp_of_errors(fnr, fpr), mu, rtol=1e-6)
    assert float(bounds.gdp_of_errors(0.5, 0.6)) == 0.0


def test_a_null_run_is_seldom_bounded_above_zero():
    """2,000 runs of fair coins, guessed at random, at 95 %: if the chance were 5 %, more than 148 alarms have
    probability 1e-6. Fixed seed."""
    rng = np.random.default_rng(1)
    right = rng.binomial(100, 0.5, size=2_000)
    epsilon = {v: bounds.one_run_epsilon(1000, 100, v, delta=1e-5) for v in set(right.tolist())}
    mu = {v: bounds.one_run_gdp(1000, 100, v) for v in set(right.tolist())}
    assert sum(epsilon[v] > 0 for v in right.tolist()) <= 148
    assert sum(mu[v] > 0 for v in right.tolist()) <= 148
    assert any(value > 0 for value in epsilon.values())  # and it is not always zero


def test_a_gaussian_mechanism_is_seldom_bounded_above_its_mu():
    """400 runs of a mechanism that is 1-GDP for each of 1,000 canaries; the 100 surest guesses; 95 %. More than 42 alarms
    have probability 1e-5 if the chance is 5 %. Fixed seed."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(400):
        member = rng.random(1000) < 0.5
        score = rng.normal(size=1000) + np.where(member, 0.5, -0.5)
        surest = np.argsort(-np.abs(score))[:100]
        right = int(((score[surest] > 0) == member[surest]).sum())
        alarms += bounds.one_run_gdp(1000, 100, right) > 1.0
    assert alarms <= 42


def test_more_right_guesses_never_prove_less_and_delta_never_helps():
    values = [bounds.one_run_epsilon(1000, 100, v, delta=0) for v in range(50, 101, 5)]
    assert values == sorted(values)
    assert bounds.one_run_epsilon(1000, 100, 95, delta=1e-3) < bounds.one_run_epsilon(1000, 100, 95, delta=0)
    gaussian = [bounds.one_run_gdp(1000, 100, v) for v in range(50, 101, 5)]
    assert gaussian == sorted(gaussian)


def test_guesses_that_cannot_be_are_refused():
    for canaries, guesses, right in ((10, 11, 3), (10, 5, 6), (10, 0, 0)):
        with pytest.raises(UsageError, match="right <= guesses <= canaries"):
            bounds.one_run_epsilon(canaries, guesses, right, delta=0)
