"""The whole suite: every check of the 24 rows, its positive control, and how much chance each may use.

The false-alarm probability of one pass is split evenly over the checks that use chance (Bonferroni), each of which splits its
part over its own statistics. Checks without chance are exact.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sfumato import checks
from sfumato.auditing.conformance import (
    accounts,
    boundary,
    bugs,
    faults,
    game,
    noise,
    nulls,
    outcome,
    sampling,
    sensitivity,
)
from sfumato.auditing.conformance.adapter import Trainer
from sfumato.auditing.conformance.bench import Bench
from sfumato.auditing.conformance.outcome import Conformance, Evidence, Finding, Row, Undecided
from sfumato.errors import UsageError

FALSE_ALARM = 1e-3  # of one pass
GAMES = 48  # of each world, in the distinguishing game
NOISE_RUNS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One look at a trainer.

    Attributes:
      row, test: which failure, and by which kind of test (S, D, G, A, F, L).
      look: the bench and this check's part of the false-alarm probability -> what was found.
      control: the same trainer with a bug that ``look`` must find.
      chance: whether ``look`` uses its part.
      when: whether the trainer makes such a claim at all.
    """

    row: int
    test: str
    name: str
    look: Callable[[Bench, float], Finding]
    control: Callable[[Bench], Bench]
    chance: bool = True
    when: Callable[[Trainer], bool] = lambda trainer: True


def _bug(bug: Callable[..., bugs.Released]) -> Callable[[Bench], Bench]:
    return lambda bench: bench.broken(bug)


def _cut_up(bench: Bench) -> bool:
    """Whether the bound is made of bounds for parts, so that one coordinate or one tensor does not reach it."""
    return bench.claim.clipping in ("per_layer", "other")


def _much_less_noise(bench: Bench) -> Bench:
    return bench.broken(bugs.hardly_any_noise if _cut_up(bench) else bugs.less_noise)


def _layers_as_one(bench: Bench) -> Bench:
    """Each layer clipped to C; where each is clipped already, the noise of half the bound."""
    return bench.broken(bugs.less_noise if bench.claim.clipping == "per_layer" else bugs.tensor_by_tensor)


def _by_person(trainer: Trainer) -> bool:
    return trainer.claim.unit == "person"


def _by_site(trainer: Trainer) -> bool:
    return trainer.claim.unit == "site"


def _each_record_a_person(bench: Bench) -> Bench:
    """Every record is clipped for itself, as if it were a person."""
    step = bench.trainer.step
    return bench.with_trainer(step_of_persons=lambda model, rows, owner, sigma, g: step(model, rows, sigma, g))


def _less_noise_together(bench: Bench) -> Bench:
    """Each of W processes adds 1/W of the noise."""
    step = bench.trainer.step_together
    return (
        bench
        if step is None
        else bench.with_trainer(step_together=lambda m, x, sigma, g, w: step(m, x, sigma / w, g, w))
    )


