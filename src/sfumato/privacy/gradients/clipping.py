"""Norms of per-unit gradients, the factors that clip them, and the sum of what is left.

Shapes: B units.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.privacy.gradients.terms import CANCELLING, Sums, Term, Units, smallest_unit, squares
from sfumato.privacy.gradients.tied import tied_squared_norms


@dataclass(frozen=True, slots=True)
class Clipped:
    """The sum over units of clipped gradients, and two things that are internal and never released as they are: the
    norms before clipping, (B,) for each group, and how many units had a non-finite gradient."""

    sums: Sums
    norms: list[Tensor]
    non_finite: int


Clip = Callable[[Tensor], Tensor]
"""(B,) norms -> (B,) factors; a norm times its factor is at most the bound."""


def clip_to(bound: float) -> Clip:
    """min(1, C / norm). Source: Abadi et al. 2016, Algorithm 1, arXiv:1607.00133."""
    return lambda norms: (bound / norms).clamp_(max=1.0)


def normalise_to(bound: float, stability: float = 0.01) -> Clip:
    """C / (norm + gamma). Source: AUTO-S, Bu et al. 2023, arXiv:2206.07136, eq. 5, with the bound C instead of 1."""
    return lambda norms: bound / (norms + stability)


def clipped_sums(
    layers: list[list[Term]],
    units: Units,
    scale: Tensor,
    clips: Sequence[Clip],
    group_of: Sequence[int],
    give: Callable[[int, Sums], None] | None = None,
) -> Clipped:
    """Clips every unit's gradient, group of layers by group of layers, and adds up.

    Guarantee: a unit changes the part of ``sums`` that belongs to a group by at most that group's bound in L2 norm over
    all its parameters, whatever the unit's gradient is; a unit with a non-finite number anywhere counts as zero
    everywhere. The bound holds in the arithmetic that is used: norms and factors are rounded against the unit. (Not
    covered: the rounding of the sum over units itself; what a unit adds to it is of the size of the bound, also where its
    pieces cancel.)

    Args:
      layers: the terms, layer by layer. Layers that share a parameter must be of one group.
      scale: (B,) float64; a unit's gradient is this times what the terms say (undoes the mean over the batch).
      clips: one for each group.
      group_of: which group each entry of ``layers`` is of.
      give: takes (number of the layer, its sums) as soon as they are there, so that they need not be held together;
        then ``Clipped.sums`` is empty.
    """
    terms = [term for group in layers for term in group]
    norms = norms_of(layers, units, scale, group_of, len(clips))
    bad = torch.zeros(units.num_units, dtype=torch.bool, device=scale.device)
    for norm in norms:
        bad |= ~torch.isfinite(norm)
    if bad.any():
        for term in terms:
            term.forget(bad, units)
    factors = [torch.where(bad, 0.0, clip(norm) * scale) for clip, norm in zip(clips, norms, strict=True)]
    least = torch.finfo(torch.float32).tiny  # a smaller factor would be rounded, up too, to the few numbers below it
    factors = [torch.where(factor < least, 0.0, factor) for factor in factors]
    sums: Sums = {}
    for number, (layer, group) in enumerate(zip(layers, group_of, strict=True)):
        for term in layer:
            for parameter, value in term.sums(factors[group], units).items():
                sums[parameter] = sums[parameter] + value if parameter in sums else value
        if give is not None:
            give(number, sums)
            sums = {}
    return Clipped(sums, norms, int(bad.sum()))


def norms_of(
    layers: list[list[Term]], units: Units, scale: Tensor, group_of: Sequence[int], groups: int = 1
) -> list[Tensor]:
    """(B,) for each group: the norms of the units' gradients, before clipping, rounded up. Internal; as ``clipped_sums``."""
    upwards = 1 + 8 * smallest_unit([term for group in layers for term in group])
    squared = [torch.zeros(units.num_units, dtype=torch.float64, device=scale.device) for _ in range(groups)]
    for group, square in zip(group_of, _squared_norms(layers, units), strict=True):
        squared[group] += square
    return [square.sqrt() * scale * upwards for square in squared]


def _squared_norms(layers: list[list[Term]], units: Units) -> list[Tensor]:
    """(B,) for every layer, an upper bound. Gradients of terms that share a parameter are formed and added first, where
    nothing better is known.

    A shared parameter's part is booked on the first layer that uses it.
    """
    users: dict[nn.Parameter, list[Term]] = {}
    for term in (term for group in layers for term in group):
        for parameter in term.parameters:
            users.setdefault(parameter, []).append(term)
    shared = {id(term) for terms in users.values() if len(terms) > 1 for term in terms}
    done: set[int] = set()
    results = []
    for group in layers:
        total = torch.zeros(units.num_units, dtype=torch.float64, device=_device(group))
        for term in group:
            if id(term) not in shared:
                total += term.squared(units)
            elif id(term) not in done:
                together = _connected(term, users)
                done |= {id(other) for other in together}
                tied = tied_squared_norms(together, units)
                total += _formed_squared_norms(together, units) if tied is None else tied
        results.append(total)
    return results


def _connected(term: Term, users: dict[nn.Parameter, list[Term]]) -> list[Term]:
    found, waiting = [term], [term]
    while waiting:
        for parameter in waiting.pop().parameters:
            for other in users[parameter]:
                if not any(other is one for one in found):
                    found.append(other)
                    waiting.append(other)
    return found


def _formed_squared_norms(terms: list[Term], units: Units) -> Tensor:
    """(B,): unit after unit, the sum of the terms' gradients and its squared norm."""
    out = torch.zeros(units.num_units, dtype=torch.float64, device=_device(terms))
    for unit in range(units.num_units):
        total: Sums = {}
        for term in terms:
            for parameter, value in term.gradient_of(unit, units).items():
                total[parameter] = total[parameter] + value if parameter in total else value
        out[unit] = sum(squares(value.reshape(1, -1))[0] for value in total.values())
    lengths = torch.zeros_like(out)
    for term in terms:  # which are summed one by one
        lengths += term.squared(units).sqrt()
    return out + CANCELLING * smallest_unit(terms) * lengths.square_()


def _device(terms: Iterable[Term]) -> torch.device:
    return next((parameter.device for term in terms for parameter in term.parameters), torch.device("cpu"))
