"""What other engines drop, crash on or refuse: a test each, with the public thread it stands for.

Threads are those of github.com/meta-pytorch/opacus (formerly pytorch/opacus). #468 could not be found and has no test.
Pretrained models and their adapters have a file of their own.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import only, relative, released, table_of, vector
from tests.privacy.gradients.comparing import (
    TOLERANCE,
    difference,
    gradients_by_backward,
    losses,
    reference_gradients,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.reference import clipped_sum
from sfumato.randomness import TestRandom

COUNTS = [1, 2, 3]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------- by thread


class Language(nn.Module):
    """Words and positions, a block, and a head that may be the embedding."""

    def __init__(self, *, tied: bool, expanded: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 9, bias=False)
        self.expanded = expanded
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1]).unsqueeze(0)
        ids = ids.expand(len(x), -1) if self.expanded else ids  # stride 0
        return self.head(self.block(self.words(x) + self.places(ids)))


@pytest.mark.parametrize("expanded", [False, True])
def test_841_position_ids_that_are_broadcast_over_the_batch(expanded):
    """Their embedding's per-example gradients had a batch of one: `stack expects each tensor to be equal size`."""
    assert difference(Language(tied=False, expanded=expanded), [torch.randint(0, 9, (6, 5))], COUNTS) <= TOLERANCE


def test_413_tied_parameters():
    """The second use was stacked as if it were another batch; ghost clipping refuses ties to this day."""
    model = Language(tied=True)
    assert difference(model, [torch.randint(0, 9, (6, 5))], COUNTS) <= TOLERANCE
    assert model.head.weight is model.words.weight


class Block(nn.Module):
    """torchvision's BasicBlock, with group norm: `out += identity` and ReLU(inplace=True)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norms[0](self.first(x)))
        out = self.norms[1](self.second(out))
        out += x
        return self.relu(out)


def test_828_operations_in_place():
    """`Output 0 of BackwardHookFunctionBackward is a view and is being modified inplace`."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True), Block(), Block(), nn.Flatten(), nn.Linear(36, 2))
    assert difference(model, [torch.randn(6, 2, 3, 3)], COUNTS) <= TOLERANCE


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_377_a_model_in_half_precision(kind):
    """One unit, whose gradient is above the bound, moves the weights by at most the bound; up to their own rounding."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).to(kind)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=0.5, noise_multiplier=0.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    table = table_of({"x": torch.randn(1, 8, dtype=kind), "weight": torch.ones(1)}, [1])
    for batch in engine.batches(table, expected_batch_size=1, steps=1):
        y = model(batch.tensors["x"])
        (10 * y.float().square().sum()).backward()
        expected = clipped_sum(reference_gradients(copy.deepcopy(model).double(), batch, squares), 0.5)
        optimizer.step()
    given = torch.cat([p.grad.double().flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert all(p.grad.dtype == kind for p in model.parameters())  # type: ignore[union-attr]
    assert float(given.norm()) <= 0.5 * (1 + torch.finfo(kind).eps)
    assert relative(given, expected) <= 8 * torch.finfo(kind).eps


def squares(model: nn.Module, batch: Any) -> Tensor:
    return batch.per_unit(10 * model(batch.tensors["x"]).square().sum(1))


def test_740_mixed_precision():
    """`expected scalar type BFloat16 but found Float`: activations are halved, the gradients behind them are not."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch.tensors["x"].float())
        return batch.per_unit(y.float().square().sum(1))

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))
    plain = copy.deepcopy(model)
    sums, batch = released(model, loss, table_of({"x": torch.randn(6, 8)}, COUNTS))
    assert relative(sums, clipped_sum(reference_gradients(plain, batch, loss), 1.0)) <= 0.02


def generator_and_critic() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).double()
    critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 1)).double()
    return generator, critic