CHECKS: tuple[Check, ...] = (
    Check(row=1, test="S", name="hostile unit in a crowd", look=sensitivity.aggregate, control=_bug(bugs.the_mean)),
    Check(row=2, test="S", name="spread over a tensor", look=sensitivity.elements, control=_bug(bugs.by_coordinates)),
    Check(row=3, test="G", name="size of the noise", look=noise.size, control=_much_less_noise),
    Check(row=3, test="D", name="game: a unit at the bound", look=game.unit_at_the_bound, control=_bug(bugs.hardly_any_noise)),
    Check(row=4, test="S", name="spread over all tensors", look=sensitivity.layers, control=_layers_as_one),
    Check(row=5, test="S", name="hostile unit in a micro-batch", look=sensitivity.micro_batches, control=_bug(bugs.in_pairs)),
    Check(
        row=6, test="L", name="losses of other units", look=boundary.independent_losses, control=boundary.coupled_losses,
        chance=False,
    ),
    Check(row=7, test="L", name="independent coins", look=sampling.poisson, control=sampling.shuffled),
    Check(row=8, test="G", name="silent company", look=noise.by_batch, control=_bug(bugs.noise_by_batch)),
    Check(row=8, test="D", name="game: silent company", look=game.silent_company, control=_bug(bugs.noise_by_batch)),
    Check(row=9, test="A", name="observed rate", look=sampling.rate, control=sampling.too_often),
    Check(row=9, test="A", name="accounted rate", look=accounts.stated_rate, control=accounts.half_rate, chance=False),
    Check(row=10, test="G", name="step of nobody", look=noise.nobody, control=_bug(bugs.nothing_for_nobody)),
    Check(row=10, test="D", name="game: an empty batch", look=game.empty_batch, control=_bug(bugs.nothing_for_nobody)),
    Check(row=10, test="A", name="empty batches", look=sampling.empties, control=sampling.without_empties),
    Check(row=11, test="A", name="events and releases", look=faults.charged, control=faults.charged_once, chance=False),
    Check(
        row=11, test="S", name="gradients kept", look=faults.kept_gradients, control=faults.gradients_added_again,
        chance=False,
    ),
    Check(row=12, test="S", name="sum and count together", look=faults.counted, control=_bug(bugs.bare_count)),
    Check(
        row=12, test="S", name="bound carried over", look=faults.carried_bound, control=faults.bound_follows_data,
        chance=False, when=lambda trainer: trainer.claim.clipping != "adaptive",
    ),
    Check(
        row=13, test="S", name="every kind of layer", look=sensitivity.fast_norms, control=_bug(bugs.layers_twice),
        chance=False,
    ),
    Check(
        row=14, test="G", name="noise on every tensor", look=noise.everything_covered, control=_bug(bugs.one_tensor_bare),
        chance=False,
    ),
    Check(row=14, test="L", name="buffers", look=boundary.what_leaves, control=boundary.a_buffer_with_data, chance=False),
    Check(
        row=15, test="G", name="digits of the noise", look=noise.low_digits,
        control=lambda bench: bench.broken(bugs.low_bits if bench.claim.hardened_noise else bugs.half_precision), chance=False,
    ),
    Check(row=16, test="G", name="independent normal noise", look=noise.shape, control=_bug(bugs.one_noise)),
    Check(row=16, test="F", name="noise of a run", look=faults.noise_of_a_run, control=faults.noise_again),
    Check(row=16, test="F", name="kill and resume", look=faults.resumed, control=faults.resumed_with_its_past),
    Check(
        row=17, test="S", name="inf, nan, huge, tiny", look=sensitivity.special_numbers, control=_bug(bugs.not_a_number),
        chance=False,
    ),
    Check(row=18, test="G", name="several processes", look=noise.together, control=_less_noise_together),
    Check(
        row=19, test="S", name="hostile update", look=sensitivity.site_update, control=_bug(bugs.units_twice), when=_by_site
    ),
    Check(row=19, test="F", name="sites drop out", look=noise.sites, control=_bug(bugs.noise_by_batch), when=_by_site),
    Check(
        row=20, test="S", name="six records of a person", look=sensitivity.persons, control=_each_record_a_person,
        when=_by_person,
    ),
    Check(row=21, test="L", name="preparation", look=boundary.preparation, control=boundary.centred, chance=False),
    Check(
        row=22, test="A", name="claimed adjacency", look=accounts.adjacency, control=accounts.replace_one_as_add_or_remove,
        chance=False,
    ),
    Check(
        row=22, test="A", name="accountant's adjacency", look=accounts.accountants_adjacency,
        control=accounts.accountant_of_add_or_remove, chance=False, when=lambda trainer: trainer.accountant is not None,
    ),
    Check(row=23, test="A", name="claimed epsilon", look=accounts.stated_epsilon, control=accounts.half_epsilon, chance=False),
    Check(
        row=23, test="A", name="accountant", look=accounts.accountant, control=accounts.half_accountant, chance=False,
        when=lambda trainer: trainer.accountant is not None,
    ),
    Check(row=24, test="D", name="audits of nothing", look=nulls.null_runs, control=nulls.best_threshold),
)  # fmt: skip

NOT_ABOUT = {
    19: ("site", "the claim is not about sites"),
    20: ("person", "the claim is not about persons: one with k records has k times the epsilon"),
}


