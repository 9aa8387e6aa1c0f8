"""How far one unit moves what a step releases: exact, without noise, for the most hostile units (test S).

A step of the Gaussian mechanism may lose mu = Delta / s at most, where Delta is how far a unit moves the released sum and
s the noise. With blocks that have noise of their own, mu^2 = sum (Delta_l / s_l)^2. The claim is mu <= 1 / sigma. Delta is
exact; s is measured, and enters as the upper end of its confidence interval, so that chance convicts with probability alpha.
Ordinary data do not show most of these bugs: the units live in gradient space (``probe``).
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.bench import Bench, Released, spread
from sfumato.auditing.conformance.outcome import Finding, Undecided

GROWTH = 1.05  # a direction that moves the sum by so much more than a simpler one shows a bug of its own
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the exact figures, relative


def mu(moved: Released, noise: Sequence[tuple[float, int]], alpha: float | None = None) -> float:
    """(sum (Delta_l / s_l)^2)^(1/2); with ``alpha`` a lower bound that is above the truth with that probability at most."""
    from scipy.stats import chi2

    total = 0.0
    for block, (rms, count) in zip(moved.blocks, noise, strict=True):
        distance = float(block.norm())
        if distance == 0:
            continue
        if not math.isfinite(distance) or rms == 0:
            return math.inf
        if alpha is not None:
            rms *= math.sqrt(count / float(chi2.ppf(alpha / len(noise), count)))
        total += (distance / rms) ** 2
    return math.sqrt(total)


def lone(bench: Bench, direction: Tensor, length: float = probe.LARGE) -> Released:
    """How far a unit moves the sum when it is alone."""
    return bench.run(bench.unit(direction, length)).minus(bench.rest()).sums


def lone_noise(bench: Bench) -> list[tuple[float, int]]:
    return spread([noise.sums for noise in bench.noises(bench.unit(probe.everywhere()))])


def crowded(bench: Bench, count: int = 7) -> tuple[Released, list[tuple[float, int]]]:
    """How far the most hostile unit moves the sum of a crowd that agrees against it, removed or without a gradient; and the
    noise there."""
    crowd = bench.crowd(count)
    hostile = bench.unit(-probe.everywhere(), 100 * count * probe.LARGE)
    moves = []
    for place in (0, count):
        batch = torch.cat([crowd[:place], hostile, crowd[place:]])
        silent = torch.cat([crowd[:place], bench.zeros(1), crowd[place:]])
        moves += [bench.run(batch).minus(bench.run(other)).sums for other in (crowd, silent)]
    noise = spread([noise.sums for noise in bench.noises(torch.cat([crowd, hostile]))])
    return max(moves, key=lambda moved: mu(moved, noise)), noise


def _saturation(bench: Bench) -> float:
    """The sum of seven units that agree, in units of one's: 7 where each is clipped for itself."""
    one = lone(bench, probe.everywhere()).norm
    return bench.run(bench.crowd(7)).minus(bench.rest()).norm / one if one else math.nan


def _unclipped(bench: Bench) -> float:
    """How much farther a unit ten times as long moves the sum."""
    near, far = (lone(bench, probe.in_coordinate(0), scale * probe.LARGE).norm for scale in (1, 10))
    if near == 0:
        raise Undecided("a hostile unit alone moves nothing, so that there is no scale to compare with")
    return far / near


def _figures(bench: Bench, moved: Released, noise: Sequence[tuple[float, int]], alpha: float) -> dict[str, float]:
    sure, likely = mu(moved, noise, alpha), mu(moved, noise)
    return {
        "claimed_noise_multiplier": bench.claim.noise_multiplier,
        "effective_noise_multiplier": 1 / likely if likely else math.inf,
        "effective_at_most": 1 / sure if sure else math.inf,
    }


def exceeds(bench: Bench, moved: Released, noise: Sequence[tuple[float, int]], alpha: float) -> bool:
    return mu(moved, noise, alpha) * bench.claim.noise_multiplier > 1 + TOLERANCE[bench.dtype]


def _words(figures: dict[str, float]) -> str:
    return (
        f"effective noise multiplier {figures['effective_noise_multiplier']:.3g} (at most "
        f"{figures['effective_at_most']:.3g}), claimed {figures['claimed_noise_multiplier']:.3g}"
    )


