"""The engine with correlated and with discrete noise: what it samples, adds, charges, and what happens when it is stopped."""

import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from tests.oracles import table_of, vector
from tests.processes import together
from torch import Tensor, nn

from sfumato.errors import BudgetExhausted, LedgerError, PrivacyRefused, SfumatoError, UsageError
from sfumato.privacy import engine as engine_module
from sfumato.privacy.accounting import epsilon
from sfumato.privacy.correlated import Stream, toeplitz, variances
from sfumato.privacy.discrete import source_named
from sfumato.privacy.engine import DifferentialPrivacyEngine, make_engine
from sfumato.privacy.events import Event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.step_noise import Block
from sfumato.randomness import SecretRandom, TestRandom
from sfumato.records import Batch, UnitTable

UNITS, SIZE, STEPS, BANDS = 240, 12.0, 10, 4


def table(units: int = UNITS) -> UnitTable:
    torch.manual_seed(9)
    return table_of({"x": torch.randn(units, 5, dtype=torch.float64), "index": torch.arange(units)}, [1] * units)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.tensors["x"]).square().sum(1)


def plan(**options) -> DpSgd:
    values = {"population": UNITS, "expected_batch_size": SIZE, "steps": STEPS, "noise_multiplier": 1.0, "delta": 1e-3}
    return DpSgd(**{**values, "bands": BANDS, **options})


def engine_of(model: nn.Module, seed: int = 0, ledger: Ledger | None = None, **options):
    torch.manual_seed(0)
    engine = make_engine(model, plan(**options), ledger=ledger, random=TestRandom(seed))
    assert isinstance(engine, DifferentialPrivacyEngine)
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def run(model: nn.Module, engine, optimizer, most: int = 10**6, **options) -> tuple[list[set[int]], list[Tensor]]:
    """Who was drawn, and the released gradient, step by step."""
    drawn, moved = [], []
    for batch in engine.batches(table(), **options):
        before = vector(model)
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(set(batch.tensors["index"].tolist()))
        moved.append(before - vector(model))
        if len(moved) == most:
            break
    return drawn, moved


def model_of(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, outputs).double()


# ------------------------------------------------------------------------------------------------ correlated


def test_a_cycle_is_one_event_charged_at_its_first_step(tmp_path):
    model = model_of()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan()) as ledger:
        engine, optimizer = engine_of(model, ledger=ledger)
        charged = []
        for batch in engine.batches(table()):
            charged.append(sum(event.count for event in ledger.spent()))
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert charged == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
        event = Event(sampling_rate=BANDS * SIZE / UNITS, noise_multiplier=1.0, count=3)
        assert ledger.spent() == [event]
        assert engine.get_epsilon(1e-3) == epsilon([event], 1e-3) == plan().epsilon()
        assert engine.stopped == "steps" and engine.steps_started == STEPS
        assert list(engine.batches(table())) == []
        with pytest.raises(BudgetExhausted):
            ledger.reserve(plan().event(1), 3)


def test_units_are_drawn_in_the_steps_of_their_group_only():
    model = model_of()
    engine, optimizer = engine_of(model, steps=80)
    drawn, _ = run(model, engine, optimizer)
    groups = [set().union(*drawn[g::BANDS]) for g in range(BANDS)]
    assert sum(map(len, groups)) == len(set().union(*groups)) > 200
    sizes = np.array([len(d) for d in drawn])
    assert abs(sizes.mean() - SIZE) < 4.9 * math.sqrt(SIZE / len(sizes))  # false-alarm probability 1e-6


def test_the_released_noise_is_that_of_the_factorisation(monkeypatch):
    """No units near: what is released, times B, is C^-1 w. Covariance over 12,000 coordinates; false-alarm probability 1e-6 for each
    of the 36 entries."""
    model = nn.Linear(2000, 6, bias=False).double()
    units = table_of({"x": torch.zeros(UNITS, 2000, dtype=torch.float64)}, [1] * UNITS)
    engine = make_engine(model, plan(steps=8), random=TestRandom(3))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    z, reported = [], []
    for batch in engine.batches(units):
        before = vector(model)
        losses(model, batch).mean().backward()
        optimizer.step()
        reported.append(engine.noise_variance(model.weight))
        optimizer.zero_grad()
        z.append(((before - vector(model)) * SIZE).numpy())
    strategy, count = toeplitz(BANDS, 8), 12_000
    inverse = np.linalg.inv(strategy.dense())
    expected = inverse @ inverse.T
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / count)
    assert (np.abs(np.stack(z) @ np.stack(z).T / count - expected) < 4.9 * spread).all()
    assert reported == pytest.approx((np.diag(expected) / SIZE**2).tolist(), rel=1e-4)
    np.testing.assert_allclose(variances(strategy), np.diag(expected), rtol=1e-12)


