"""The audit itself (row 24): where there is nothing to find, a lower bound above 0 may come at most as often as it says."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from sfumato.auditing import bounds
from sfumato.auditing.conformance.bench import Bench, called
from sfumato.auditing.conformance.outcome import Finding

RUNS, SCORES, CONFIDENCE = 500, 300, 0.95


def null_runs(bench: Bench, alpha: float) -> Finding:
    """500 audits of nothing at 95 %, of the trainer's own ``lower_bound`` or, if it has none, of ours."""
    from scipy.stats import binom

    bound = bench.trainer.lower_bound
    alarms = called("lower_bound", _alarms, _ours if bound is None else bound, bench.seed * 17 + 5)
    p = float(binom.sf(alarms - 1, RUNS, 1 - CONFIDENCE))
    whose = "this suite's lower bound" if bound is None else "the trainer's lower bound"
    said = f"{whose} is above 0 in {alarms} of {RUNS} audits of nothing, {RUNS * (1 - CONFIDENCE):.0f} allowed: p = {p:.3g}"
    return Finding(violated=p < alpha, because=said, figures={"alarms": float(alarms), "p_alarms": p})


@lru_cache(maxsize=64)
def _alarms(bound: Callable[[np.ndarray, np.ndarray, float, float], float], seed: int) -> int:
    rng = np.random.default_rng(seed)
    return sum(bound(rng.normal(size=SCORES), rng.normal(size=SCORES), 0.0, CONFIDENCE) > 0 for _ in range(RUNS))


def _ours(members: np.ndarray, nonmembers: np.ndarray, delta: float, confidence: float) -> float:
    return bounds.epsilon_lower_bound(members, nonmembers, delta=delta, confidence=confidence, seed=0)


def best_threshold(bench: Bench) -> Bench:
    """The largest bound over all thresholds, each at the full confidence."""
    return bench.with_trainer(lower_bound=largest_over_thresholds)


def largest_over_thresholds(members: np.ndarray, nonmembers: np.ndarray, delta: float, confidence: float) -> float:
    thresholds = np.unique(np.concatenate([members, nonmembers]))
    missed = np.searchsorted(np.sort(members), thresholds, side="left")
    alarms = len(nonmembers) - np.searchsorted(np.sort(nonmembers), thresholds, side="left")
    fnr = bounds.clopper_pearson_upper(missed, len(members), 1 - confidence)
    fpr = bounds.clopper_pearson_upper(alarms, len(nonmembers), 1 - confidence)
    return float(np.maximum(bounds.epsilon_of_errors(fnr, fpr, delta), bounds.epsilon_of_errors(fpr, fnr, delta)).max())
