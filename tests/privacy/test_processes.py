"""Training in 1, 2 and 4 processes (gloo): what is released is what one process would have released.

``work_*`` functions run in every process; the tests judge what they bring back. The judges are tried on three wrong
engines at the end of each section: noise in every process, a mean instead of a sum, a unit that two processes own.
"""

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from tests.oracles import joined, one_unit_at_a_time, relative, table_of
from tests.processes import together
from torch import Tensor, nn

from sfumato.errors import OutsideError, SfumatoError, UnsupportedLayer, UsageError
from sfumato.privacy import reduction
from sfumato.privacy.engine import DifferentialPrivacyEngine, NotPrivateEngine, make_engine
from sfumato.privacy.gradients.groups import Part
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, NotPrivate
from sfumato.privacy.processes import Processes, wrapper_problem
from sfumato.privacy.reduction import Reduction
from sfumato.randomness import SecretRandom, TestRandom
from sfumato.records import Batch, UnitTable

SIZES = [1, 2, 4]
UNITS = 23


class Shift(nn.Module):
    """A bare parameter: goes through ``torch.func``, row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by.cos() + self.by


class Mixed(nn.Module):
    """A weight per rule; 3, 5 and 7 rows, which neither 2 nor 4 processes share evenly; a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.mix = nn.Conv1d(5, 7, 2)
        self.norm = nn.LayerNorm(7)
        self.shift = Shift(7)
        self.out = nn.Linear(7, 3)
        self.again = nn.Linear(7, 3)
        self.again.weight = self.out.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.shift(self.norm(self.mix(self.frozen(self.words(words)).transpose(1, 2)).transpose(1, 2))).tanh()
        return self.out(x).sum(1) + self.again(x.square()).sum(1)


def mixed(dtype: torch.dtype = torch.float64) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def mixed_table(dtype: torch.dtype = torch.float64) -> UnitTable:
    torch.manual_seed(1)
    counts = [1 + i % 3 for i in range(UNITS)]
    rows = sum(counts)
    weight = torch.logspace(-1, 1, rows, dtype=dtype)  # so that some units are clipped, and others are not
    owner = torch.arange(UNITS).repeat_interleave(torch.tensor(counts))
    return table_of({"words": torch.randint(0, 11, (rows, 4)), "weight": weight, "number": owner}, counts)


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return batch.per_unit(model(batch.tensors["words"]).square().sum(1) * batch.tensors["weight"])


def shard_fully(model: nn.Module, **policy: Any) -> nn.Module:
    """FSDP2, with a group for every layer that stands alone; the two tied ones are in the root's."""
    from torch.distributed.fsdp import fully_shard

    for name in ("mix", "norm", "shift"):
        fully_shard(getattr(model, name), **policy)
    return fully_shard(model, **policy)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([whole(p.grad).double().flatten() for p in trained(model)])


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([whole(p).double().flatten() for p in trained(model)])


# ------------------------------------------------------------------------------- wrong engines, for the judges to convict


class NoiseEverywhere(Reduction):
    """Every process adds the whole noise to its own sum: the reduced gradient has sqrt(W) times the promised noise."""

    def released(self, stds, divisor, noise) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, std in stds.items():
            self.add(parameter, noise.added((), parameter.numel(), std, None).view(parameter.shape))
        yield from super().released(dict.fromkeys(stds, 0.0), divisor, noise)


class Mean(Reduction):
    """As gradients are averaged in ordinary data-parallel training."""

    def add(self, parameter: nn.Parameter, value: Tensor) -> None:
        super().add(parameter, value / self._processes.size)


class SharedUnits(Processes):
    """Unit 0 is in everybody's share."""

    def own_units(self, num_units: int) -> np.ndarray:
        return np.union1d([0], super().own_units(num_units))


def engine_of(model: nn.Module, seed: int, wrong: type | None = None, **options: Any) -> DifferentialPrivacyEngine:
    processes = wrong(dist.group.WORLD) if wrong is SharedUnits else None
    values = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "random": TestRandom(seed + dist.get_rank())}
    engine = DifferentialPrivacyEngine(model, **{**values, **options}, processes=processes)
    if wrong in (NoiseEverywhere, Mean):
        join = engine._join

        def joined_wrongly(part: str) -> None:
            join(part)
            engine._reductions[part] = wrong(engine._tape.layers, engine.processes)

        engine._join = joined_wrongly
    return engine


# --------------------------------------------------------------------------------------------------------------- the sum


