"""Golden numbers, closed forms, monotonicity: accounting against what is known without it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from sfumato.errors import PrivacyRefused, SfumatoError, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event, accountants, calibrate, curve, epsilon, merged

LONG = Event(sampling_rate=0.01, noise_multiplier=1.0, count=10_000)
GAUSSIAN = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=2.0)


def exact_gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Balle & Wang 2018, Theorem 8, arXiv:1805.06530, by bisection in 30 digits."""
    mp.dps = 30
    s, low, high = mp.mpf(noise_multiplier), mp.mpf(0), mp.mpf(100)
    for _ in range(80):
        middle = (low + high) / 2
        spent = mp.ncdf(1 / (2 * s) - middle * s) - mp.exp(middle) * mp.ncdf(-1 / (2 * s) - middle * s)
        low, high = (middle, high) if spent > delta else (low, middle)
    return float(high)


def test_long_training_has_the_known_epsilon():
    """Golden: q = .01, sigma = 1, T = 10^4, delta = 1e-5: 6.188 by PLD, 6.713 by RDP."""
    figures = accountants([LONG], 1e-5)
    assert figures["pld"] == pytest.approx(6.188, abs=1e-3)
    assert figures["rdp"] == pytest.approx(6.713, abs=1e-3)
    assert figures["zcdp"] is None


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_one_gaussian_matches_the_analytic_gaussian_from_above(noise_multiplier, delta):
    exact = exact_gaussian_epsilon(noise_multiplier, delta)
    for mechanism in ("gaussian", "poisson_gaussian"):  # with rate 1 they are one
        event = Event(mechanism=mechanism, sampling_rate=1.0, noise_multiplier=noise_multiplier)
        value = epsilon([event], delta)
        assert value is not None and exact - 1e-9 <= value <= exact * 1.001 + 1e-3


@pytest.mark.parametrize(
    ("target", "noise"),
    [(0.1, 30.75), (0.2, 16.30), (1, 3.7306), (2, 1.9938), (4, 1.0812), (8, 0.6002), (10, 0.4999)],
)
def test_calibrating_one_gaussian_gives_the_analytic_gaussian(target, noise):
    """Golden: analytic Gaussian mechanism, delta = 1e-5."""
    assert calibrate(epsilon=target, delta=1e-5, sampling_rate=1.0, steps=1) == pytest.approx(noise, rel=5e-4)


@pytest.mark.parametrize(("target", "noise", "tolerance"), [(1.0, 16.92, 0.05), (10.0, 2.380, 0.01)])
def test_mnist_plans_get_the_known_noise_and_keep_their_promise(target, noise, tolerance):
    q, steps = 4096 / 60_000, 4394
    found = calibrate(epsilon=target, delta=1e-5, sampling_rate=q, steps=steps)
    assert found == pytest.approx(noise, abs=tolerance)
    spent = epsilon([Event(sampling_rate=q, noise_multiplier=found, count=steps)], 1e-5)
    less = epsilon([Event(sampling_rate=q, noise_multiplier=found * 0.9995, count=steps)], 1e-5)
    assert spent is not None and less is not None
    assert spent <= target < less  # enough, and hardly more than enough


def test_a_calibration_is_remembered():
    values = {"epsilon": 1.5, "delta": 1e-5, "sampling_rate": 1.0, "steps": 1}
    calibrate(**values)
    before = calibrate.cache_info().hits
    calibrate(**values)
    assert calibrate.cache_info().hits == before + 1


rates = st.floats(1e-3, 0.3)
noises = st.floats(1.0, 20.0)


