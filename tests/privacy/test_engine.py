"""The engine as users meet it: their loop, its accounting, and everything that must not pass in silence."""

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tests.oracles import one_unit_at_a_time, relative, released, table_of, vector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sfumato
from sfumato.errors import LedgerError, PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy.accounting import Event, epsilon
from sfumato.privacy.engine import DifferentialPrivacyEngine, NotPrivateEngine, make_engine
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.randomness import SecretRandom, TestRandom
from sfumato.records import Batch, UnitTable

PLAN = DpSgd(population=200, expected_batch_size=20.0, steps=4, noise_multiplier=1.0, delta=1e-3)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def losses(self, batch: Tensor) -> Tensor:
        return (self(batch) - batch[:, :2]).square().sum(1)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    x = batch.tensors["x"]
    return batch.per_unit((model(x) - x[:, :2]).square().sum(1))


def make(seed: int = 0) -> Regression:
    torch.manual_seed(seed)
    return Regression().double()


def table(units: int = 200, rows: int = 1) -> UnitTable:
    torch.manual_seed(9)
    return table_of({"x": torch.randn(units * rows, 5, dtype=torch.float64)}, [rows] * units)


def private(model: nn.Module, **options) -> tuple[DifferentialPrivacyEngine, torch.optim.Optimizer]:
    values = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "random": TestRandom(0), **options}
    engine = DifferentialPrivacyEngine(model, **values)
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def train(model: nn.Module, engine, optimizer, batches) -> int:
    steps = 0
    for batch in batches:
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += batch.last
    return steps


# ------------------------------------------------------------------------------------------------ the public face


def test_the_example_of_the_architecture_page_runs_as_it_is_printed():
    torch.manual_seed(0)
    model = Regression()
    dataset = list(torch.randn(16_384, 5))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = sfumato.DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.1)
    engine.attach(optimizer)  # in place; returns the same optimizer

    for batch in engine.batches(dataset, expected_batch_size=256, steps=1_000):
        losses = model.losses(batch)  # shape (B,): one loss per example
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    print(engine.get_epsilon(delta=1e-5))

    assert engine.stopped == "steps"
    expected = epsilon([Event(sampling_rate=256 / 16_384, noise_multiplier=1.1, count=1_000)], 1e-5)
    assert engine.get_epsilon(delta=1e-5) == expected
    with torch.no_grad():
        assert float(model.losses(torch.stack(dataset)).mean()) < 1.0  # it learns: about 2.3 at the start
    assert engine.for_release


def test_the_textbook_form_runs_as_it_is_printed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(640, 5), torch.randint(0, 3, (640,)))
    train_loader = DataLoader(data, batch_size=64, shuffle=True)
    criterion = nn.CrossEntropyLoss()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    engine = sfumato.DifferentialPrivacyEngine(
        model, max_grad_norm=1.0, noise_multiplier=1.1, expected_batch_size=64, sampling_rate=64 / 640
    )
    engine.attach(optimizer)

    for _epoch in range(2):
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()

    spent = engine.get_epsilon(delta=1e-5)

    assert spent == epsilon([Event(sampling_rate=0.1, noise_multiplier=1.1, count=20)], 1e-5)
    assert 0 < spent < engine.get_epsilon(1e-5, accountant="rdp")


def test_attach_returns_the_same_optimizer_and_refuses_a_second_one():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    assert engine.attach(optimizer) is optimizer
    with pytest.raises(UsageError, match="the engine has SGD already"):
        engine.attach(optimizer)


def test_the_textbook_step_is_the_oracles():
    model = make()
    plain = copy.deepcopy(model)
    x = torch.randn(30, 5, dtype=torch.float64)
    _, optimizer = private(model, noise_multiplier=0.0, max_grad_norm=3.0, expected_batch_size=25, sampling_rate=0.1)
    before = vector(model)
    model.losses(x).mean().backward()
    optimizer.step()
    batch = table_of({"x": x}, [1] * 30).batch(range(30), records_per_unit=1)
    expected = one_unit_at_a_time(plain, losses, batch, 3.0) / 25
    assert relative(before - vector(model), expected) <= 1e-6


def test_a_sum_of_losses_gives_the_same_step_as_their_mean():
    results = [
        released(make(), losses, table(), rate=0.3, loss_reduction=reduction)[0] for reduction in ("mean", "sum")
    ]
    assert relative(results[0], results[1]) <= 1e-12


