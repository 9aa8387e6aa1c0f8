"""Several backward passes in one step, several optimizers on one batch: each is what its context says, or is refused."""

import copy
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from tests.oracles import one_unit_at_a_time, relative, table_of, vector
from torch import Tensor, nn
from torch.nn.functional import softplus

from sfumato.errors import PrivacyRefused, UnsupportedLayer, UsageError
from sfumato.privacy.accounting import Event, epsilon
from sfumato.privacy.engine import DifferentialPrivacyEngine, NotPrivateEngine
from sfumato.privacy.gradients.groups import Part
from sfumato.privacy.gradients.reference import clipped_sum, per_unit_gradients
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.settings import PartSettings
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable


class Scorer(nn.Module):
    """An embedding, convolution, norm and linear layers: a rule of each kind sees two passes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.convolution = nn.Conv1d(1, 3, 2)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        h = self.convolution((x + self.words(words)).unsqueeze(1)).flatten(1)
        return self.head(self.norm(h))


def make() -> Scorer:
    torch.manual_seed(0)
    return Scorer().double()


def people(counts: list[int] | None = None) -> UnitTable:
    torch.manual_seed(2)
    counts = counts or [1, 2, 2, 3]
    rows = sum(counts)
    x = torch.randn(rows, 4, dtype=torch.float64)
    return table_of({"x": x, "words": torch.randint(0, 5, (rows,))}, counts)


def first(model: nn.Module, batch: Batch) -> Tensor:
    return batch.per_unit(model(batch.tensors["x"], batch.tensors["words"]).square().sum(1))


def second(model: nn.Module, batch: Batch) -> Tensor:
    """Of the same rows, in another order of features, and of another size."""
    return batch.per_unit(3 * model(batch.tensors["x"].flip(1), batch.tensors["words"]).cos().sum(1))


def private(model: nn.Module, **options) -> tuple[DifferentialPrivacyEngine, torch.optim.Optimizer]:
    values = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "random": TestRandom(0), **options}
    engine = DifferentialPrivacyEngine(model, **values)
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))


def drawn(engine, table: UnitTable, steps: int = 1, **options):
    return engine.batches(table, expected_batch_size=table.num_units, steps=steps, records_per_unit=9, **options)


# ---------------------------------------------------------------------------------------------- of the same units


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("physical", [None, 2])
def test_several_passes_over_the_same_units_add_up_before_the_clipping(physical, retain):
    """Also where both losses hang on one forward pass (retain_graph), and person by person."""
    model, plain = make(), make()
    engine, optimizer = private(model, max_grad_norm=5.0)
    before, parts = vector(model), []
    for batch in drawn(engine, people(), max_physical_batch_size=physical):
        with engine.same_units():
            if retain:
                values = first(model, batch)
                values.mean().backward(retain_graph=True)
                (values**2).mean().backward()
            else:
                first(model, batch).mean().backward()
                second(model, batch).mean().backward()
        optimizer.step()
        parts.append(batch)

    def both(model: nn.Module, batch: Batch) -> Tensor:
        a = first(model, batch)
        return a + a**2 if retain else a + second(model, batch)

    expected = sum((one_unit_at_a_time(plain, both, part, 5.0) for part in parts), torch.zeros(()))
    assert relative((before - vector(model)) * 4, expected) <= 1e-6
    apart = sum(
        (one_unit_at_a_time(plain, loss, part, 5.0) for part in parts for loss in (first, second)), torch.zeros(())
    )
    assert relative(expected, apart) > 1e-3  # clipping each loss by itself would be something else


def test_what_is_not_declared_is_refused():
    model = make()
    engine, _ = private(model)

    def after_the_context() -> None:
        for batch in drawn(engine, people()):
            with engine.same_units():
                first(model, batch).mean().backward()
            second(model, batch).mean().backward()

    def before_the_context() -> None:
        for batch in drawn(engine, people()):
            first(model, batch).mean().backward()
            with engine.same_units():
                second(model, batch).mean().backward()

    with pytest.raises(UsageError, match=r"called twice.*same_units\(\).*public\(\).*frozen\(\).*accumulate\(\)"):
        after_the_context()
    engine._tape.clear()
    with pytest.raises(UsageError, match=r"same_units\(\) · came after a backward\(\)"):
        before_the_context()


def test_passes_of_other_rows_are_not_of_the_same_units():
    model = make()
    engine, optimizer = private(model, expected_batch_size=4, sampling_rate=0.5)
    x, words = torch.randn(4, 4, dtype=torch.float64), torch.randint(0, 5, (4,))
    with engine.same_units():
        model(x, words).sum().backward()
        model(x[:3], words[:3]).sum().backward()
    with pytest.raises(UnsupportedLayer, match=r"words \(Embedding\).* was called with different numbers of rows"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------- public data


@pytest.mark.parametrize("order", ["before", "after", "outside the loop"])
def test_a_public_gradient_is_added_as_it_is_after_the_noise(order):
    """Neither clipped nor noised nor divided, once; its batch has another size, and it may come before or after."""
    model, plain = make(), make()
    engine, optimizer = private(model, max_grad_norm=1e-3)
    x, words = torch.randn(11, 4, dtype=torch.float64), torch.randint(0, 5, (11,))
    before = vector(model)

    def public() -> None:
        with engine.public():
            model(x, words).square().sum().backward()

    if order == "outside the loop":
        public()
    for step, batch in enumerate(drawn(engine, people(), steps=2)):
        here = copy.deepcopy(model)
        if order == "before" and step == 0:
            public()
        first(model, batch).mean().backward()
        if order == "after" and step == 0:
            public()
        optimizer.step()
        moved = before - vector(model)
        before = vector(model)
        expected = one_unit_at_a_time(here, first, batch, 1e-3) / 4
        if step == 0:
            plain(x, words).square().sum().backward()
            added = torch.cat([p.grad.flatten() for p in plain.parameters()])  # type: ignore[union-attr]
            assert float(added.norm()) > 1.0
            expected = expected + added
        assert relative(moved, expected) <= 1e-9


def test_a_public_pass_hides_no_leak_and_no_private_pass():
    class Leaky(Scorer):
        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            return super().forward(x, words) + self.head.bias.sum()

    torch.manual_seed(0)
    model = Leaky().double()
    engine, optimizer = private(model)
    x, words = torch.randn(3, 4, dtype=torch.float64), torch.randint(0, 5, (3,))

    def leak() -> None:
        for batch in drawn(engine, people()):
            first(model, batch).mean().backward()
            with engine.public():
                Scorer.forward(model, x, words).sum().backward()
            optimizer.step()

    with pytest.raises(UnsupportedLayer, match=r"head\.bias · got a gradient that was not clipped"):
        leak()
    engine._passes.public.clear()

    def forward_outside() -> None:
        for batch in drawn(engine, people()):
            values = first(model, batch)
            with engine.public():
                values.mean().backward()

    with pytest.raises(UsageError, match=r"backward\(\) · reached head \(Linear\), whose forward pass was outside"):
        forward_outside()
    assert not engine._passes.public

    def backward_outside() -> None:
        for batch in drawn(engine, people()):
            with engine.public():
                values = Scorer.forward(model, batch.tensors["x"], batch.tensors["words"]).sum(1)
            batch.per_unit(values).mean().backward()
            optimizer.step()

    with pytest.raises(UnsupportedLayer, match="got a gradient that was not clipped"):
        backward_outside()


@pytest.mark.parametrize("context", ["public", "frozen"])
def test_a_step_inside_a_context_without_records_is_refused(context):
    model = make()
    engine, optimizer = private(model)

    def loop() -> None:
        for batch in drawn(engine, people()):
            first(model, batch).mean().backward()
            with getattr(engine, context)():
                optimizer.step()

    with pytest.raises(UsageError, match=rf"step\(\) · was called inside engine\.{context}\(\)"):
        loop()
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_go_through_a_frozen_model_and_stay_in_what_comes_before_it():
    model, before_it = make(), nn.Linear(3, 4).double()
    engine, optimizer = private(model)
    words = torch.randint(0, 5, (6,))
    for batch in drawn(engine, people()):
        with engine.frozen():
            model(before_it(torch.ones(6, 3, dtype=torch.float64)), words).sum().backward()
        assert before_it.weight.grad is not None and all(p.grad is None for p in model.parameters())
        here, before = copy.deepcopy(model), vector(model)
        first(model, batch).mean().backward()
        optimizer.step()
        assert relative((before - vector(model)) * 4, one_unit_at_a_time(here, first, batch, 1.0)) <= 1e-6


# ------------------------------------------------------------------------------------------ unequal micro-batches


def test_a_hand_written_batch_in_unequal_micro_batches_is_one_step_and_one_event():
    """5, 0, 1 and 7 rows; nothing moves before the last; a second batch is charged anew."""
    model = make()
    engine, optimizer = private(
        model, max_grad_norm=2.0, noise_multiplier=0.0, expected_batch_size=10, sampling_rate=0.1
    )
    table = people([1] * 13)
    for batch_number in range(2):
        plain, before = copy.deepcopy(model), vector(model)
        sizes = [5, 0, 1, 7]
        starts = [0, 5, 5, 6]
        expected = torch.zeros_like(before)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            batch = table.batch(range(start, start + size), records_per_unit=1)
            with engine.accumulate(more=i + 1 < len(sizes)):
                values = first(model, batch)
                (values.mean() if size else values.sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
            expected += one_unit_at_a_time(plain, first, batch, 2.0)
            assert torch.equal(before, vector(model)) == (i + 1 < len(sizes))
        assert relative((before - vector(model)) * 10, expected) <= 1e-6
        assert engine.state_dict()["events"] == [
            Event(sampling_rate=0.1, noise_multiplier=0.0, count=batch_number + 1).to_dict()
        ]


def test_accumulating_is_refused_where_the_engine_cuts_the_batches_and_where_nothing_is_known():
    model = make()
    engine, _ = private(model)
    next(drawn(engine, people()))
    with pytest.raises(UsageError, match=r"accumulate\(\) · engine\.batches cuts its batches itself"):
        engine.accumulate()
    with pytest.raises(UsageError, match=r"accumulate\(\) · without privacy"):
        NotPrivateEngine(make()).accumulate()


def test_a_step_that_failed_is_not_the_beginning_of_a_batch():
    """It was charged; the next one is charged again."""
    model = make()
    engine, optimizer = private(model, expected_batch_size=4, sampling_rate=0.1)
    x, words = torch.randn(4, 4, dtype=torch.float64), torch.randint(0, 5, (4,))
    (model(x, words).sum() + model(x[:3], words[:3]).sum()).backward()
    with pytest.raises(UnsupportedLayer, match=r"words \(Embedding\).* was called with different numbers of rows"):
        optimizer.step()
    model(x, words).sum().backward()
    optimizer.step()
    assert engine.state_dict()["steps_started"] == 2


# ----------------------------------------------------------------------------------------- generators, discriminators


class Discriminator(nn.Module):
    def __init__(self, conditions: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 + conditions, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze(1)


def generator(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 2))


def ring(units: int = 60) -> UnitTable:
    torch.manual_seed(5)
    angle = torch.rand(units, dtype=torch.float64) * 2 * math.pi
    x = torch.stack([angle.cos(), angle.sin()], 1) + 3
    return table_of({"x": x, "condition": torch.randn(units, 1, dtype=torch.float64)}, [1] * units)


def test_a_gan_whose_generator_sees_no_private_data():
    """Only the discriminator is in the engine. Its loss of real data is private, its loss of generated data public; the
    generator learns through it while it is frozen. Every step of both is the one that is written out."""
    torch.manual_seed(0)
    d, g = Discriminator().double(), generator(3).double()
    engine, d_optimizer = private(d, max_grad_norm=0.5)
    g_optimizer = torch.optim.SGD(g.parameters(), lr=0.5)
    for batch in engine.batches(ring(), expected_batch_size=20, steps=4):
        noise = torch.randn(30, 3, dtype=torch.float64)
        plain, before = copy.deepcopy(d), vector(d)
        softplus(-d(batch.tensors["x"])).mean().backward()
        with engine.public():
            softplus(d(g(noise).detach())).mean().backward()
        d_optimizer.step()
        real = one_unit_at_a_time(plain, lambda d, b: softplus(-d(b.tensors["x"])), batch, 0.5) / 20
        softplus(plain(g(noise).detach())).mean().backward()
        fake = torch.cat([p.grad.flatten() for p in plain.parameters()])  # type: ignore[union-attr]
        assert relative(before - vector(d), real + fake) <= 1e-6

        twin, g_before, d_before = copy.deepcopy(g), vector(g), vector(d)
        g_optimizer.zero_grad()
        with engine.frozen():
            softplus(-d(g(noise))).mean().backward()
        g_optimizer.step()
        softplus(-copy.deepcopy(d)(twin(noise))).mean().backward()
        expected = torch.cat([p.grad.flatten() for p in twin.parameters()])  # type: ignore[union-attr]
        assert relative(g_before - vector(g), 0.5 * expected) <= 1e-9
        assert torch.equal(vector(d), d_before)
    assert engine.stopped == "steps"
    assert engine.state_dict()["steps_started"] == 4


PARTS = {
    "discriminator": Part(modules=("discriminator",), max_grad_norm=0.5, noise_multiplier=4.0),
    "generator": Part(modules=("generator",), max_grad_norm=0.2, noise_multiplier=3.0),
}
JOINT = (4.0**-2 + 3.0**-2) ** -0.5


def conditional() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"discriminator": Discriminator(1), "generator": generator(4)}).double()


def fake(model: nn.Module, batch: Batch) -> Tensor:
    """From the unit's own condition, which is private, and noise that is fixed here."""
    condition = batch.tensors["condition"]
    z = torch.cat([torch.ones(len(condition), 3, dtype=torch.float64), condition], 1)
    return torch.cat([model["generator"](z), condition], 1)  # type: ignore[index]


