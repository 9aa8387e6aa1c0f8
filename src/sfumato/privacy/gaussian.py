"""One Gaussian mechanism in closed form: mu-GDP, with mu = sensitivity / standard deviation.

Source: Balle & Wang 2018, Theorem 8, arXiv:1805.06530; Dong, Roth & Su 2022, Corollary 2.13, arXiv:1905.02383. The classical
sqrt(2 ln(1.25/delta)) / epsilon is nowhere used: it wastes noise below epsilon = 1 and is false for large epsilon.
"""

import math

from sfumato import checks

_TIGHT = 1e-13  # relative width of a bisection's last interval


def delta_of(mu: float, epsilon: float) -> float:
    """delta(epsilon) of a mu-GDP mechanism: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu), without cancellation."""
    from scipy.special import erfcx, log_ndtr, ndtr

    checks.non_negative(mu=mu)
    if mu == 0:
        return max(0.0, -math.expm1(epsilon))
    a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    if a > -5:
        second = math.exp(min(epsilon + float(log_ndtr(b)), 0.0))
        return max(0.0, float(ndtr(a)) - second)
    # Both terms are tails: phi(a) = e^eps phi(b), so what is left is phi(a) times a difference of Mills ratios.
    root = math.sqrt(2)
    mills = float(erfcx(-a / root) - erfcx(-b / root)) * math.sqrt(math.pi / 2)
    return max(0.0, math.exp(-a * a / 2) / math.sqrt(2 * math.pi) * mills)


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon >= 0 with delta(epsilon) <= delta, rounded up."""
    _check_delta(delta)
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(mu, high) > delta:
        low, high = high, high * 2
    while high - low > _TIGHT * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose mechanism is (epsilon, delta)-private, rounded down."""
    checks.non_negative(epsilon=epsilon)
    _check_delta(delta)
    low, high = 0.0, 1.0
    while delta_of(high, epsilon) <= delta:
        low, high = high, high * 2
    while high - low > _TIGHT * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, epsilon) <= delta else (low, middle)
    return low


def std_of(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The analytic Gaussian: the least standard deviation for (epsilon, delta) at this L2 sensitivity."""
    checks.positive(sensitivity=sensitivity)
    return sensitivity / mu_of(epsilon, delta)


def _check_delta(delta: float) -> None:
    checks.probability(delta=delta)
    checks.positive(delta=delta)