def test_parts_of_a_batch_give_the_same_step_as_the_whole():
    whole, batch = released(make(), losses, table(rows=2), rate=0.3)
    parts, same = released(make(), losses, table(rows=2), rate=0.3, max_physical_batch_size=7)
    assert batch.num_units == same.num_units > 30
    assert relative(parts, whole) <= 1e-12
    assert relative(whole, one_unit_at_a_time(make(), losses, batch, 1.0)) <= 1e-6


def test_the_step_is_divided_by_the_expected_size_not_by_the_actual_one():
    """With every gradient clipped to 1e-6 and pointing anywhere, one unit more or less must not rescale the others."""
    model = make()
    engine, optimizer = private(model, noise_multiplier=0.0, max_grad_norm=1e-6)
    sizes = []
    for batch in engine.batches(table(), expected_batch_size=20, steps=5):
        before, plain = vector(model), copy.deepcopy(model)
        losses(model, batch).mean().backward()
        optimizer.step()
        sizes.append(batch.num_units)
        assert relative(before - vector(model), one_unit_at_a_time(plain, losses, batch, 1e-6) / 20) <= 1e-6
    assert len(set(sizes)) > 1


def test_an_ordinary_dataset_with_unit_names_makes_one_gradient_of_a_units_items():
    """The loss is a mean over rows; a unit's gradient is the mean over its own rows, whatever the others have.

    The bound is 8, so that some units are clipped and others are not.
    """
    x = torch.randn(60, 5, dtype=torch.float64)
    owners = [f"person {i % 17 % 9 if i < 45 else 0}" for i in range(60)]  # of 2 to 24 items
    dataset = [{"x": row, "number": i} for i, row in enumerate(x)]
    model = make()
    plain, before = copy.deepcopy(model), vector(model)
    engine, optimizer = private(model, noise_multiplier=0.0, max_grad_norm=8.0)
    numbers: list[int] = []
    for batch in engine.batches(dataset, expected_batch_size=9, steps=1, unit=owners, records_per_unit=4):
        model.losses(batch["x"]).mean().backward()
        optimizer.step()
        numbers = batch["number"].tolist()
    drawn = UnitTable({"x": x[numbers]}, [owners[i] for i in numbers])
    whole = drawn.batch(range(9), records_per_unit=100)
    assert max(np.bincount(whole.unit.numpy())) <= 4 < max(owners.count(name) for name in owners)
    expected = one_unit_at_a_time(plain, losses, whole, 8.0)
    alone = [drawn.batch([unit], records_per_unit=100) for unit in range(9)]
    norms = [float(one_unit_at_a_time(plain, losses, unit, 1e9).norm()) for unit in alone]
    assert 2 <= sum(norm < 8.0 for norm in norms) <= 7
    assert relative((before - vector(model)) * 9, expected) <= 1e-6


@pytest.mark.parametrize(("limit", "rows"), [(None, 1), (2, 2), (9, 4)])
def test_no_unit_has_more_rows_in_a_batch_than_the_limit(limit, rows):
    model = make()
    engine, optimizer = private(model)
    for batch in engine.batches(table(30, rows=4), expected_batch_size=15, steps=3, records_per_unit=limit):
        assert torch.bincount(batch.unit).tolist() == [rows] * batch.num_units
        losses(model, batch).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
def test_other_clippings_keep_the_same_bound_over_all_parameters(clipping):
    """One unit, gradient above C: per layer each of 3 layers keeps C / sqrt(3); automatic goes to about C."""
    one = table_of({"x": torch.randn(1, 5, dtype=torch.float64)}, [1])
    sums, _ = released(make(), losses, one, max_grad_norm=0.1, clipping=clipping)
    assert 0.099 < float(sums.norm()) <= 0.1
    if clipping == "per_layer":
        first = float(sums[: 5 * 7 + 7].norm())
        assert first == pytest.approx(0.1 / math.sqrt(3), rel=1e-6)


# --------------------------------------------------------------------------------------------------- noise, chance


