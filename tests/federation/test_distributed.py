"""Shares of discrete noise under a sum: a rounding that keeps its bound, a rotation, a grid, shares for those who are there."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tests.federation.making import HOSTILE, filled, mechanism, one_round, public, slowly_clipped, update, vector

from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as of
from sfumato.federation import update_plans
from sfumato.federation.mechanisms import Received, distributed
from sfumato.privacy import accounting
from sfumato.randomness import TestRandom

S = 0.7
SETTINGS = of.Distributed(max_update_norm=S, noise_multiplier=1.0, bits=20)


def made(settings=SETTINGS) -> distributed.Distributed:
    one = mechanism(settings)
    assert isinstance(one, distributed.Distributed)
    return one


def spread_is(values, std: float) -> bool:
    """Chi-square on the sum of squares: false-alarm probability 1e-6."""
    statistic = float(torch.as_tensor(values).double().square().sum()) / std**2
    return chi2.ppf(5e-7, len(values)) < statistic < chi2.ppf(1 - 5e-7, len(values))


# ---- rotation ----


def test_the_rotation_is_the_hadamard_matrix_times_signs():
    """Oracle: Sylvester's matrix, by its recursion."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 16:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs = distributed._signs(16, 3)
    assert set(signs.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(distributed.rotate(x, 3), matrix @ (signs * x) / 4)
    torch.testing.assert_close(distributed.rotate_back(distributed.rotate(x, 3), 3), x)
    assert not torch.allclose(distributed.rotate(x, 3), distributed.rotate(x, 4))


def test_a_rotated_spike_is_flat():
    spike = torch.zeros(1024, dtype=torch.float64)
    spike[17] = 5.0
    rotated = distributed.rotate(spike, 1)
    torch.testing.assert_close(rotated.abs(), torch.full((1024,), 5.0 / 32).double())


# ---- rounding ----


@pytest.mark.parametrize("beta", [0.6, 1e-6])
@pytest.mark.parametrize("kind", ["halves", "random", "zero", "spike", "almost whole"])
def test_a_rounded_vector_keeps_its_bound(kind, beta):
    """Every draw, for the worst vectors: all rests 1/2, where a rounding is longest and least certain."""
    generator = torch.Generator().manual_seed(2)
    vector_ = {
        "halves": torch.full((64,), 0.5),
        "random": torch.randn(64, generator=generator),
        "zero": torch.zeros(64),
        "spike": torch.nn.functional.one_hot(torch.tensor(3), 64) * 4.5,
        "almost whole": torch.full((64,), 1 - 1e-12),
    }[kind].double()
    bound = update_plans.rounded_bound(max(float(vector_.norm()), 1e-9), 64, beta)
    chance = TestRandom(1)
    for _ in range(300):
        whole = distributed.rounded(vector_, bound, chance)
        assert float(whole.double().norm()) <= bound
        assert (whole.double() - vector_).abs().max() < 1


def test_the_bound_is_the_smaller_of_the_papers_two():
    """arXiv:2102.06387, Theorem 1, number by number; the limits beta -> 1 and -> 0."""
    for norm, d, beta in ((3.0, 16, 0.6), (100.0, 4096, 0.01), (0.01, 64, 0.5)):
        root = math.sqrt(d)
        narrow = norm**2 + d / 4 + math.sqrt(2 * math.log(1 / beta)) * (norm + root / 2)
        assert update_plans.rounded_bound(norm, d, beta) == pytest.approx(min(math.sqrt(narrow), norm + root))
    assert update_plans.rounded_bound(3.0, 16, 1e-300) == pytest.approx(7.0)


def test_a_rounding_is_right_on_average_where_nothing_is_drawn_again():
    """20,000 draws: within 5.3 standard errors in each of 8 numbers, false-alarm probability 1e-6."""
    x = torch.tensor([0.1, -0.3, 2.5, 7.99, -4.0, 0.5, 1e-3, -2.7], dtype=torch.float64)
    chance = TestRandom(1)
    drawn = torch.stack([distributed.rounded(x, 1e6, chance) for _ in range(20_000)]).double()
    rest = x - x.floor()
    error = (rest * (1 - rest) / 20_000).sqrt()
    assert bool(((drawn.mean(0) - x).abs() <= 5.3 * error + 1e-12).all())


def test_where_no_draw_is_short_enough_it_is_cut_towards_zero():
    x = torch.full((4,), 1.5, dtype=torch.float64)
    whole = distributed.rounded(x, 2.0, TestRandom(1))  # only 1, 1, 1, 1 is so short
    assert whole.tolist() == [1, 1, 1, 1]
    assert not distributed.rounded(x, 0.5, TestRandom(1)).any()


def test_the_squared_norm_is_exact_beyond_float64():
    numbers = torch.tensor([2**31 - 1, -(2**31 - 1), 3] * 1000, dtype=torch.int64)
    assert distributed._square(numbers) == sum(int(n) ** 2 for n in numbers)
    assert distributed._square(torch.tensor([2**31])) > 2**100


# ---- shares and grid ----


def test_shares_of_those_who_are_there_make_the_noise_that_is_promised():
    """Variance sigma^2 S^2 / (n - t): with t of n sites silent or colluding, what is left is sigma S at least, and the smoothing of
    r = 2 steps is paid for."""
    settings = replace(SETTINGS, dropouts=2, colluders=1, noise_multiplier=1.5)
    grid = made(settings).grid(public(8))
    left = math.sqrt(5 * grid.share_std**2 - 4) / grid.bound
    assert left == pytest.approx(1.5, rel=1e-9)
    assert grid.bound >= S * grid.scale


@pytest.mark.parametrize("silent", [0, 2])
def test_the_noise_of_a_round_is_there_when_sites_are_silent(silent):
    """Measured on the sum, in whole numbers: at least sigma B, with two of eight silent, on 32,768 numbers."""
    shapes = {"w": (32_768,)}
    among = public(8, shapes=shapes)
    one = made(replace(SETTINGS, dropouts=2, noise_multiplier=1.0))
    grid = one.grid(among)
    here = among.sites[silent:]
    step, _ = one_round(one, among, {site: filled(0.0, shapes) for site in here})
    steps = vector(step) * 8 * grid.scale  # the rotation keeps the norm
    assert spread_is(steps, math.sqrt(len(here)) * grid.share_std)
    assert float(steps.norm()) / math.sqrt(32_768) >= 0.98 * grid.bound * 1.0


@pytest.mark.parametrize("noise", [1e-3, 1.0, 1e3])
def test_the_finest_grid_is_one_that_64_bits_can_draw_and_square(noise):
    among = public(4)
    one = made(replace(SETTINGS, bits=48, noise_multiplier=noise))
    grid = one.grid(among)
    assert max(grid.bound, grid.share_std) < 2**31
    states = dict.fromkeys(among.sites, update(1, 9.0))
    step, _ = one_round(one, among, states)
    error = vector(step) - vector(slowly_clipped(update(1, 9.0), S))
    assert float(error.norm()) < 3 * noise * S / 4 * math.sqrt(32)


def test_shares_are_discrete_gaussians():
    grid = made().grid(public(4, shapes={"w": (65_536,)}))
    drawn = distributed.share(grid, TestRandom(1))
    assert drawn.dtype == torch.int64
    assert spread_is(drawn, grid.share_std)
    assert not distributed.share(replace(grid, noise_multiplier=0.0), TestRandom(1)).any()


def test_too_few_replies_leave_the_sum_unopened():
    one = made(replace(SETTINGS, dropouts=1))
    among = public(4)
    with pytest.raises(UsageError) as refused:
        one_round(one, among, {site: update(1) for site in among.sites[:2]})
    assert refused.value.code == "too_few_sites"
    one_round(one, among, {site: update(1) for site in among.sites[:3]})


def test_single_updates_are_never_looked_at():
    one = made()
    part = one.at_site(update(1), public(), one.ask(one.begin(public())), TestRandom(1))
    seen = Received(asked=("site-0",), sites=public().sites, updates={"site-0": part.tensors})
    with pytest.raises(UsageError) as refused:
        one.at_server(seen, public(), one.begin(public()), lambda updates: {}, TestRandom(1))
    assert refused.value.code == "not_aggregated"


@pytest.mark.parametrize("bits", [16, 20, 32, 48])
def test_a_sum_comes_back_exactly_and_does_not_wrap_around(bits):
    """The largest sums that there can be: four sites, all of length S, all alike. Without noise: off by the rounding alone, less than
    one step a site. 30 rotations."""
    among = public(4)
    one = made(replace(SETTINGS, bits=bits, noise_multiplier=0.0))
    grid = one.grid(among)
    memory = one.begin(among)
    for round_ in range(30):
        state = update(round_, 100.0)
        step, memory = one_round(one, among, dict.fromkeys(among.sites, state), memory=memory, seed=round_)
        off = (vector(step) - vector(slowly_clipped(state, S))).norm()
        assert float(off) <= math.sqrt(grid.dimension) / grid.scale + 1e-6
    assert memory.values["rotation"] == 31


def test_numbers_wrap_around_as_seldom_as_was_asked():
    """A sum of whole length n S on one number, rotated by 400 sets of signs, with the noise: asked for 1e-2 at most in a round, so
    more than 15 of 400 have probability below 1e-4. On a grid that is eight times finer it happens in every round."""
    settings = replace(SETTINGS, wrap=1e-2, bits=12, noise_multiplier=0.3)
    grid = update_plans.grid_of(settings, 4, 64, 0.3)
    chance, spike = TestRandom(5), torch.zeros(64, dtype=torch.float64)
    spike[0] = 4 * S

    def wraps(finer: float) -> int:
        times = 0
        for turn in range(1, 401):
            noise = sum(distributed.share(grid, chance) for _ in range(4))
            numbers = distributed.rotate(spike, turn) * grid.scale * finer + noise * finer
            times += bool((numbers.abs() >= 2**11).any())
        return times

    assert wraps(1.0) <= 15
    assert wraps(8.0) == 400


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_site_with_hostile_data_still_sends_a_bounded_update_and_noise(kind):
    """What is in the vector beside the noise: found by sending twice with the same chance, once for a blank."""
    among, one = public(4), made()
    told = one.ask(one.begin(among))
    sent, blank = (
        one.at_site(state, among, told, TestRandom(3)).tensors["sum"] for state in (filled(HOSTILE[kind]), filled(0.0))
    )
    assert sent.dtype == torch.int64
    assert bool(((sent >= 0) & (sent < 2**20)).all())
    grid = one.grid(among)
    moved = distributed.centred(sent - blank, 20).double()
    # a redrawn rounding takes other coins, and so other noise: then the two are apart by two independent noises
    assert float(moved.norm()) <= grid.bound + 12 * grid.share_std * math.sqrt(grid.dimension)
    if kind in ("nan", "inf", "minus inf", "zero"):
        assert not moved.any()


def test_what_one_site_moves_is_the_bound_at_most_over_all_roundings():
    """Without noise, all 2^4 roundings of the worst vector: none is longer than B, which is above S times the scale."""
    grid = update_plans.grid_of(replace(SETTINGS, bits=6, rounding=0.6, noise_multiplier=0.0), 2, 4, 0.0)
    x = torch.full((4,), S * grid.scale / 2, dtype=torch.float64)
    assert float(x.norm()) == pytest.approx(S * grid.scale)
    assert grid.bound > S * grid.scale
    lengths = [
        math.hypot(*(math.floor(float(v)) + up for v, up in zip(x, ups, strict=True)))
        for ups in itertools.product((0, 1), repeat=4)
    ]
    assert max(lengths) > S * grid.scale  # a rounding without its own bound would pass the clip
    chance = TestRandom(4)
    assert all(float(distributed.rounded(x, grid.bound, chance).double().norm()) <= grid.bound for _ in range(200))


def test_the_claim_holds_for_the_exact_law_of_a_small_round():
    """Oracle: one number, four sites, one silent. The exact law of the sum of three shares, moved by what a site can move it (2 B), against
    the plan's epsilon: delta is not above what is claimed, by summation over the whole numbers."""
    settings = of.Distributed(max_update_norm=1.0, noise_multiplier=2.0, bits=8, dropouts=1)
    among = public(4, shapes={"w": ()}, rounds=1)
    one = made(settings)
    grid, plan = one.grid(among), one.plan(among)
    width = int(12 * grid.share_std)
    x = np.arange(-width, width + 1, dtype=np.float64)
    share = np.exp(-(x**2) / (2 * grid.share_std**2))
    law = np.convolve(np.convolve(share, share), share)
    law /= law.sum()
    shift = math.floor(2 * grid.bound)
    p, q = np.pad(law, (shift, 0)), np.pad(law, (0, shift))
    for delta in (1e-3, 1e-5):
        epsilon = accounting.epsilon(plan.events(), delta, adjacency="replace_one")
        assert epsilon is not None
        assert np.maximum(p - math.exp(epsilon) * q, 0).sum() <= delta
        assert np.maximum(p - math.exp(0.8 * epsilon) * q, 0).sum() > delta  # and the claim is not empty


def test_our_epsilon_is_not_above_the_papers():
    """arXiv:2102.06387, Theorem 1 and equation 17: D_a <= min{a D2^2 / 2 + tau d, a (D2 + sqrt(d) tau)^2 / 2}, D2 = 2 B /
    sqrt(n - t) s. PLD of the comparison with a Gaussian is tighter than that by conversion of Rényi divergences, and never
    less than a Gaussian's."""
    from sfumato.privacy import gaussian
    from sfumato.privacy.filters import converted
    from sfumato.privacy.site_updates import tau

    among = public(8, rounds=4)
    one = made(replace(SETTINGS, dropouts=2, noise_multiplier=3.0, bits=14))
    grid, plan = one.grid(among), one.plan(among)
    moved, t = 2 * grid.bound / (math.sqrt(6) * grid.share_std), tau(8, grid.share_std)
    orders = [1 + i / 20 for i in range(1, 2000)]
    paper = min(
        4 * min(a * moved**2 / 2 + t * grid.dimension, a / 2 * (moved + math.sqrt(grid.dimension) * t) ** 2)
        + converted(a, 1e-5)
        for a in orders
    )
    exact = gaussian.epsilon_of(math.sqrt(4) * moved, 1e-5)
    assert exact <= plan.epsilon() < paper


def test_with_many_bits_it_is_as_good_as_noise_at_the_server():
    """One site silent of none allowed for: the error of the mean is that of `central` with the same noise multiplier, to 1 %."""
    shapes = {"w": (32_768,)}
    among = public(4, shapes=shapes)
    one = made(replace(SETTINGS, bits=32, noise_multiplier=1.0))
    states = {site: update(i, 5.0, shapes) for i, site in enumerate(among.sites)}
    step, _ = one_round(one, among, states)
    error = vector(step) - sum(vector(slowly_clipped(s, S)) for s in states.values()) / 4
    assert float(error.norm()) / math.sqrt(32_768) == pytest.approx(S / 4, rel=0.02)


# ---- plan ----


def test_the_plan_spends_what_was_asked_for_with_its_slack():
    one = made(of.Distributed(epsilon=6.0, dropouts=1))
    plan = one.promise(public()).at_site
    assert plan is not None
    assert plan.slack is not None
    assert 5.99 < plan.epsilon() <= 6.0
    assert "modulo 2^20" in one.in_words(public())


@pytest.mark.parametrize(
    ("settings", "among", "words"),
    [
        (replace(SETTINGS, dropouts=3, colluders=1), {}, "nobody is left"),
        (replace(SETTINGS, bits=2), {}, "too few"),
        (SETTINGS, {"rate": 0.5}, "every site takes part"),
        (SETTINGS, {"weights": [1.0, 1.0, 1.0, 2.0]}, "weighs the same"),
        (replace(SETTINGS, bits=8, noise_multiplier=0.05), {"sites": 40}, "coarser shares"),
    ],
)
def test_what_has_no_guarantee_is_refused(settings, among, words):
    with pytest.raises(UsageError) as refused:
        made(settings).promise(public(**among))
    assert words in str(refused.value)


def test_a_site_that_is_told_another_modulus_refuses():
    one = made()
    for told in ({"bits": 8, "rotation": 1}, {"bits": 20}, {"bits": 20, "rotation": 0}, {"bits": 20, "rotation": True}):
        with pytest.raises(UsageError):
            one.at_site(update(1), public(), told, TestRandom(1))