def test_the_sum_of_the_steps_has_less_noise_than_with_independent_noise():
    """The same model without data, 40 steps: the variance of the sum, by the error formula and by chi-square; alarm 1e-6."""
    model = nn.Linear(1000, 4, bias=False).double()
    units = table_of({"x": torch.zeros(UNITS, 1000, dtype=torch.float64)}, [1] * UNITS)
    lengths = {}
    for bands in (1, 8):
        engine = make_engine(model, plan(steps=40, bands=bands), random=TestRandom(bands))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        before = vector(model)
        for batch in engine.batches(units):
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        engine.detach()
        inverse = np.linalg.inv(toeplitz(bands, 40).dense())
        per_coordinate = float((inverse.sum(0) ** 2).sum()) / SIZE**2
        lengths[bands] = float((vector(model) - before).square().sum())
        assert stats.chi2.ppf(5e-7, 4000) < lengths[bands] / per_coordinate < stats.chi2.ppf(1 - 5e-7, 4000)
    assert lengths[8] < 0.35 * lengths[1]


def test_the_clipped_sums_are_not_touched():
    """Without noise, steps with bands are ordinary steps on what was drawn."""
    model, twin = model_of(), model_of()
    engine, optimizer = engine_of(model, noise_multiplier=0.0)
    drawn, moved = run(model, engine, optimizer)
    held = table().tensors["x"]
    for units, move in zip(drawn, moved, strict=True):
        total = torch.zeros(18, dtype=torch.float64)
        for unit in sorted(units):
            twin.zero_grad()
            twin(held[unit : unit + 1]).square().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
            total += gradient * min(1.0, 1.0 / float(gradient.norm()))
        torch.testing.assert_close(move, total / SIZE, rtol=1e-6, atol=1e-9)
        nn.utils.vector_to_parameters(vector(twin) - move, twin.parameters())


def test_a_stop_ends_the_block_and_the_next_one_has_new_groups_and_fresh_noise(tmp_path):
    """Stopped after 6 of 10 steps, in the second of three cycles: that cycle is spent, 2 steps remain, and the state holds
    neither noise nor groups."""
    path, model = tmp_path / "ledger.db", model_of()
    with Ledger.open(path, run="r", plan=plan()) as ledger:
        engine, optimizer = engine_of(model, ledger=ledger)
        first, _ = run(model, engine, optimizer, most=6)
        saved = engine.state_dict()
        block = engine._block
        engine.detach()
    assert set(saved) == {"format", "steps_started", "for_release", "events", "ledger_sequence", "ledger_position"}
    with Ledger.open(path, run="r", plan=plan()) as ledger:
        engine, optimizer = engine_of(model, seed=1, ledger=ledger)
        engine.load_state_dict(saved)
        second, _ = run(model, engine, optimizer)
        assert engine._block is not block and engine._block is not None
        assert len(second) == 2 and engine.stopped == "steps"
        assert sum(event.count for event in ledger.spent()) == 3 == plan().event().count
        assert engine.get_epsilon(1e-3) == plan().epsilon()
    assert len(first) == 6


def test_every_call_of_batches_begins_a_block(tmp_path):
    model = model_of()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan(steps=12)) as ledger:
        engine, optimizer = engine_of(model, ledger=ledger, steps=12)
        blocks = []
        for _ in range(3):
            run(model, engine, optimizer, steps=2)
            blocks.append(engine._block)
        assert len({id(block) for block in blocks}) == 3
        assert sum(event.count for event in ledger.spent()) == 3
        assert run(model, engine, optimizer) == ([], [])


def test_an_error_in_a_step_ends_the_block(tmp_path, monkeypatch):
    """Some of the step's noise was taken, some not: what goes on is a new block, charged as one."""
    model = model_of()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan()) as ledger:
        engine, optimizer = engine_of(model, ledger=ledger)
        blocks, failed = [], False
        for step, batch in enumerate(engine.batches(table())):
            losses(model, batch).mean().backward()
            if step == 1:
                with monkeypatch.context() as patch:
                    patch.setattr(engine._gradients, "write", lambda *_: (_ for _ in ()).throw(RuntimeError("torn")))
                    with pytest.raises(RuntimeError, match="torn"):
                        optimizer.step()
                failed = True
            else:
                optimizer.step()
            optimizer.zero_grad()
            blocks.append(engine._block)
            if step == 3:
                break
        assert failed and blocks[0] is not None and blocks[1] is None
        assert blocks[2] is not None and blocks[2] is not blocks[0] and blocks[3] is blocks[2]
        assert sum(event.count for event in ledger.spent()) == 2


