"""Every layer kind against a loop of one unit at a time in float64: relative 1e-6 of the released step."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import one_unit_at_a_time, relative, released, table_of
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy import sources
from sfumato.privacy.gradients import terms
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.rules import RowByRow, Rule, known_layers, rule, rule_for
from sfumato.records import Batch

TOLERANCE = 1e-6
COUNTS = [1, 3, 2, 1, 2, 4]  # rows of the units
ROWS = sum(COUNTS)


class Bare(nn.Module):
    """Owns parameters that no layer holds, beside a layer that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.inner = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale + self.token)


class Repeated(nn.Module):
    """One layer called on inputs of different lengths; its calls add up."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x).flatten(1), self.layer(x[:, :, 1:].sin()).flatten(1)], 1)


class Tied(nn.Module):
    """A language model whose head is its embedding, with position ids shared by all rows: (1, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.places = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.words(x) + self.places(torch.arange(x.shape[1]).unsqueeze(0))))


class Residual(nn.Module):
    """Output gradients shared between branches, in-place activations, one layer on a detached input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.side = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.first(x))
        h = h + self.second(h) + self.side(h.detach())
        return nn.functional.silu(self.second(h) + h, inplace=True)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x + 0 * x.requires_grad_(), use_reentrant=False)  # type: ignore[return-value]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state


class OutOfPlaceOfVmap(nn.Module):
    """Control flow on values, which vmap cannot do: goes row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        rows = [row * self.weight if float(row.detach().sum()) > 0 else row * self.weight.square() for row in x]
        return torch.stack(rows)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    getattr(layer, name).requires_grad_(False)
    return layer


def floats(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape)


def words(*shape: int, high: int = 11) -> Tensor:
    return torch.randint(0, high, (ROWS, *shape))


CASES = {
    "linear": (lambda: nn.Linear(5, 4), lambda: floats(5)),
    "linear on draws (R, K, d)": (lambda: nn.Linear(5, 4), lambda: floats(3, 5)),
    "linear on any leading shape": (lambda: nn.Linear(5, 4), lambda: floats(2, 3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), lambda: floats(3, 5)),
    "linear of one output": (lambda: nn.Linear(5, 1), lambda: floats(3, 5)),
    "linear, frozen weight": (lambda: frozen(nn.Linear(5, 4), "weight"), lambda: floats(3, 5)),
    "linear, frozen bias": (lambda: frozen(nn.Linear(5, 4), "bias"), lambda: floats(3, 5)),
    "linear with many positions": (lambda: nn.Linear(4, 3), lambda: floats(30, 4)),
    "bilinear": (lambda: TwoInputs(), lambda: floats(5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), lambda: floats(3, 11)),
    "conv1d, reflect": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"), lambda: floats(3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: floats(3, 6, 5)),
    "conv2d, few positions": (lambda: nn.Conv2d(12, 10, 3), lambda: floats(12, 4, 3)),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), dilation=(1, 2)), lambda: floats(2, 9, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), lambda: floats(4, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: floats(4, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, (5, 3), padding="same", bias=False), lambda: floats(3, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), lambda: floats(3, 5, 5)),
    "conv2d, frozen weight": (lambda: frozen(nn.Conv2d(3, 4, 3), "weight"), lambda: floats(3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), lambda: floats(2, 4, 4, 5)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(3, 4, 3, 2, padding=1, output_padding=1), lambda: floats(3, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), lambda: floats(4, 4, 3)),
    "embedding": (lambda: nn.Embedding(11, 4), lambda: words(7)),
    "embedding of one word": (lambda: nn.Embedding(11, 4), lambda: words()),
    "embedding on draws": (lambda: nn.Embedding(11, 4), lambda: words(2, 3)),
    "embedding, padding": (lambda: nn.Embedding(5, 4, padding_idx=2), lambda: words(7, high=5)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Tanh()), lambda: floats(3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), lambda: floats(5)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 5)), lambda: floats(2, 3, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), lambda: floats(3, 5)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Tanh()), lambda: floats(3, 4, 4)),
    "group norm on vectors": (lambda: nn.GroupNorm(2, 6), lambda: floats(6)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), lambda: floats(3, 4, 4)),
    "prelu": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), lambda: floats(5)),
    "bare parameters": (Bare, lambda: floats(3, 5)),
    "attention": (SelfAttention, lambda: floats(4, 6)),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        lambda: floats(4, 6),
    ),
    "recurrent cell, called often": (Recurrent, lambda: floats(4, 5)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), lambda: floats(3, 5)),
    "control flow": (OutOfPlaceOfVmap, lambda: floats(5)),
    "linear called twice": (lambda: Repeated(nn.Linear(5, 4)), lambda: floats(3, 5, 5)[:, :, :, :]),
    "convolution called twice": (lambda: Repeated(nn.Conv1d(3, 4, 2)), lambda: floats(3, 6)),
    "tied head and shared positions": (Tied, lambda: words(7)),
    "residual": (Residual, lambda: floats(5)),
    "checkpointed": (Checkpointed, lambda: floats(5)),
}  # fmt: skip


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(5, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x.flip(1))


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Per unit the mean over its rows of a smooth function of all outputs; the units' gradients differ in size."""
    y = model(batch.tensors["x"]).flatten(1)
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)
    values = ((y - target).square() + 0.1 * y.sin()).sum(1) * batch.tensors["weight"]
    return batch.per_unit(values)