def work_sum(rank: int, size: int, kind: str, rate: float, seed: int, wrong: type | None, options: dict) -> dict:
    """One step without noise: the released gradient times the expected size, and who was drawn here."""
    options = dict(options)
    physical = options.pop("max_physical_batch_size", None)
    model = mixed()
    if kind == "fsdp":
        shard_fully(model)
    engine = engine_of(model, seed, wrong, **options)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    before, drawn, flags = parameters(model), [], []
    batches = engine.batches(
        mixed_table(), expected_batch_size=rate * UNITS, steps=1, records_per_unit=2, max_physical_batch_size=physical
    )
    for batch in batches:
        losses(model, batch).mean().backward()
        optimizer.step()
        drawn.append(batch)
        flags.append(batch.last)
        if not batch.last:
            optimizer.zero_grad()
    specs = [(p.grad.placements == p.placements, p.grad.to_local().shape == p.to_local().shape) for p in trained(model)
             if hasattr(p, "placements")]  # fmt: skip
    released = gradient(model)
    optimizer.zero_grad()
    for batch in engine.batches(
        mixed_table(), steps=1, records_per_unit=2
    ):  # a second step: nothing is left of the first
        losses(model, batch).mean().backward()
        optimizer.step()
    return {
        "sum": released * rate * UNITS,
        "moved": (before - parameters(model)) * rate * UNITS,
        "drawn": joined(drawn),
        "last": flags,
        "specs": specs,
        "second": gradient(model) * rate * UNITS,
    }


def judge_sum(results: list[dict], max_grad_norm: float = 1.0) -> None:
    """All processes have the sum over everybody's units of clipped gradients, by the slow reference, to 1e-6."""
    reference = sum(one_unit_at_a_time(mixed(), losses, r["drawn"], max_grad_norm) for r in results)
    assert isinstance(reference, Tensor)
    for result in results:
        assert relative(result["sum"], reference) <= 1e-6
        assert torch.equal(result["sum"], results[0]["sum"])
        assert torch.equal(result["moved"], results[0]["moved"])
        assert relative(result["moved"], result["sum"] + result["second"]) <= 1e-6
        assert result["last"] == results[0]["last"]
        assert all(all(spec) for spec in result["specs"])


def judge_shares(results: list[dict]) -> None:
    numbers = [number for r in results for number in set(r["drawn"].tensors["number"].tolist())]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
@pytest.mark.parametrize("size", SIZES)
def test_the_sum_is_that_of_one_process(size, kind):
    """Every unit is drawn: shares of 12 and 11, or of 6, 6, 6 and 5 units; some units are clipped and others are not."""
    results = together(size, work_sum, kind, 1.0, 0, None, {"max_grad_norm": 30.0})
    judge_sum(results, 30.0)
    judge_shares(results)
    assert sum(r["drawn"].num_units for r in results) == UNITS
    assert len({r["drawn"].num_units for r in results}) == (1 if size == 1 else 2)
    norms = [float(one_unit_at_a_time(mixed(), losses, batch, 1e9).norm()) for batch in alone(results)]
    assert 3 < sum(norm < 30.0 for norm in norms) < UNITS - 3


def alone(results: list[dict]) -> Iterator[Batch]:
    for result in results:
        numbers = result["drawn"].tensors["number"].unique().tolist()
        yield from (mixed_table().batch([number], records_per_unit=2) for number in numbers)


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
@pytest.mark.parametrize(("size", "seed"), [(2, 14), (4, 4)])
def test_a_process_may_draw_nobody_and_need_fewer_parts(size, seed, kind):
    results = together(size, work_sum, kind, 0.2, seed, None, {"max_physical_batch_size": 1})
    units = [r["drawn"].num_units for r in results]
    assert min(units) == 0 and max(units) > 1  # so that somebody runs through parts with nobody in them
    assert results[0]["last"] == [False] * (max(units) - 1) + [True]
    judge_sum(results)
    judge_shares(results)


@pytest.mark.parametrize("clipping", ["per_layer", "automatic", "adaptive"])
def test_other_clippings_are_the_same_in_one_process_and_in_two(clipping):
    options = {"clipping": clipping, "loss_reduction": "mean"}
    work = work_untied
    one, two = together(1, work, options), together(2, work, options)
    assert relative(two[0], one[0]) <= 1e-12
    assert torch.equal(two[0], two[1])


def work_untied(rank: int, size: int, options: dict) -> Tensor:
    model = mixed()
    model.again = nn.Linear(7, 3).double()
    shard_fully(model)
    engine = engine_of(model, 0, **options)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    for batch in engine.batches(mixed_table(), expected_batch_size=UNITS, steps=1, records_per_unit=3):
        losses(model, batch).mean().backward()
        optimizer.step()
    return gradient(model)


def test_many_small_buckets_give_the_same_sum(monkeypatch):
    results = together(2, work_small_buckets)
    judge_sum(results)


def work_small_buckets(rank: int, size: int) -> dict:
    reduction.BUCKET = 17  # cuts through parameters, and joins small ones
    return work_sum(rank, size, "replicated", 1.0, 0, None, {})


def test_a_mean_instead_of_a_sum_is_convicted():
    with pytest.raises(AssertionError):
        judge_sum(together(2, work_sum, "replicated", 1.0, 0, Mean, {}))