def audit(
    trainer: Trainer,
    *,
    name: str = "",
    seed: int | None = None,
    false_alarm: float = FALSE_ALARM,
    noise_runs: int = NOISE_RUNS,
    games: int = GAMES,
    controls: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Conformance:
    """Holds a trainer against its claim, row by row.

    Guarantee: a trainer that keeps its claim gets a VIOLATION anywhere with probability ``false_alarm`` at most, over the
    seed, as far as its noise is normal and its arithmetic rounds as its type does. Nothing is promised the other way: a
    trainer that is CONSISTENT everywhere may still be wrong in a way that no check looks for.

    Args:
      seed: of every noisy step, draw and game; fresh if None. A trainer that knew it could cheat.
      noise_runs, games: how often steps are repeated.
      controls: without them a pass takes half the time, and nothing is CONSISTENT: it can convict, and no more.
    Raises: UsageError if the trainer cannot take one ordinary step.
    """
    checks.probability(false_alarm=false_alarm)
    checks.positive(noise_runs=noise_runs, games=games)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    bench = Bench(trainer, seed=seed, noise_runs=noise_runs, games=games)
    _take_one_step(bench)
    alpha = false_alarm / sum(check.chance for check in CHECKS)
    rows: list[Row] = []
    for number in outcome.FAILURES:
        evidence = [
            decide(check, bench, alpha, controls) for check in CHECKS if check.row == number and check.when(trainer)
        ]
        unit, why = NOT_ABOUT.get(number, ("", ""))
        rows.append(outcome.row_of(number, evidence, not_about=why if unit and trainer.claim.unit != unit else ""))
        progress(f"row {number} of {len(outcome.FAILURES)}: {rows[-1].verdict}")
    verdict, because = outcome.overall(rows)
    return Conformance(
        trainer=name or trainer.name,
        verdict=verdict,
        because=because,
        rows=rows,
        false_alarm=false_alarm,
        seed=seed,
        claim=dataclasses.asdict(trainer.claim),
        hints=[*trainer.notes, *boundary.hints(trainer)],
    )


def decide(check: Check, bench: Bench, alpha: float, controls: bool = True) -> Evidence:
    """A check, and, where it finds nothing, whether it would have."""
    false_alarm = alpha if check.chance else 0.0

    def evidence(
        verdict: outcome.Verdict, because: str, figures: Mapping[str, float] | None = None, control: str = ""
    ) -> Evidence:
        return Evidence(
            name=check.name,
            test=check.test,
            verdict=verdict,
            because=because,
            false_alarm=false_alarm,
            figures=figures or {},
            control=control,
        )

    try:
        found = check.look(bench, alpha)
    except Undecided as undecided:
        return evidence("INCONCLUSIVE", str(undecided))
    if found.violated:
        return evidence("VIOLATION", found.because, figures=found.figures)
    if not controls:
        return evidence("INCONCLUSIVE", f"{found.because}; no positive control was made", figures=found.figures)
    try:
        control = check.look(check.control(bench), alpha)
    except Undecided as undecided:
        because = f"{found.because}; but the positive control could not be made ({undecided})"
        return evidence("INCONCLUSIVE", because, figures=found.figures)
    if not control.violated:
        because = f"{found.because}; but a bug that was put in was not found either ({control.because})"
        return evidence("INCONCLUSIVE", because, figures=found.figures)
    return evidence("CONSISTENT", found.because, figures=found.figures, control=control.because)


def _take_one_step(bench: Bench) -> None:
    try:
        released = bench.run(bench.crowd(2), bench.claim.noise_multiplier, 1)
    except Undecided as undecided:
        raise UsageError(
            f"trainer = {bench.trainer.name or 'step'} · {undecided}, on two ordinary units",
            next="step(model, inputs, noise_multiplier, generator) must train the model it is given, in place, for one step.",
        ) from undecided
    if released.norm == 0:
        raise UsageError(
            f"trainer = {bench.trainer.name or 'step'} · one step did not change the model's parameters",
            next="Train the model in place, with SGD; do not copy it.",
        )