def d_losses(model: nn.Module, batch: Batch) -> Tensor:
    real = torch.cat([batch.tensors["x"], batch.tensors["condition"]], 1)
    score = model["discriminator"]  # type: ignore[index]
    return softplus(-score(real)) + softplus(score(fake(model, batch)))


def g_losses(model: nn.Module, batch: Batch) -> Tensor:
    return softplus(-model["discriminator"](fake(model, batch)))  # type: ignore[index]


def of(model: nn.Module, part: str) -> Tensor:
    return vector(model[part])  # type: ignore[index]


def quiet() -> dict[str, Part]:
    return {
        name: Part(modules=part.modules, max_grad_norm=part.max_grad_norm, noise_multiplier=0.0)
        for name, part in PARTS.items()
    }


def two_optimizers(model: nn.Module, **options):
    engine = DifferentialPrivacyEngine(model, **{"parts": PARTS, "random": TestRandom(1), **options})
    optimizers = {
        name: engine.attach(torch.optim.SGD(model[name].parameters(), lr=1.0), part=name)  # type: ignore[index]
        for name in PARTS
    }
    return engine, optimizers


def test_a_gan_whose_generator_sees_private_data():
    """Both are parts of one mechanism; each step's sum is that of one unit after another, for that part's parameters."""
    model = conditional()
    engine, optimizers = two_optimizers(model, parts=quiet())
    for batch in engine.batches(ring(), expected_batch_size=20, steps=3):
        for name, losses, bound in (("discriminator", d_losses, 0.5), ("generator", g_losses, 0.2)):
            plain, before, others = copy.deepcopy(model), of(model, name), vector(model)
            for other in PARTS:
                plain[other].requires_grad_(other == name)
            with engine.training(name):
                losses(model, batch).mean().backward()
                optimizers[name].step()
            gradients = per_unit_gradients(plain, lambda b: losses(plain, b), batch)  # noqa: B023
            norms = gradients.norm(dim=1)
            assert (norms > bound).any()
            assert relative(before - of(model, name), clipped_sum(gradients, bound) / 20) <= 1e-6
            assert int((others != vector(model)).sum()) == len(before)  # the other part did not move
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    assert all(p.requires_grad for p in model.parameters())