def test_a_unit_that_two_processes_own_is_convicted():
    results = together(2, work_sum, "replicated", 1.0, 0, SharedUnits, {})
    with pytest.raises(AssertionError):
        judge_shares(results)
    with pytest.raises(AssertionError):
        judge_inclusion(*shares_of(together(2, work_draws, SharedUnits)))


# ----------------------------------------------------------------------------------------------------------- the noise

STEPS = 4
NOBODY = 1e-12  # units in an expected batch: some unit is drawn in fewer than one test run in 10^9
SIGMA, BOUND = 1.5, 2.0


class Wide(nn.Sequential):
    """11,000 coordinates."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 58), nn.Tanh(), nn.Linear(58, 1))


def work_noise(rank: int, size: int, kind: str, wrong: type | None) -> dict:
    """Steps of noise alone (nobody is drawn), and from which process each coordinate's noise came."""
    torch.manual_seed(0)
    model = Wide()
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    engine = engine_of(model, 0, wrong, noise_multiplier=SIGMA, max_grad_norm=BOUND, random=SecretRandom())
    optimizer = engine.attach(torch.optim.AdamW(model.parameters(), lr=1e-3))
    data = UnitTable({"x": torch.randn(1000, 50)}, [str(i) for i in range(1000)])
    noises = []
    for batch in engine.batches(data, expected_batch_size=NOBODY, steps=STEPS):
        assert batch.num_units == 0
        model(batch.tensors["x"]).square().sum(1).mean().backward()
        optimizer.step()
        noises.append(gradient(model) * NOBODY / (SIGMA * BOUND))
    return {"noise": torch.stack(noises), "parameters": parameters(model), "releasable": engine.for_release}


