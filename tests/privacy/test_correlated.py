"""Banded correlated noise against dense computations, exact couplings, and the event that is claimed for it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular
from scipy.optimize import check_grad, minimize_scalar
from torch import Tensor

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import correlated
from sfumato.privacy.correlated import Strategy, Stream, check_memory, error, general, momentum_sums, toeplitz, widened
from sfumato.privacy.discrete import source_named
from sfumato.privacy.noise import GRID_BITS, GaussianSource
from sfumato.privacy.sampling import CyclicPoisson
from sfumato.randomness import Random, SecretRandom, TestRandom

GAUSSIAN = GaussianSource()


def dense_error(strategy: Strategy, workload: np.ndarray) -> float:
    return float(np.linalg.norm(workload @ np.linalg.inv(strategy.dense()))) / math.sqrt(strategy.steps)


def lower(first: np.ndarray) -> np.ndarray:
    steps = len(first)
    return np.array([[first[t - s] if s <= t else 0.0 for s in range(steps)] for t in range(steps)])


# ------------------------------------------------------------------------------------------------ the strategy


@pytest.mark.parametrize("make", [toeplitz, general])
@pytest.mark.parametrize(
    ("bands", "steps", "momentum"), [(1, 9, 0.0), (2, 16, 0.0), (5, 40, 0.0), (5, 40, 0.9), (12, 12, 0.5)]
)
def test_error_and_sensitivity_are_those_of_the_dense_matrices(make, bands, steps, momentum):
    strategy = make(bands, steps, momentum)
    matrix = strategy.dense()
    assert (np.triu(matrix, 1) == 0).all() and (np.tril(matrix, -bands) == 0).all()
    norms = np.linalg.norm(matrix, axis=0)
    assert strategy.sensitivity == pytest.approx(norms.max(), rel=1e-14) and norms.max() <= 1 + 1e-12
    if make is general:
        np.testing.assert_allclose(norms, 1.0, rtol=1e-12)
    overlap = matrix.T @ matrix  # steps b apart move different rows: a unit's windows do not touch
    assert all(overlap[s, t] == 0 for s in range(steps) for t in range(s + bands, steps))
    first = momentum_sums(steps, momentum)
    assert error(strategy, first) == pytest.approx(dense_error(strategy, lower(first)), rel=1e-10)


def test_one_band_is_independent_noise():
    """Sums of t independent numbers: the mean of 1 .. T is (T + 1) / 2."""
    for make in (toeplitz, general):
        np.testing.assert_allclose(make(1, 63).dense(), np.eye(63), atol=1e-14)
        assert error(make(1, 63)) == pytest.approx(math.sqrt(32.0))


def test_more_bands_and_fewer_constraints_make_less_error():
    errors = [error(toeplitz(bands, 64)) for bands in (1, 2, 4, 8, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.45 * errors[0]
    for bands in (2, 8):
        assert error(general(bands, 64)) < error(toeplitz(bands, 64))
    root = np.cumprod(np.concatenate([[1.0], 1.0 - 0.5 / np.arange(1, 64)]))  # the square root of A, not cut
    square_root = Strategy(rows=(root / np.linalg.norm(root) / (1 + 1e-15))[None], steps=64)
    assert error(toeplitz(64, 64)) <= error(square_root)


@pytest.mark.parametrize("steps", [2, 12, 1024])
def test_two_bands_are_the_optimum_of_a_search_over_dense_matrices(steps):
    ones = lower(np.ones(steps))

    def value(c: float) -> float:
        matrix = (np.eye(steps) + c * np.eye(steps, k=-1)) / math.hypot(1, c)
        return float(np.linalg.norm(solve_triangular(matrix.T, ones.T)))  # of the transpose

    found = minimize_scalar(value, bounds=(0, 1), method="bounded", options={"xatol": 1e-10})
    strategy = toeplitz(2, steps)
    assert strategy.rows[0, 1] / strategy.rows[0, 0] == pytest.approx(found.x, abs=1e-4)
    assert error(strategy) * math.sqrt(steps) == pytest.approx(found.fun, rel=1e-9)


def test_the_slope_of_the_error_is_its_derivative():
    first = momentum_sums(30, 0.7)
    point = np.array([0.5, 0.3, 0.2])

    def value(rest: np.ndarray) -> float:
        return correlated._toeplitz_error(np.concatenate([[1.0], rest]), first)[0]

    def slope(rest: np.ndarray) -> np.ndarray:
        return correlated._toeplitz_error(np.concatenate([[1.0], rest]), first)[1]

    assert check_grad(value, slope, point) < 1e-4 * np.abs(slope(point)).max()


def test_the_workload_of_momentum_is_what_the_optimizer_of_torch_does():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.8)
    gradients = torch.linspace(-1, 2, 7, dtype=torch.float64)
    weights = []
    for gradient in gradients:
        weight.grad = gradient.reshape(1)
        optimizer.step()
        weights.append(-float(weight.detach()))
    assert weights == pytest.approx((lower(momentum_sums(7, 0.8)) @ gradients.numpy()).tolist())


@pytest.mark.parametrize(
    ("rows", "steps", "word"),
    [
        (np.ones((1, 2)), 4, "longest column"),
        (np.array([[0.0, 0.5]]), 4, "positive on the diagonal"),
        (np.array([[math.nan]]), 4, "finite"),
        (np.ones((3, 1)), 4, "rows ="),
        (np.full((1, 5), 0.1), 4, "rows ="),
        (np.array([[0.1, 0.9]]), 20, r"C\^-1"),
        (np.concatenate([[0.001], np.full(199, 0.05)])[None], 400, "float64"),
    ],
)
def test_a_matrix_that_the_proof_does_not_cover_is_refused(rows, steps, word):
    with pytest.raises(UsageError, match=word):
        Strategy(rows=rows, steps=steps)


def test_impossible_numbers_of_bands_are_refused():
    for make in (toeplitz, general):
        with pytest.raises(UsageError, match="bands = 5"):
            make(5, 4)
        with pytest.raises(UsageError, match="bands = 0"):
            make(0, 4)
    with pytest.raises(UsageError, match="steps = 2000"):
        general(2, 2000)
    with pytest.raises(UsageError, match="step = 4"):
        toeplitz(2, 4).row(4)


# ------------------------------------------------------------------------------------------------ the stream


class Given:
    """A source whose independent noise is given: row t at step t."""

    name = "gaussian"

    def __init__(self, noise: Tensor) -> None:
        self.noise = list(noise)

    def spacing(self, std: float) -> float:
        return GAUSSIAN.spacing(std)

    def widened(self, std: float, bound: float, dimension: int) -> float:
        return GAUSSIAN.widened(std, bound, dimension)

    def draw(self, count: int, std: float, random: Random, plus: Tensor | None = None) -> Tensor:
        raise AssertionError("a stream takes whole numbers")

    def whole(self, count: int, std: float, step: float, random: Random) -> Tensor:
        return self.noise.pop(0).clone()

    def rounded(self, values: Tensor, step: float) -> Tensor:
        return GAUSSIAN.rounded(values, step)


STRATEGIES = [toeplitz(1, 12), toeplitz(4, 12), general(3, 12), toeplitz(12, 12)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{len(s.rows)}x{s.bands}")
@pytest.mark.parametrize("name", ["gaussian", "discrete"])
def test_the_stream_is_the_inverse_of_c_on_independent_noise(strategy, name):
    source, std, count = source_named(name), 0.37, 50
    drawn = Stream(strategy, count, std, source)
    random = TestRandom(3)
    z = torch.stack([drawn.next(random) for _ in range(12)])
    again = TestRandom(3)
    grid = source.spacing(std / float(strategy.rows[:, 0].max()))
    w = torch.stack([source.whole(count, std / float(strategy.row(t)[0]), grid, again) for t in range(12)]) * grid
    matrix = strategy.dense()
    unit_diagonal = matrix / np.diag(matrix)[:, None]
    expected = np.linalg.solve(unit_diagonal, w.numpy())
    np.testing.assert_allclose(z.numpy(), expected, atol=40 * grid, rtol=0)
    assert ((z / grid) == (z / grid).round()).all() or name == "discrete"


@pytest.mark.parametrize("name", ["gaussian", "discrete"])
def test_the_noise_has_the_covariance_of_the_factorisation(name):
    """Entries of the sample covariance of 100,000 coordinates against std^2 (C' C)^-1; false-alarm probability 1e-6 for each
    of the 10."""
    strategy, count, std = toeplitz(3, 4), 100_000, 2.0
    drawn, random = Stream(strategy, count, std, source_named(name)), TestRandom(7)
    z = np.stack([drawn.next(random).numpy() for _ in range(4)])
    inverse = np.linalg.inv(strategy.dense())
    expected = std**2 * inverse @ inverse.T
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / count)
    assert (np.abs(z @ z.T / count - expected) < 4.9 * spread).all()
    sums = np.cumsum(z, axis=0)  # what training sees of it: less than of independent noise
    assert (sums**2).mean() == pytest.approx((std * error(strategy)) ** 2, rel=0.05)
    assert (sums[-1] ** 2).mean() < 0.75 * 4 * std**2


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{len(s.rows)}x{s.bands}")
def test_with_the_noise_that_the_proof_names_a_neighbour_releases_the_same_bits(strategy):
    """The heart of the proof, through the real stream: for every unit there is independent noise that hides it exactly, and
    it is as near as the proof says. delta = the unit's rounded contribution at step s."""
    count, sigma, bound, steps = 400, 0.8, 1.0, 12
    std = widened(sigma * bound, bound, count, strategy)
    grid = GAUSSIAN.spacing(std / float(strategy.rows[:, 0].max()))
    numbers = np.random.default_rng(2)
    others = torch.from_numpy(numbers.standard_normal((steps, count)))
    random = TestRandom(1)
    noise = torch.stack([GAUSSIAN.whole(count, std / float(strategy.row(t)[0]), grid, random) for t in range(steps)])

    def released(sums: Tensor, w: Tensor) -> Tensor:
        stream = Stream(strategy, count, std, Given(w))
        return torch.stack([stream.next(random, plus=sums[t]) for t in range(steps)])

    without = released(others, noise)
    for s in (0, 5, 11):
        unit = torch.from_numpy(numbers.standard_normal(count))
        sums = others.clone()
        sums[s] += unit * (bound / unit.norm())
        z = without / grid - GAUSSIAN.rounded(
            sums, grid
        )  # the neighbour's correlated noise, if it is to release the same
        hiding = []
        for t in range(steps):
            row = strategy.row(t)
            back = torch.zeros(count, dtype=torch.float64)
            for k in range(1, min(len(row), t + 1)):
                back.add_(z[t - k], alpha=float(row[k] / row[0]))
            hiding.append(z[t] + back.round())
        hiding = torch.stack(hiding)
        assert torch.equal(released(sums, hiding), without)
        moved = (noise - hiding).numpy()
        window = range(s, min(s + strategy.bands, steps))
        assert all((moved[t] == 0).all() for t in range(steps) if t not in window)
        delta = (GAUSSIAN.rounded(sums[s], grid) - GAUSSIAN.rounded(others[s], grid)).numpy()
        for t in window:
            ratio = strategy.row(t)[t - s] / strategy.row(t)[0]
            assert np.abs(moved[t] - ratio * delta).max() <= (2 if t > s else 0)
        distance = math.sqrt(sum(((moved[t] * grid * strategy.row(t)[0] / std) ** 2).sum() for t in window))
        assert distance <= 1 / sigma
        if strategy.sensitivity > 0.999 and s == 0:
            assert distance > 0.999 / sigma


def test_rounding_is_paid_for():
    for strategy, dimension in ((toeplitz(4, 12), 10**6), (general(3, 12), 10), (toeplitz(1, 12), 10**7)):
        std, bound = 1.3, 0.9
        paid = widened(std, bound, dimension, strategy)
        grid = GAUSSIAN.spacing(paid / float(strategy.rows[:, 0].max()))
        moved = bound + 2 * grid * math.sqrt(dimension) + 2 * grid * math.sqrt(strategy.bands * dimension)
        assert paid / moved >= std / bound
        assert paid <= std * (1 + 1e-4)
    assert widened(0.0, 1.0, 10, toeplitz(2, 4)) == 0.0
    with pytest.raises(PrivacyRefused, match="bands = 4"):
        widened(1e5, 1.0, 10**9, toeplitz(4, 12))
    assert GRID_BITS == 30  # which the proof counts with


def test_no_noise_is_exactly_nothing():
    stream = Stream(toeplitz(2, 4), 3, 0.0, GAUSSIAN)
    assert stream.next(SecretRandom()).tolist() == [0.0] * 3
    assert stream.next(SecretRandom(), plus=torch.tensor([0.1, 2.0, 3.0], dtype=torch.float64)).tolist() == [
        0.1,
        2.0,
        3.0,
    ]


def test_a_stream_ends_with_its_block_and_two_blocks_share_nothing():
    random = SecretRandom()
    first, second = (Stream(toeplitz(2, 3), 1000, 1.0, GAUSSIAN) for _ in range(2))
    drawn = [torch.cat([stream.next(random) for _ in range(3)]) for stream in (first, second)]
    assert not torch.isin(drawn[0], drawn[1]).any()
    with pytest.raises(UsageError, match="step = 3"):
        first.next(random)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_past_noise_and_groups_cannot_be_written_down_or_copied(duplicate):
    with pytest.raises(UsageError, match="noise drawn twice cancels"):
        duplicate(Stream(toeplitz(2, 4), 3, 1.0, GAUSSIAN))
    with pytest.raises(UsageError, match="who is in which group is secret"):
        duplicate(CyclicPoisson(10, 2, 0.5, SecretRandom()))


def test_too_much_memory_is_refused_before_it_is_taken():
    check_memory(4, 1000, limit=24_000)
    with pytest.raises(PrivacyRefused, match="bands = 4 · the past noise of 1,001 coordinates") as caught:
        check_memory(4, 1001, limit=24_000)
    assert caught.value.code == "memory"
    check_memory(16, 10)
    with pytest.raises(PrivacyRefused):
        check_memory(513, 2**40)


# ------------------------------------------------------------------------------------------------ the event that is claimed


def delta_of(event_rate: float, sigma: float, count: int, epsilon: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    event = SelfComposedDpEvent(PoissonSampledDpEvent(event_rate, GaussianDpEvent(sigma)), count)
    return PLDAccountant(value_discretization_interval=1e-4).compose(event).get_delta(epsilon)


class Game:
    """b = 2, T = 4, one dimension, one unit of gradient 1 that is there or not; every coordinate of the real stream is one
    repetition, its coins and group those of the real sampler. ``loss`` is the exact log-likelihood ratio of what is released."""

    bands, steps, rate, sigma = 2, 4, 0.3, 0.9

    def __init__(self, repetitions: int, seed: int) -> None:
        self.strategy = toeplitz(self.bands, self.steps)
        self.repetitions, self.random = repetitions, TestRandom(seed)
        self.joined = np.zeros((self.steps, repetitions), dtype=bool)

    def sample(self, group: int | None) -> None:
        """Every repetition is one unit of one sampler; its group by the sampler's dice, or the same for all."""
        sampler = CyclicPoisson(self.repetitions, self.bands, self.rate, self.random)
        if group is not None:
            nobody = np.empty(0, dtype=np.int64)
            sampler._members = [np.arange(self.repetitions) if g == group else nobody for g in range(self.bands)]
        for t in range(self.steps):
            self.joined[t, sampler.next()] = True

    def released(self, there: bool) -> np.ndarray:
        stream = Stream(self.strategy, self.repetitions, self.sigma, GAUSSIAN)
        sums = torch.from_numpy(self.joined * float(there))
        return np.stack([stream.next(self.random, plus=sums[t]).numpy() for t in range(self.steps)])

    def loss(self, released: np.ndarray, group: int | None) -> np.ndarray:
        """log P(released | there) / P(released | not there), summed over groups and coins."""
        u = self.strategy.dense() @ released  # one to one; C G + w
        ratio = np.zeros(self.repetitions)
        groups = range(self.bands) if group is None else [group]
        for g in groups:
            product = np.ones(self.repetitions)
            for s in range(g, self.steps, self.bands):
                column = self.strategy.dense()[:, s]  # windows of one group do not touch
                exponent = (column @ u - 0.5 * column @ column) / self.sigma**2
                product = product * (1 - self.rate + self.rate * np.exp(exponent))
            ratio += product / len(groups)
        return np.log(ratio)

    def deltas(self, epsilon: float, group: int | None) -> tuple[float, float, float]:
        """E_P (1 - e^(epsilon - loss))+, E_Q (1 - e^(epsilon + loss))+, and the larger standard error."""
        added = np.maximum(1 - np.exp(epsilon - self.loss(self.released(True), group)), 0)
        removed = np.maximum(1 - np.exp(epsilon + self.loss(self.released(False), group)), 0)
        return added.mean(), removed.mean(), max(added.std(), removed.std()) / math.sqrt(self.repetitions)


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_the_loss_is_that_of_the_claimed_event(epsilon):
    """Group 0 takes part in two whole windows: the event is met exactly, and not passed. With the group unknown it is less.
    False-alarm probability 1e-6 for each comparison (4.9 standard errors)."""
    claimed = delta_of(Game.rate, Game.sigma, 2, epsilon)
    game = Game(400_000, seed=1)
    game.sample(group=0)
    added, removed, error_ = game.deltas(epsilon, group=0)
    assert added <= claimed + 4.9 * error_ and removed <= claimed + 4.9 * error_
    assert max(added, removed) >= claimed - 4.9 * error_ - 1e-5
    game = Game(400_000, seed=2)
    game.sample(group=None)
    added, removed, error_ = game.deltas(epsilon, group=None)
    assert max(added, removed) <= claimed + 4.9 * error_
    assert max(added, removed) < 0.9 * claimed


def test_a_sampler_without_groups_is_convicted_by_the_same_figures():
    """Every unit in every step, with the same rate: its windows overlap, and it loses more than the claimed event."""
    claimed = delta_of(Game.rate, Game.sigma, 2, 1.0)
    game = Game(400_000, seed=3)
    game.joined = game.random.uniform(4 * 400_000).reshape(4, -1) < Game.rate
    u = game.strategy.dense() @ game.released(True)
    ratio = np.zeros(game.repetitions)
    for pattern in range(16):
        coins = np.array([pattern >> t & 1 for t in range(4)])
        mean = game.strategy.dense() @ coins
        weight = np.prod(np.where(coins, Game.rate, 1 - Game.rate))
        ratio += weight * np.exp((mean @ u - 0.5 * mean @ mean) / Game.sigma**2)
    gain = np.maximum(1 - np.exp(1.0) / ratio, 0)
    assert gain.mean() > claimed + 4.9 * gain.std() / math.sqrt(game.repetitions)
