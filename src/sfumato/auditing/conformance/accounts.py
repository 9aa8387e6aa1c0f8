"""Does epsilon follow from what was done (test A)? The claim, and the trainer's accountant, against what is recomputed.

One unsampled Gaussian has a closed form (Balle & Wang 2018); Poisson-sampled ones are recomputed by PLD, which RDP must not
be below. Under replace-one a unit moves the sum by 2 C, so that mu is twice what it is under add-or-remove.
"""

import itertools
import math
from dataclasses import replace

from sfumato.auditing.conformance.adapter import Adjacency, Claim
from sfumato.auditing.conformance.bench import Bench, called
from sfumato.auditing.conformance.outcome import Finding, Undecided
from sfumato.privacy import accounting, gaussian
from sfumato.privacy.accounting import Event

FORGIVEN = 0.02  # relative; two honest accountants on different grids differ by less


def epsilon(noise_multiplier: float, rate: float, steps: int, delta: float, adjacency: Adjacency) -> tuple[float, str]:
    """What the events really lose at ``delta``, and by which computation."""
    if rate >= 1:
        factor = 2.0 if adjacency == "replace_one" else 1.0
        return gaussian.epsilon_of(factor * math.sqrt(steps) / noise_multiplier, delta), "closed form"
    event = Event(sampling_rate=rate, noise_multiplier=noise_multiplier, count=steps)
    value = accounting.epsilon([event], delta, "pld", adjacency)
    rdp = accounting.epsilon([event], delta, "rdp", adjacency)
    assert value is not None  # PLD applies to every such event; where RDP does too, PLD above it raises in there
    return value, f"PLD for {adjacency}" + (f" (RDP: {rdp:.4g})" if rdp is not None else "")


def _run(claim: Claim) -> tuple[float, int, float, float]:
    """(q, T, delta, epsilon) of the claim. Raises Undecided where something is missing."""
    missing = [name for name in ("sampling_rate", "steps", "delta", "epsilon") if getattr(claim, name) is None]
    if missing:
        raise Undecided(f"the claim does not say {', '.join(missing)}")
    assert claim.sampling_rate is not None and claim.steps is not None
    assert claim.delta is not None and claim.epsilon is not None
    return claim.sampling_rate, claim.steps, claim.delta, claim.epsilon


def _too_small(value: float, truth: float) -> bool:
    return value < truth * (1 - FORGIVEN) - 1e-3


def adjacency(bench: Bench, alpha: float) -> Finding:
    """Row 22: the epsilon is that of the claimed adjacency, not of the one that is half as far."""
    claim = bench.claim
    rate, steps, delta, stated = _run(claim)
    truth, how = epsilon(claim.noise_multiplier, rate, steps, delta, claim.adjacency)
    other, _ = epsilon(claim.noise_multiplier, rate, steps, delta, "add_or_remove")
    mixed = claim.adjacency == "replace_one" and _too_small(stated, truth) and not _too_small(stated, other)
    said = f"for {claim.adjacency}: {truth:.4g} by {how}, claimed {stated:.4g}"
    said += f", which is that of add_or_remove ({other:.4g})" if mixed else ""
    return Finding(violated=mixed, because=said, figures={"epsilon": truth, "claimed_epsilon": stated})


def stated_epsilon(bench: Bench, alpha: float) -> Finding:
    """Row 23: epsilon is not below what the events lose, and delta is below 1/N."""
    claim = bench.claim
    rate, steps, delta, stated = _run(claim)
    if claim.population is None:
        raise Undecided("the claim does not say population: delta cannot be compared with 1/N")
    truth, how = epsilon(claim.noise_multiplier, rate, steps, delta, claim.adjacency)
    figures = {"epsilon": truth, "claimed_epsilon": stated, "delta_times_population": delta * claim.population}
    if delta * claim.population >= 1:
        said = (
            f"delta = {delta:g} is not below 1/N = {1 / claim.population:.3g}: a whole {claim.unit} may be given away"
        )
        return Finding(violated=True, because=said, figures=figures)
    low = _too_small(stated, truth) and not adjacency(bench, alpha).violated
    return Finding(violated=low, because=f"{truth:.4g} by {how}, claimed {stated:.4g}", figures=figures)