def test_523_a_generator_and_a_private_discriminator_with_an_optimizer_each():
    """`cannot reshape tensor of 0 elements`, in the example of the package itself.

    The discriminator sees real and generated data; only it meets private data, so only its steps are private. The
    generator learns from a frozen discriminator: post-processing.
    """
    generator, critic = generator_and_critic()
    engine = DifferentialPrivacyEngine(critic, max_grad_norm=0.5, noise_multiplier=0.0, random=TestRandom(0))
    of_critic = engine.attach(torch.optim.SGD(critic.parameters(), lr=1.0))
    of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
    table = table_of({"x": torch.randn(5, 4, dtype=torch.float64)}, [1] * 5)

    def loss(critic: nn.Module, batch: Any, made: Tensor) -> Tensor:
        real, fake = critic(batch.tensors["x"]), critic(made[: batch.num_rows])
        return batch.per_unit((F.softplus(-real) + F.softplus(fake)).squeeze(1))

    for batch in engine.batches(table, expected_batch_size=5, steps=3):
        noise = torch.randn(batch.num_rows, 2, dtype=torch.float64)
        made = generator(noise).detach()
        rows = []
        for unit in range(batch.num_units):
            alone = only(batch, unit)
            own = made[unit : unit + 1]
            rows.append(gradients_by_backward(critic, alone, lambda c, b, own=own: loss(c, b, own)))
        expected, before = clipped_sum(torch.cat(rows), 0.5), vector(critic)
        loss(critic, batch, made).mean().backward()
        of_critic.step()
        assert relative((before - vector(critic)) * 5, expected) <= TOLERANCE
        critic.requires_grad_(False)
        before_generator, before_critic = vector(generator), copy.deepcopy(critic.state_dict())
        of_generator.zero_grad()
        F.softplus(-critic(generator(noise))).mean().backward()
        of_generator.step()
        critic.requires_grad_(True)
        assert not torch.equal(vector(generator), before_generator)
        assert all(torch.equal(value, before_critic[name]) for name, value in critic.state_dict().items())


def test_31_the_wasserstein_loss_real_and_generated_in_one_backward_pass():
    """Per-example gradients of the second `loss.backward()` were appended to those of the first."""
    generator, critic = generator_and_critic()
    made = generator(torch.randn(6, 2, dtype=torch.float64)).detach()

    def loss(critic: nn.Module, batch: Any) -> Tensor:
        return batch.per_unit((critic(batch.tensors["made"]) - critic(batch.tensors["x"])).squeeze(1))

    plain = copy.deepcopy(critic)
    tensors = {"x": torch.randn(6, 4, dtype=torch.float64), "made": made}
    sums, batch = released(critic, loss, table_of(tensors, COUNTS), max_grad_norm=0.3)
    assert relative(sums, clipped_sum(reference_gradients(plain, batch, loss), 0.3)) <= TOLERANCE


def test_31_a_gradient_penalty_is_refused_by_name():
    """It needs the second derivative of every example."""
    _, critic = generator_and_critic()

    def loss(critic: nn.Module, batch: Any) -> Tensor:
        x = batch.tensors["x"].requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return batch.per_unit((slope.norm(dim=1) - 1).square())

    with pytest.raises(UnsupportedLayer, match="gradient penalty"):
        released(critic, loss, table_of({"x": torch.randn(6, 4, dtype=torch.float64)}, COUNTS))


def test_522_empty_batches_whole_and_in_physical_parts():
    """The splitting sampler divided by zero parts; the collate function lost the types."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    data = [{"x": torch.tensor([1, 2])} for _ in range(30)]
    sizes, steps = [], 0
    for batch in engine.batches(data, expected_batch_size=0.7, steps=30, max_physical_batch_size=1):
        assert batch["x"].dtype == torch.int64
        model(batch["x"]).sum(1).mean().backward()
        before = vector(model)
        optimizer.step()
        optimizer.zero_grad()
        steps += not torch.equal(before, vector(model))
        sizes.append(len(batch["x"]))
    assert steps == 30  # one move for every draw, empty ones too
    assert 0 in sizes
    assert len(sizes) > 30


class Adapted(nn.Module):
    """A frozen layer with a low-rank addition, as adapters have it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_732_low_rank_adapters_on_a_frozen_model():
    """`Per sample gradient is not initialized. Not updated in backward pass?`"""
    frozen = nn.Linear(6, 3).requires_grad_(False)
    model = nn.Sequential(nn.LayerNorm(6).requires_grad_(False), Adapted(), nn.ReLU(inplace=True), Adapted(), frozen)
    before = frozen.weight.clone()
    assert difference(model, [torch.randn(6, 2, 6)], COUNTS) <= TOLERANCE
    assert torch.equal(frozen.weight, before.double())


