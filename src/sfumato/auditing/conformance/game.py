"""The distinguishing game (test D): an adversary sees what a step released, and says whether the unit was in it.

A library of adversaries, each a statistic of what was released; thresholds are chosen on a third of the games, and measured
on the rest, both ways. One step on exactly these units is at most (1 / sigma)-GDP, so that mu = qnorm(1 - FPR) - qnorm(FNR),
from Clopper-Pearson bounds on both rates, above 1 / sigma convicts. All adversaries share ``alpha``.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sfumato.auditing import bounds
from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.bench import Bench, Released
from sfumato.auditing.conformance.outcome import Finding, Undecided

QUIET = 4.0  # the games are played at a noise multiplier of at least this: few games then suffice to prove a small mu
Adversary = Callable[[Released], float]


def adversaries(direction: Tensor) -> dict[str, Adversary]:
    """Statistics of one release. ``direction``: (P,), of the canary's gradient."""
    return {
        "canary direction": lambda r: float(r.vector @ direction),
        "squared norm": lambda r: float(r.vector.square().sum()),
        "largest coordinate": lambda r: float(r.vector.abs().max()),
        "first tensor": lambda r: float(r.blocks[0].square().sum()),
        "last tensor": lambda r: float(r.blocks[-1].square().sum()),
        "share of exact zeros": lambda r: float((r.vector == 0).double().mean()),
    }


def play(
    bench: Bench, without: Tensor, with_: Tensor, direction: Tensor, alpha: float, claimed_mu: float | None
) -> Finding:
    """Both worlds, ``bench.games`` times each.

    Args: claimed_mu: in the claim; None: 1 / sigma of the games.
    """
    sigma = max(bench.claim.noise_multiplier, QUIET)
    limit = 1 / sigma if claimed_mu is None else claimed_mu
    outs = [bench.run(without, sigma, 10_000 + i).sums for i in range(bench.games)]
    ins = [bench.run(with_, sigma, 20_000 + i).sums for i in range(bench.games)]
    if not all(release.finite for release in outs + ins):
        raise Undecided("releases that are not finite: see row 17")
    library = adversaries(direction)
    best, who = 0.0, "none"
    level = alpha / (4 * len(library))  # two directions, two rates each
    for name, statistic in library.items():
        scores = [np.array([statistic(release) for release in world]) for world in (outs, ins)]
        for sign in (1.0, -1.0):
            bound = _mu(sign * scores[0], sign * scores[1], level)
            if bound > best:
                best, who = bound, name
    said = f"mu at least {best:.3g} by the {who}, claimed {limit:.3g} (noise multiplier {sigma:g}, {bench.games} games)"
    return Finding(violated=best > limit * (1 + 1e-6), because=said, figures={"mu_at_least": best, "mu_claimed": limit})


def _mu(outs: np.ndarray, ins: np.ndarray, level: float) -> float:
    """A lower bound on mu from scores that are higher with the unit."""
    cut = len(outs) // 3
    chosen = np.sort(np.unique(np.concatenate([outs[:cut], ins[:cut]])))
    thresholds = (chosen[1:] + chosen[:-1]) / 2
    if not len(thresholds):
        return 0.0
    errors = [(outs[:cut] >= t).mean() + (ins[:cut] < t).mean() for t in thresholds]
    best = [t for t, error in zip(thresholds, errors, strict=True) if error == min(errors)]
    threshold = best[len(best) // 2]
    alarms, missed = int((outs[cut:] >= threshold).sum()), int((ins[cut:] < threshold).sum())
    fpr = bounds.clopper_pearson_upper(alarms, len(outs) - cut, level)
    fnr = bounds.clopper_pearson_upper(missed, len(ins) - cut, level)
    return float(bounds.gdp_of_errors(fnr, fpr)) if fpr < 1 and fnr < 1 else 0.0


def unit_at_the_bound(bench: Bench, alpha: float) -> Finding:
    """Row 3: a unit at the bound, in one coordinate, where only the noise can hide it."""
    direction = probe.in_coordinate(len(probe.SIZES) - 1)
    return play(bench, bench.zeros(1), bench.unit(direction, 1.0), direction, alpha, None)


def silent_company(bench: Bench, alpha: float) -> Finding:
    """Row 8: units without a gradient; nobody may notice that they are there."""
    unit = bench.unit(probe.everywhere())
    return play(bench, unit, torch.cat([unit, bench.zeros(7)]), probe.everywhere(), alpha, None)


def empty_batch(bench: Bench, alpha: float) -> Finding:
    """Row 10: nobody at all, or a unit without a gradient."""
    try:
        bench.run(bench.nobody())
    except Undecided as undecided:
        raise Undecided(f"on an empty batch the {undecided}") from undecided
    return play(
        bench, bench.nobody(), bench.zeros(1), torch.ones(sum(probe.SIZES)).double() / math.sqrt(256), alpha, None
    )
