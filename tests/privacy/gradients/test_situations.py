"""Models in unusual situations: the step is the reference's, or what stands in the way is named."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import relative, released, table_of, vector
from tests.privacy.gradients.comparing import TOLERANCE, copied, difference, losses, reference_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.reference import clipped_sum
from sfumato.privacy.gradients.rules import RowByRow
from sfumato.privacy.gradients.terms import Units
from sfumato.randomness import TestRandom


def engine_of(model: nn.Module, **options: Any) -> DifferentialPrivacyEngine:
    values: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "random": TestRandom(0), **options}
    return DifferentialPrivacyEngine(model, **values)


class Uses(nn.Module):
    """Bare parameters of a given shape, and what is done with them."""

    def __init__(self, use: Callable[..., Any], *shape: int, **layers: nn.Module) -> None:
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.randn(*shape))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args: Any) -> Any:
        return self.use(self, *args)


# --------------------------------------------------------------------------------------------------- half precision

HALF = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 3, 2),
        nn.InstanceNorm2d(3, affine=True),
        nn.PReLU(3),
        nn.Flatten(),
        nn.Linear(3 * 6 * 6, 8),
        nn.LayerNorm(8),
    ),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Linear(25, 8),
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 4),
    ),
    "bare": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Linear(25, 6),
        Uses(lambda m, x: m.layer(x * m.weight), 6, layer=nn.Linear(6, 6)),
        parametrizations.weight_norm(nn.Linear(6, 4)),
    ),
}


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("name", HALF)
def test_under_autocast_the_step_is_the_references_under_autocast(name, clipped):
    """bfloat16 has 8 bits: 5 % of the step. A unit that is above the bound comes out at most at the bound."""
    torch.manual_seed(0)
    model = HALF[name]()
    x = torch.randn(6, 2, 5, 5)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch.tensors["x"].float())
        return batch.per_unit((y.float() - 0.5).square().flatten(1).sum(1))

    plain = copy.deepcopy(model)
    table = table_of({"x": x}, [1, 2, 3])
    everyone = table.batch(range(3), records_per_unit=9)
    gradients = reference_gradients(plain, everyone, loss)
    bound = float(gradients.norm(dim=1).min()) * (0.5 if clipped else 1e3)
    sums, batch = released(model, loss, table, max_grad_norm=bound)
    assert relative(sums, clipped_sum(reference_gradients(plain, batch, loss), bound)) <= 0.05
    if clipped:
        alone, _ = released(copy.deepcopy(plain), loss, table_of({"x": x[:1]}, [1]), max_grad_norm=1e-3)
        assert 0.98e-3 < float(alone.norm()) <= 1e-3 * (1 + 1e-4)  # the parameters themselves are rounded to float32


@pytest.mark.parametrize("name", HALF)
def test_under_autocast_a_recorded_model_gives_what_it_gave_before(name):
    torch.manual_seed(0)
    model, x = HALF[name](), torch.randn(6, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        Tape(model)
        after = model(x)
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


# ------------------------------------------------------------------------------------------------ batches and modes


def everything() -> nn.Module:
    """Every kind of rule in one model on (R, 1, 4, 4)."""

    def use(m: Any, x: Tensor) -> Tensor:
        h = m.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.weight.expand(len(x), -1, -1), h], 1)
        return m.body(h)[:, 0]

    body = nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.PReLU(),
        nn.RMSNorm(4),
    )
    return Uses(use, 1, 1, 4, patches=nn.Conv2d(1, 4, 2, stride=2), body=body)


def test_an_empty_batch_passes_through_every_kind_of_layer():
    model = everything()
    engine = engine_of(model, noise_multiplier=1.0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    before = vector(model)
    for batch in engine.batches([torch.randn(1, 4, 4)] * 500, expected_batch_size=1e-4, steps=2):
        assert batch.shape[0] == 0
        model(batch).sum(1).mean().backward()
        optimizer.step()
    assert torch.isfinite(vector(model)).all()
    assert (vector(model) != before).all()


def test_evaluation_in_between_and_a_part_without_gradient_leave_no_trace():
    torch.manual_seed(0)

    def use(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            noise = m.layer(x.sin())  # the same layer, for a target
        return m.layer(x) - noise.detach() * m.weight

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            model(torch.randn(5, 4, dtype=torch.float64))
        return losses(model, batch)

    model = nn.Sequential(Uses(use, 4, layer=nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 2))
    assert difference(model, [torch.randn(6, 4)], [1, 2, 3], loss=loss) <= TOLERANCE


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_model_may_change_its_precision_after_attaching(kind):
    torch.manual_seed(0)
    model, x = everything(), torch.randn(5, 1, 4, 4)
    engine = engine_of(model, expected_batch_size=5, sampling_rate=0.1)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    model.to(kind)
    table = table_of({"x": x.to(kind), "weight": torch.ones(5, dtype=kind)}, [1] * 5)
    batch = table.batch(range(5), records_per_unit=1)
    expected = clipped_sum(reference_gradients(copy.deepcopy(model).double(), batch), 1.0)
    before = vector(model)
    losses(model, batch).mean().backward()
    optimizer.step()
    assert all(p.dtype == kind for p in model.parameters())
    assert relative((before - vector(model)) * 5, expected) <= (TOLERANCE if kind == torch.float64 else 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_model_may_move_to_another_device_after_attaching():
    torch.manual_seed(0)
    model, x = everything().double(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    engine = engine_of(model, expected_batch_size=5, sampling_rate=0.1)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    table = table_of({"x": x, "weight": torch.ones(5, dtype=torch.float64)}, [1] * 5)
    batch = table.batch(range(5), records_per_unit=1)
    expected = clipped_sum(reference_gradients(copy.deepcopy(model), batch), 1.0)
    model.cuda()
    before = vector(model).cpu()
    y = model(x.cuda()).flatten(1)
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype, device=y.device)
    ((y - target).square() + 0.1 * y.sin()).sum(1).mean().backward()
    optimizer.step()
    assert relative((before - vector(model).cpu()) * 5, expected) <= TOLERANCE


def test_copies_and_pickles_of_every_kind_of_layer_are_ordinary_and_can_be_trained_privately():
    torch.manual_seed(0)
    model, x = pickled_model().double(), torch.randn(3, 4, 4, dtype=torch.float64)
    engine_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))
        twin(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        twin.zero_grad()
        assert difference(twin, [x], [1, 2]) <= TOLERANCE


def pickled_model() -> nn.Module:
    """(A parametrised layer is a class made on the fly: torch pickles its weights only.)"""
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Conv1d(4, 4, 1), Positions(), layer, nn.PReLU(), nn.Linear(4, 2))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.places


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.deep = nn.Linear(4, 4), Positions(), True

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if self.deep else self.first(x)


def test_a_layer_may_be_left_out_of_a_step():
    """It then gets noise alone, here none. (Left out of the first step it is an error: it may be forgotten.)"""
    torch.manual_seed(0)
    model, x = Skipping().double(), torch.randn(5, 4, 4, dtype=torch.float64)
    engine = engine_of(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    table = table_of({"x": x, "weight": torch.ones(5, dtype=torch.float64)}, [1] * 5)
    for batch in engine.batches(table, expected_batch_size=5, steps=2):
        places = model.second.places.detach().clone()
        expected, before = clipped_sum(reference_gradients(copy.deepcopy(model), batch), 1.0), vector(model)
        losses(model, batch).mean().backward()
        optimizer.step()
        assert relative((before - vector(model)) * 5, expected) <= TOLERANCE
        assert torch.equal(places, model.second.places) != model.deep
        model.deep = False
    fresh = Skipping()
    fresh.deep = False
    with pytest.raises(UsageError, match=r"second\.places · took no part in the loss"):
        released(fresh, losses, table_of({"x": x.float(), "weight": torch.ones(5)}, [1] * 5))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch._dynamo's own look
@pytest.mark.parametrize("inside", ["the model", "the loss"])
def test_what_torch_compile_makes_of_the_rest_leaves_the_layers_recorded(inside):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), Uses(lambda m, x: m.layer(x) * m.weight, 3, layer=nn.Linear(4, 3))
    )

    def loss(own: nn.Module, batch: Any) -> Tensor:
        if own is not model:
            return losses(own, batch)
        if inside == "the model":
            return losses(torch.compile(own, backend="eager"), batch)  # type: ignore[arg-type]
        compiled = torch.compile(lambda x: own(x).sin().cos(), backend="eager")
        return losses(own, batch) + 0 * batch.per_unit(compiled(batch.tensors["x0"].detach())[:, 0].detach())

    try:
        assert difference(model, [torch.randn(6, 4)], [1, 2, 3], loss=loss) <= TOLERANCE
    finally:
        torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ what is rows, what not


class Masked(nn.Module):
    """A mask (L, L) that all rows share, beside rows of L positions, in a module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(x @ (x * self.scale).transpose(1, 2) + mask, -1) @ x


