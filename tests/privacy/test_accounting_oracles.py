"""Every kind of event against something that computes it in another way, and how epsilon moves with each parameter."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from sfumato.privacy import gaussian
from sfumato.privacy.accounting import accountants, curve, epsilon, gdp, trajectory
from sfumato.privacy.events import ADJACENCIES, Adjacency, Event, joint_noise_multiplier

DELTA = 1e-4
X, STEP = np.linspace(-25, 25, 100_001, retstep=True)

SAMPLED = Event(sampling_rate=0.1, noise_multiplier=1.2, count=20)
PLAIN = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=4.0, count=3)
TRUNCATED = Event(
    mechanism="truncated_poisson_gaussian", sampling_rate=0.1, noise_multiplier=3.0, count=20, population=300, largest_batch=40
)  # fmt: skip
ANSWERS = Event(mechanism="randomized_response", sampling_rate=1.0, noise_multiplier=0.6, count=4, categories=5)
KINDS: list[tuple[Event, Adjacency]] = [
    (event, adjacency)
    for event, adjacency in itertools.product((SAMPLED, PLAIN, TRUNCATED, ANSWERS), ADJACENCIES)
    if adjacency != "add_or_remove" or event in (SAMPLED, PLAIN)
]


def spent(events, delta: float = DELTA, adjacency: Adjacency = "add_or_remove") -> float:
    value = epsilon(events, delta, adjacency=adjacency)
    assert value is not None
    return value


def hockey_stick(p: np.ndarray, q: np.ndarray, eps: float, step: float = STEP) -> float:
    return float(np.maximum(p - math.exp(eps) * q, 0).sum() * step)


def mixture(means: dict[float, float], sigma: float) -> np.ndarray:
    return sum((weight * norm.pdf(X, mean, sigma) for mean, weight in means.items()), np.zeros_like(X))


# -- oracles --


def truncated_sums(contributions: list[float], own: float, rate: float, largest: int) -> dict[float, float]:
    """The law of the clean sum, by enumeration: of every sample of units, and of every subset that may be kept of it."""
    values = [own, *contributions]
    law: dict[float, float] = {}
    for joined in itertools.product((0, 1), repeat=len(values)):
        sample = [i for i, there in enumerate(joined) if there]
        chance = rate ** len(sample) * (1 - rate) ** (len(values) - len(sample))
        kept = list(itertools.combinations(sample, min(largest, len(sample))))
        for subset in kept:
            total = round(sum(values[i] for i in subset), 9)
            law[total] = law.get(total, 0.0) + chance / len(kept)
    return law


@pytest.mark.parametrize(("rate", "largest"), [(0.3, 2), (0.5, 1), (0.2, 4)])
@pytest.mark.parametrize(("adjacency", "instead"), [("zero_out", 0.0), ("replace_one", -1.0)])
def test_truncated_sampling_is_never_charged_less_than_an_enumeration_of_five_units_finds(
    rate, largest, adjacency, instead
):
    """Hostile others: all alike, or on both sides. The charge may be above (its pairs are a bound), not below."""
    sigma = 1.4
    event = Event(
        mechanism="truncated_poisson_gaussian", sampling_rate=rate, noise_multiplier=sigma, population=5, largest_batch=largest
    )  # fmt: skip
    charged = spent([event], adjacency=adjacency)
    worst = 0.0
    for others in ([-1.0] * 4, [1.0] * 4, [0.0] * 4, [1.0, 1.0, -1.0, -1.0]):
        one = mixture(truncated_sums(others, 1.0, rate, largest), sigma)
        other = mixture(truncated_sums(others, instead, rate, largest), sigma)
        for p, q in ((one, other), (other, one)):
            assert hockey_stick(p, q, charged) <= DELTA * (1 + 1e-6)
            worst = max(worst, hockey_stick(p, q, charged / (2 if largest == 4 else 4)))
    assert worst > DELTA  # half the charge would be a false claim; a quarter where nearly every sample is cut


def losses_by_hand(p: np.ndarray, q: np.ndarray, width: float = 2e-3) -> tuple[int, np.ndarray]:
    """The law of log(p/q) under p, rounded up to multiples of ``width``: (first multiple, probabilities)."""
    loss = np.ceil(np.log(p / q) / width).astype(int)
    first = int(loss.min())
    return first, np.bincount(loss - first, weights=p * STEP)


@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize(
    ("adjacency", "with_unit", "without"),
    [("replace_one", {1.0: 0.2, 0.0: 0.8}, {-1.0: 0.2, 0.0: 0.8}), ("add_or_remove", {1.0: 0.2, 0.0: 0.8}, {0.0: 1.0})],
)
def test_composed_steps_against_losses_convolved_by_hand(adjacency, with_unit, without, times):
    """From above, within the rounding up of at most ``times`` 0.002 that the oracle itself does."""
    event = Event(sampling_rate=0.2, noise_multiplier=1.3, count=times)
    p, q = mixture(with_unit, 1.3), mixture(without, 1.3)
    found = 0.0
    for one, other in ((p, q), (q, p)):
        first, law = losses_by_hand(one, other)
        whole = law
        for _ in range(times - 1):
            whole = np.convolve(whole, law)
        loss = (first * times + np.arange(len(whole))) * 2e-3
        low, high = 0.0, 20.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            above = (whole * np.maximum(-np.expm1(middle - loss), 0)).sum() > DELTA
            low, high = (middle, high) if above else (low, middle)
        found = max(found, high)
    assert found - times * 2e-3 - 1e-4 <= spent([event], adjacency=adjacency) <= found + 1e-3


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("adjacency", ["replace_one", "zero_out"])
def test_randomised_response_is_charged_for_every_answer(count, adjacency):
    """Exact: all K^n outputs fall into classes by how many answers are x, x' or others. (dp_accounting's PLD accountant
    charges n answers as one.)"""
    categories, p = 4, 0.5
    event = Event(
        mechanism="randomized_response", sampling_rate=1.0, noise_multiplier=p, categories=categories, count=count
    )
    kept, other = 1 - p + p / categories, p / categories
    law = [kept, other, (categories - 2) * other]  # of x, x' and the others
    instead = (
        [other, kept, law[2]] if adjacency == "replace_one" else [1 / categories, 1 / categories, 1 - 2 / categories]
    )

    def delta_at(eps: float, p: list[float], q: list[float]) -> float:
        total = 0.0
        for i in range(count + 1):
            for j in range(count - i + 1):
                ways = math.comb(count, i) * math.comb(count - i, j)
                a, b = (m[0] ** i * m[1] ** j * m[2] ** (count - i - j) for m in (p, q))
                total += ways * max(0.0, a - math.exp(eps) * b)
        return total

    eps = spent([event], adjacency=adjacency)
    assert max(delta_at(eps, law, instead), delta_at(eps, instead, law)) <= DELTA
    less = eps - count * 2e-4
    assert max(delta_at(less, law, instead), delta_at(less, instead, law)) > DELTA


def test_zcdp_is_the_least_over_orders_of_its_conversion():
    """Corollary 13 of arXiv:2004.00010, minimised by somebody else; for one Gaussian and many."""
    for event in (PLAIN, replace(PLAIN, noise_multiplier=0.7, count=1), replace(PLAIN, count=500)):
        rho = event.count / (2 * event.noise_multiplier**2)

        def at(log_excess: float, rho: float = rho) -> float:
            alpha = 1 + math.exp(log_excess)
            return alpha * rho + (math.log(1 / DELTA) - math.log(alpha)) / (alpha - 1) + math.log1p(-1 / alpha)

        least = minimize_scalar(at, bounds=(-7, 15), method="bounded", options={"xatol": 1e-12}).fun
        assert epsilon([event], DELTA, "zcdp") == pytest.approx(least, rel=1e-6)
        assert epsilon([event], DELTA, "zcdp") >= least * (1 - 1e-12)
        assert least < rho + 2 * math.sqrt(rho * math.log(1 / DELTA))  # Bun & Steinke 2016, Proposition 1.3


# -- how it moves --


@pytest.mark.parametrize(("event", "adjacency"), KINDS, ids=lambda x: x if isinstance(x, str) else x.mechanism)
def test_epsilon_falls_with_noise_and_delta_and_rises_with_the_number_of_steps(event, adjacency):
    moves_as_it_must(event, adjacency, 1.3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("event", "adjacency"), KINDS, ids=lambda x: x if isinstance(x, str) else x.mechanism)
@settings(deadline=None, max_examples=10)
@given(factor=st.floats(1.05, 3.0), times=st.integers(2, 4), noise=st.floats(0.8, 1.2))
def test_epsilon_moves_so_from_anywhere(event, adjacency, factor, times, noise):
    moves_as_it_must(replace(event, noise_multiplier=event.noise_multiplier * noise), adjacency, factor, times)


def moves_as_it_must(event: Event, adjacency: Adjacency, factor: float, times: int) -> None:
    """Strictly, for every kind under every adjacency it is defined for; PLD is at most RDP, or it would raise."""

    def of(**changes) -> float:
        return spent([replace(event, **changes)], adjacency=adjacency)

    here = of()
    noisier = event.noise_multiplier * factor
    if event.mechanism == "randomized_response":  # a chance, at most 1
        noisier = min(1.0, noisier)
    assert of(noise_multiplier=noisier) < here
    assert of(count=event.count * times) > here * 1.05
    assert spent([event], DELTA * factor, adjacency) <= here <= spent([event], DELTA / factor, adjacency)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@settings(deadline=None, max_examples=2)
@given(rate=st.floats(0.002, 0.9), factor=st.floats(1.05, 1.1))
def test_epsilon_rises_with_the_sampling_rate_up_to_that_of_all_units(adjacency, rate, factor):
    event = replace(SAMPLED, sampling_rate=rate)
    everybody = spent([replace(SAMPLED, sampling_rate=1.0)], adjacency=adjacency)
    here, more = (spent([replace(event, sampling_rate=r)], adjacency=adjacency) for r in (rate, rate * factor))
    assert here <= more + 1e-3 and more <= everybody + 1e-3
    assert here < more or more < 0.05


@pytest.mark.parametrize(("event", "adjacency"), KINDS, ids=lambda x: x if isinstance(x, str) else x.mechanism)
def test_pld_is_the_least_of_the_accountants(event, adjacency):
    figures = accountants([event], DELTA, adjacency)
    assert figures["pld"] is not None and figures["pld"] > 0
    for name in ("rdp", "zcdp"):
        value = figures[name]
        assert value is None or figures["pld"] <= value


@pytest.mark.parametrize(("event", "adjacency"), KINDS, ids=lambda x: x if isinstance(x, str) else x.mechanism)
def test_the_curve_falls_and_has_the_claim_on_it(event, adjacency):
    points = curve([event], (1e-8, 1e-6, DELTA, 1e-2), adjacency)
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(points)) and points[0][1] > points[-1][1]
    assert [DELTA, spent([event], adjacency=adjacency)] in points


def test_gaussians_add_up_as_their_squared_mu():
    """Exactly, in any grouping; beside a sampled event the sum of a Gaussian and a sampled one is above both."""
    others = [replace(PLAIN, noise_multiplier=3.0, count=7), replace(PLAIN, noise_multiplier=0.9, count=1)]
    together = gdp([PLAIN, *others], DELTA)
    alone = [gdp([event], DELTA)["mu"] for event in (PLAIN, *others)]
    assert together["exact"] and together["mu"] == pytest.approx(math.sqrt(sum(mu**2 for mu in alone)), rel=1e-12)
    one = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=1 / together["mu"])
    assert spent([PLAIN, *others]) == pytest.approx(spent([one]), rel=1e-12)
    assert joint_noise_multiplier([4.0] * 3 + [3.0] * 7 + [0.9]) == pytest.approx(1 / together["mu"], rel=1e-12)
    assert max(spent([SAMPLED]), spent([PLAIN])) < spent([SAMPLED, PLAIN]) < spent([SAMPLED]) + spent([PLAIN])


def test_a_grid_of_losses_agrees_with_the_closed_form_for_a_rate_just_below_one():
    """The exact formula is for rate 1, the grid for all others: no jump between them."""
    nearly = replace(PLAIN, mechanism="poisson_gaussian", sampling_rate=1 - 1e-9)
    exact = gaussian.epsilon_of(math.sqrt(3) / 4, DELTA)
    assert exact - 1e-6 <= spent([nearly]) <= exact + 1e-3


def test_a_mixed_trajectory_ends_at_the_composition_and_never_falls():
    """A release at the beginning, then steps."""

    def after(steps: int) -> list[Event]:
        return [PLAIN, replace(SAMPLED, count=steps)]

    points = trajectory(after, 20, DELTA, points=4)
    assert [step for step, _ in points] == [0, 5, 10, 15, 20]
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert points[-1][1] == spent([PLAIN, SAMPLED])
