"""The norm of a gradient that two layers have a share in, without forming it: an embedding tied to the output layer.

Of one unit with output layer gradients sum_s g_s a_s' and embedding gradients sum_t e_{w_t} h_t' (e_w the unit vector of
word w), the squared norm of the sum is that of each, which the terms know, plus twice

    sum_{s,t} g_s[w_t] <a_s, h_t>,

which needs T^2 (D + 1) operations instead of a gradient of V D numbers. Shapes: n units, S and T positions, D width, V
words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.privacy.gradients import products
from sfumato.privacy.gradients.terms import CANCELLING, WORK_BYTES, Lookup, Outer, Term, Units, blocks, by_unit


def tied_squared_norms(terms: Sequence[Term], units: Units) -> Tensor | None:
    """(B,) float64, an upper bound, for one embedding and one output layer with the same weight; None for others."""
    lookups = [term for term in terms if isinstance(term, Lookup)]
    outers = [term for term in terms if isinstance(term, Outer)]
    if len(terms) != 2 or len(lookups) != 1 or len(outers) != 1 or lookups[0].parameters[0] is not outers[0].weight:
        return None
    lookup, outer = lookups[0], outers[0]
    out = torch.zeros(units.num_units, dtype=torch.float64, device=outer.inputs.device)
    for group in units.groups():
        words = lookup.words[group.rows].reshape(group.num_units, -1)  # (n, T)
        h = by_unit(lookup.outputs, group)  # (n, T, D)
        a, g = by_unit(outer.inputs, group), by_unit(outer.outputs, group)  # (n, S, D), (n, S, V)
        size = 4 * a.shape[1] * words.shape[1] * a.element_size()
        cross = [_cross(words[b], h[b], a[b], g[b]) for b in blocks(group.num_units, max(1, WORK_BYTES // size))]
        out[group.units] = 2 * torch.cat(cross)
    squared = lookup.squared(units), outer.squared(units)  # only now: a term may let go of what it was made of
    lengths = squared[0].sqrt() + squared[1].sqrt()
    return (
        out.add_(squared[0])
        .add_(squared[1])
        .clamp_(min=0)
        .add_(CANCELLING * torch.finfo(outer.inputs.dtype).eps * lengths.square_())
    )


def _cross(words: Tensor, h: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """(n,), not below the true value: rounding is put on top."""
    of_words = torch.gather(g, 2, words.unsqueeze(1).expand(-1, a.shape[1], -1))  # (n, S, T)
    inner = products.pairs(a, h)  # (n, S, T)
    unit = torch.finfo(a.dtype).eps / 2
    slack = 1.02 * (products.roundings(a.shape[2]) + words.shape[1] + 8) * unit
    lengths = of_words.abs().mul_(a.norm(dim=2).unsqueeze(2)).mul_(h.norm(dim=2).unsqueeze(1))
    return (of_words.mul_(inner)).sum(2).sum(1, dtype=torch.float64) + slack * lengths.sum(2).sum(
        1, dtype=torch.float64
    )