def test_the_noise_has_the_promised_size_whatever_the_batch_is():
    """Chi-square over 5 steps x P coordinates of empty batches; false alarm 1e-6, seed fixed."""
    model = nn.Linear(40, 50)
    engine, optimizer = private(model, noise_multiplier=1.5, max_grad_norm=2.0)
    data = UnitTable({"x": torch.randn(1000, 40)}, [str(i) for i in range(1000)])
    moves = []
    for batch in engine.batches(data, expected_batch_size=1e-3, steps=5):
        assert batch.num_units == batch.num_rows == 0
        before = vector(model)
        model(batch.tensors["x"]).square().sum(1).mean().backward()
        optimizer.step()
        moves.append((before - vector(model)) * 1e-3 / 3.0)
    everything = torch.cat(moves)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(everything))
    assert low < float(everything.square().sum()) < high
    correlations = np.corrcoef(torch.stack(moves).numpy())[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(len(moves[0]))  # fresh at every step; false alarm below 2e-8


def test_the_batches_are_a_poisson_sample():
    """Inclusion counts over 400 steps: chi-square against Binomial(400, .1); false alarm 1e-6, seed fixed."""
    model = make()
    engine, optimizer = private(model)
    data = table(100)
    counts, sizes = np.zeros(100), []
    for batch in engine.batches(data, expected_batch_size=10, steps=400):
        units = [int((data.tensors["x"] == row).all(1).nonzero()) for row in batch.tensors["x"]]
        counts[units] += 1
        sizes.append(len(units))
        losses(model, batch).mean().backward()
        optimizer.step()
    statistic = ((counts - 40) ** 2 / (400 * 0.1 * 0.9)).sum()
    assert stats.chi2.ppf(5e-7, 100) < statistic < stats.chi2.ppf(1 - 5e-7, 100)
    dispersion = np.var(sizes) * 399 / 9  # Binomial(100, .1) sizes have variance 9
    assert stats.chi2.ppf(5e-7, 399) < dispersion < stats.chi2.ppf(1 - 5e-7, 399)


@pytest.mark.parametrize(
    ("model", "item"),
    [
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 2)), torch.randn(2, 5, 5)),
        (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), torch.randn(3, 4)),
        (nn.Sequential(nn.Embedding(5, 3), nn.RMSNorm(3)), torch.tensor([1, 2])),
    ],
)
def test_an_empty_batch_is_a_step_of_noise_and_is_charged(model, item):
    engine, optimizer = private(model)
    before = vector(model)
    for batch in engine.batches([item] * 500, expected_batch_size=1e-3, steps=2):
        assert batch.shape[0] == 0
        model(batch).flatten(1).sum(1).mean().backward()
        optimizer.step()
    moved = (vector(model) - before).abs()
    assert (moved > 0).all()
    assert torch.isfinite(moved).all()
    assert engine.get_epsilon(1e-5) == epsilon([Event(sampling_rate=1e-3 / 500, noise_multiplier=1.0, count=2)], 1e-5)


def test_a_gradient_that_is_not_finite_counts_as_zero():
    x = torch.randn(6, 5, dtype=torch.float64)
    x[1], x[4, 2] = math.nan, math.inf
    model = make()
    before = vector(model)
    engine, optimizer = private(model, noise_multiplier=0.0)
    for batch in engine.batches(table_of({"x": x}, [1] * 6), expected_batch_size=6, steps=1):
        losses(model, batch).mean().backward()
        optimizer.step()
    finite = table_of({"x": x[[0, 2, 3, 5]]}, [1] * 4).batch(range(4), records_per_unit=1)
    assert relative((before - vector(model)) * 6, one_unit_at_a_time(make(), losses, finite, 1.0)) <= 1e-6
    assert engine.non_finite == 2
    assert "non_finite" not in str(engine.state_dict())


# ------------------------------------------------------------------------------------------- budget, ledger, state