class Masking(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.inner, self.length = Masked(), length

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.linspace(0, 40, self.length**2, dtype=x.dtype).sin().view(self.length, self.length)
        return self.inner(x, mask)


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_a_mask_with_as_many_lines_as_the_batch_has_rows_is_not_taken_for_rows(rows):
    torch.manual_seed(0)
    assert difference(Masking(4), [torch.randn(rows, 4, 4)], [1] * rows) <= TOLERANCE


def test_what_was_seen_to_be_shared_once_is_shared_also_when_chance_hides_it():
    """Dropout inside: no comparison could tell."""
    torch.manual_seed(0)

    def use(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return F.dropout(x + mask, 0.5) * m.weight

    model = Uses(use, 4)
    tape, mask = Tape(model), torch.randn(4, 4)
    for rows in (3, 4):
        tape.give_units(Units(None, rows))
        y = model(torch.zeros(rows, 4, 4), mask)
        assert ((y == 0) | (y - 2 * mask * model.weight).abs().lt(1e-6)).all()
    fresh = Uses(use, 4)
    Tape(fresh).give_units(Units(None, 4))
    with pytest.raises(UnsupportedLayer, match="Uses · gives for a batch something else"):
        fresh(torch.zeros(4, 4, 4), mask)


@dataclass
class Result:
    y: Tensor


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "rows that influence each other": (lambda m, x: (x - x.mean(0)) * m.weight, "something else than for its rows"),
    "a result it keeps": (lambda m, x: setattr(m, "kept", x * m.weight) or m.kept.sin(), r"as an attribute, kept"),
    "results it collects": (lambda m, x: m.found.append(x * m.weight) or m.found[-1].sin(), "as an attribute, found"),
    "an object": (lambda m, x: Result(x * m.weight), "returned a Result, in which its rows cannot be seen"),
    "a result without rows": (lambda m, x: (x * m.weight).sum(), r"an output of shape \(\) for one row"),
    "a batch turned over": (lambda m, x: (x * m.weight).transpose(0, 1), r"of shape \(4, 1\) for one row"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_module_that_cannot_go_row_by_row_is_named(name):
    use, message = BAD[name]
    model = Uses(use, 4)
    model.found = []  # type: ignore[assignment]
    Tape(model).give_units(Units(None, 5))
    with pytest.raises(UnsupportedLayer, match=message):
        model(torch.randn(5, 4))
    assert "kept" not in vars(model)
    assert not model.found


def test_a_change_in_place_is_made_once_or_refused():
    def plain(m: Any, x: Tensor) -> Tensor:
        return x.mul_(2) * m.weight

    def twice(m: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return x * m.weight if float(x.detach().sum()) > 0 else -x * m.weight  # vmap stops here, and begins anew

    x = torch.ones(5, 4)
    model = Uses(plain, 4)
    Tape(model).give_units(Units(None, 5))
    torch.testing.assert_close(model(x), 2 * model.weight.expand(5, 4))
    model = Uses(twice, 4)
    Tape(model).give_units(Units(None, 5))
    with pytest.raises(UnsupportedLayer, match="Uses · changes an argument or a buffer in place"):
        model(torch.ones(5, 4))


def test_a_running_average_in_a_module_that_goes_row_by_row_is_refused():
    def use(m: Any, x: Tensor) -> Tensor:
        m.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return (x - m.mean) * m.weight

    model = Uses(use, 4)
    model.register_buffer("mean", torch.zeros(4))
    Tape(model).give_units(Units(None, 5))
    with pytest.raises(UnsupportedLayer, match="a buffer in place"):
        model(torch.randn(5, 4))


def test_bags_with_offsets_are_refused():
    """All words of the batch in one dimension: no leading rows."""
    model = nn.EmbeddingBag(7, 3)
    Tape(model).give_units(Units(None, 3))
    with pytest.raises(UnsupportedLayer, match="EmbeddingBag"):
        model(torch.tensor([1, 2, 4, 5, 6]), torch.tensor([0, 2, 3]))


def test_a_layer_called_on_other_rows_too_is_refused_by_name():
    """(Negative examples, two for every row.)"""

    def use(m: Any, x: Tensor) -> Tensor:
        others = m.layer(x.repeat(2, 1)).view(2, *x.shape).sum(0)
        return m.layer(x) + others

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return use(self, x)

    with pytest.raises(UnsupportedLayer, match=r"layer \(Linear\) · was called with different numbers of rows"):
        released(Both(), losses, table_of({"x": torch.randn(3, 4), "weight": torch.ones(3)}, [1] * 3))


def test_in_a_hand_written_loop_rows_are_found_in_dictionaries_too():
    """Else positions that were folded into the leading dimension would each be a unit of their own."""

    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            x = batch["x"]
            return self.layer(x.flatten(0, 1)).view_as(x)

    model = Folding()
    engine = engine_of(model, expected_batch_size=3, sampling_rate=0.1)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    model({"x": torch.randn(3, 2, 4)}).sum((1, 2)).mean().backward()
    with pytest.raises(UnsupportedLayer, match=r"rows, 3, in every layer, but is in layer \(Linear\): \[6\]"):
        optimizer.step()


# --------------------------------------------------------------------------------------------- how a module is treated


def test_layers_inside_a_module_with_bare_parameters_keep_their_rules():
    """Each is called with all rows, and records for itself."""
    model = everything()
    tape = Tape(model)
    tape.give_units(Units(None, 5))
    for _ in range(2):
        model(torch.randn(5, 1, 4, 4)).sum().backward()
        assert all(layer.calls or layer.terms for layer in tape.layers)
        assert [type(term).__name__ for term in tape.layers[1].terms] == ["Convolution", "PerRow"]
        tape.clear()
    found = {layer.name: type(layer.rule).__name__ for layer in tape.layers}
    assert found == {
        "": "RowByRow",
        "patches": "ConvolutionRule",
        "body.0.self_attn": "MultiheadAttentionRule",
        "body.0.linear1": "LinearRule",
        "body.0.linear2": "LinearRule",
        "body.0.norm1": "LayerNormRule",
        "body.0.norm2": "LayerNormRule",
        "body.2": "PReLURule",
        "body.3": "RMSNormRule",
    }
    own = [tape.parameters[p] for p in tape.layers[0].parameters]
    assert sorted(own) == [
        "body.1.bias",
        "body.1.parametrizations.weight.original0",
        "body.1.parametrizations.weight.original1",
        "weight",
    ]


def test_where_vmap_cannot_the_layers_inside_are_still_told_apart():
    """Per layer, each is clipped by itself; what went row by row as a whole is handed to the layer it is of."""
    torch.manual_seed(0)

    def use(m: Any, x: Tensor) -> Tensor:
        return m.layer(x * m.weight if float(x.detach().sum()) > 0 else x + m.weight)

    model = Uses(use, 4, layer=nn.Linear(4, 3)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    weight = torch.ones(1, dtype=torch.float64)
    sums, _ = released(
        model, losses, table_of({"x": x, "weight": weight}, [1]), max_grad_norm=1e-3, clipping="per_layer"
    )
    parts = sums.split([4, 15])
    assert [float(part.norm()) for part in parts] == pytest.approx([1e-3 / 2**0.5] * 2, rel=1e-6)


def test_a_computed_weight_is_computed_once_for_all_rows():
    calls = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(weight.shape)
            return weight.tanh()

    model = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(model, "weight", Counted())
    Tape(model).give_units(Units(None, 20))
    x = torch.randn(20, 3)
    model(x)  # the first time it is also run as it is
    calls.clear()
    model(x)
    assert calls == [(3, 3)]


def test_a_power_iteration_advances_as_without_the_engine_and_needs_no_noise():
    for make in (parametrizations.spectral_norm, nn.utils.spectral_norm):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = make(nn.Linear(5, 5)).double()
        plain = copied(model)
        engine = engine_of(model, max_grad_norm=1e-9)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
        table = table_of({"x": torch.randn(4, 5).double(), "weight": torch.ones(4).double()}, [1] * 4)
        for batch in engine.batches(table, expected_batch_size=4, steps=3):
            losses(model, batch).mean().backward()
            optimizer.step()
            losses(plain, batch)
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_row_by_row_alone_is_right_for_attention_too():
    """The rule for attention is for speed: without it the module is still treated."""
    torch.manual_seed(0)

    class Renamed(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Renamed(4, 2, batch_first=True, add_bias_kv=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x, x)

    model = Self()
    assert isinstance(Tape(copy.deepcopy(model)).layers[0].rule, RowByRow)
    assert difference(model, [torch.randn(6, 3, 4)], [1, 2, 3]) <= TOLERANCE


# ------------------------------------------------------------------------------------------- refused at construction


class Holder(nn.Module):
    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.weight = parameter


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Linear(3, 3))


def compiled_in_place() -> nn.Module:
    model = nn.Linear(3, 3)
    model.compile(backend="eager")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(3), r"\(BatchNorm1d\): normalises over the batch.*GroupNorm"),
    "frozen batch norm": (lambda: nn.BatchNorm2d(3).requires_grad_(False), r"\(BatchNorm2d\): normalises"),
    "instance norm with averages": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        r"\(InstanceNorm1d\): keeps running averages.*track_running_stats=False",
    ),
    "recurrent network": (lambda: nn.GRU(3, 3, batch_first=True), r"\(GRU\).*nn\.GRUCell"),
    "attention, positions first": (lambda: nn.MultiheadAttention(4, 2), r"\(MultiheadAttention\).*batch_first=True"),
    "embedding with a largest norm": (lambda: nn.Embedding(5, 3, max_norm=1.0), r"\(Embedding\): max_norm"),
    "bag with a largest norm": (lambda: nn.EmbeddingBag(5, 3, max_norm=1.0), r"\(EmbeddingBag\): max_norm"),
    "words counted": (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "no parameters yet": (lambda: nn.LazyLinear(3), r"\(LazyLinear\): has no parameters yet"),
    "complex parameters": (lambda: nn.Linear(3, 3, dtype=torch.complex64), r"\(Linear\): has complex parameters"),
    "scripted": (scripted, r"was compiled by torch\.jit"),
    "compiled": (lambda: torch.compile(nn.Linear(3, 3), backend="eager"), r"\(OptimizedModule\): was compiled"),  # type: ignore[return-value, arg-type]
    "compiled in place": (compiled_in_place, r"\(Linear\): was compiled by torch\.compile"),
    "in parallel": (lambda: nn.DataParallel(nn.Linear(3, 3)), r"\(DataParallel\): splits rows"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_at_construction_by_name(name):
    make, message = REFUSED[name]
    part = make()
    model = nn.Sequential(nn.Linear(3, 3), part)
    with pytest.raises(UnsupportedLayer, match=message):
        engine_of(model)
    assert "forward" not in vars(model[0])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_that_has_run_once_is_an_ordinary_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    model(torch.randn(1, 4))
    assert difference(model, [torch.randn(6, 4)], [1, 2, 3]) <= TOLERANCE


def test_a_second_derivative_through_a_recorded_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Positions())
    Tape(model).give_units(Units(None, 4))
    x = torch.randn(4, 4, 4, requires_grad=True)
    with pytest.raises(UnsupportedLayer, match="a second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_a_weight_computed_by_a_hook_of_ones_own_is_refused():
    """Its gradient does not come through the records."""

    def halve(module: Any, args: Any) -> None:
        module.weight = module.raw / 2

    layer = nn.Linear(4, 4, bias=False)
    layer.raw = nn.Parameter(layer.weight.detach())
    del layer.weight
    layer.register_forward_pre_hook(halve)
    with pytest.raises(UnsupportedLayer, match=r"raw · got a gradient that was not clipped"):
        released(layer, losses, table_of({"x": torch.randn(3, 4), "weight": torch.ones(3)}, [1] * 3))
