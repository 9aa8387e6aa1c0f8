"""What an attack proves about epsilon: lower bounds with a confidence, and the statistics around them.

Scores are "higher means more likely a member". A threshold is chosen on one half of the scores and measured on the other:
a bound taken as the largest over all thresholds is too large under the null.
"""

from collections.abc import Callable

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError


def clopper_pearson_upper(successes: np.ndarray | int, trials: int, alpha: float) -> np.ndarray:
    """Largest probability that ``successes`` of ``trials`` do not refute at level ``alpha``, one-sided."""
    from scipy.special import betaincinv

    successes = np.asarray(successes, dtype=float)
    inside = np.minimum(successes, trials - 1)  # at successes = trials the bound is 1
    return np.where(successes < trials, betaincinv(inside + 1, trials - inside, 1 - alpha), 1.0)


def clopper_pearson_lower(successes: np.ndarray | int, trials: int, alpha: float) -> np.ndarray:
    """Smallest probability that ``successes`` of ``trials`` do not refute at level ``alpha``, one-sided."""
    return 1.0 - clopper_pearson_upper(trials - np.asarray(successes), trials, alpha)


def epsilon_of_errors(false_negatives: np.ndarray, false_positives: np.ndarray, delta: float) -> np.ndarray:
    """The least epsilon for which a test with these error rates may exist: ``max(0, ln((1 - delta - FNR) / FPR))``.

    Both rates are upper bounds. Source: Kairouz, Oh & Viswanath 2015, Theorem 2.1; Nasr et al. 2021, § 5.
    The other direction is the same function with the rates exchanged.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (1 - delta - np.asarray(false_negatives)) / np.asarray(false_positives)
        return np.where(ratio > 1, np.log(np.maximum(ratio, 1.0)), 0.0)


def epsilon_lower_bound(
    members: np.ndarray, nonmembers: np.ndarray, *, delta: float, confidence: float, seed: int
) -> float:
    """A lower bound on epsilon that holds with probability ``confidence``.

    Guarantee: if the scores are independent, and each member's has a distribution that (epsilon, delta)-DP ties to the
    non-members', then P(bound > epsilon) <= 1 - confidence. Two directions with a threshold each, two error rates for each
    of them: every rate is bounded at (1 - confidence) / 4.
    With n non-members in the measuring half and no false positive it cannot pass about ln(n / ln(4 / (1 - confidence))).
    """
    checks.probability(delta=delta, confidence=confidence)
    members, nonmembers = _scores(members, nonmembers)
    if min(len(members), len(nonmembers)) < 4:
        return 0.0
    alpha = (1 - confidence) / 4
    rng = np.random.default_rng(seed)
    (choose_in, measure_in), (choose_out, measure_out) = (
        np.array_split(rng.permutation(x), 2) for x in (members, nonmembers)
    )
    best = 0.0
    for reverse in (False, True):
        # "Member above t": epsilon from true positives over false positives. Reversed: "non-member below t".
        threshold = _best_threshold(choose_in, choose_out, delta, alpha, reverse)
        missed, alarms = (measure_in < threshold).sum(), (measure_out >= threshold).sum()
        fnr = clopper_pearson_upper(missed, len(measure_in), alpha)
        fpr = clopper_pearson_upper(alarms, len(measure_out), alpha)
        bound = epsilon_of_errors(fpr, fnr, delta) if reverse else epsilon_of_errors(fnr, fpr, delta)
        best = max(best, float(bound))
    return best


def _best_threshold(members: np.ndarray, nonmembers: np.ndarray, delta: float, alpha: float, reverse: bool) -> float:
    """The threshold whose bound would be largest on these scores (biased upwards here, and therefore only chosen here)."""
    values = np.unique(np.concatenate([members, nonmembers]))
    # Between two scores, not on one: a gap between members and non-members then separates unseen ones too.
    thresholds = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    missed = np.searchsorted(np.sort(members), thresholds, side="left")
    alarms = len(nonmembers) - np.searchsorted(np.sort(nonmembers), thresholds, side="left")
    fnr = clopper_pearson_upper(missed, len(members), alpha)
    fpr = clopper_pearson_upper(alarms, len(nonmembers), alpha)
    bounds = epsilon_of_errors(fpr, fnr, delta) if reverse else epsilon_of_errors(fnr, fpr, delta)
    return float(thresholds[int(np.argmax(bounds))])


def gdp_of_errors(false_negatives: np.ndarray | float, false_positives: np.ndarray | float) -> np.ndarray:
    """The least mu for which a test with these error rates may exist: ``max(0, qnorm(1 - FPR) - qnorm(FNR))``.

    Both rates are upper bounds. mu-GDP means: as hard to tell apart as N(0, 1) and N(mu, 1).
    Source: Dong, Roth & Su 2022, section 2.2, arXiv:1905.02383; used as an audit by Nasr et al. 2023, arXiv:2302.07956.
    """
    from scipy.special import ndtri

    return np.maximum(ndtri(1 - np.asarray(false_positives, float)) - ndtri(np.asarray(false_negatives, float)), 0.0)


def one_run_epsilon(canaries: int, guesses: int, right: int, *, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on epsilon from ONE training run, in which each of m canaries took part by its own fair coin.

    Guarantee: if the training is (epsilon, delta)-private for one canary, P(bound > epsilon) <= 1 - confidence, however the
    ``guesses`` were chosen (the surest ones, after seeing the model). With all of r guesses right and delta = 0 the bound
    is about ln(r / 3): 3.49 for 100, 5.81 for 1,000, 8.11 for 10,000.
    Source: Steinke, Nasr & Jagielski 2023, Theorem 5.2 and Corollary 5.4, arXiv:2305.08846.
    """
    from scipy.stats import binom

    _check_guesses(canaries, guesses, right)
    checks.probability(delta=delta, confidence=confidence)
    steps = np.arange(1, right + 1)

    def chance(epsilon: float) -> float:
        """The largest probability of so many right guesses under (epsilon, delta)-DP, less what is allowed."""
        rate = 1 / (1 + np.exp(-epsilon))
        tail = float(binom.sf(right - 1, guesses, rate))
        more = float(((binom.sf(right - 1 - steps, guesses, rate) - tail) / steps).max(initial=0.0))
        return min(1.0, tail + 2 * canaries * delta * more) - (1 - confidence)

    if chance(0.0) >= 0:
        return 0.0
    # not monotone where delta is large: the bound is the least epsilon that is not refuted
    grid = np.linspace(0.0, 30.0, 301)
    high = next((i for i in range(1, len(grid)) if chance(float(grid[i])) >= 0), None)
    return float(grid[-1]) if high is None else _root(chance, float(grid[high - 1]), float(grid[high]))