def test_noise_of_another_step_is_never_given():
    block = Block(3, 6, source_named("gaussian"), SecretRandom())
    block.begin_step()
    block.added("a", 5, 1.0, None)
    with pytest.raises(SfumatoError, match="noise of step 1"):
        block.added("a", 5, 1.0, None)
    block.begin_step()
    with pytest.raises(SfumatoError, match="standard deviation 1"):
        block.added("a", 5, 2.0, None)
    with pytest.raises(SfumatoError, match="noise of step 0"):
        block.added("b", 5, 1.0, None)


def refused_in_a_fork(act: Callable[[], object]) -> bool:
    """Whether ``act`` is refused with LedgerError in a forked child; False where the child goes on as if nothing had happened."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
        except LedgerError as error:
            code = 0 if error.code == "ledger_forked" and error.next else 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A forked child has no thread but the one that forked: torch must not wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_forked_child_takes_no_step_of_a_cycle_that_its_parent_was_charged_for(tmp_path):
    """A fork between two steps of one event, and one between a batch and its step; the parent goes on."""
    model = model_of()
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan()) as ledger:
        engine, optimizer = engine_of(model, ledger=ledger)
        batches = engine.batches(table())

        def step() -> None:
            losses(model, next(batches)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        assert refused_in_a_fork(step)
        losses(model, next(batches)).mean().backward()
        assert refused_in_a_fork(optimizer.step)
        optimizer.step()
        optimizer.zero_grad()
        step()
        assert ledger.spent_steps == 1


@pytest.mark.usefixtures("one_thread")
def test_blocks_and_streams_are_of_the_process_that_began_them():
    block = Block(3, 6, source_named("gaussian"), SecretRandom())
    block.begin_step()
    block.units(9, 0.5)
    assert refused_in_a_fork(block.begin_step)
    assert refused_in_a_fork(lambda: block.units(9, 0.5))
    assert refused_in_a_fork(lambda: block.added("a", 5, 1.0, None))
    stream = Stream(toeplitz(3, 6), 5, 1.0, source_named("gaussian"))
    stream.next(SecretRandom())
    assert refused_in_a_fork(lambda: stream.next(SecretRandom()))
    stream.next(SecretRandom())
    block.added("a", 5, 1.0, None)
    block.begin_step()


def test_physical_parts_are_one_step_of_the_block():
    model = model_of()
    engine, optimizer = engine_of(model)
    steps = 0
    for batch in engine.batches(table(), max_physical_batch_size=3):
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += batch.last
    assert steps == STEPS and engine._block is not None and engine._block.step == STEPS - 1


def test_what_the_proof_does_not_cover_is_refused():
    model = model_of()
    with pytest.raises(UsageError, match="clipping = adaptive"):
        DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, bands=2, clipping="adaptive")
    with pytest.raises(UsageError, match="bands = 0"):
        DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, bands=0)
    with pytest.raises(UsageError, match="adjacency = replace_one"):
        make_engine(model, plan(adjacency="replace_one"))
    make_engine(model, plan(adjacency="zero_out")).detach()
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=1.0, noise_multiplier=1.0, bands=2, expected_batch_size=12, sampling_rate=0.05
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    model(table().tensors["x"]).square().sum(1).mean().backward()
    with pytest.raises(UsageError, match="hand-written loop"):
        optimizer.step()
    engine.detach()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0, bands=30)
    engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UsageError, match=r"sampling_rate = 1\.5"):
        engine.batches(table(), expected_batch_size=12, steps=40)
    engine.detach()
    both = nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(2, 5)})
    parts = {name: engine_module.Part(modules=(name,), max_grad_norm=1.0) for name in both}
    engine = DifferentialPrivacyEngine(both, parts=parts, noise_multiplier=1.0, bands=2)
    with pytest.raises(UsageError, match="optimizer for each part"):
        engine.attach(torch.optim.SGD(both["a"].parameters(), lr=1.0), part="a")
    engine.detach()


def test_more_past_noise_than_memory_is_refused_when_the_engine_is_made(monkeypatch):
    def limited(bands: int, dimension: int) -> None:
        raise PrivacyRefused(f"bands = {bands} · {dimension}", code="memory")

    monkeypatch.setattr(engine_module, "check_memory", limited)
    model = model_of()
    with pytest.raises(PrivacyRefused, match="bands = 4 · 18"):
        engine_of(model)
    engine_of(model, bands=1)


# ------------------------------------------------------------------------------------------------ discrete, truncated


@pytest.mark.parametrize("options", [{"bands": 1}, {"bands": BANDS}], ids=["independent", "correlated"])
def test_discrete_noise_has_the_same_size_and_lies_on_its_grid(options):
    """Chi-square of the sum of squares of the first step without data; false-alarm probability 1e-6."""
    model = nn.Linear(2000, 2, bias=False).double()
    units = table_of({"x": torch.zeros(UNITS, 2000, dtype=torch.float64)}, [1] * UNITS)
    engine = make_engine(model, plan(noise="discrete", steps=8, **options), random=TestRandom(5))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    for batch in engine.batches(units):
        losses(model, batch).mean().backward()
        optimizer.step()
        assert model.weight.grad is not None
        statistic = float(model.weight.grad.square().sum()) / engine.noise_variance(model.weight)
        assert stats.chi2.ppf(5e-7, 4000) < statistic < stats.chi2.ppf(1 - 5e-7, 4000)
        optimizer.zero_grad()
    assert engine.stopped == "steps"


def test_truncated_batches_are_never_larger_and_charged_as_such():
    model = model_of()
    engine, optimizer = engine_of(model, bands=1, largest_batch=14, adjacency="zero_out", steps=60)
    drawn, _ = run(model, engine, optimizer)
    assert max(map(len, drawn)) == 14
    assert [event["mechanism"] for event in engine.state_dict()["events"]] == ["truncated_poisson_gaussian"]
    expected = plan(bands=1, largest_batch=14, adjacency="zero_out", steps=60)
    assert engine.get_epsilon(1e-3) == expected.epsilon()
    engine, _ = engine_of(model_of(), bands=1, largest_batch=14, adjacency="zero_out", population=UNITS + 1)
    with pytest.raises(UsageError, match=f"population = {UNITS + 1}"):
        engine.batches(table())


# ------------------------------------------------------------------------------------------------ several processes


def work_correlated(rank: int, size: int, kind: str) -> dict:
    """Eight steps without data's influence: the released noise, whole, and which units this process drew in each step."""
    model = nn.Linear(600, 10, bias=False)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    units = table_of({"x": torch.zeros(UNITS, 600), "index": torch.arange(UNITS)}, [1] * UNITS)
    engine = make_engine(model, plan(steps=8), random=SecretRandom())
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    noise, drawn = [], []
    for batch in engine.batches(units):
        losses(model, batch).mean().backward()
        optimizer.step()
        held = model.weight.grad
        assert held is not None
        noise.append((held.full_tensor() if kind == "fsdp" else held).flatten().double() * SIZE)
        drawn.append(batch.tensors["index"].tolist())
        optimizer.zero_grad()
    return {"noise": torch.stack(noise), "drawn": drawn, "events": engine.state_dict()["events"]}


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
def test_two_processes_keep_the_past_noise_of_their_own_coordinates(kind):
    """The covariance over steps is the factorisation's, the same bits are everywhere, nobody is drawn in two groups; 6 standard
    errors: false-alarm probability 2e-9 for each of 36 entries."""
    results = together(2, work_correlated, kind)
    noise, count = results[0]["noise"].numpy(), 6000
    assert torch.equal(results[0]["noise"], results[1]["noise"])
    inverse = np.linalg.inv(toeplitz(BANDS, 8).dense())
    expected = inverse @ inverse.T
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / count)
    assert (np.abs(noise @ noise.T / count - expected) < 6 * spread).all()
    assert abs(float((noise[:, : count // 2] * noise[:, count // 2 :]).mean())) < 6 * expected[-1, -1] * 8 / math.sqrt(
        count
    )
    groups = [{u for r in results for step in r["drawn"][g::BANDS] for u in step} for g in range(BANDS)]
    assert sum(map(len, groups)) == len(set().union(*groups)) > 20
    assert not {u for step in results[0]["drawn"] for u in step} & {u for step in results[1]["drawn"] for u in step}
    assert results[0]["events"] == results[1]["events"] == [plan(steps=8).event().to_dict()]
