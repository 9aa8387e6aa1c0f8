"""Clipping over all layers, and where rows are lost."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import one_unit_at_a_time, relative, released, table_of
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.gradients.clipping import clip_to, clipped_sums, normalise_to
from sfumato.privacy.gradients.reference import clipped_sum, per_unit_gradients
from sfumato.privacy.gradients.terms import PerRow, Units
from sfumato.records import Batch

extreme = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-300, 1e30, -1e150, math.inf, math.nan]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(extreme, extreme, extreme), min_size=1, max_size=6),
    bound=st.floats(1e-6, 1e6),
    kind=st.sampled_from([clip_to, normalise_to]),
)
def test_removing_one_unit_moves_the_sum_by_at_most_the_bound(rows, bound, kind):
    """Guarantee for every input: zero, tiny, huge, infinite, not a number."""
    first, second = nn.Parameter(torch.zeros(1).double()), nn.Parameter(torch.zeros(2).double())
    values = torch.tensor(rows, dtype=torch.float64)

    def total(values: Tensor) -> Tensor:
        count = len(values)
        layers = [[PerRow(first, values[:, :1].clone())], [PerRow(second, values[:, 1:].clone())]]
        sums = clipped_sums(
            layers, Units(None, count), torch.ones(count, dtype=torch.float64), [kind(bound)], [0] * len(layers)
        ).sums
        return torch.cat([sums[first], sums[second]])

    everything = total(values)
    assert torch.isfinite(everything).all()
    others = total(values[:-1]) if len(values) > 1 else torch.zeros(3, dtype=torch.float64)
    rounding = 1e-12 * bound * len(values)
    assert float((everything - others).norm()) <= bound + rounding


def test_a_gradient_below_the_bound_is_not_changed():
    weight = nn.Parameter(torch.zeros(2).double())
    rows = torch.tensor([[0.3, 0.4], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    scale = torch.ones(3, dtype=torch.float64)
    result = clipped_sums([[PerRow(weight, rows)]], Units(None, 3), scale, [clip_to(1.0)], [0])
    torch.testing.assert_close(result.sums[weight], torch.tensor([0.9, 1.2], dtype=torch.float64))
    assert result.non_finite == 0


def test_the_package_reference_and_the_oracle_of_the_tests_agree():
    """Written twice, on purpose."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    batch = table_of({"x": torch.randn(9, 4, dtype=torch.float64)}, [1, 3, 2, 3]).batch(range(4), records_per_unit=9)

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return batch.per_unit(model(batch.tensors["x"]).square().sum(1))

    reference = clipped_sum(per_unit_gradients(model, lambda batch: losses(model, batch), batch), 0.3)
    assert relative(reference, one_unit_at_a_time(model, losses, batch, 0.3)) <= 1e-12


class Positions(nn.Module):
    """Position ids without a dimension for the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x) + self.places(torch.arange(x.shape[1]))


def test_an_input_shared_by_all_rows_without_a_dimension_for_them_is_refused_by_name():
    table = table_of({"x": torch.randint(0, 7, (6, 5))}, [1] * 6)
    with pytest.raises(UnsupportedLayer, match=r"rows, 6, .*places \(Embedding\): \[5\]"):
        released(Positions(), lambda model, batch: model(batch.tensors["x"]).sum((1, 2)), table)


def test_rows_that_arrive_in_the_second_dimension_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    table = table_of({"x": torch.randn(6, 5, 3)}, [1] * 6)
    with pytest.raises(UnsupportedLayer, match=r"0 \(Linear\): \[5\]; 1 \(Linear\): \[5\]"):
        released(model, lambda model, batch: model(batch.tensors["x"].transpose(0, 1)).sum((0, 2)), table)


def test_under_autocast_the_clipped_sum_is_that_of_the_half_precision_gradients():
    """bfloat16 has 8 bits: the sum is close to the exact one, and the bound holds all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(54, 8), nn.LayerNorm(8))
    plain = copy.deepcopy(model)

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        x = batch.tensors["x"]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            y = model(x)
        return batch.per_unit((y.to(x.dtype) - 0.5).pow(4).sum(1))

    table = table_of({"x": torch.randn(8, 2, 5, 5)}, [1, 2, 2, 3])
    sums, batch = released(model, losses, table, max_grad_norm=0.5)
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, 0.5)) <= 0.05
    one = table_of({"x": torch.randn(1, 2, 5, 5)}, [1])
    alone, _ = released(copy.deepcopy(plain), losses, one, max_grad_norm=1e-3)
    assert 0.9e-3 < float(alone.norm()) <= 1e-3 * (1 + 1e-4)  # the parameters themselves are rounded to float32