def judge_noise(results: list[dict]) -> None:
    """Chi-square of all coordinates and steps, two-sided 1e-6; the other bounds are hit below 1e-7."""
    noise = results[0]["noise"]
    count = noise.numel()
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], count)
    assert low < float(noise.square().sum()) < high
    for result in results:  # every process has the same gradient, bit by bit, and so the same model
        assert torch.equal(result["noise"], noise)
        assert torch.equal(result["parameters"], results[0]["parameters"])
    correlations = np.corrcoef(noise.numpy())[np.triu_indices(STEPS, 1)]  # fresh at every step
    assert np.abs(correlations).max() < 6 / math.sqrt(noise.shape[1])
    for shift in range(1, 8):  # shards of W processes, side by side: no process repeats what another one drew
        for parts in (2, 4):
            pieces = noise[:, : noise.shape[1] // parts * parts].reshape(STEPS, parts, -1)
            for a, b in ((i, j) for i in range(parts) for j in range(i)):
                x, y = pieces[:, a, shift:].flatten(), pieces[:, b, : -shift or None].flatten()
                assert abs(float((x * y).mean())) < 6 / math.sqrt(len(x))
                same = (pieces[:, a] * pieces[:, b]).mean()
                assert abs(float(same)) < 6 / math.sqrt(len(x))


@pytest.mark.parametrize("kind", ["replicated", "fsdp"])
@pytest.mark.parametrize("size", SIZES)
def test_the_noise_is_drawn_once_for_all_processes(size, kind):
    results = together(size, work_noise, kind, None)
    judge_noise(results)
    assert all(r["releasable"] for r in results)


def test_shards_of_one_parameter_have_independent_noise():
    """One weight of 4 x 5,000, a row in each of 4 processes: each row against each other; false alarm below 1e-7."""
    noise = together(4, work_rows)[0]
    correlations = np.corrcoef(noise.numpy())[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 6 / math.sqrt(5_000)
    assert float(noise.square().mean()) == pytest.approx(1.0, abs=0.06)


def work_rows(rank: int, size: int) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(5_000, 4, bias=False)
    fully_shard(model)
    engine = engine_of(model, 0, noise_multiplier=1.0, random=SecretRandom())
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    for batch in engine.batches(torch.zeros(100, 5_000), expected_batch_size=1e-9, steps=1):
        model(batch).sum(1).mean().backward()
        optimizer.step()
    return whole(model.weight.grad).double() * 1e-9


@pytest.mark.parametrize("size", [2, 4])
def test_noise_in_every_process_is_convicted(size):
    with pytest.raises(AssertionError):
        judge_noise(together(size, work_noise, "replicated", NoiseEverywhere))


# ------------------------------------------------------------------------------------------------------------ the sample

DRAWS, RATE, POPULATION = 250, 0.1, 60


def work_draws(rank: int, size: int, wrong: type | None) -> np.ndarray:
    """(draws, units) bool: who was drawn in this process."""
    model = nn.Linear(1, 1)
    engine = engine_of(model, 0, wrong, random=SecretRandom())
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    seen = np.zeros((DRAWS, POPULATION), bool)
    data = torch.arange(POPULATION, dtype=torch.float32).view(-1, 1)
    for step, batch in enumerate(engine.batches(data, expected_batch_size=RATE * POPULATION, steps=DRAWS)):
        seen[step, batch.view(-1).long().numpy()] = True
        (model(batch) * 0).mean().backward()
        optimizer.step()
    return seen


def shares_of(seen: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    return np.stack(seen), [s.sum(1) for s in seen]


def judge_inclusion(seen: np.ndarray, sizes: list[np.ndarray]) -> None:
    """A Poisson sample of everybody: each unit Binomial(draws, q), batch sizes Binomial(N, q) apart; 1e-6 each."""
    assert (seen.any(1).sum(0) <= 1).all()  # (W, units): nobody is drawn in two processes
    counts = seen.sum((0, 1))
    statistic = ((counts - DRAWS * RATE) ** 2 / (DRAWS * RATE * (1 - RATE))).sum()
    assert stats.chi2.ppf(5e-7, POPULATION) < statistic < stats.chi2.ppf(1 - 5e-7, POPULATION)
    total = np.sum(sizes, axis=0)
    dispersion = ((total - POPULATION * RATE) ** 2).sum() / (POPULATION * RATE * (1 - RATE))
    assert stats.chi2.ppf(5e-7, DRAWS) < dispersion < stats.chi2.ppf(1 - 5e-7, DRAWS)
    for a, b in ((i, j) for i in range(len(sizes)) for j in range(i)):  # processes draw independently: below 1e-7
        assert abs(np.corrcoef(sizes[a], sizes[b])[0, 1]) < 6 / math.sqrt(DRAWS)


@pytest.mark.parametrize("size", [2, 4])
def test_the_processes_together_draw_a_poisson_sample(size):
    judge_inclusion(*shares_of(together(size, work_draws, None)))


@pytest.mark.parametrize(("num_units", "size"), [(0, 2), (1, 4), (23, 4), (24, 3)])
def test_every_unit_is_in_one_share_and_shares_are_balanced(num_units, size):
    shares = []
    for rank in range(size):
        processes = Processes()
        processes.rank, processes.size = rank, size
        shares.append(processes.own_units(num_units))
    assert sorted(np.concatenate(shares).tolist()) == list(range(num_units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -------------------------------------------------------------------------------------------------- charges, and the end

PLAN = DpSgd(population=UNITS, expected_batch_size=5.0, steps=3, noise_multiplier=2.0, delta=1e-3, records_per_unit=2,
             unit="person")  # fmt: skip


def work_budget(rank: int, size: int, folder: Path) -> dict:
    """The plan's steps and more: process 0 alone has the ledger."""
    model = mixed()
    ledger = Ledger.open(folder / "ledger.db", run="r", plan=PLAN) if rank == 0 else None
    engine = make_engine(model, PLAN, ledger)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=0.1))
    steps, epsilons = 0, []
    for batch in engine.batches(mixed_table(), steps=10):
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        epsilons.append(engine.get_epsilon(PLAN.delta))
    spent, stopped = ledger.spent_steps if ledger else None, engine.stopped
    state = engine.state_dict()
    left = len(list(engine.batches(mixed_table())))  # what the ledger has left is known to all
    if ledger:
        ledger.close()
    return {"steps": steps, "stopped": stopped, "epsilons": epsilons, "spent": spent, "left": left, "state": state}


def test_a_step_of_all_is_one_event_and_the_budget_ends_all_of_them(tmp_path):
    results = together(2, work_budget, tmp_path)
    for result in results:
        assert (result["steps"], result["stopped"], result["left"]) == (PLAN.steps, "budget", 0)
        assert result["epsilons"] == [PLAN.epsilon(n) for n in (1, 2, 3)]
        assert result["state"] == results[0]["state"]
    assert results[0]["spent"] == PLAN.steps
    with Ledger.open(tmp_path / "ledger.db", run="r") as ledger:
        assert [event.count for event in ledger.spent()] == [PLAN.steps]


def work_own_data(rank: int, size: int) -> dict:
    """A hand-written loop over rows of one's own; process 1 has none in the second step."""
    model = Wide().double()
    plain = copy.deepcopy(model)
    engine = engine_of(model, 0, expected_batch_size=10.0, sampling_rate=0.1)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    expected, released = [], []
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        x = torch.randn(0 if rank and step else 3 + rank, 50, dtype=torch.float64)
        batch = table_of({"x": x}, [1] * len(x)).batch(range(len(x)), records_per_unit=1)
        plain.load_state_dict(model.state_dict())
        expected.append(one_unit_at_a_time(plain, lambda m, b: m(b.tensors["x"]).square().sum(1) * 5, batch, 1.0))
        (model(x).square().sum(1) * 5).mean().backward()
        optimizer.step()
        released.append(gradient(model) * 10)
        optimizer.zero_grad()
    return {
        "expected": expected,
        "released": released,
        "epsilon": engine.get_epsilon(1e-5),
        "steps": engine.steps_started,
    }


def test_a_hand_written_loop_adds_up_over_processes():
    results = together(2, work_own_data)
    for step in range(2):
        expected = results[0]["expected"][step] + results[1]["expected"][step]
        for result in results:
            assert relative(result["released"][step], expected) <= 1e-6
            assert (result["steps"], result["epsilon"]) == (2, math.inf)


# ------------------------------------------------------------------------------------------- errors end all, and name it


class Broken:
    """A data set one item of which cannot be read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Tensor:
        if i % 2:  # those of process 1
            raise OSError("an odd item cannot be read")
        return torch.ones(50)


def work_errors(rank: int, size: int) -> dict[str, str]:
    """What each mistake, made in process 1 alone unless it says otherwise, raises in this process."""
    said = {}

    def attempt(name: str, **options: Any) -> None:
        torch.manual_seed(0)
        model = Wide()
        dataset: Any = [torch.ones(50)] * 10
        values = {"random": TestRandom(rank), **options}
        try:
            if rank and name == "settings":
                values["noise_multiplier"] = 0.5
            if rank and name == "model":
                model.append(nn.Linear(1, 1))
            engine = engine_of(model, 0, **values)
            optimizer = torch.optim.SGD(trained(model), lr=1.0)
            if rank and name == "optimizer":
                optimizer.param_groups[0]["params"].pop()
            engine.attach(optimizer)
            if rank and name == "dataset":
                dataset = dataset[1:]
            for batch in engine.batches(Broken() if name == "item" else dataset, expected_batch_size=9, steps=3):
                loss = model(batch).square().sum(1).mean()
                if rank and name == "leak":
                    loss = loss + model[0].weight.sum()
                loss.backward()
                if rank and name == "closure":
                    optimizer.step(lambda: 0.0)
                optimizer.step()
                if rank and name == "replica":
                    with torch.no_grad():
                        model[2].bias[0] += 1e-6
            said[name] = "nothing"
        except (SfumatoError, OSError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    for name in ("settings", "model", "optimizer", "dataset", "item", "leak", "closure", "replica"):
        attempt(name)
    attempt("random", random=TestRandom(0))
    attempt("nothing wrong")
    return said


def test_a_mistake_in_one_process_is_an_error_in_all_of_them():
    first, second = together(2, work_errors)
    for said in (first, second):
        assert said.pop("nothing wrong") == "nothing"
    for name, kind, words in [
        ("settings", "UsageError", "noise_multiplier = 0.0 in process 0, 0.5 in process 1"),
        ("model", "UsageError", "trained = "),
        ("optimizer", "UsageError", "does not train 4.bias"),
        ("dataset", "UsageError", "num_units = 10 in process 0, 9 in process 1"),
        ("item", "SfumatoError", "OSError: an odd item cannot be read"),
        ("leak", "UnsupportedLayer", "0.weight · got a gradient that was not clipped"),
        ("closure", "UsageError", "would compute gradients that are not protected"),
        ("replica", "UsageError", "2.bias · no longer the same in all 2 processes"),
        ("random", "UsageError", "the same bytes in two processes"),
    ]:
        assert first[name].startswith(kind) and words in first[name], first[name]
        if name != "item":
            assert second[name].startswith(kind)
    assert "process 1 of 2: " in first["leak"] and "process 1" not in second["leak"]
    assert second["item"] == "OSError: an odd item cannot be read"


def work_ledgers(rank: int, size: int, folder: Path) -> str:
    """Both open a ledger; then process 0's ledger fails in the middle."""
    model = Wide()
    with Ledger.open(folder / f"{rank}.db", run="r") as ledger:
        with pytest.raises(UsageError, match="only process 0 writes it"):
            engine_of(model, 0, ledger=ledger).attach(torch.optim.SGD(trained(model), lr=1.0))
    model = Wide()
    ledger = Ledger.open(folder / "2.db", run="r") if rank == 0 else None
    engine = engine_of(model, 0, ledger=ledger)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    said = ""
    try:
        for batch in engine.batches([torch.ones(50)] * 10, expected_batch_size=5, steps=3):
            model(batch).square().sum(1).mean().backward()
            optimizer.step()
            if ledger is not None:
                ledger.close()
    except SfumatoError as error:
        said = f"{type(error).__name__}: {error}"
    return said


def test_a_second_ledger_is_refused_and_a_ledger_that_fails_stops_all(tmp_path):
    first, second = together(2, work_ledgers, tmp_path)
    assert first.startswith("LedgerError: ledger = ") and "is closed" in first
    assert second.startswith("LedgerError: process 0: ledger = ") and "is closed" in second


def work_death(rank: int, size: int) -> str:
    model = Wide()
    engine = engine_of(model, 0, random=SecretRandom())
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1.0))
    try:
        for step, batch in enumerate(engine.batches([torch.ones(50)] * 10, expected_batch_size=5, steps=3)):
            if rank == 1 and step == 1:
                os.kill(os.getpid(), 9)
            model(batch).square().sum(1).mean().backward()
            optimizer.step()
    except OutsideError as error:
        return f"{error.code} {error}"
    return "nothing"


def test_when_a_process_is_killed_the_others_say_so():
    with pytest.raises(AssertionError, match="it ended without an answer") as caught:
        together(2, work_death)
    assert "process 0" not in str(caught.value)  # it answered


def work_replicas(rank: int, size: int) -> Tensor:
    """Different weights and buffers before ``attach``, as with a seed of their own; process 0's afterwards."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.register_buffer("scale", torch.randn(2))
    model[1].weight.requires_grad_(False)
    engine_of(model, 0).attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    return torch.cat([*(p.detach().flatten() for p in model.parameters()), model.scale])


def test_replicas_begin_as_process_0():
    results = together(4, work_replicas)
    torch.manual_seed(0)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0][:6], nn.Linear(3, 2).weight.detach().flatten())


# ------------------------------------------------------------------------------------------------- optimizers, policies


def work_zero(rank: int, size: int, sigma: float, bucket_view: bool) -> dict:
    """AdamW with its state shared out over the processes, beside ordinary AdamW on one's own."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model = Wide().double()
    engine = engine_of(model, 0, noise_multiplier=sigma, random=TestRandom(rank))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=0.01, parameters_as_bucket_view=bucket_view
    )
    assert engine.attach(optimizer) is optimizer
    plain = copy.deepcopy(model)
    ordinary = torch.optim.AdamW(plain.parameters(), lr=0.01)
    torch.manual_seed(5)
    x = torch.randn(20, 50, dtype=torch.float64)
    for batch in engine.batches(list(x), expected_batch_size=20, steps=3):
        (model(batch).square().sum(1) * 3).mean().backward()
        optimizer.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad
        ordinary.step()
        optimizer.zero_grad()
    shares = len(optimizer.optim.state)
    return {"zero": parameters(model), "plain": parameters(plain), "states": shares, "start": parameters(Wide())}