def case(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    make, data = CASES[name]
    x = data()
    weight = torch.rand(ROWS, dtype=torch.float64) * 2
    return make().double(), {"x": x.double() if x.is_floating_point() else x, "weight": weight}


def bound(model: nn.Module, tensors: dict[str, Tensor], counts: list[int]) -> float:
    """About half of the units are clipped by it."""
    norms = []
    table = table_of(tensors, counts)
    for unit in range(table.num_units):
        batch = table.batch([unit], records_per_unit=100)
        norms.append(float(one_unit_at_a_time(model, losses, batch, 1e300).norm()))
    return sorted(norms)[len(norms) // 2] * 1.01


@pytest.mark.parametrize("name", CASES)
def test_the_released_sum_is_that_of_one_unit_at_a_time(name):
    """Units of one to four rows, in one batch."""
    model, tensors = case(name)
    plain = copy.deepcopy(model)
    c = bound(plain, tensors, COUNTS)
    sums, batch = released(model, losses, table_of(tensors, COUNTS), max_grad_norm=c)
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, c)) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_same_for_units_of_one_row_in_parts(name):
    """Every row is a unit; batches are cut into physical parts of at most five."""
    model, tensors = case(name, seed=1)
    plain = copy.deepcopy(model)
    c = bound(plain, tensors, [1] * ROWS)
    table = table_of(tensors, [1] * ROWS)
    sums, batch = released(model, losses, table, max_grad_norm=c, max_physical_batch_size=5)
    assert batch.num_units == ROWS
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, c)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["linear with many positions", "conv2d", "conv2d, groups", "bare parameters", "conv3d"]
)
def test_the_same_when_nothing_may_be_kept(name, monkeypatch):
    """Gradients are formed a few at a time, and the sum is computed anew."""
    monkeypatch.setattr(terms, "KEEP_BYTES", 0)
    monkeypatch.setattr(terms, "WORK_BYTES", 1000)
    model, tensors = case(name)
    plain = copy.deepcopy(model)
    c = bound(plain, tensors, COUNTS)
    sums, batch = released(model, losses, table_of(tensors, COUNTS), max_grad_norm=c)
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, c)) <= TOLERANCE


@pytest.mark.parametrize("name", ["linear on draws (R, K, d)", "embedding", "tied head and shared positions"])
def test_the_same_for_units_in_any_order_of_their_sizes(name, monkeypatch):
    """The engine sorts units by their number of rows to avoid copies; nothing rests on it."""
    monkeypatch.setattr(sources, "fewest_rows_first", lambda counts: np.arange(len(counts)))
    model, tensors = case(name)
    plain = copy.deepcopy(model)
    c = bound(plain, tensors, COUNTS)
    sums, batch = released(model, losses, table_of(tensors, COUNTS), max_grad_norm=c)
    assert torch.bincount(batch.unit).tolist() == COUNTS
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, c)) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_layer_computes_the_same_as_without_the_engine(name):
    """Forward, and the gradient that it passes on."""
    model, tensors = case(name)
    plain = copy.deepcopy(model)
    x = tensors["x"]
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    tape = Tape(model)
    outputs = [m(i) for m, i in zip((plain, model), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    if x.is_floating_point():
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        assert tape.has_records
        assert all(p.grad is None for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 8),
)
def test_convolutions_of_random_shape(seed, counts, channels, kernel, stride, padding, dilation, size):
    torch.manual_seed(seed)
    inputs, outputs, groups = channels
    layer = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups).double()
    rows = sum(counts)
    tensors = {
        "x": torch.randn(rows, inputs * groups, size, size + 1, dtype=torch.float64),
        "weight": torch.rand(rows, dtype=torch.float64),
    }
    plain = copy.deepcopy(layer)
    sums, batch = released(layer, losses, table_of(tensors, counts), max_grad_norm=1.0)
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, 1.0)) <= TOLERANCE


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    positions=st.lists(st.integers(1, 4), max_size=2),
)
def test_linear_layers_of_random_shape(seed, counts, width, height, positions):
    torch.manual_seed(seed)
    layer = nn.Linear(width, height).double()
    rows = sum(counts)
    tensors = {
        "x": torch.randn(rows, *positions, width, dtype=torch.float64),
        "weight": torch.rand(rows, dtype=torch.float64),
    }
    plain = copy.deepcopy(layer)
    sums, batch = released(layer, losses, table_of(tensors, counts), max_grad_norm=1.0)
    assert relative(sums, one_unit_at_a_time(plain, losses, batch, 1.0)) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------ the registry


def test_a_rule_is_registered_by_decorator_and_used():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    assert rule_for(Scale()) is None

    @rule(Scale)
    class ScaleRule(RowByRow):
        parameters = ("weight",)

    assert isinstance(rule_for(Scale()), ScaleRule)
    assert "Scale" in known_layers()
    with pytest.raises(UsageError, match="there is one already"):
        rule(Scale)(ScaleRule)


def test_a_subclass_with_another_forward_does_not_get_its_bases_rule():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    assert rule_for(Doubled(3, 3)) is None
    assert isinstance(rule_for(Renamed(3, 3)), Rule)


def test_a_layer_on_an_input_without_rows_is_refused():
    class NoRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mean(0)).expand(x.shape[0], 4)

    tensors = {"x": floats(5), "weight": torch.rand(ROWS)}
    with pytest.raises(UnsupportedLayer, match="needs 2 dimensions, rows first"):
        released(NoRows(), losses, table_of(tensors, COUNTS))


def test_rows_folded_into_another_dimension_are_refused_by_name():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).flatten(0, 1)).view(x.shape[0], -1)

    tensors = {"x": floats(3, 5), "weight": torch.rand(ROWS)}
    with pytest.raises(UnsupportedLayer, match=rf"rows, {ROWS}, .*second \(Linear\): \[{3 * ROWS}\]"):
        released(Folded(), losses, table_of(tensors, COUNTS))
