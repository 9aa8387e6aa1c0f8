"""The noise itself (test G): its size, its shape, its independence, its low bits; and what has none.

Every statistic is compared with its exact distribution for normal noise; p-values are two-sided or one-sided as said, and a
check convicts where its smallest p-value, times the number of statistics it looked at, is below ``alpha``.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sfumato.auditing.conformance import probe
from sfumato.auditing.conformance.bench import Bench, Released, spread
from sfumato.auditing.conformance.outcome import Finding, Undecided
from sfumato.auditing.conformance.sensitivity import TOLERANCE, exceeds, lone, lone_noise, mu

WASTE = 1.5  # more noise than so many times the claim is said, though it hides more and not less


def size(bench: Bench, alpha: float) -> Finding:
    """Row 3: the noise against how far one unit at the bound moves one coordinate, where no clipping can go wrong."""
    noise = lone_noise(bench)
    sigma = bench.claim.noise_multiplier
    if all(rms == 0 for rms, _ in noise):
        return Finding(violated=True, because="there is no noise at all", figures={"effective_noise_multiplier": 0.0})
    # what has none at all is row 14's
    shown = [(rms if rms else math.inf, count) for rms, count in noise]
    moves = [lone(bench, probe.in_coordinate(i), 1.0) for i in range(len(probe.SIZES))]
    moved = max(moves, key=lambda moved: mu(moved, shown))
    sure, likely = mu(moved, shown, alpha), mu(moved, shown)
    figures = {
        "claimed_noise_multiplier": sigma,
        "effective_noise_multiplier": 1 / likely if likely else math.inf,
        "effective_at_most": 1 / sure if sure else math.inf,
    }
    said = f"noise of {figures['effective_noise_multiplier']:.3g} C, claimed {sigma:.3g} C"
    if sure * sigma > 1 + TOLERANCE[bench.dtype]:
        return Finding(violated=True, because=said, figures=figures)
    spreads = (probe.everywhere(), *map(probe.in_tensor, range(len(probe.SIZES))))
    widest = max(mu(lone(bench, direction), shown) for direction in spreads)
    if widest * sigma * WASTE < 1:
        raise Undecided(
            f"{said}: more than claimed, so the guarantee holds, but this is not the mechanism that is claimed"
        )
    return Finding(violated=False, because=said, figures=figures)


def by_batch(bench: Bench, alpha: float) -> Finding:
    """Row 8: neither a unit's part nor the noise may depend on how many others there are."""
    unit = bench.unit(probe.everywhere())
    alone = bench.run(unit)
    company = bench.run(torch.cat([unit, bench.zeros(7)]))
    change = company.minus(alone).norm / lone(bench, probe.everywhere()).norm
    small = spread(bench.noises(unit))
    large = spread(bench.noises(torch.cat([unit, bench.zeros(7)]), first=2000))
    worst = _least_f([small, large])
    figures = {"change_of_sum": change, "p_noise": worst}
    said = f"seven units without a gradient change the sum by {change:.3g} of itself; equal noise: p = {worst:.3g}"
    return Finding(violated=not change <= TOLERANCE[bench.dtype] or worst < alpha, because=said, figures=figures)


def _least_f(groups: Sequence[Sequence[tuple[float, int]]]) -> float:
    """The smallest two-sided p-value of the F test between two groups, block by block, times the number of tests."""
    from scipy.stats import f

    least, tests = 1.0, 0
    for (rms, count), (other, other_count) in zip(*groups, strict=True):
        tests += 1
        if rms == 0 or other == 0:
            if rms != other:
                return 0.0
            continue
        ratio = (rms / other) ** 2
        least = min(least, 2 * float(min(f.cdf(ratio, count, other_count), f.sf(ratio, count, other_count))))
    return min(1.0, least * tests)


def nobody(bench: Bench, alpha: float) -> Finding:
    """Row 10: an empty batch is a step of noise like any other."""
    try:
        empty = bench.noises(bench.nobody())
    except Undecided as undecided:
        raise Undecided(f"on an empty batch the {undecided}: whether anyone was there must not show") from undecided
    present = bench.noises(bench.zeros(1), first=3000)
    worst = _least_f([spread(empty), spread(present)])
    moved = bench.run(bench.nobody()).minus(bench.run(bench.zeros(1))).norm
    bound = lone(bench, probe.everywhere()).norm
    said = f"noise for nobody as for a unit without a gradient: p = {worst:.3g}, and moved by {moved / bound:.3g} C"
    return Finding(
        violated=worst < alpha or moved > TOLERANCE[bench.dtype] * bound, because=said, figures={"p_noise": worst}
    )