@pytest.mark.parametrize(("sigma", "bucket_view"), [(0.0, False), (1.0, True)])
def test_an_optimizer_whose_state_is_shared_out_takes_the_same_steps(sigma, bucket_view):
    results = together(2, work_zero, sigma, bucket_view)
    for result in results:
        assert torch.equal(result["zero"], results[0]["zero"])
        assert relative(result["zero"], result["plain"]) <= 1e-12
        assert 0 < result["states"] < 6  # each process holds the state of some parameters


def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused():
    (said, _) = together(2, work_overlap)
    assert "overlap_with_ddp" in said


def work_overlap(rank: int, size: int) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Wide()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, overlap_with_ddp=True, lr=0.1)
    with pytest.raises(UsageError) as caught:
        engine_of(model, 0).attach(optimizer)
    return str(caught.value)


def work_bfloat16(rank: int, size: int) -> dict:
    """FSDP2 that computes in bfloat16 and holds float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = shard_fully(mixed(torch.float32), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    engine = engine_of(model, 0)
    optimizer = engine.attach(torch.optim.AdamW(trained(model), lr=0.1))
    seen, kinds = [], set()
    add = Reduction.add
    Reduction.add = lambda self, p, value: (kinds.add(str(value.dtype)), add(self, p, value))[1]  # type: ignore
    for batch in engine.batches(mixed_table(torch.float32), expected_batch_size=UNITS, steps=1, records_per_unit=2):
        seen.append(batch)
        losses(model, batch).mean().backward()
        optimizer.step()
    kinds |= {str(p.grad.dtype) for p in trained(model)}
    return {"sum": gradient(model) * UNITS, "drawn": joined(seen), "kinds": kinds}


@pytest.mark.parametrize("size", [1, 2])
def test_computing_in_bfloat16_keeps_norms_and_sums_in_float32(size):
    """The sum is the float64 one but for bfloat16's own rounding of the forward and backward pass (2^-8)."""
    results = together(size, work_bfloat16)
    reference = sum(one_unit_at_a_time(mixed(), losses, r["drawn"], 1.0) for r in results)
    for result in results:
        assert relative(result["sum"], reference) < 0.05  # type: ignore[arg-type]
        assert result["kinds"] == {"torch.float32"}
    assert float(results[0]["sum"].norm()) <= UNITS * (1 + 1e-6)


