"""What a careless or hostile loop does around a step: the bound holds, or the step is refused by name."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients import terms
from sfumato.privacy.norms import GradientNorms
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable


def private(model, **options):
    options = {"max_grad_norm": 1.0, "noise_multiplier": 0, "expected_batch_size": 1, "sampling_rate": 0.1, **options}
    engine = DifferentialPrivacyEngine(model, **options, random=TestRandom(0))
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def norm_of(model) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm())


class Weighted(nn.Module):
    """(R, L) words or vectors and weights: the loss of a row is a weighted sum, whose pieces may cancel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (self.layer(x).squeeze(-1) * weights).sum(1)


@pytest.mark.parametrize("size", [1e10, 3e38])
@pytest.mark.parametrize("kind", ["embedding", "formed", "kept"])
def test_pieces_of_one_unit_that_cancel_do_not_reach_the_others(kind, size, monkeypatch):
    """Five ordinary rows and a hostile one, whose pieces are huge and sum to nothing: it may move the sum by C."""
    monkeypatch.setattr(terms, "LOOSEST", 0.0)  # no norm from Gram matrices: these bound the pieces by themselves
    if kind == "formed":
        for name in ("KEEP_BYTES", "KEEP_ALWAYS_BYTES"):
            monkeypatch.setattr(terms, name, 0)
    positions = 4 if kind == "embedding" else 64
    sums = []
    for hostile in (False, True):
        torch.manual_seed(0)
        layer = nn.Embedding(3, 1) if kind == "embedding" else nn.Linear(2, 1, bias=False)
        model = Weighted(layer)
        x = torch.ones(6, positions, dtype=torch.int64) if kind == "embedding" else torch.ones(6, positions, 2)
        weights = torch.full((6, positions), 0.5)
        weights[5] = 0.0
        if hostile:
            weights[5, : positions // 2] = size
            weights[5, positions // 2 :] = -size
        _, optimizer = private(model)
        model(x, weights).mean().backward()
        optimizer.step()
        sums.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    assert float(sums[0].norm()) == pytest.approx(5.0, rel=1e-3)
    assert float((sums[1] - sums[0]).norm()) <= 1.0 + 1e-3


def test_an_input_that_is_changed_before_the_step_is_refused():
    model = nn.Linear(3, 2)
    _, optimizer = private(model)
    x = torch.randn(4, 3)
    model(x).square().sum(1).mean().backward()
    x.mul_(1e4)
    with pytest.raises(UsageError, match="was changed in place between"):
        optimizer.step()


def test_a_step_inside_autocast_keeps_the_bound():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 500), nn.LayerNorm(500), nn.Linear(500, 300))
    _, optimizer = private(model)
    with torch.autocast("cpu", torch.bfloat16):
        (model(torch.randn(1, 40, 64)) * torch.randn(1, 40, 300)).sum().mul(1e3).backward()
        optimizer.step()
    assert 0.99 <= norm_of(model) <= 1.0 + 1e-6


def test_a_huge_gradient_and_a_tiny_bound_keep_the_bound():
    model = nn.Linear(1, 1, bias=False)
    bound = 1e-6
    _, optimizer = private(model, max_grad_norm=bound)
    (model(torch.full((1, 1), 1e20)) * 1e18).sum().backward()
    optimizer.step()
    assert norm_of(model) <= bound


def test_a_micro_batch_that_failed_is_not_counted_twice(monkeypatch):
    model = nn.Linear(3, 1)
    engine, optimizer = private(model)
    x = torch.randn(1, 3) * 100

    def micro_batch() -> None:
        model(x).sum(1).mean().backward()
        optimizer.step()

    add = engine._add
    monkeypatch.setattr(engine, "_add", lambda *given: (add(*given), 1 / 0))
    with engine.accumulate(more=True), pytest.raises(ZeroDivisionError):
        micro_batch()
    monkeypatch.undo()
    micro_batch()
    assert norm_of(model) <= 1.0 + 1e-6
    assert engine.steps_started == 2  # the lost batch stays charged


@pytest.mark.parametrize("context", ["public", "frozen"])
def test_a_reentrant_checkpoint_does_not_carry_private_rows_into_a_public_pass(context):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    engine, _ = private(model)
    x = torch.randn(4, 3, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=True).mean()
    with getattr(engine, context)(), pytest.raises(UsageError, match="forward pass was outside"):
        loss.backward()


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("run", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.run.lerp_(x.mean(0).detach(), 0.5)  # type: ignore[operator]
        return y


def test_a_hand_written_loop_cannot_change_a_buffer_with_private_data():
    model = Remembering()
    _, optimizer = private(model)
    model(torch.randn(4, 3)).mean().backward()
    with pytest.raises(UnsupportedLayer, match="run · a buffer that the forward pass changed"):
        optimizer.step()


def test_what_was_frozen_later_is_not_moved_by_noise():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    _, optimizer = private(model, noise_multiplier=1.0)
    model[0].requires_grad_(False)
    model(torch.randn(4, 3)).mean().backward()
    with pytest.raises((UnsupportedLayer, UsageError), match=r"frozen after the engine was made|trains 2 parameters"):
        optimizer.step()


def test_a_layer_that_was_frozen_in_its_forward_pass_is_not_given_a_made_up_gradient():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    _, optimizer = private(model)
    model[0].weight.requires_grad_(False)
    loss = model(torch.randn(4, 3)).mean()
    model[0].weight.requires_grad_(True)
    with pytest.raises(UsageError, match="was frozen in its forward pass"):
        loss.backward()
        optimizer.step()


def test_a_state_cannot_take_back_what_was_charged():
    model = nn.Linear(3, 1)
    engine, optimizer = private(model)
    before = engine.state_dict()
    model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    with pytest.raises(UsageError, match="has charged 1 already"):
        engine.load_state_dict(before)


def test_an_empty_batch_has_no_texts_of_anybody():
    class Captioned(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, i: int):
            return {"x": torch.ones(3), "text": f"patient {i}", "pair": (torch.ones(1), "secret")}

    engine, optimizer = private(nn.Linear(3, 1), expected_batch_size=None, sampling_rate=None)
    for batch in engine.batches(Captioned(), expected_batch_size=1e-9, steps=1):
        assert batch["x"].shape == (0, 3)
        assert batch["text"] == []
        assert [len(column) for column in batch["pair"]] == [0, 0]
        engine.model(batch["x"]).sum(1).mean().backward()
        optimizer.step()


def test_units_are_rows_only_where_each_has_one():
    owner = torch.tensor([0, 0, 2])
    assert terms.Units(owner, 3).owner is owner


class FirstRows(nn.Module):
    """Initialises itself from the first rows it sees, past what torch counts as a change."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(1))
        self.where, self.seen = where, False

    def forward(self, x):
        if not self.seen:
            (self.mean if self.where == "buffer" else self.layer.bias).data.copy_(x.mean().reshape(1))
            self.seen = True
        return self.layer(x)[:, 0]


@pytest.mark.parametrize("where", ["buffer", "parameter"])
@pytest.mark.parametrize("look", ["independence", "norms"])
def test_a_look_at_private_rows_leaves_nothing_of_them_in_the_model(where, look):
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) + 5
    table, model = UnitTable({"x": rows}, [str(i) for i in range(10)]), FirstRows(where)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedLayer, match="changed in a forward pass over private records"):
        if look == "norms":
            GradientNorms(model, lambda b: model(b.tensors["x"]) ** 2, table, records_per_unit=1, random=TestRandom(0))
        else:
            engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
            engine.check_independence(lambda b: model(b.tensors["x"]) ** 2, table.batch(range(3), records_per_unit=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
