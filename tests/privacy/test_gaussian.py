"""The closed forms of one Gaussian, against 40 digits and the published figures."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from sfumato.errors import UsageError
from sfumato.privacy import gaussian


def exact_delta(mu: float, epsilon: float) -> float:
    """Balle & Wang 2018, Theorem 8, arXiv:1805.06530, in 60 digits."""
    with mp.workdps(60):
        m, e = mp.mpf(mu), mp.mpf(epsilon)
        return float(mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m))


@pytest.mark.parametrize(
    ("epsilon", "std"),
    [(0.1, 30.75), (0.2, 16.30), (1, 3.7306), (2, 1.9938), (4, 1.0812), (8, 0.6002), (10, 0.4999)],
)
def test_the_analytic_gaussian_has_the_published_figures(epsilon, std):
    """Golden: sigma / sensitivity at delta = 1e-5."""
    assert gaussian.std_of(epsilon, 1e-5) == pytest.approx(std, rel=3e-4)
    assert gaussian.std_of(epsilon, 1e-5, sensitivity=2.0) == pytest.approx(2 * std, rel=3e-4)


@settings(deadline=None, max_examples=200)
@given(mu=st.floats(1e-3, 30.0), epsilon=st.floats(0.0, 60.0))
def test_delta_is_exact_also_where_both_terms_nearly_cancel(mu, epsilon):
    exact = exact_delta(mu, epsilon)
    if exact > 1e-250:
        assert gaussian.delta_of(mu, epsilon) == pytest.approx(exact, rel=1e-8, abs=1e-15)


@settings(deadline=None, max_examples=50)
@given(epsilon=st.floats(0.01, 50.0), delta=st.floats(1e-12, 0.4))
def test_the_two_inverses_keep_the_promise_and_waste_nothing(epsilon, delta):
    mu = gaussian.mu_of(epsilon, delta)
    assert gaussian.delta_of(mu, epsilon) <= delta < gaussian.delta_of(mu * (1 + 1e-9), epsilon)
    assert gaussian.epsilon_of(mu, delta) == pytest.approx(epsilon, rel=1e-6)


def test_the_classical_formula_is_not_the_analytic_one_and_fails_above_its_range():
    """sqrt(2 ln(1.25/delta)) / epsilon claims 0.484 at epsilon = 10: its true epsilon is above 10."""
    classical = math.sqrt(2 * math.log(1.25e5)) / 10
    assert classical == pytest.approx(0.484, abs=1e-3)
    assert gaussian.epsilon_of(1 / classical, 1e-5) > 10


def test_nothing_released_costs_nothing_and_a_bad_delta_is_refused():
    assert gaussian.delta_of(0.0, 1.0) == 0.0 and gaussian.epsilon_of(1e-9, 1e-5) == 0.0
    for delta in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(UsageError, match="delta"):
            gaussian.mu_of(1.0, delta)