def test_one_joint_event_is_charged_for_every_batch_whoever_is_stepped(tmp_path: Path):
    """In the ledger, reserved before and committed after the last step, or with the next batch."""
    plan = DpSgd(
        population=60, expected_batch_size=20.0, steps=6, noise_multiplier=JOINT, delta=1e-3,
        max_grad_norm=math.hypot(0.5, 0.2),
        parts=tuple(
            PartSettings(name=n, modules=tuple(p.modules), max_grad_norm=p.max_grad_norm,
                         share=(JOINT / (p.noise_multiplier or 1)) ** 2)
            for n, p in PARTS.items()
        ),
    )  # fmt: skip
    committed = []
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        engine = DifferentialPrivacyEngine.from_plan(conditional(), plan, ledger=ledger, random=TestRandom(0))
        model = engine.model
        optimizers = {
            name: engine.attach(torch.optim.Adam(model[name].parameters(), lr=0.01), part=name)  # type: ignore[index]
            for name in PARTS
        }
        commit = ledger.commit
        ledger.commit = lambda sequence: committed.append(sequence) or commit(sequence)  # type: ignore[method-assign]
        for number, batch in enumerate(engine.batches(ring())):
            assert ledger.spent() == [plan.event(number + 1)]
            with engine.training("discriminator"):
                d_losses(model, batch).mean().backward()
                optimizers["discriminator"].step()
            if number % 2:
                with engine.training("generator"):
                    g_losses(model, batch).mean().backward()
                    optimizers["generator"].step()
            assert len(committed) == (number + 1 if number % 2 else number)
        assert len(committed) == len(set(committed)) == 6
        assert engine.get_epsilon(plan.delta) == plan.epsilon()
    expected = epsilon([Event(sampling_rate=1 / 3, noise_multiplier=JOINT, count=6)], 1e-3)
    assert plan.epsilon() == expected