def aggregate(bench: Bench, alpha: float) -> Finding:
    """Row 1: a unit turns the whole aggregate around, or is not clipped at all."""
    growth = _unclipped(bench)
    if not growth <= GROWTH:
        return Finding(
            violated=True,
            because=f"a gradient ten times as long moves the sum {growth:.3g} times as far: it is not clipped",
            figures={"growth": growth},
        )
    return _of_crowd(bench, alpha, few=True)


def micro_batches(bench: Bench, alpha: float) -> Finding:
    """Row 5: a unit turns its micro-batch around."""
    return _of_crowd(bench, alpha, few=False)


def _of_crowd(bench: Bench, alpha: float, *, few: bool) -> Finding:
    moved, noise = crowded(bench)
    alone = mu(lone(bench, probe.everywhere()), noise)
    saturation = _saturation(bench)
    whole = saturation < 1.5  # seven that agree count as one
    worse = mu(moved, noise) > GROWTH * alone and _unclipped(bench) <= GROWTH
    figures = {**_figures(bench, moved, noise, alpha), "sum_of_seven": saturation}
    found = worse and exceeds(bench, moved, noise, alpha) and whole == few
    said = f"against a crowd: {_words(figures)}; seven units that agree count as {saturation:.3g}"
    return Finding(violated=found, because=said, figures=figures)


def elements(bench: Bench, alpha: float) -> Finding:
    """Row 2: a gradient that is spread over a tensor moves it farther than one in a single coordinate."""
    return _of_directions(
        bench, alpha, [probe.in_tensor(i) for i in _tensors()], [probe.in_coordinate(i) for i in _tensors()]
    )


def layers(bench: Bench, alpha: float) -> Finding:
    """Row 4: a gradient that is spread over the tensors moves them farther than one in a single tensor."""
    return _of_directions(bench, alpha, [probe.everywhere()], [probe.in_tensor(i) for i in _tensors()])


def _tensors() -> range:
    return range(len(probe.SIZES))


def _of_directions(bench: Bench, alpha: float, wide: Iterable[Tensor], narrow: Iterable[Tensor]) -> Finding:
    noise = lone_noise(bench)
    moved = max((lone(bench, direction) for direction in wide), key=lambda moved: mu(moved, noise))
    before = max(mu(lone(bench, direction), noise) for direction in narrow)
    figures = _figures(bench, moved, noise, alpha)
    growth = mu(moved, noise) / before if before else math.nan
    found = growth > GROWTH and exceeds(bench, moved, noise, alpha)
    said = f"{_words(figures)}; {growth:.3g} times what a narrower gradient does"
    return Finding(violated=found, because=said, figures={**figures, "growth": growth})


def special_numbers(bench: Bench, alpha: float) -> Finding:
    """Row 17: gradients that are infinite, not a number, huge or tiny, in the trainer's own type."""
    crowd = bench.crowd(3)
    bound = lone(bench, probe.everywhere()).norm
    without = bench.run(crowd)
    largest = float(torch.finfo(bench.dtype).max)
    worst, words = 0.0, ""
    for name, value in (("inf", math.inf), ("nan", math.nan), ("largest", largest), ("tiny", 1e-35)):
        for shape, hostile in (("one number", bench.zeros(1)), ("all numbers", bench.zeros(1))):
            hostile[0, 0 if shape == "one number" else slice(None)] = value
            released = bench.run(torch.cat([crowd, hostile]))
            distance = released.minus(without).norm if released.finite else math.inf
            if not distance <= worst:
                worst, words = distance, f"{name} in {shape}"
    ratio = worst / bound if bound else math.nan
    return Finding(
        violated=not ratio <= 1 + TOLERANCE[bench.dtype],
        because=f"a gradient of {words} moves the sum by {ratio:.4g} C"
        if math.isfinite(ratio)
        else f"{words} comes through",
        figures={"moved_over_bound": ratio},
    )