def work_gpt2(rank: int, size: int) -> dict:
    """Tied head, Conv1D of transformers (a rule tries it out on whole weights), position ids; after a forward pass."""
    from torch.distributed.fsdp import fully_shard
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=12, vocab_size=30, n_positions=16, **none))
    data = list(torch.randint(0, 30, (7, 9), generator=torch.Generator().manual_seed(3)))
    if size > 1:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
        model(input_ids=torch.stack(data[:1]))  # leaves the root's parameters gathered
    engine = engine_of(model, 0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    gradients = []
    for words in engine.batches(data, expected_batch_size=7, steps=2):
        out = model(input_ids=words, use_cache=False).logits[:, :-1].transpose(1, 2)
        nn.functional.cross_entropy(out, words[:, 1:], reduction="none").mean(1).mean().backward()
        optimizer.step()
        gradients.append(gradient(model))
        optimizer.zero_grad()
    return {"gradients": gradients, "rules": [type(layer.rule).__name__ for layer in engine._tape.layers]}


def test_a_sharded_gpt2_is_that_of_one_process():
    """Float32, of a model that is not sharded in one process: 1e-5 by the order of summation."""
    one, two = together(1, work_gpt2), together(2, work_gpt2)
    assert two[0]["rules"] == one[0]["rules"] and "RowByRow" not in one[0]["rules"]
    for mine, expected in zip(two[0]["gradients"], one[0]["gradients"], strict=True):
        assert relative(mine, expected) <= 1e-5


def work_twin(rank: int, size: int, physical: int | None) -> Tensor:
    model = mixed()
    plan = NotPrivate(population=UNITS, expected_batch_size=float(UNITS), steps=2, unit="person", records_per_unit=3)
    engine = make_engine(model, plan, random=TestRandom(rank))
    assert isinstance(engine, NotPrivateEngine)
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=0.01))
    for batch in engine.batches(mixed_table(), max_physical_batch_size=physical):
        losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


