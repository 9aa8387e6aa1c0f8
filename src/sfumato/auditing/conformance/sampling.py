"""Who is drawn (tests L, A): Poisson sampling at the stated rate, by chi-square; anything else amplifies less.

The suite asks the trainer's sampler for many draws, from N units at rate q. Under independent coins: every unit's number of
inclusions is Binomial(T, q), every batch's size Binomial(N, q), and the overlap of two steps Binomial(N, q^2).
"""

from collections.abc import Callable

import numpy as np
import torch

from sfumato.auditing.conformance.bench import Bench, called
from sfumato.auditing.conformance.outcome import Finding, Undecided

UNITS, RATE, STEPS = 200, 0.05, 2_000
FEW_UNITS, FEW_RATE, FEW_STEPS = 20, 0.05, 1_500  # a batch is empty with probability .36

Draws = Callable[[int, float, int, torch.Generator], list[np.ndarray]]


def joined(bench: Bench, units: int, rate: float, steps: int) -> np.ndarray:
    """(steps, units) bool. Raises Undecided where there is no sampler, or it does not do what was asked."""
    sample = bench.trainer.sample
    if sample is None:
        raise Undecided("the adapter gives no sample")
    generator = torch.Generator().manual_seed(bench.seed * 7 + units)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed * 7 + units + 1)
        drawn = called("sample", lambda: list(sample(units, rate, steps, generator)))
    if len(drawn) != steps:
        raise Undecided(f"sample gave {len(drawn)} batches, {steps} were asked for")
    table = np.zeros((steps, units), dtype=bool)
    for step, indices in enumerate(drawn):
        table[step, np.asarray(indices, dtype=np.int64)] = True
    return table


def _two_sided(value: float, df: int) -> float:
    from scipy.stats import chi2

    return float(min(1.0, 2 * min(chi2.cdf(value, df), chi2.sf(value, df))))


def poisson(bench: Bench, alpha: float) -> Finding:
    """Row 7: independent coins: inclusion counts and batch sizes spread as binomials, steps are independent.

    The mean rate is row 9's: every statistic is taken about the rate that was observed, which makes the p-values of spreads
    a little too large or too small by one degree of freedom in 200.
    """
    table = joined(bench, UNITS, RATE, STEPS)
    rate = float(table.mean())
    if not 0 < rate < 1:
        return Finding(violated=True, because=f"{rate:.0%} of all units are drawn in every step")
    spread = rate * (1 - rate)
    pairs = (table[:-1:2] & table[1::2]).sum(axis=1)
    coins, both = len(pairs) * UNITS, rate**2
    p = {
        "inclusions": _two_sided(float(((table.sum(0) - STEPS * rate) ** 2).sum() / (STEPS * spread)), UNITS - 1),
        "batch sizes": _two_sided(float(((table.sum(1) - UNITS * rate) ** 2).sum() / (UNITS * spread)), STEPS - 1),
        "overlap of steps": _two_sided(float((pairs.sum() - coins * both) ** 2 / (coins * both * (1 - both))), 1),
    }
    name, worst = min(p.items(), key=lambda item: item[1])
    said = f"independent coins: p = {worst:.3g} ({name})"
    if p["inclusions"] < alpha / 4 and table.sum(0).var() > 3 * STEPS * spread:
        raise Undecided("units are drawn at different rates (row 9), so that their coins cannot be compared")
    figures = {f"p_{key.replace(' ', '_')}": value for key, value in p.items()}
    return Finding(violated=worst < alpha / 4, because=said, figures=figures)


def rate(bench: Bench, alpha: float) -> Finding:
    """Row 9: every unit is drawn at the stated rate: none more often than others, all together as often as stated."""
    table = joined(bench, UNITS, RATE, STEPS)
    counts = table.sum(0)
    spread = RATE * (1 - RATE)
    total = _two_sided(float((counts.sum() - UNITS * STEPS * RATE) ** 2 / (UNITS * STEPS * spread)), 1)
    # the most frequent unit, by the binomial tail
    from scipy.stats import binom

    most = min(1.0, UNITS * float(binom.sf(counts.max() - 1, STEPS, RATE)))
    said = f"a rate of {table.mean():.4g} where {RATE} was asked for: p = {total:.3g}; the most frequent unit: p = {most:.3g}"
    # fixed batches have no spread of their total: too regular is row 7's, too often or too seldom is this row's
    wrong = total < alpha / 2 and abs(table.mean() - RATE) > 0.01 * RATE
    return Finding(violated=wrong or most < alpha / 2, because=said, figures={"p_rate": total, "p_most_frequent": most})


def empties(bench: Bench, alpha: float) -> Finding:
    """Row 10: with one expected unit in a batch, a third of the batches are empty."""
    from scipy.stats import binom

    table = joined(bench, FEW_UNITS, FEW_RATE, FEW_STEPS)
    empty = int((table.sum(1) == 0).sum())
    chance = (1 - FEW_RATE) ** FEW_UNITS
    p = min(1.0, 2 * float(min(binom.cdf(empty, FEW_STEPS, chance), binom.sf(empty - 1, FEW_STEPS, chance))))
    said = f"{empty} of {FEW_STEPS} batches are empty, {FEW_STEPS * chance:.0f} expected: p = {p:.3g}"
    return Finding(violated=p < alpha, because=said, figures={"empty": float(empty), "p_empty": p})


# -- controls: other samplers under the same tests --


def shuffled(bench: Bench) -> Bench:
    """The same number of units in every batch, each unit once an epoch."""

    def sample(population: int, rate: float, steps: int, generator: torch.Generator) -> list[np.ndarray]:
        size, out = max(1, round(population * rate)), []
        while len(out) < steps:
            order = torch.randperm(population, generator=generator).numpy()
            out += [order[i : i + size] for i in range(0, population - size + 1, size)]
        return out[:steps]

    return bench.with_trainer(sample=sample)


def too_often(bench: Bench) -> Bench:
    """A rate that is a fifth higher, of the trainer's own sampler."""
    sample = bench.trainer.sample
    return bench if sample is None else bench.with_trainer(sample=lambda n, q, t, g: sample(n, 1.2 * q, t, g))


def without_empties(bench: Bench) -> Bench:
    """Empty batches of the trainer's own sampler are dropped."""
    sample = bench.trainer.sample
    if sample is None:
        return bench

    def nonempty(population: int, rate: float, steps: int, generator: torch.Generator) -> list[np.ndarray]:
        drawn = [batch for batch in sample(population, rate, 2 * steps, generator) if len(batch)]
        return drawn[:steps]

    return bench.with_trainer(sample=nonempty)