def fast_norms(bench: Bench, alpha: float) -> Finding:
    """Row 13: every kind of layer, float64: one unit alone, and a batch against the slow reference to 1e-6."""
    claim = bench.claim
    if not _unclipped(bench) <= GROWTH:
        raise Undecided("nothing is clipped (row 1), so that there is no bound to compare with")
    bound = lone(bench, probe.everywhere()).norm
    refused, wrong, tried = [], [], []
    worst = 0.0
    for kind in probe.MODELS:
        inputs = probe.inputs_of(kind, 5, torch.float64)
        try:
            nobody = _without_units(bench, kind, inputs)
            distances = [bench.run(inputs[i : i + 1], kind=kind).minus(nobody).norm / bound for i in range(5)]
            whole = bench.run(inputs, kind=kind).minus(nobody).vector
        except Undecided as undecided:
            refused.append(f"{kind} ({undecided})")
            continue
        tried.append(kind)
        worst = max(worst, *distances)
        if claim.clipping == "flat":
            expected = _reference(kind, inputs, claim.max_grad_norm) * (bound / claim.max_grad_norm)
            off = float((whole - expected).norm() / expected.norm())
            if not off <= _exact(bench):
                wrong.append(f"{kind} is off by {off:.2g}")
    if not tried:
        raise Undecided(f"the trainer takes none of the models: {refused[0]}")
    said = f"a unit moves {', '.join(tried)} by {worst:.7g} C at most"
    said += f"; refused: {'; '.join(refused)}" if refused else ""
    figures = {"moved_over_bound": worst}
    if worst > 1 + _exact(bench):
        return Finding(violated=True, because=said, figures=figures)
    if wrong:  # shorter than they should be: no loss of privacy, but not what is claimed either
        raise Undecided(f"{'; '.join(wrong)} from the slow reference, without moving farther than C")
    return Finding(violated=False, because=said, figures=figures)


def _exact(bench: Bench) -> float:
    """1e-6 in float64; the scale comes from the probe, which has the trainer's own type. AUTO-S reaches C only in the limit."""
    return 1e-6 if bench.dtype == torch.float64 and bench.claim.clipping != "automatic" else 1e-4


def _without_units(bench: Bench, kind: str, inputs: Tensor) -> Released:
    try:
        return bench.run(inputs[:0], kind=kind)
    except Undecided:
        moved = bench.run(inputs[:1], kind=kind)
        return moved.scaled(0.0)


def _reference(kind: str, inputs: Tensor, max_grad_norm: float) -> Tensor:
    """(P,): the sum of clipped gradients, one unit at a time, in float64."""
    model = probe.model_of(kind, torch.float64)
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for i in range(len(inputs)):
        gradients = torch.autograd.grad(model(inputs[i : i + 1]).sum(), parameters)
        gradient = torch.cat([g.flatten() for g in gradients])
        total += gradient * min(1.0, max_grad_norm / max(float(gradient.norm()), 1e-300))
    return total


def persons(bench: Bench, alpha: float) -> Finding:
    """Row 20: a person whose six records agree moves the sum as far as C, not 6 C."""
    step = bench.trainer.step_of_persons
    if step is None:
        raise Undecided("the adapter gives no step_of_persons")
    rows = bench.crowd(6)
    owner = torch.zeros(6, dtype=torch.int64)

    def moved(sigma: float, seed: int) -> Released:
        return bench.observe(
            probe.model_of("probe", bench.dtype),
            seed,
            lambda model, g: step(model, rows.clone(), owner.clone(), sigma, g),
            "step_of_persons",
        )

    quiet = moved(0.0, 0)
    noise = spread([moved(bench.claim.noise_multiplier, 1 + i).minus(quiet) for i in range(bench.noise_runs)])
    distance = quiet.minus(bench.rest())
    figures = _figures(bench, distance, noise, alpha)
    return Finding(
        violated=exceeds(bench, distance, noise, alpha),
        because=f"six records of one person: {_words(figures)}",
        figures=figures,
    )


def site_update(bench: Bench, alpha: float) -> Finding:
    """Row 19: the hostile update of a site, alone, against a crowd, and spread as it likes."""
    growth = _unclipped(bench)
    noise = lone_noise(bench)
    moves = [lone(bench, direction) for direction in (probe.everywhere(), *map(probe.in_tensor, _tensors()))]
    against, crowd_noise = crowded(bench)
    candidates = [(moved, noise) for moved in moves] + [(against, crowd_noise)]
    moved, there = max(candidates, key=lambda pair: mu(*pair))
    figures = _figures(bench, moved, there, alpha)
    return Finding(
        violated=not growth <= GROWTH or exceeds(bench, moved, there, alpha),
        because=f"a hostile update: {_words(figures)}; ten times as long moves {growth:.3g} times as far",
        figures={**figures, "growth": growth},
    )