def stated_rate(bench: Bench, alpha: float) -> Finding:
    """Row 9: q is B / N."""
    claim = bench.claim
    missing = [n for n in ("sampling_rate", "expected_batch_size", "population") if getattr(claim, n) is None]
    if missing:
        raise Undecided(f"the claim does not say {', '.join(missing)}")
    assert claim.sampling_rate is not None and claim.expected_batch_size is not None and claim.population is not None
    true = claim.expected_batch_size / claim.population
    said = f"q = {claim.sampling_rate:.4g} is accounted, B / N = {true:.4g}"
    return Finding(violated=claim.sampling_rate < true * (1 - 1e-3), because=said, figures={"rate": true})


def accountant(bench: Bench, alpha: float) -> Finding:
    """Row 23: the trainer's accountant: the closed form at q = 1, PLD elsewhere; monotone in sigma, q and T."""
    return _of_accountant(bench, mixed_up=False)


def accountants_adjacency(bench: Bench, alpha: float) -> Finding:
    """Row 22: the trainer's accountant is that of its adjacency."""
    return _of_accountant(bench, mixed_up=True)


def _of_accountant(bench: Bench, *, mixed_up: bool) -> Finding:
    compute, claim = bench.trainer.accountant, bench.claim
    if compute is None:
        raise Undecided("the adapter gives no accountant")
    cases = [(1.0, 1.0, 1), (4.0, 1.0, 1), (8.0, 1.0, 10), (1.0, 0.02, 200), (2.0, 0.05, 500)]
    low = []
    for sigma, rate, steps in cases:
        value = float(called("accountant", compute, sigma, rate, steps, 1e-5))
        truth, _ = epsilon(sigma, rate, steps, 1e-5, claim.adjacency)
        other, _ = epsilon(sigma, rate, steps, 1e-5, "add_or_remove")
        mixed = claim.adjacency == "replace_one" and not _too_small(value, other)
        if _too_small(value, truth) and mixed == mixed_up:
            low.append(f"{value:.4g} at sigma = {sigma:g}, q = {rate:g}, T = {steps}, where {truth:.4g} is lost")
    if not mixed_up:
        low += _not_monotone(bench)
    said = "; ".join(low) or f"{len(cases)} cases are not below what is lost"
    return Finding(violated=bool(low), because=said, figures={"wrong_cases": float(len(low))})


def _not_monotone(bench: Bench) -> list[str]:
    compute = bench.trainer.accountant
    assert compute is not None
    lines = {
        "sigma": [(sigma, 0.02, 200) for sigma in (4.0, 2.0, 1.0)],
        "q": [(1.0, rate, 200) for rate in (0.01, 0.02, 0.05)],
        "T": [(1.0, 0.02, steps) for steps in (50, 200, 800)],
    }
    found = []
    for name, points in lines.items():
        values = [float(called("accountant", compute, *point, 1e-5)) for point in points]
        if any(after <= before for before, after in itertools.pairwise(values)):
            found.append(f"epsilon does not grow with {name}: {', '.join(f'{value:.4g}' for value in values)}")
    return found


# -- controls: the same claim, told smaller --


def half_epsilon(bench: Bench) -> Bench:
    """Half of what the events lose is claimed."""
    claim = bench.claim
    if claim.epsilon is None or claim.sampling_rate is None or claim.steps is None or claim.delta is None:
        return bench
    truth, _ = epsilon(claim.noise_multiplier, claim.sampling_rate, claim.steps, claim.delta, "add_or_remove")
    return bench.with_trainer(claim=replace(claim, epsilon=truth / 2))


def replace_one_as_add_or_remove(bench: Bench) -> Bench:
    """Replace-one is claimed, with the epsilon of add-or-remove."""
    claim = bench.claim
    if claim.epsilon is None or claim.sampling_rate is None or claim.steps is None or claim.delta is None:
        return bench
    truth, _ = epsilon(claim.noise_multiplier, claim.sampling_rate, claim.steps, claim.delta, "add_or_remove")
    return bench.with_trainer(claim=replace(claim, adjacency="replace_one", epsilon=truth))


def half_rate(bench: Bench) -> Bench:
    rate = bench.claim.sampling_rate
    return bench if rate is None else bench.with_trainer(claim=replace(bench.claim, sampling_rate=rate / 2))


def half_accountant(bench: Bench) -> Bench:
    compute = bench.trainer.accountant
    return bench if compute is None else bench.with_trainer(accountant=lambda *given: compute(*given) / 2)


def accountant_of_add_or_remove(bench: Bench) -> Bench:
    claim = replace(bench.claim, adjacency="replace_one")
    return bench.with_trainer(
        claim=claim, accountant=lambda sigma, q, t, delta: epsilon(sigma, q, t, delta, "add_or_remove")[0]
    )