def test_the_loop_ends_cleanly_when_the_ledger_says_no(tmp_path: Path):
    model = make()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=PLAN) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, PLAN, ledger=ledger, random=TestRandom(0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        steps = train(model, engine, optimizer, engine.batches(table(), steps=10, max_physical_batch_size=8))
        assert (steps, engine.stopped) == (PLAN.steps, "budget")
        assert engine.get_epsilon(PLAN.delta) == PLAN.epsilon()
        assert ledger.spent_steps == PLAN.steps
        assert list(engine.batches(table())) == []


def test_a_step_is_reserved_before_its_data_is_touched_and_committed_after_it(tmp_path: Path):
    happened = []

    class Spy:
        def __len__(self) -> int:
            return 200

        def __getitem__(self, i: int) -> Tensor:
            happened.append("data")
            return torch.zeros(5, dtype=torch.float64)

    model = make()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=PLAN) as ledger:
        engine = make_engine(model, PLAN, ledger, TestRandom(0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        for name in ("reserve", "commit"):
            original = getattr(ledger, name)
            setattr(ledger, name, lambda *a, o=original, n=name: (happened.append(n), o(*a))[1])
        for batch in engine.batches(Spy(), steps=2):
            model.losses(batch).mean().backward()
            happened.append("step")
            optimizer.step()
    order = [name for i, name in enumerate(happened) if i == 0 or happened[i - 1] != name]
    assert order == ["reserve", "data", "step", "commit"] * 2


def test_a_draw_that_was_never_stepped_is_spent(tmp_path: Path):
    model = make()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=PLAN) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, PLAN, ledger=ledger, random=TestRandom(0))
        engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in engine.batches(table()):
            break
        assert ledger.spent() == [PLAN.event(1)]
        assert engine.get_epsilon(PLAN.delta) == PLAN.epsilon(1)
        assert ledger.remaining_steps == PLAN.steps - 1


def test_a_resumed_run_continues_the_count_and_takes_only_what_is_left(tmp_path: Path):
    path, model = tmp_path / "ledger.db", make()
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, PLAN, ledger=ledger, random=TestRandom(0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert train(model, engine, optimizer, engine.batches(table(), steps=1)) == 1
        state = engine.state_dict()
        for _ in engine.batches(table(), steps=1):
            break  # the run is killed here: this step is lost, and stays spent
        engine.detach()
    with Ledger.open(path, run="r", plan=PLAN) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, PLAN, ledger=ledger, random=TestRandom(1))
        engine.load_state_dict(state)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert train(model, engine, optimizer, engine.batches(table())) == PLAN.steps - 2
        assert engine.stopped == "steps"
        assert engine.get_epsilon(PLAN.delta) == PLAN.epsilon()
        newest = engine.state_dict()
        engine.detach()
    with Ledger.open(tmp_path / "other.db", run="r", plan=PLAN) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, PLAN, ledger=ledger)
        with pytest.raises(LedgerError, match="older than the checkpoint"):
            engine.load_state_dict(newest)


@pytest.mark.parametrize("kind", [DifferentialPrivacyEngine, NotPrivateEngine])
def test_what_a_test_source_began_is_not_for_release_whoever_ends_it(kind):
    def made(random):
        if kind is NotPrivateEngine:
            return NotPrivateEngine(make(), random=random)
        return DifferentialPrivacyEngine(make(), max_grad_norm=1.0, noise_multiplier=1.0, random=random)

    begun = made(TestRandom(0)).state_dict()
    ended = made(SecretRandom())
    assert ended.for_release
    ended.load_state_dict(begun)
    assert not ended.for_release and ended.state_dict()["for_release"] is False
    older = made(SecretRandom())
    older.load_state_dict({name: value for name, value in begun.items() if name != "for_release"})
    assert older.for_release


def test_the_state_holds_accounting_only():
    model = make()
    engine, optimizer = private(model)
    train(model, engine, optimizer, engine.batches(table(), expected_batch_size=20, steps=3))
    state = engine.state_dict()
    assert set(state) == {"format", "steps_started", "for_release", "events", "ledger_sequence"}
    assert state["events"] == [Event(sampling_rate=0.1, noise_multiplier=1.0, count=3).to_dict()]
    engine.detach()
    again, _ = private(model, sampling_rate=0.1)
    again.load_state_dict(state)
    assert again.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    with pytest.raises(UsageError, match="state = "):
        again.load_state_dict({"steps": 3})


def test_epsilon_is_infinite_without_noise_zero_before_the_first_step_and_unknown_without_a_rate():
    model = make()
    engine, optimizer = private(model, noise_multiplier=0.0)
    with pytest.raises(UsageError, match=r"sampling_rate = None.*engine\.batches"):
        engine.get_epsilon(1e-5)
    batches = engine.batches(table(), expected_batch_size=20, steps=1)
    assert engine.get_epsilon(1e-5) == 0
    train(model, engine, optimizer, batches)
    assert engine.get_epsilon(1e-5) == math.inf
    with pytest.raises(UsageError, match="zcdp"):
        engine.get_epsilon(1e-5, accountant="zcdp")