def everything_covered(bench: Bench, alpha: float) -> Finding:
    """Row 14: every tensor that a unit moves has noise."""
    noise = lone_noise(bench)
    moved = lone(bench, probe.everywhere())
    bare = [i for i in range(moved.tensors) if noise[i][0] == 0 and float(moved.blocks[i].norm()) > 0]
    names = ", ".join(f"tensor {i}" for i in bare)
    said = f"{names} moves with the data, without noise" if bare else "every tensor that moves has noise"
    return Finding(violated=bool(bare), because=said, figures={"tensors_without_noise": float(len(bare))})


def shape(bench: Bench, alpha: float) -> Finding:
    """Row 16: mean, shape, and independence across coordinates, tensors and steps."""
    return independent(bench.noises(bench.unit(probe.everywhere())), alpha)


def independent(noises: Sequence[Released], alpha: float) -> Finding:
    """Is this the noise of independent normals?

    Mean 0 (z), normal (Kolmogorov-Smirnov, conservative with an estimated scale), no correlation of neighbouring coordinates,
    of tensors, or of any two steps (Fisher's z, good to a factor of 2 at these p-values and numbers; alpha is halved for it).
    """
    from scipy.special import log_ndtr
    from scipy.stats import kstest

    blocks = _normalised(noises)
    rows = np.concatenate(blocks, axis=1)  # (steps, P)
    width = min(block.shape[1] for block in blocks)
    tensors = [_z(a[:, :width].ravel(), b[:, :width].ravel()) for a, b in itertools.combinations(blocks, 2)]
    steps = [_z(a, b) for a, b in itertools.combinations(rows, 2)]
    groups = {
        "mean": [abs(float(rows.mean())) * math.sqrt(rows.size)],
        "neighbours": [_z(rows[:, :-1].ravel(), rows[:, 1:].ravel())],
        "tensors": tensors,
        "steps": steps,
    }
    p = {
        name: min(1.0, 2 * len(values) * math.exp(float(log_ndtr(-max(values)))))
        for name, values in groups.items()
        if values
    }
    p["normal"] = float(kstest(rows.ravel(), "norm").pvalue)
    name, worst = min(p.items(), key=lambda item: item[1])
    same = any(np.array_equal(a, b) for a, b in itertools.combinations(rows, 2))
    said = "two steps had the same noise" if same else f"independent normal noise: p = {worst:.3g} ({name})"
    figures = {f"p_{key}": value for key, value in p.items()}
    return Finding(violated=same or worst * len(p) < alpha / 2, because=said, figures=figures)


def _normalised(noises: Sequence[Released]) -> list[np.ndarray]:
    """(steps, n) for every tensor, over its root mean square; tensors without noise are left out."""
    scales = [rms for rms, _ in spread(noises)]
    kept = [i for i in range(noises[0].tensors) if scales[i] > 0]
    if not kept:
        raise Undecided("there is no noise to look at")
    return [np.stack([(noise.blocks[i] / scales[i]).numpy() for noise in noises]) for i in kept]


def _z(a: np.ndarray, b: np.ndarray) -> float:
    """|Fisher's z| of a correlation, standardised."""
    r = float(np.corrcoef(a, b)[0, 1])
    return math.inf if not abs(r) < 1 - 1e-12 else abs(math.atanh(r)) * math.sqrt(len(a) - 3)


def low_digits(bench: Bench, alpha: float) -> Finding:
    """Row 15: which numbers can come out must not depend on the units.

    Noise of few digits (float16, bfloat16) lies on a coarse grid that the sum does not lie on, so that a release minus a
    guessed sum tells whether the guess is right. Where the trainer claims hardened noise, all releases must lie on one grid,
    whatever the units are.
    """
    unit = bench.unit(_irregular(), 0.7)
    nobody = torch.stack([noise.vector for noise in bench.noises(bench.zeros(1), first=3000)])
    pure = torch.unique(nobody, dim=0).flatten()  # steps with the same noise are row 16's
    pure = pure[pure != 0]
    if len(pure) == 0:
        raise Undecided("there is no noise to look at")
    distinct = len(torch.unique(pure.abs()))
    ties = 1 - distinct / len(pure)
    released = torch.cat(
        [bench.run(unit, bench.claim.noise_multiplier, 6000 + i).vector for i in range(bench.noise_runs)]
    )
    if ties > 0.01:  # float32 draws: below 1e-3 at this number; float16 and bfloat16: above 5e-2
        largest = float(pure.abs().max())
        grid = _grid_of(pure.abs())
        off = _beside(released[released.abs() > largest / 2], grid) if grid else 0.0
        figures = {"ties": ties, "off_the_grid": off}
        said = f"{ties:.1%} of the noise repeats: it has few digits"
        return Finding(
            violated=off > 0.01, because=f"{said}; {off:.0%} of the releases lie beside its grid", figures=figures
        )
    if not bench.claim.hardened_noise:
        raise Undecided(
            f"ordinary floating-point noise ({ties:.2%} of it repeats), and no claim that its low bits are safe"
        )
    fine = bench.in_float64()
    std = fine.claim.noise_multiplier * fine.claim.max_grad_norm
    grid = math.ldexp(1.0, math.floor(math.log2(std)) - 33)
    released = torch.cat(
        [
            fine.run(inputs, fine.claim.noise_multiplier, first + i).vector
            for inputs, first in ((fine.zeros(1), 3000), (unit.double(), 6000))
            for i in range(4)
        ]
    )
    off = min(_beside(released / scale, grid) for scale in _scales(fine))
    said = f"{off:.0%} of the releases lie beside the grid of 2^-33 noise, whatever the units are"
    return Finding(violated=off > 0.001, because=said, figures={"ties": ties, "off_the_grid": off})