@pytest.mark.parametrize("physical", [None, 5])
def test_the_twin_without_privacy_is_that_of_one_process(physical):
    one, two = together(1, work_twin, None), together(2, work_twin, physical)
    assert relative(two[0], one[0]) <= 1e-12
    assert torch.equal(two[0], two[1])


# ----------------------------------------------------------------------------- parts, public passes, bounds that adapt


def work_parts(rank: int, size: int, sigma: float) -> dict:
    """Two parts with an optimizer each, and a public pass that differs between processes."""
    model = mixed()
    body, head = ("words", "mix", "norm", "shift"), ("out", "again")
    engine = engine_of(
        model,
        0,
        max_grad_norm=None,
        noise_multiplier=sigma,
        parts={"body": Part(modules=body, max_grad_norm=2.0), "head": Part(modules=head, max_grad_norm=1.0)},
    )
    optimizers = {}
    for name, modules in (("body", body), ("head", head)):
        own = {p: None for module in modules for p in getattr(model, module).parameters()}
        optimizers[name] = engine.attach(torch.optim.SGD(list(own), lr=0.5), part=name)
    norms, words = [], torch.full((4, 4), rank)
    for batch in engine.batches(mixed_table(), expected_batch_size=UNITS, steps=2, records_per_unit=3):
        for name, optimizer in optimizers.items():
            with engine.training(name):
                losses(model, batch).mean().backward()
                optimizer.step()
            norms.append(
                torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).norm()
            )
            optimizer.zero_grad()
    before = parameters(model)
    for batch in engine.batches(mixed_table(), steps=1, records_per_unit=3):
        with engine.public():
            model(words).sum().backward()
        public = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trained(model)])
        assert not public.any()  # kept aside until the step
        for name, optimizer in optimizers.items():
            with engine.training(name):
                (losses(model, batch) * 0).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return {"parameters": parameters(model), "norms": norms, "public": before - parameters(model), "before": before}


def test_parts_with_optimizers_of_their_own_and_public_passes_are_those_of_one_process():
    one, two = together(1, work_parts, 0.0), together(2, work_parts, 0.0)
    assert relative(two[0]["before"], one[0]["before"]) <= 1e-12
    for step in range(4):
        assert float(two[0]["norms"][step]) == pytest.approx(float(one[0]["norms"][step]), rel=1e-9)
    assert torch.equal(two[0]["parameters"], two[1]["parameters"])
    model = mixed()  # the mean over processes of public gradients moved it, and nothing else
    with torch.no_grad():
        nn.utils.vector_to_parameters(two[0]["before"], trained(model))
    model.zero_grad()
    ((model(torch.zeros(4, 4).long()).sum() + model(torch.ones(4, 4).long()).sum()) / 2).backward()
    assert relative(two[0]["public"], gradient(model) * 0.5) <= 1e-9
    noisy = together(2, work_parts, 1.0)
    assert torch.equal(noisy[0]["parameters"], noisy[1]["parameters"])


def work_adaptive(rank: int, size: int, sigma: float) -> list[float]:
    model = mixed()
    shard_fully(model)
    engine = engine_of(model, 0, noise_multiplier=sigma, max_grad_norm=30.0, clipping="adaptive")
    optimizer = engine.attach(torch.optim.SGD(trained(model), lr=1e-4))
    bounds = []
    for batch in engine.batches(mixed_table(), expected_batch_size=UNITS, steps=3, records_per_unit=3):
        losses(model, batch).mean().backward()
        optimizer.step()
        bounds.append(engine.max_grad_norm)
    return bounds


def test_a_bound_that_adapts_is_the_same_in_all_processes():
    one, two = together(1, work_adaptive, 0.0), together(2, work_adaptive, 0.0)
    assert two[0] == two[1] == pytest.approx(one[0], rel=1e-9)
    assert len(set(two[0])) == 3
    noisy = together(2, work_adaptive, 1.0)
    assert noisy[0] == noisy[1] and noisy[0] != two[0]