@pytest.mark.parametrize("positions", [1, 2, 60])
def test_692_whichever_way_the_norms_are_found_the_step_is_the_same(positions):
    """Training with ghost norms ended elsewhere than without, and not twice in the same place."""

    def step() -> Tensor:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(7, 8), nn.Tanh(), nn.Conv1d(positions, 5, 3), nn.Tanh(), nn.Linear(6, 9)
        ).double()
        tensors = {"x": torch.randn(6, positions, 7, dtype=torch.float64), "weight": torch.ones(6, dtype=torch.float64)}
        plain = copy.deepcopy(model)
        sums, batch = released(model, losses, table_of(tensors, COUNTS), max_grad_norm=5.0)
        assert relative(sums, clipped_sum(reference_gradients(plain, batch), 5.0)) <= TOLERANCE
        return sums

    assert torch.equal(step(), step())


class Coupling(nn.Module):
    """An affine coupling of a normalising flow (Dinh et al. 2017, arXiv:1605.08803), and a planar one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 4))
        self.mask = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0]), requires_grad=False)
        self.u, self.w, self.b = (nn.Parameter(torch.randn(n) / 2) for n in (4, 4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(x[:, :2]).chunk(2, 1)
        y = torch.cat([x[:, :2], x[:, 2:] * scale.tanh().exp() + shift], 1)
        inner = torch.tanh(y @ self.w + self.b).unsqueeze(1)
        log_det = (
            scale.tanh().sum(1) + (1 + (1 - inner.square()) @ (self.w * self.u).sum().view(1, 1)).abs().log()[:, 0]
        )
        return y + self.u * inner, log_det.unsqueeze(1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(), Coupling()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = 0.0
        for layer in self.layers:
            x, log_det = layer(x.flip(1))
            total = total + log_det
        return x, total


def test_602_a_normalising_flow_with_parameters_of_its_own():
    """It passed the validator, and then `Per sample gradient is not initialized`."""
    assert difference(Flow(), [torch.randn(6, 4)], COUNTS) <= TOLERANCE


def test_820_adapters_of_a_model_that_changes_after_attaching_still_learn():
    """They were silently left as they were: the model had been moved after wrapping, or its parameters replaced."""
    model = nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(6, 2).requires_grad_(False))
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=0.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    model.double()
    table = table_of({"x": torch.randn(6, 6).double(), "weight": torch.ones(6).double()}, COUNTS)
    for batch in engine.batches(table, expected_batch_size=3, steps=1, records_per_unit=3):
        expected = clipped_sum(reference_gradients(copy.deepcopy(model), batch), 1.0)
        before, base = vector(model), model[0].base.weight.clone()
        losses(model, batch).mean().backward()
        optimizer.step()
        assert relative((before - vector(model)) * 3, expected) <= TOLERANCE
        assert torch.equal(model[0].base.weight, base)


def test_820_parameters_that_were_replaced_after_attaching_are_named():
    model = nn.Sequential(Adapted(), nn.Linear(6, 2).requires_grad_(False)).double()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=0.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("up" in name or "down" in name)
    table = table_of({"x": torch.randn(3, 6).double(), "weight": torch.ones(3).double()}, [1] * 3)
    with pytest.raises(UsageError, match=r"does not train 0\.down\.weight, 0\.up\.weight"):
        for batch in engine.batches(table, expected_batch_size=3, steps=1):
            losses(model, batch).mean().backward()
            optimizer.step()


# ------------------------------------------------------------------------------------- the rest of what was seen to fail


def test_multihead_attention_fails_in_every_mode():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.attention(x, x.cos(), x.sin())

    assert difference(Attending(), [torch.randn(6, 3, 4)], COUNTS) <= TOLERANCE


class TimeEmbedded(nn.Module):
    """A scalar time through two linear layers, added to a convolution's channels (diffusion models)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))
        self.down, self.up = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ConvTranspose2d(3, 1, 4, stride=2, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.cat([(t * 2.0**k).sin().unsqueeze(1) for k in range(4)], 1)
        return self.up(F.silu(self.down(x) + self.time(waves)[:, :, None, None], inplace=True))


def test_parameters_of_a_time_embedding_are_dropped_in_silence():
    """(Beside a transposed convolution.) A time (R,) has no dimension but the rows."""
    model = TimeEmbedded()
    assert difference(model, [torch.randn(6, 1, 6, 6), torch.rand(6)], COUNTS) <= TOLERANCE


def test_a_bare_parameter_and_weight_norm_are_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))
            self.layer = parametrizations.weight_norm(nn.Conv1d(4, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x * self.scale).transpose(1, 2))

    assert difference(Scaled(), [torch.randn(6, 3, 4)], COUNTS) <= TOLERANCE