def test_the_noise_of_each_optimizer_is_that_of_its_part():
    """Chi-square over 40 empty batches; false alarm 1e-6 each, seed fixed."""
    model = conditional()
    engine, optimizers = two_optimizers(model)
    noise: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    for batch in engine.batches(ring(), expected_batch_size=1e-9, steps=40):
        for name, losses in (("discriminator", d_losses), ("generator", g_losses)):
            before = of(model, name)
            with engine.training(name):
                losses(model, batch).sum().backward()
                optimizers[name].step()
            noise[name].append((before - of(model, name)) * 1e-9)
    for name, part in PARTS.items():
        values = torch.cat(noise[name]) / (part.max_grad_norm * (part.noise_multiplier or 0))
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(values))
        assert low < float(values.square().sum()) < high


def test_a_part_is_stepped_once_for_a_batch():
    model = conditional()
    engine, optimizers = two_optimizers(model)

    def loop() -> None:
        for batch in engine.batches(ring(), expected_batch_size=20, steps=1):
            for _ in range(2):
                with engine.training("discriminator"):
                    d_losses(model, batch).mean().backward()
                    optimizers["discriminator"].step()

    with pytest.raises(PrivacyRefused, match="every batch is for one step"):
        loop()


def test_a_backward_pass_that_no_part_owns_is_refused():
    model = conditional()
    engine, optimizers = two_optimizers(model)

    def without_context() -> None:
        for batch in engine.batches(ring(), expected_batch_size=20, steps=1):
            d_losses(model, batch).mean().backward()
            optimizers["discriminator"].step()

    with pytest.raises(UsageError, match=r"is for part discriminator, but generator\.0 .*training\('discriminator'\)"):
        without_context()

    def two_parts_at_once() -> None:
        for batch in engine.batches(ring(), expected_batch_size=20, steps=1):
            with engine.training("discriminator"):
                d_losses(model, batch).mean().backward()
            with engine.training("generator"):
                g_losses(model, batch).mean().backward()

    with pytest.raises(UsageError, match=r"training\('generator'\) · came before the step of an earlier backward"):
        two_parts_at_once()
    with pytest.raises(UsageError, match=r"part = 'critic' · is not a part.*'discriminator', 'generator'"):
        engine.training("critic")
    engine._tape.clear()
    with engine.training("generator"), pytest.raises(UsageError, match=r"inside engine\.training"):
        with engine.training("discriminator"):
            pass