# ---------------------------------------------------------------------------------- what must not pass in silence


def test_every_layer_that_cannot_be_treated_is_named_at_construction():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm2d(3), nn.LSTM(3, 3)))
    model.append(nn.MultiheadAttention(4, 2))
    model.append(nn.Embedding(3, 3, max_norm=1.0))
    with pytest.raises(UnsupportedLayer) as caught:
        DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    for name in ("1 (BatchNorm1d)", "2.0 (BatchNorm2d)", "2.1 (LSTM)", "3 (MultiheadAttention)", "4 (Embedding)"):
        assert name in str(caught.value)
    assert "5 layers" in str(caught.value)
    assert "GroupNorm" in str(caught.value)
    assert "forward" not in vars(model[0])  # nothing was wrapped


def test_a_parameter_that_would_not_train_is_named():
    model = make()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(UsageError, match=r"does not train body\.0\.weight, body\.0\.bias"):
        engine.attach(torch.optim.SGD(model.body[2:].parameters(), lr=1.0))
    with pytest.raises(UsageError, match="not the model's, unprotected"):
        engine.attach(torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=1.0))


def test_a_parameter_that_becomes_trainable_later_is_named():
    model = make()
    model.body[3].requires_grad_(False)
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))

    def loop() -> None:
        for batch in engine.batches(table(), expected_batch_size=20, steps=2):
            losses(model, batch).mean().backward()
            optimizer.step()
            model.body[3].requires_grad_(True)

    with pytest.raises(UnsupportedLayer, match=r"body\.3\.weight, body\.3\.bias · became trainable"):
        loop()


def test_a_parameter_that_takes_no_part_is_named():
    model = nn.ModuleDict({"used": nn.Linear(5, 2), "unused": nn.Linear(5, 2)}).double()
    engine, optimizer = private(model)

    def loop() -> None:
        for batch in engine.batches(table(), expected_batch_size=20, steps=1):
            losses(model["used"], batch).mean().backward()
            optimizer.step()

    with pytest.raises(UsageError, match=r"unused\.weight, unused\.bias · took no part"):
        loop()