def test_batch_norm_is_run_on_though_it_couples_the_examples():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(UnsupportedLayer, match=r"1 \(BatchNorm2d\): normalises over the batch.*use nn\.GroupNorm"):
        DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)


def test_a_layer_used_twice_with_different_shapes():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 3)

        def forward(self, word: Tensor, others: Tensor) -> Tensor:
            return (self.words(word).unsqueeze(1) * self.words(others)).sum(2)

    inputs = [torch.randint(0, 7, (6,)), torch.randint(0, 7, (6, 5))]
    assert difference(Twice(), inputs, COUNTS) <= TOLERANCE


def test_frozen_inputs_and_layers_in_front():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    assert difference(model, [torch.randn(6, 4)], COUNTS) <= TOLERANCE


def test_accumulation_over_unequal_parts_of_a_batch():
    """Seven units in parts of at most three: 3, 3 and 1; a mean of means would weigh the last one threefold."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    counts = [2, 1, 3, 1, 1, 2, 1]
    assert difference(model, [torch.randn(sum(counts), 4)], counts, at_once=3) <= TOLERANCE


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = (
                nn.Linear(4, 4),
                nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)),
            )

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.body, self.first(x), use_reentrant=reentrant)

    assert difference(Checkpointed(), [torch.randn(6, 4)], COUNTS, reference=gradients_by_backward) <= TOLERANCE


def test_a_parameter_without_a_gradient_is_an_error_that_names_it_not_a_printed_line(capsys):
    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.forgotten = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    tensors = {"x": torch.randn(3, 4), "weight": torch.ones(3)}
    with pytest.raises(UsageError, match=r"forgotten\.weight, forgotten\.bias · took no part in the loss"):
        released(Leaving(), losses, table_of(tensors, [1] * 3))
    assert capsys.readouterr() == ("", "")


class Placed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x) + self.places(torch.arange(x.shape[1]).unsqueeze(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("thread", ["841", "828"])
def test_the_others_really_fail_on_some_of_these(thread):
    """So that this list is not of straw: Opacus in its default mode."""
    opacus = pytest.importorskip("opacus")
    model, x = {
        "841": (Placed(), torch.randint(0, 9, (6, 5))),
        "828": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(6, 4)),
    }[thread]
    assert difference(copy.deepcopy(model), [x], COUNTS) <= TOLERANCE

    def sizes() -> set[int]:
        wrapped = opacus.GradSampleModule(model)
        wrapped(x).flatten(1).sum(1).mean().backward()
        return {len(p.grad_sample) for p in model.parameters()}

    if thread == "841":
        assert sizes() == {6, 1}  # of 6 examples; its optimizer then fails to stack them
    else:
        with pytest.raises(RuntimeError, match="modified inplace"):
            sizes()