def test_optimizers_and_parts_that_do_not_fit_are_refused():
    model = conditional()
    engine = DifferentialPrivacyEngine(model, parts=PARTS, random=TestRandom(0))
    d = torch.optim.SGD(model["discriminator"].parameters(), lr=1.0)
    with pytest.raises(UsageError, match="not the part's, unprotected"):
        engine.attach(torch.optim.SGD(model.parameters(), lr=1.0), part="discriminator")
    with pytest.raises(UsageError, match=r"does not train generator\.0\.weight"):
        engine.attach(torch.optim.SGD(model["generator"][2].parameters(), lr=1.0), part="generator")
    engine.attach(d, part="discriminator")
    for part in ("", "discriminator"):
        with pytest.raises(UsageError, match="the engine has SGD already"):
            engine.attach(torch.optim.SGD(model.parameters(), lr=1.0), part=part)
    with pytest.raises(UsageError, match=r"no optimizer trains generator\.0\.weight"):
        engine.batches(ring(), expected_batch_size=20, steps=1)
    g = engine.attach(torch.optim.SGD(model["generator"].parameters(), lr=1.0), part="generator")
    with pytest.raises(UsageError, match=r"max_physical_batch_size = 5 · must be left out with 2 optimizers"):
        engine.batches(ring(), expected_batch_size=20, steps=1, max_physical_batch_size=5)
    engine._expected_batch_size, engine._sampling_rate = 20.0, 0.5
    with engine.training("generator"):
        g_losses(model, ring().batch(range(20), records_per_unit=1)).mean().backward()
        with pytest.raises(UsageError, match="does not say which steps are of one batch"):
            g.step()