def test_a_weight_that_is_read_outside_its_module_is_named_and_nothing_moves():
    class Leaky(Regression):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.body[0].weight.sum()

    model = Leaky().double()
    before = vector(model)
    engine, optimizer = private(model)
    with pytest.raises(UnsupportedLayer, match=r"body\.0\.weight · got a gradient that was not clipped"):
        train(model, engine, optimizer, engine.batches(table(), expected_batch_size=20, steps=1))
    assert torch.equal(vector(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_that_the_forward_pass_changes_is_named():
    class Counting(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.add_(x.detach().mean(0))
            return super().forward(x)

    model = Counting().double()
    engine, optimizer = private(model)
    with pytest.raises(UnsupportedLayer, match="mean · a buffer that the forward pass changed"):
        train(model, engine, optimizer, engine.batches(table(), expected_batch_size=20, steps=1))


def test_two_backward_passes_before_a_step_are_refused():
    model = make()
    engine, optimizer = private(model)

    def loop() -> None:
        for batch in engine.batches(table(), expected_batch_size=20, steps=1):
            losses(model, batch).mean().backward()
            losses(model, batch).mean().backward()

    with pytest.raises(UsageError, match="called twice before"):
        loop()
    assert not optimizer.state


def test_a_second_step_on_the_same_batch_is_refused():
    model = make()
    engine, optimizer = private(model)

    def loop() -> None:
        for batch in engine.batches(table(), expected_batch_size=20, steps=1):
            for _ in range(2):
                losses(model, batch).mean().backward()
                optimizer.step()

    with pytest.raises(PrivacyRefused, match="every batch is for one step"):
        loop()
    assert engine.state_dict()["steps_started"] == 1


def test_a_step_without_backward_and_a_backward_without_step_are_refused():
    model = make()
    engine, optimizer = private(model)

    def loop() -> None:
        for _ in engine.batches(table(), expected_batch_size=20, steps=1):
            optimizer.step()

    with pytest.raises(UsageError, match=r"no backward\(\) came before it"):
        loop()

    def loop() -> None:
        for batch in engine.batches(table(), expected_batch_size=20, steps=2):
            losses(model, batch).mean().backward()

    with pytest.raises(UsageError, match=r"step\(\) · was not called for a batch"):
        loop()

    def loop() -> None:  # whether there is noise would tell who was drawn
        for batch in engine.batches(table(), expected_batch_size=20, steps=2):
            if batch.num_units == 0:
                losses(model, batch).mean().backward()
                optimizer.step()

    with pytest.raises(UsageError, match=r"step\(\) · was not called for a batch"):
        loop()


def test_a_hand_written_step_says_what_it_needs_to_know():
    model = make()
    _, optimizer = private(model)
    model.losses(torch.randn(4, 5, dtype=torch.float64)).mean().backward()
    with pytest.raises(UsageError, match=r"expected_batch_size = None, sampling_rate = None.*engine\.batches"):
        optimizer.step()


def test_a_closure_is_refused():
    model = make()
    _, optimizer = private(model, expected_batch_size=4, sampling_rate=0.1)
    with pytest.raises(UsageError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type]


def test_batches_before_attach_are_refused():
    engine = DifferentialPrivacyEngine(make(), max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(UsageError, match=r"engine\.attach\(optimizer\)"):
        engine.batches(table(), expected_batch_size=20, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expected_batch_size": 300}, "sampling_rate = 1.5"),
        ({"expected_batch_size": -1}, "expected_batch_size = -1"),
        ({}, "expected_batch_size = None"),
        ({"expected_batch_size": 20, "steps": None}, "steps = None"),
        ({"expected_batch_size": 20, "max_physical_batch_size": 0}, "max_physical_batch_size = 0"),
        ({"expected_batch_size": 20, "unit": ["a"]}, "unit · a UnitTable knows its units"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(options, message):
    engine, _ = private(make())
    with pytest.raises(UsageError, match=message):
        engine.batches(table(), **{"steps": 1, **options})


def test_a_gradient_left_from_the_last_step_does_no_harm():
    """A loop that never calls zero_grad trains as one that does."""
    results = []
    for clean in (True, False):
        model = make()
        engine, optimizer = private(model)
        for batch in engine.batches(table(), expected_batch_size=20, steps=3):
            losses(model, batch).mean().backward()
            optimizer.step()
            if clean:
                optimizer.zero_grad()
        results.append(vector(model))
    assert torch.equal(results[0], results[1])


# ------------------------------------------------------------------------------------------ the model stays itself


def test_copies_and_pickles_of_the_model_are_ordinary_models():
    model = make()
    names, kind = list(model.state_dict()), type(model)
    engine, optimizer = private(model)
    assert (list(model.state_dict()), type(model)) == (names, kind)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(4, 5, dtype=torch.float64)
        with torch.no_grad():
            twin.body[0].weight.zero_()
            assert not torch.equal(twin(x), model(x))  # it computes with its own weights
        twin.losses(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        DifferentialPrivacyEngine(twin, max_grad_norm=1.0, noise_multiplier=1.0)  # and can be trained privately itself
    assert train(model, engine, optimizer, engine.batches(table(), expected_batch_size=20, steps=1)) == 1


def test_a_forward_that_was_replaced_on_a_layer_is_refused_by_name():
    model = make()
    model.body[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UnsupportedLayer, match=r"body\.0 \(Linear\): has a forward that was replaced"):
        DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)


def test_one_model_has_one_engine_at_a_time():
    model = make()
    engine, _ = private(model)
    with pytest.raises(UnsupportedLayer, match="recorded by another engine"):
        private(model)
    engine.detach()
    private(model)


def test_detach_gives_the_model_and_the_optimizer_back():
    model = make()
    engine, optimizer = private(model)
    engine.detach()
    model.losses(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert all("forward" not in vars(module) for module in model.modules())


def test_evaluation_in_between_leaves_no_trace():
    model = make()
    engine, optimizer = private(model, noise_multiplier=0.0)
    for batch in engine.batches(table(), expected_batch_size=20, steps=2):
        with torch.no_grad():
            model.losses(torch.randn(7, 5, dtype=torch.float64))
        plain, before = copy.deepcopy(model), vector(model)
        losses(model, batch).mean().backward()
        optimizer.step()
        assert relative((before - vector(model)) * 20, one_unit_at_a_time(plain, losses, batch, 1.0)) <= 1e-6


# ------------------------------------------------------------------------------------------------- independence


class Coupled(nn.Module):
    """Subtracts the batch's mean: no parameters, no buffers, no name that gives it away."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_layer_through_which_units_influence_each_other_is_named():
    model = nn.Sequential(nn.Linear(5, 7), Coupled(), nn.Linear(7, 2)).double()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    batch = table(4, 2).batch(range(4), records_per_unit=2)
    with pytest.raises(UnsupportedLayer, match=r"1 \(Coupled\)"):
        engine.check_independence(lambda batch: losses(model, batch), batch)


def test_a_loss_in_which_units_influence_each_other_is_found_also_where_only_the_gradient_shows_it():
    model = make()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    batch = table(4).batch(range(4), records_per_unit=1)

    def contrastive(batch: Batch) -> Tensor:
        values = losses(model, batch)
        return values - values.logsumexp(0)

    def hidden(batch: Batch) -> Tensor:
        values = losses(model, batch)
        coupled = values * values.detach().sum()
        return values.detach() + coupled - coupled.detach()

    for bad in (contrastive, hidden):
        with pytest.raises(UnsupportedLayer, match="the loss"):
            engine.check_independence(bad, batch)
    engine.check_independence(lambda batch: losses(model, batch), batch)


def test_dropout_and_group_norm_pass_the_check():
    model = nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    batch = table(4).batch(range(4), records_per_unit=1)
    engine.check_independence(lambda batch: losses(model, batch), batch)
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------- the twin without privacy


def test_the_twin_takes_ordinary_gradients_over_the_expected_size():
    plan = NotPrivate(population=200, expected_batch_size=20.0, steps=2, unit="person", records_per_unit=2)
    for limit in (None, 6):
        model = make()
        engine = make_engine(model, plan, random=TestRandom(3))
        assert isinstance(engine, NotPrivateEngine)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        parts, before = [], vector(model)
        for batch in engine.batches(table(rows=2), steps=1, max_physical_batch_size=limit):
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            parts.append(batch)
        plain = make()
        (sum(losses(plain, part).sum() for part in parts) / 20).backward()
        expected = torch.cat([p.grad.flatten() for p in plain.parameters()])  # type: ignore[union-attr]
        assert relative(before - vector(model), expected) <= 1e-12
        assert engine.get_epsilon(delta=1e-5) == math.inf
        assert len(parts) > 1 or limit is None


def test_the_twin_does_nothing_with_an_empty_batch():
    model = make()
    engine = NotPrivateEngine(model, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.AdamW(model.parameters(), lr=1.0))
    before = vector(model)
    assert train(model, engine, optimizer, engine.batches(table(), expected_batch_size=1e-6, steps=3)) == 3
    assert torch.equal(before, vector(model))


@pytest.mark.parametrize("bands", [1, 2])
def test_blocks_of_steps_are_charged_before_they_begin_and_exactly_at_the_end(tmp_path: Path, monkeypatch, bands: int):
    """Four reservations at once: an iteration that is left early gives back what nobody drew."""
    from sfumato.privacy.ledger import blocks, show

    monkeypatch.setattr(blocks.Pace, "at_once", lambda self, left, ahead: min(4, left, ahead))
    plan = DpSgd(
        population=200, expected_batch_size=20.0, steps=40, noise_multiplier=4.0, delta=1e-4, bands=bands
    )  # fmt: skip
    path, model = tmp_path / "ledger.db", make()
    with Ledger.open(path, run="r", plan=plan) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=TestRandom(0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        for number, batch in enumerate(engine.batches(table())):
            assert number < bands * ledger.spent_steps
            if number == 12:
                break
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = engine.state_dict()
        assert ledger.sequence < 2 + 13 // bands  # fewer entries than reservations
        engine.detach()
    charged = -(-13 // bands)
    assert show(path)["steps"] == charged
    with Ledger.open(path, run="r", plan=plan) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(model, plan, ledger=ledger, random=TestRandom(1))
        engine.load_state_dict(state)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert train(model, engine, optimizer, engine.batches(table())) == 40 - bands * charged
        assert ledger.remaining_steps == 0 and engine.stopped == "steps"
        engine.detach()
    assert show(path)["steps"] == plan.event().count