@settings(deadline=None, max_examples=10)
@given(rate=rates, noise=noises, count=st.integers(1, 300), delta=st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_more_noise_fewer_steps_and_rarer_sampling_never_cost_more_and_pld_never_exceeds_rdp(rate, noise, count, delta):
    """Monotone up to the grid: 1e-4 relative and absolute. PLD above RDP would raise inside."""

    def spent(rate: float, noise: float, count: int) -> float:
        value = epsilon([Event(sampling_rate=rate, noise_multiplier=noise, count=count)], delta)
        assert value is not None
        return value

    here = spent(rate, noise, count)
    for less in (
        spent(rate, noise * 1.2, count),
        spent(rate, noise, max(count // 2, 1)),
        spent(rate * 0.8, noise, count),
    ):
        assert less <= here * (1 + 1e-4) + 1e-4


def test_many_tiny_losses_get_a_finer_grid_instead_of_a_false_alarm():
    """Each of 10^5 steps loses about 3e-6, far below 1e-4, where PLD comes out at 0.0144, RDP at 0.0061."""
    event = Event(sampling_rate=1e-4, noise_multiplier=38.433, count=100_000)
    figures = accountants([event], 1e-6)
    assert figures["pld"] is not None and figures["rdp"] is not None
    assert 0.001 < figures["pld"] <= figures["rdp"] < 0.0061


def test_pld_above_rdp_stops_everything(monkeypatch):
    monkeypatch.setattr(accounting, "_rdp_epsilon", lambda *of: 5.0)
    event = Event(sampling_rate=0.5, noise_multiplier=0.3)  # 17 or so in truth
    with pytest.raises(SfumatoError, match="PLD must not be above RDP"):
        accounting._pld_epsilon.__wrapped__((event,), 1e-5, "add_or_remove")


def test_zcdp_is_given_for_unsampled_gaussians_only_and_lies_between_exact_and_crude():
    events = [GAUSSIAN, Event(sampling_rate=1.0, noise_multiplier=3.0, count=5)]
    rho = 1 / 8 + 5 / 18
    crude = rho + 2 * math.sqrt(rho * math.log(1e5))  # Bun & Steinke 2016, Proposition 1.3
    figures = accountants(events, 1e-5)
    assert figures["pld"] is not None and figures["zcdp"] is not None
    assert figures["pld"] <= figures["zcdp"] < crude
    assert epsilon([*events, LONG], 1e-5, "zcdp") is None


def test_composition_ignores_order_and_grouping():
    one, three = Event(sampling_rate=0.1, noise_multiplier=1.0), Event(sampling_rate=0.1, noise_multiplier=1.0, count=3)
    assert merged([one, GAUSSIAN, three]) == (Event(sampling_rate=0.1, noise_multiplier=1.0, count=4), GAUSSIAN)
    assert epsilon([one, GAUSSIAN, three], 1e-5) == pytest.approx(epsilon([GAUSSIAN, three, one], 1e-5), rel=1e-9)


def test_nothing_spent_is_zero_and_no_noise_is_infinite():
    assert epsilon([], 1e-5) == 0.0
    assert epsilon([Event(sampling_rate=0.1, noise_multiplier=1.0, count=0)], 1e-5) == 0.0
    assert epsilon([LONG, Event(sampling_rate=0.1, noise_multiplier=0.0)], 1e-5) == math.inf


def test_a_hopeless_epsilon_is_large_and_not_a_crash():
    """On the fine grid this would need 10^10 cells."""
    values = [
        epsilon([Event(sampling_rate=0.07, noise_multiplier=noise, count=4000)], 1e-5) for noise in (0.05, 0.1, 0.2)
    ]
    assert all(value is not None and value > 1000 for value in values)
    assert values == sorted(values, key=lambda value: -(value or 0))


def test_the_curve_falls_as_delta_grows():
    points = curve([LONG])
    assert [delta for delta, _ in points] == sorted(delta for delta, _ in points)
    assert [value for _, value in points] == sorted((value for _, value in points), reverse=True)
    assert [1e-5, epsilon([LONG], 1e-5)] in points


@pytest.mark.parametrize(("target", "code"), [(1e-9, "epsilon_unreachable"), (1e9, "epsilon_too_large")])
def test_a_target_out_of_reach_is_refused_with_its_reason(target, code):
    with pytest.raises(PrivacyRefused) as refused:
        calibrate(epsilon=target, delta=1e-5, sampling_rate=0.5, steps=1000)
    assert refused.value.code == code


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_outside_its_range_is_refused(delta):
    with pytest.raises(UsageError, match="delta"):
        epsilon([LONG], delta)


def test_an_unknown_accountant_is_refused():
    with pytest.raises(UsageError, match="accountant = 'gdp'"):
        epsilon([LONG], 1e-5, "gdp")


def test_events_survive_a_round_trip_and_nothing_else_is_read():
    good = LONG.to_dict()
    assert Event.from_dict(good) == LONG
    bad = [
        {**good, "extra": 1},
        {key: value for key, value in good.items() if key != "count"},
        {**good, "count": 1.0},
        {**good, "count": True},
        {**good, "count": -1},
        {**good, "sampling_rate": 1},
        {**good, "sampling_rate": 0.0},
        {**good, "sampling_rate": 1.5},
        {**good, "noise_multiplier": float("nan")},
        {**good, "noise_multiplier": "1"},
        {**good, "mechanism": "laplace"},
        {**good, "mechanism": "gaussian"},
        [],
        None,
    ]
    for values in bad:
        with pytest.raises(UsageError):
            Event.from_dict(values)


def test_adjacency_is_add_or_remove_for_both_accountants():
    """Golden, mind the factor 2: GaussianDpEvent(2) at delta = 1e-5 is 1.993 by PLD under add-or-remove."""
    figures = accountants([GAUSSIAN], 1e-5)
    assert figures["pld"] == pytest.approx(1.993, abs=2e-3)
    assert figures["rdp"] == pytest.approx(2.166, abs=2e-3)