def test_the_twin_without_privacy_runs_the_same_loop():
    """Ordinary gradients of the mean loss over the expected size, part by part, and the public one as it is."""
    model = conditional()
    engine = NotPrivateEngine(model, random=TestRandom(1))
    optimizers = {
        name: engine.attach(torch.optim.SGD(model[name].parameters(), lr=1.0), part=name)  # type: ignore[index]
        for name in PARTS
    }
    for batch in engine.batches(ring(), expected_batch_size=20, steps=2):
        for name, losses in (("discriminator", d_losses), ("generator", g_losses)):
            plain, before = copy.deepcopy(model), of(model, name)
            with engine.training(name), engine.same_units():
                losses(model, batch).mean().backward()
                with engine.public():
                    model[name].parameters().__next__().sum().backward()  # type: ignore[index]
                assert next(model[name].parameters()).grad is not None  # type: ignore[index]
            optimizers[name].step()
            optimizers[name].zero_grad()
            (losses(plain, batch).sum() / 20).backward()
            next(plain[name].parameters()).grad += 1  # type: ignore[index]
            expected = torch.cat([p.grad.flatten() for p in plain[name].parameters()])  # type: ignore[index]
            assert relative(before - of(model, name), expected) <= 1e-9
    assert engine.get_epsilon(1e-5) == math.inf
