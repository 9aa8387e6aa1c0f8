"""Chance inside a loss: nobody's seed, another for every part, and torch's generator as the caller left it."""

import numpy as np
import pytest
import torch
from scipy import stats
from tests.oracles import table_of
from tests.processes import together
from torch import Tensor, nn

from sfumato.errors import PrivacyRefused
from sfumato.privacy.chance import LossChance
from sfumato.privacy.engine import DifferentialPrivacyEngine, NotPrivateEngine
from sfumato.privacy.norms import GradientNorms
from sfumato.randomness import SecretRandom, TestRandom
from sfumato.records import UnitTable

TABLE: UnitTable = table_of({"x": torch.arange(60.0, dtype=torch.float64)[:, None]}, [1] * 60)


def model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(1, 1).double()
    nn.init.zeros_(layer.weight)
    return layer


def engine_of(random, cls=DifferentialPrivacyEngine, **options):
    net = model()
    values = {"max_grad_norm": 1.0, "noise_multiplier": 1.0} if cls is DifferentialPrivacyEngine else {}
    engine = cls(net, random=random, **values, **options)
    return net, engine, engine.attach(torch.optim.SGD(net.parameters(), lr=0.1))


def drawn(
    random, *, table: UnitTable = TABLE, seed: int = 0, steps: int = 4, size: float = 30.0, **more
) -> list[Tensor]:
    """What the losses of a training draw: one number for every row, step by step."""
    torch.manual_seed(seed)
    net, engine, optimizer = engine_of(random, cls=more.pop("cls", DifferentialPrivacyEngine))
    seen = []
    for batch in engine.batches(table, expected_batch_size=size, steps=steps, **more):
        x = batch.tensors["x"]
        noise = torch.randn(len(x), dtype=torch.float64)
        seen.append(noise)
        (net(x)[:, 0] * noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    return seen


def by_hand(random, seed: int = 0, steps: int = 3) -> list[Tensor]:
    """The same in a hand-written loop, drawn before the first layer is called."""
    torch.manual_seed(seed)
    net, engine, optimizer = engine_of(random, expected_batch_size=20, sampling_rate=0.5)
    seen = []
    for _ in range(steps):
        noise = torch.randn(20, dtype=torch.float64)
        seen.append(noise)
        (net(noise[:, None])[:, 0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    return seen


def common(a: list[Tensor], b: list[Tensor]) -> int:
    """How many numbers occur in both. Of independent doubles: none, but with a chance below 1e-10."""
    return len(np.intersect1d(torch.cat(a).numpy(), torch.cat(b).numpy()))


@pytest.mark.parametrize("run", [drawn, by_hand])
def test_the_callers_seed_says_nothing_of_what_a_loss_draws(run):
    first, second = run(SecretRandom(), seed=5), run(SecretRandom(), seed=5)
    torch.manual_seed(5)
    assert common(first, second) == 0
    assert common(first, [torch.randn(2_000, dtype=torch.float64)]) == 0


@pytest.mark.parametrize("run", [drawn, by_hand])
def test_a_test_source_repeats_it_whatever_the_callers_seed(run):
    first, second = run(TestRandom(3), seed=1), run(TestRandom(3), seed=2)
    assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert common(first, run(TestRandom(4), seed=1)) == 0


@pytest.mark.parametrize("run", [drawn, by_hand])
def test_no_step_draws_what_an_earlier_one_drew(run):
    values = torch.cat(run(TestRandom(3), steps=12))
    assert len(values.unique()) == len(values) > 100


def test_the_draws_of_a_neighbouring_data_set_are_no_shifted_copy():
    """With one row less, under a known seed, all others would have their neighbour's draws: the twin without privacy shows it."""
    fewer = table_of({"x": torch.zeros(59, 1, dtype=torch.float64)}, [1] * 59)
    (first,) = drawn(SecretRandom(), size=60.0, cls=NotPrivateEngine, steps=1)
    (second,) = drawn(SecretRandom(), table=fewer, size=59.0, cls=NotPrivateEngine, steps=1)
    assert torch.equal(first[:40], second[:40])  # torch makes the last of them by another method
    assert common(drawn(SecretRandom(), size=60.0), drawn(SecretRandom(), table=fewer, size=59.0)) == 0


def test_what_a_loss_draws_is_another_stream_than_sampling_and_noise():
    """The engine's own stream goes on as if no loss drew anything."""
    quiet, loud = TestRandom(7), TestRandom(7)
    drawn(loud, size=1e-9)
    net, engine, optimizer = engine_of(quiet)
    for batch in engine.batches(TABLE, expected_batch_size=1e-9, steps=4):
        net(batch.tensors["x"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert quiet.bytes(32) == loud.bytes(32)


def test_the_words_of_a_fresh_state_are_those_of_the_source():
    """Oracle: the source's 624 words through the tempering of MT19937 (Matsumoto & Nishimura 1998), in their order."""
    chance = LossChance(model(), TestRandom(11))
    try:
        chance.renew()
        got = torch.randint(2**27, (623,), dtype=torch.int64)
    finally:
        chance.give_back()
    y = np.frombuffer(TestRandom(11).apart().bytes(4 * 624), dtype="<u4").astype(np.uint64)[:623]
    y = y ^ (y >> np.uint64(11))
    y = y ^ ((y << np.uint64(7)) & np.uint64(0x9D2C5680))
    y = y ^ ((y << np.uint64(15)) & np.uint64(0xEFC60000))
    y = y ^ (y >> np.uint64(18))
    assert got.tolist() == (y & np.uint64(0x7FFFFFF)).tolist()


def test_what_is_drawn_is_normal():
    """Kolmogorov-Smirnov over 400 states; false-alarm probability 1e-6, seed fixed."""
    chance = LossChance(model(), TestRandom(12))
    values = []
    try:
        for _ in range(400):
            chance.renew()
            values.append(torch.randn(50))
    finally:
        chance.give_back()
    assert stats.kstest(torch.cat(values).numpy(), "norm").pvalue > 1e-6


def test_torchs_generator_is_given_back_at_the_end_of_the_batches():
    torch.manual_seed(8)
    expected = torch.randn(3)
    for leave_after in (None, 2):
        torch.manual_seed(8)
        net, engine, optimizer = engine_of(SecretRandom())
        for i, batch in enumerate(engine.batches(TABLE, expected_batch_size=30.0, steps=4)):
            net(batch.tensors["x"] + torch.randn(1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == leave_after:
                break
        assert torch.equal(torch.randn(3), expected)


def test_torchs_generator_is_given_back_by_detach_and_by_an_error():
    torch.manual_seed(8)
    expected = torch.randn(3)
    torch.manual_seed(8)
    by_hand(SecretRandom(), seed=8)
    assert torch.equal(torch.randn(3), expected)
    torch.manual_seed(8)
    _, engine, _ = engine_of(SecretRandom())
    batches = engine.batches(TABLE, expected_batch_size=30.0, steps=4)
    next(batches)
    with pytest.raises(RuntimeError, match="in the loop"):
        batches.throw(RuntimeError("in the loop"))
    assert torch.equal(torch.randn(3), expected)


def test_an_iteration_that_was_left_gives_nothing_back_in_the_middle_of_the_next():
    torch.manual_seed(8)
    expected = torch.randn(3)
    torch.manual_seed(8)
    _, engine, _ = engine_of(SecretRandom())
    left = engine.batches(TABLE, expected_batch_size=30.0, steps=4)
    next(left)
    now = engine.batches(TABLE, expected_batch_size=30.0, steps=1)
    next(now)
    left.close()
    assert not torch.equal(torch.randn(3), expected)
    now.close()
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("release", [True, False])
def test_seeding_torch_between_a_draw_and_its_step_is_refused_in_what_may_be_released(release):
    net, engine, optimizer = engine_of(SecretRandom() if release else TestRandom(0))
    for batch in engine.batches(TABLE, expected_batch_size=30.0, steps=1):
        torch.manual_seed(0)
        net(batch.tensors["x"] + torch.randn(1)).mean().backward()
        if release:
            with pytest.raises(PrivacyRefused, match="torch was seeded while the engine was at work"):
                optimizer.step()
            break
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()


def test_seeding_torch_in_a_hand_written_loop_is_refused_and_a_fork_of_the_generator_is_not():
    net, engine, optimizer = engine_of(SecretRandom(), expected_batch_size=20, sampling_rate=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
    net(torch.randn(20, 1, dtype=torch.float64)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.manual_seed(0)
    net(torch.randn(20, 1, dtype=torch.float64)).mean().backward()
    with pytest.raises(PrivacyRefused, match="torch was seeded"):
        optimizer.step()
    engine.detach()


def test_the_norms_that_choose_a_bound_are_drawn_from_the_source_too():
    def norms(random, seed):
        net = model()
        torch.manual_seed(seed)

        def losses(batch):
            return net(batch.tensors["x"])[:, 0] * (1 + torch.rand(batch.num_rows, dtype=torch.float64))

        asked = GradientNorms(net, losses, TABLE, records_per_unit=1, random=random)
        before = torch.random.get_rng_state()
        values = asked.column(np.arange(60)).values
        assert torch.equal(before, torch.random.get_rng_state())
        return values

    assert np.array_equal(norms(TestRandom(1), 0), norms(TestRandom(1), 1))
    assert not np.array_equal(norms(SecretRandom(), 0), norms(SecretRandom(), 0))


def test_without_privacy_the_callers_seed_is_kept():
    """A twin is ordinary training, and can be repeated."""
    first = drawn(TestRandom(3), seed=1, cls=NotPrivateEngine)
    assert all(
        torch.equal(a, b) for a, b in zip(first, drawn(TestRandom(3), seed=1, cls=NotPrivateEngine), strict=True)
    )
    assert common(first, drawn(TestRandom(3), seed=2, cls=NotPrivateEngine)) == 0


def _of_rank(rank: int, size: int) -> list[list[float]]:
    return [values.tolist() for values in drawn(SecretRandom(), seed=5)]


def test_every_process_draws_its_own():
    first, second = ([torch.tensor(v, dtype=torch.float64) for v in values] for values in together(2, _of_rank))
    assert torch.cat(first).numel() > 20 and torch.cat(second).numel() > 20
    assert common(first, second) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generator_of_the_gpu_is_renewed_and_given_back():
    net = nn.Linear(1, 1).cuda()
    torch.cuda.manual_seed(3)
    expected = torch.randn(4, device="cuda")
    torch.cuda.manual_seed(3)
    chance = LossChance(net, SecretRandom())
    chance.renew()
    first = torch.randn(4, device="cuda")
    chance.renew()
    second = torch.randn(4, device="cuda")
    chance.give_back()
    assert torch.equal(torch.randn(4, device="cuda"), expected)
    assert not torch.equal(first, expected) and not torch.equal(first, second)


def test_numpy_and_python_too_draw_what_nobody_knows_and_are_given_back():
    """Some models mask by ``numpy.random`` in every step, which a trainer has seeded."""
    import random

    def seen(source):
        np.random.seed(42)
        random.seed(42)
        before = np.random.get_state()[1].copy(), random.getstate()
        chance = LossChance(model(), source)
        chance.renew()
        values = [*np.random.random(3), random.random(), *np.random.standard_normal(2)]
        chance.renew()
        values += [*np.random.random(3), random.random()]
        chance.give_back()
        assert np.array_equal(np.random.get_state()[1], before[0]) and random.getstate() == before[1]
        return values

    one, two = seen(SecretRandom()), seen(SecretRandom())
    assert not set(one) & set(two) and len(set(one)) == len(one)
    assert seen(TestRandom(3)) == seen(TestRandom(3))


def test_numpys_and_pythons_words_are_uniform():
    """Kolmogorov-Smirnov on 600 numbers of each; a false alarm in 1e-4 of seeds, and the seed is fixed."""
    import random

    chance = LossChance(model(), TestRandom(5))
    chance.renew()
    numbers = np.random.random(300), np.array([random.random() for _ in range(300)])
    chance.give_back()
    assert all(stats.kstest(values, "uniform").pvalue > 1e-4 for values in numbers)
    assert abs(np.corrcoef(*numbers)[0, 1]) < 0.25