def _scales(bench: Bench) -> list[float]:
    """What the sum may have been multiplied with before it was released: by how a short gradient comes out, by how a long one
    does (where short ones are made longer), or one over the expected batch size."""
    length = 1e-3
    short = lone(bench, probe.in_coordinate(0), length).norm / (length * bench.claim.max_grad_norm)
    long = lone(bench, probe.everywhere()).norm / bench.claim.max_grad_norm
    stated = bench.claim.expected_batch_size
    return [scale for scale in (short, long, 1 / stated if stated else 0.0) if scale > 0]


def _beside(values: Tensor, grid: float) -> float:
    """The share of the values that are no multiples of the grid, up to the rounding of a division."""
    parts = values / grid
    return float(((parts - parts.round()).abs() > 0.01).double().mean())


def _irregular() -> Tensor:
    """A direction whose numbers lie on no grid."""
    values = torch.tensor([math.sqrt(i + 2) for i in range(sum(probe.SIZES))], dtype=torch.float64) * probe.signs(256)
    return values / values.norm()


def _grid_of(values: Tensor) -> float:
    """The smallest gap between the largest values, whose grid is the coarsest."""
    large = torch.unique(values[values > values.max() / 2])
    return float((large[1:] - large[:-1]).min()) if len(large) > 1 else 0.0


def together(bench: Bench, alpha: float) -> Finding:
    """Row 18: what several processes release is what one would."""
    step = bench.trainer.step_together
    if step is None:
        raise Undecided("the adapter gives no step_together")
    units = torch.cat([bench.unit(probe.everywhere()), bench.unit(probe.in_tensor(0), 0.5), bench.zeros(2)])
    fewer = units[1:]

    def released(inputs: Tensor, sigma: float, seed: int, processes: int) -> Released:
        return bench.observe(
            probe.model_of("probe", bench.dtype),
            seed,
            lambda model, g: step(model, inputs.clone(), sigma, g, processes),
            "step_together",
        )

    one = bench.run(units).minus(bench.rest()).norm
    figures: dict[str, float] = {}
    said = []
    violated = False
    for processes in (2, 4):
        quiet = released(units, 0.0, 0, processes)
        noise = spread([released(units, bench.claim.noise_multiplier, 1 + i, processes).minus(quiet) for i in range(8)])
        moved = quiet.minus(released(fewer, 0.0, 0, processes))
        sure, likely = mu(moved, noise, alpha / 2), mu(moved, noise)
        figures[f"effective_of_{processes}"] = 1 / likely if likely else math.inf
        figures[f"sum_of_{processes}"] = quiet.norm / one if one else math.nan
        said.append(f"{processes} processes: effective noise multiplier {figures[f'effective_of_{processes}']:.3g}")
        violated |= sure * bench.claim.noise_multiplier > 1 + TOLERANCE[bench.dtype]
    return Finding(violated=violated, because="; ".join(said), figures=figures)


def sites(bench: Bench, alpha: float) -> Finding:
    """Row 19: a site that drops out must not take its share of the noise along."""
    moved = lone(bench, probe.everywhere())
    few = spread(bench.noises(bench.unit(probe.everywhere())))
    many = spread(bench.noises(torch.cat([bench.unit(probe.everywhere()), bench.zeros(7)]), first=2000))
    worst = _least_f([few, many])
    bad = any(exceeds(bench, moved, noise, alpha / 2) for noise in (few, many))
    said = f"one site and eight: equal noise, p = {worst:.3g}"
    return Finding(violated=bad or worst < alpha / 2, because=said, figures={"p_noise": worst})