def work_freezing(rank: int, size: int) -> str:
    engine = engine_of(shard_fully(mixed()), 0)
    with pytest.raises(UsageError) as caught, engine.frozen():
        pass
    return str(caught.value)


def test_a_sharded_model_is_not_frozen_for_a_moment():
    assert "fully_shard does not notice" in together(1, work_freezing)[0]


# ------------------------------------------------------------------------------------------------------------- refusals


def work_refusals(rank: int, size: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def said(model: nn.Module) -> str:
        with pytest.raises(UnsupportedLayer) as caught:
            engine_of(model, 0)
        assert not any("forward" in vars(module) for module in model.modules())
        return str(caught.value)

    hybrid = Wide()
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("copies", "shards")))
    tensor_parallel = Wide()
    parallelize_module(tensor_parallel, init_device_mesh("cpu", (size,)), {"0": ColwiseParallel()})
    inside = nn.Sequential(Around(nn.Linear(3, 3)))
    fully_shard(inside[0].inner)
    sharded = fully_shard(Wide())
    assert isinstance(sharded[0].weight, DTensor)
    with pytest.raises(UsageError, match="sharded, which the engine without privacy"):
        NotPrivateEngine(sharded)
    with pytest.raises(UsageError, match="before fully_shard"):
        engine_of(sharded, 0).check_independence(losses, mixed_table().batch([0, 1], records_per_unit=1))
    wrapped = nn.parallel.DistributedDataParallel(Wide())
    return {"hybrid": said(hybrid), "tensor": said(tensor_parallel), "inside": said(inside), "ddp": said(wrapped)}


def work_late(rank: int, size: int) -> str:
    """The engine is made as if torch.distributed were not there yet; one that says so itself trains alone."""
    there, dist.is_initialized = dist.is_initialized, lambda: False
    late = DifferentialPrivacyEngine(Wide(), max_grad_norm=1.0, noise_multiplier=1.0)
    dist.is_initialized = there
    alone = DifferentialPrivacyEngine(Wide(), max_grad_norm=1.0, noise_multiplier=1.0, processes=Processes())
    alone.attach(torch.optim.SGD(alone.model.parameters(), lr=1.0))
    with pytest.raises(UsageError) as caught:
        late.attach(torch.optim.SGD(late.model.parameters(), lr=1.0))
    return str(caught.value)


def test_an_engine_that_was_made_before_the_processes_met_is_refused():
    assert "initialised after the engine was made" in together(2, work_late)[0]


class Around(nn.Module):
    """Has a parameter of its own around another layer, so that it is treated as a whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_other_ways_of_splitting_a_model_are_refused_by_name():
    said = together(2, work_refusals)[0]
    assert "copies, shards" in said["hybrid"] and "0.weight" in said["hybrid"]
    assert "tensor parallel" in said["tensor"] and "0.weight" in said["tensor"]
    assert "fully_shard was applied inside it" in said["inside"]
    assert "DistributedDataParallel" in said["ddp"] and "leave it out" in said["ddp"]


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("deepspeed.runtime.engine", "DeepSpeedEngine"),
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
        ("torch.distributed.pipelining._IR", "Pipe"),
        ("torch.distributed.pipelining.stage", "_PipelineStageBase"),
    ],
)
def test_engines_of_others_are_refused_by_name_without_being_imported(package, name):
    other = type(name, (nn.Module,), {"__module__": package})
    inherited = type("Mine", (other,), {})()
    inherited.layer = nn.Linear(2, 2)
    assert wrapper_problem(nn.Linear(2, 2)) is None
    with pytest.raises(UnsupportedLayer, match="fully_shard"):
        DifferentialPrivacyEngine(inherited, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(UnsupportedLayer, match="fully_shard"):
        DifferentialPrivacyEngine(nn.Sequential(inherited), max_grad_norm=1.0, noise_multiplier=1.0)


def test_an_optimizer_that_is_not_torchs_is_refused():
    model = Wide()
    engine = DifferentialPrivacyEngine(model, max_grad_norm=1.0, noise_multiplier=1.0)
    other = type("DeepSpeedZeroOptimizer", (), {"param_groups": [{"params": list(model.parameters())}]})()
    with pytest.raises(UsageError, match="DeepSpeedZeroOptimizer"):
        engine.attach(other)  # type: ignore[arg-type]


def test_a_process_alone_meets_nobody():
    """Nothing of this needs torch.distributed to be initialised."""
    alone = Processes.current()
    assert (alone.rank, alone.size, alone.first, alone.together) == (0, 1, True, False)
    assert (alone.largest(3), alone.total([2.0]), alone.anyone(True), alone.decide(lambda: 5)) == (3, [2.0], True, 5)
    alone.require_same("x", a=1)
    alone.require_equal({"w": torch.ones(1)})
    with pytest.raises(ValueError, match="mine"), alone.agreeing():
        raise ValueError("mine")
