"""Norms err upwards only, and not by much; a unit's norm is its own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sfumato.privacy.gradients import tied
from sfumato.privacy.gradients.convolution import Convolution, Geometry
from sfumato.privacy.gradients.terms import Lookup, Outer, PerRow, Term, Units

LINEAR = nn.Linear(300, 200)
BIAS = LINEAR.bias


def outer(rows: int, positions: int, *, kind: torch.dtype = torch.float32, opposite: bool = False) -> Outer:
    """With ``opposite``, a row's positions cancel up to a small rest: the norm is tiny, its summands are not."""
    a = torch.randn(rows, positions, 300, dtype=kind)
    g = torch.randn(rows, positions, 200, dtype=kind)
    if opposite:
        half = positions // 2
        a[:, half:] = a[:, :half]
        g[:, half:] = -g[:, :half] * (1 + 1e-4)
    return Outer(LINEAR.weight, BIAS, a, g)


def true_squares(term: Outer, units: Units) -> torch.Tensor:
    """The same numbers in float64, formed."""
    twin = Outer(LINEAR.weight, BIAS, term.inputs.double(), term.outputs.double())
    out = []
    for unit in range(units.num_units):
        sums = twin.gradient_of(unit, units)
        out.append(sum(float(value.square().sum()) for value in sums.values()))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("positions", [2, 8, 400])
def test_a_norm_in_single_precision_is_never_below_the_true_one(positions, opposite):
    for units in (Units(None, 20), Units(torch.arange(20) // 3, 7)):
        torch.manual_seed(0)
        term = outer(20, positions, opposite=opposite)
        true = true_squares(term, units)
        computed = term.squared_norms(units)
        if positions < 400:  # beyond, the gradient is formed, and its own norm counts
            assert (computed >= true).all()
        if not opposite:  # the price of certainty, for positions that have nothing in common
            assert (computed <= true * (1 + 1.3e-4 * 3 * positions)).all()


@pytest.mark.parametrize("size", [1, 127, 129, 5_000_003])
@pytest.mark.parametrize("value", [0.1, 1.0, 3e-20, 1e-30])
def test_the_norm_of_millions_of_numbers_is_not_below_and_hardly_above(size, value):
    """float32 vector_norm over the whole is below by 1e-4 at 5 million; equal numbers are its worst case, and squares
    below the smallest float are lost."""
    gradients = torch.full((1, size), value)
    true = size * float(gradients[0, 0].double()) ** 2
    computed = float(PerRow(nn.Parameter(torch.zeros(size)), gradients).squared_norms(Units(None, 1)))
    assert true <= computed <= true * (1 + 2e-5) + size * 2e-38


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), other=st.floats(-1e30, 1e30))
def test_a_units_norm_does_not_move_with_another_units_rows(seed, other):
    torch.manual_seed(seed)
    units = Units(torch.tensor([0, 0, 1, 2, 2, 2]), 3)
    geometry = Geometry((1,), (0,), (1,), output_padding=(0,))
    weight, words = nn.Parameter(torch.zeros(4, 3, 2)), torch.randint(0, 5, (6, 4))
    for scale in (1.0, other):
        torch.manual_seed(seed)
        g = torch.randn(6, 4, 200, dtype=torch.float64)
        g[2] *= scale
        terms: list[Term] = [
            Outer(LINEAR.weight, BIAS, torch.randn(6, 4, 300, dtype=torch.float64), g),
            PerRow(BIAS, g.sum(1)),
            Lookup(nn.Parameter(torch.zeros(5, 200)), words, g),
            Convolution(weight, torch.randn(6, 3, 51, dtype=torch.float64), g[:, :, :50], geometry),
        ]
        now = [term.squared_norms(units)[[0, 2]] for term in terms]
        if scale == 1.0:
            before = now
    for a, b in zip(before, now, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_forgotten_row_contributes_exactly_zero_also_where_it_is_not_finite():
    torch.manual_seed(0)
    geometry = Geometry((1,), (0,), (1,), output_padding=(0,))
    bad = torch.tensor([False, True, False])
    for make in (
        lambda x, g: Outer(LINEAR.weight, BIAS, x, g),
        lambda x, g: PerRow(BIAS, g.sum(1)),
        lambda x, g: Lookup(nn.Parameter(torch.zeros(9, 200)), torch.ones(len(x), 4, dtype=torch.int64), g),
        lambda x, g: Convolution(nn.Parameter(torch.zeros(4, 4, 101)), x, g[:, :, :200], geometry),
    ):
        x, g = torch.randn(3, 4, 300), torch.randn(3, 4, 200)
        clean = make(x[~bad], g[~bad])
        x[1], g[1, 0, 0] = math.inf, math.nan
        term = make(x, g)
        assert not torch.isfinite(term.squared_norms(Units(None, 3))[1])
        term.forget(bad, Units(None, 3))
        for a, b in zip(
            term.sums(torch.ones(3, dtype=torch.float64), Units(None, 3)).values(),
            clean.sums(torch.ones(2, dtype=torch.float64), Units(None, 2)).values(),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_units_know_their_rows():
    units = Units(torch.tensor([0, 0, 1, 2, 2, 2, 3]), 4)
    assert units.counts.tolist() == [2, 1, 3, 1]
    assert units.rows_of(2) == slice(3, 6)
    assert [(group.count, group.num_units) for group in units.groups()] == [(1, 2), (2, 1), (3, 1)]
    sums = units.add_rows(torch.arange(7.0).unsqueeze(1)).view(-1)
    assert sums.tolist() == [1, 2, 12, 6]
    assert Units(torch.arange(5), 5).owner is None
    ordered = Units(torch.tensor([0, 1, 2, 2, 3, 3]), 4)
    assert [group.rows for group in ordered.groups()] == [slice(0, 2), slice(2, 6)]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("owner", [None, [0, 0, 1, 2, 2, 2]])
def test_the_norm_of_a_tied_embedding_needs_no_gradient_of_the_size_of_the_vocabulary(kind, opposite, owner):
    """Against the formed sum of both gradients; never below it, also where the two nearly cancel."""
    torch.manual_seed(0)
    units = Units(None, 6) if owner is None else Units(torch.tensor(owner), 3)
    weight, bias = nn.Parameter(torch.zeros(11, 8)), nn.Parameter(torch.zeros(11))
    words, h = torch.randint(0, 11, (6, 5)), torch.randn(6, 5, 8)
    a, g = torch.randn(6, 4, 8), torch.randn(6, 4, 11)
    if opposite:  # the output layer undoes what the embedding says
        a, g = -h, F.one_hot(words, 11) * (1 + 1e-4)

    def terms(of):
        return [Lookup(weight, words, h.to(of)), Outer(weight, bias, a.to(of), g.to(of))]

    computed = tied.tied_squared_norms(terms(kind), units)
    assert computed is not None
    lookup, outer = terms(torch.float64)
    true = torch.zeros(units.num_units, dtype=torch.float64)
    for unit in range(units.num_units):
        one, other = lookup.gradient_of(unit, units), outer.gradient_of(unit, units)
        true[unit] = (one[weight] + other[weight]).square().sum() + other[bias].square().sum()
    assert (computed >= true * (1 - 1e-12) - 1e-12).all()
    if not opposite:
        torch.testing.assert_close(computed, true, rtol=1e-10 if kind == torch.float64 else 1e-4, atol=0)
    assert tied.tied_squared_norms([*terms(kind), *terms(kind)], units) is None