def one_run_gdp(canaries: int, guesses: int, right: int, *, confidence: float = 0.95) -> float:
    """The same as ``one_run_epsilon`` under the hypothesis that the training is mu-GDP: a lower bound on mu, and tighter.

    It refutes a stated curve, nothing else: an (epsilon, delta) mechanism that is no Gaussian may break it without
    breaking its promise. ``privacy.gaussian.epsilon_of(mu, delta)`` is the epsilon that is refuted with it.
    Source: Mahloujifar, Melis & Chaudhuri 2024, Algorithm 3 with abstention, arXiv:2410.22235.
    """
    from scipy.special import ndtr, ndtri

    _check_guesses(canaries, guesses, right)
    checks.probability(confidence=confidence)

    def refuted(mu: float) -> bool:
        level = 1 - confidence
        r, h = level * right / canaries, level * (guesses - right) / canaries
        for i in range(right - 1, -1, -1):
            above = max(h, float(ndtr(ndtri(r) - mu)))
            r += i / (guesses - i) * (above - h)
            h = above
        return r + h > guesses / canaries

    if not refuted(0.0):
        return 0.0
    return _root(lambda mu: -1.0 if refuted(mu) else 1.0, 0.0, 40.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """The largest value known to be below where an increasing function crosses 0, by halving to 1e-9."""
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


def _check_guesses(canaries: int, guesses: int, right: int) -> None:
    if not 0 <= right <= guesses <= canaries or guesses < 1:
        raise UsageError(
            f"canaries = {canaries}, guesses = {guesses}, right = {right} · must be right <= guesses <= canaries, and a guess",
            next="Count every canary once; a canary about which nothing was guessed is none of the guesses.",
        )


def auc(members: np.ndarray, nonmembers: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Area under the ROC curve with DeLong's interval: (value, low, high).

    Source: DeLong et al. 1988, computed from ranks as in Sun & Xu 2014. The interval is taken on the logit, so that it stays
    inside [0, 1]. At perfect separation DeLong's variance is 0; then the bound comes from min(N) disjoint pairs, all right.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    members, nonmembers = _scores(members, nonmembers)
    m, n = len(members), len(nonmembers)
    if min(m, n) < 2:
        raise UsageError(f"{m} members, {n} non-members · at least two of each", next="Measure more units.")
    pooled = rankdata(np.concatenate([members, nonmembers]))
    above = (pooled[:m] - rankdata(members)) / n  # share of non-members below each member
    below = 1 - (pooled[m:] - rankdata(nonmembers)) / m  # share of members above each non-member
    value = float(above.mean())
    tail = 1 - confidence
    if value in (0.0, 1.0):
        edge = (tail / 2) ** (1 / min(m, n))
        return (value, edge, 1.0) if value else (value, 0.0, 1 - edge)
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n
    logit = np.log(value / (1 - value))
    spread = float(ndtri(1 - tail / 2)) * np.sqrt(variance) / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(logit + np.array([-spread, spread]))))
    return value, float(low), float(high)


def roc(members: np.ndarray, nonmembers: np.ndarray, *, points: int = 200) -> list[list[float]]:
    """[[fpr, tpr], ...] from (0, 0) to (1, 1), at most about ``points``, dense at small rates as a log-log plot needs."""
    fpr, tpr = _rates(members, nonmembers)
    n = len(nonmembers)
    wanted = np.union1d(np.linspace(0, 1, points // 2), np.geomspace(1 / n, 1, points // 2)) if n else np.zeros(1)
    index = np.unique(np.concatenate([np.searchsorted(fpr, wanted, side="right") - 1, [0, len(fpr) - 1]]))
    return [[float(fpr[i]), float(tpr[i])] for i in index]


def tpr_at_fpr(members: np.ndarray, nonmembers: np.ndarray, level: float) -> float:
    """The largest true-positive rate of a threshold with at most ``level`` false positives (below 1/N that is none)."""
    fpr, tpr = _rates(members, nonmembers)
    return float(tpr[fpr <= level + 1e-12].max())


def _rates(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    members, nonmembers = _scores(members, nonmembers)
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([members, nonmembers]))[::-1]])
    tpr = 1 - np.searchsorted(np.sort(members), thresholds, side="left") / len(members)
    fpr = 1 - np.searchsorted(np.sort(nonmembers), thresholds, side="left") / len(nonmembers)
    return fpr, tpr


def _scores(members: np.ndarray, nonmembers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, scores in (("members", members), ("nonmembers", nonmembers)):
        if np.ndim(scores) != 1 or np.isnan(scores).any():
            raise UsageError(
                f"{name} = {np.shape(scores)} · scores must be one number per unit, none of them NaN",
                next="Give the mean loss of each unit; a diverged model cannot be audited by its loss.",
            )
    return np.asarray(members, float), np.asarray(nonmembers, float)
