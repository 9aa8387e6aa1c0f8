"""One coin for every weight: its probabilities, its range, and what all of them together cost."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.federation.conftest import work_for
from tests.federation.making import HOSTILE, SHAPES, filled, mechanism, one_round, public, update, vector

from sfumato.errors import UsageError
from sfumato.federation import mechanism_settings as of
from sfumato.federation import simulate
from sfumato.federation.mechanisms import Received, ldp_fl
from sfumato.randomness import TestRandom


class Coins:
    """A source whose uniform numbers are given, to find the probability of a coin exactly."""

    for_release = False

    def __init__(self, numbers):
        self.numbers = np.asarray(numbers, dtype=np.float64)

    def uniform(self, count):
        return self.numbers[:count]


def probability_of_plus(w: float, radius: float, epsilon: float) -> float:
    """By bisection over the coin's uniform number: where the answer turns from plus to minus."""
    low, high = 0, 2**53
    while high - low > 1:
        middle = (low + high) // 2
        plus = ldp_fl.told_as(torch.tensor([w], dtype=torch.float64), radius, epsilon, Coins([middle / 2**53]))[0] > 0
        low, high = (middle, high) if plus else (low, middle)
    return high / 2**53


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("share", [-3.0, -1.0, -0.4, 0.0, 0.7, 1.0, 50.0, math.nan, math.inf])
def test_the_coin_has_the_papers_probability_and_mean(epsilon, share):
    """Oracle: ((w - c)(e^eps - 1) + r (e^eps + 1)) / (2 r (e^eps + 1)) with c = 0; what it says is w on average."""
    radius = 0.02
    w = radius * (min(1.0, max(-1.0, share)) if math.isfinite(share) else 0.0)
    formula = (w * (math.exp(epsilon) - 1) + radius * (math.exp(epsilon) + 1)) / (2 * radius * (math.exp(epsilon) + 1))
    plus = probability_of_plus(radius * share, radius, epsilon)
    assert plus == pytest.approx(formula, rel=1e-12)
    told = ldp_fl.amplitude(radius, epsilon)
    assert told == pytest.approx(radius * (math.exp(epsilon) + 1) / (math.exp(epsilon) - 1))
    assert told * (2 * plus - 1) == pytest.approx(w, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 6.0, 20.0])
def test_no_two_weights_are_told_apart_by_more_than_epsilon(epsilon):
    """The attack that must fail: the ends of the range, and whatever lies outside of it, with all roundings."""
    chances = [probability_of_plus(w, 1.0, epsilon) for w in (-math.inf, -1e300, -1.0, 0.3, 1.0, 1e300, math.nan)]
    for p in chances:
        for q in chances:
            assert p <= math.exp(epsilon) * q
            assert 1 - p <= math.exp(epsilon) * (1 - q)


@pytest.mark.parametrize("kind", HOSTILE)
def test_only_two_values_are_ever_sent(kind):
    made = mechanism(of.LdpFl(epsilon_per_weight=2.0, radius=0.5))
    state = update(1, 100.0)
    state["b"] = torch.full((2, 2, 2), HOSTILE[kind])
    sent = made.at_site(state, public(), made.ask(made.begin(public())), TestRandom(1)).tensors
    values = vector(sent).unique()
    torch.testing.assert_close(values.abs(), torch.full((2,), ldp_fl.amplitude(0.5, 2.0)).double(), rtol=1e-6, atol=0)


def test_the_mean_over_many_sites_is_the_update():
    """10,000 sites with one update each: within 5.4 standard errors in each of 23 numbers, false-alarm probability 2e-6."""
    state, chance = update(2, 0.5), TestRandom(3)
    told = torch.stack(
        [vector({n: ldp_fl.told_as(t, 0.4, 1.0, chance) for n, t in state.items()}) for _ in range(10_000)]
    )
    error = ldp_fl.amplitude(0.4, 1.0) / 100
    assert float((told.mean(0) - vector(state)).abs().max()) < norm.ppf(1 - 1e-6 / 23) * error


def test_the_plan_says_d_t_epsilon_and_composes():
    made = mechanism(of.LdpFl(epsilon_per_weight=0.01))
    plan = made.promise(public(rounds=3)).at_site
    assert plan is not None
    assert plan.weights_per_round == 23
    assert plan.epsilon_per_weight == pytest.approx(0.01)
    assert plan.pure_epsilon() == pytest.approx(0.01 * 23 * 3)
    assert plan.epsilon() < plan.pure_epsilon()
    assert "0.69 in all" in made.in_words(public(rounds=3))
    assert "nobody shuffles" in made.in_words(public(rounds=3))


def test_a_radius_that_is_not_told_is_refused():
    made = mechanism(of.LdpFl(epsilon_per_weight=1.0))
    for told in ({}, {"radius": 0.1}, {"radius": {"b": 0.1}}, {"radius": dict.fromkeys(SHAPES, -1.0)}):
        with pytest.raises(UsageError):
            made.at_site(update(1), public(), told, TestRandom(1))


def test_the_range_follows_the_size_of_the_noisy_mean():
    """Three root mean squares of a large tensor's mean update, the coins' variance taken off; by a factor of two a round at most."""
    shapes = {"large": (200_000,), "small": (200_000,)}
    among = public(4, shapes=shapes)
    made = mechanism(of.LdpFl(epsilon_per_weight=4.0, radius=0.1))
    state = {"large": torch.full((200_000,), 0.05), "small": torch.full((200_000,), 0.005)}
    memory = made.begin(among)
    for round_ in range(5):
        _, memory = one_round(made, among, dict.fromkeys(among.sites, state), memory=memory, seed=round_)
    radii = memory.values["radius"]
    assert isinstance(radii, dict)
    assert radii["large"] == pytest.approx(0.15, rel=0.05)
    assert radii["small"] == pytest.approx(0.015, rel=0.2)
    fixed = mechanism(of.LdpFl(epsilon_per_weight=4.0, radius=0.1, adaptive_range=False))
    _, memory = one_round(fixed, among, dict.fromkeys(among.sites, state))
    assert memory.values["radius"] == {"large": 0.1, "small": 0.1}


def test_a_shuffler_keeps_the_sums_and_hides_whose_a_number_is():
    """Five sites, each of which sends its own number everywhere: afterwards every site's numbers are mixed, each place has all five.
    Counts of (number, place) by chi-square, false-alarm probability 1e-6."""
    from scipy.stats import chi2

    sent = {f"site-{i}": filled(float(i), {"w": (20_000,)}) for i in range(5)}
    shuffled = ldp_fl.split_and_shuffled(sent, TestRandom(1))
    stacked = torch.stack([shuffled[place]["w"] for place in sorted(shuffled)])
    assert torch.equal(stacked.sort(dim=0).values, torch.arange(5.0)[:, None].expand(5, 20_000))
    counts = torch.stack([(row == i).sum() for row in stacked for i in range(5)]).double()
    assert float(((counts - 4000).square() / 4000).sum()) < chi2.ppf(1 - 1e-6, 16)


def test_a_shuffled_round_has_the_same_step_and_no_sites_numbers(make_site):
    """Through the server: the mean is the same, and the report has no lengths of single sites. Numbers of a part that two of three
    hold are mixed among those two."""
    sent = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([5.0])}}
    sent["c"] = {"v": torch.tensor([6.0])}
    mixed = [ldp_fl.split_and_shuffled(sent, TestRandom(seed)) for seed in range(40)]
    assert all({site: set(of) for site, of in one.items()} == {s: set(of) for s, of in sent.items()} for one in mixed)
    assert all(torch.equal(one["a"]["w"] + one["b"]["w"], torch.tensor([4.0, 6.0])) for one in mixed)
    firsts = [one["a"]["w"].tolist() for one in mixed]
    assert {tuple(one) for one in firsts} == {(1, 2), (1, 4), (3, 2), (3, 4)}  # place by place; false alarm 4 (3/4)^40

    results, states = [], []
    for shuffled in (False, True):
        sites = [make_site(name, value, private=False) for name, value in (("a", 0.5), ("b", -1.0), ("c", 2.0))]
        sites = [replace(site, ledger=site.ledger.parent / str(shuffled) / "ledger.db") for site in sites]
        wanted = of.LdpFl(epsilon_per_weight=2.0, radius=0.5, shuffled=shuffled)
        work = work_for(sites, mechanism=wanted, weights="equal", random=lambda: TestRandom(3))
        found = simulate.simulate(sites, work, run="r", chance=TestRandom(4))
        results.append(found.rounds)
        states.append(found.state)
    assert all(set(result.lengths) == set(result.cosines) == {"a", "b", "c"} for result in results[0])
    assert all(result.sites == ("a", "b", "c") and not result.lengths and not result.cosines for result in results[1])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-6)


def test_what_combines_shuffled_updates_sees_no_sites_own():
    among = public(shapes={"w": (40,)}, weights=[1.0] * 4)
    update = {"w": torch.linspace(-1, 1, 40)}
    seen: list[dict] = []

    def combine(updates):
        seen.append(dict(updates))
        return {"w": sum(one["w"] for one in updates.values()) / 4}

    for shuffled in (False, True):
        made = mechanism(of.LdpFl(epsilon_per_weight=1.0, radius=0.5, shuffled=shuffled))
        told, chance = made.ask(made.begin(among)), TestRandom(1)
        sent = {site: made.at_site(update, among, told, chance).tensors for site in among.sites}
        received = Received(asked=among.sites, sites=among.sites, updates=sent)
        made.at_server(received, among, made.begin(among), combine, TestRandom(2))
        own = [torch.equal(seen[-1][site]["w"], sent[site]["w"]) for site in among.sites]
        assert own == [not shuffled] * 4  # by chance 40 coins are the same once in 2^40


def test_what_shuffling_does_not_go_with_is_refused_and_no_epsilon_is_smaller_for_it(make_site):
    sites = [make_site(name, 1.0, units=units, private=False) for name, units in (("a", 100), ("b", 200))]
    wanted = of.LdpFl(epsilon_per_weight=2.0, shuffled=True)
    work = work_for(sites, mechanism=wanted)
    with pytest.raises(UsageError, match="shuffled = true"):
        mechanism(wanted).promise(work.public)
    with pytest.raises(UsageError, match="aggregation = krum"):
        of.check_together(wanted, of.Krum(hostile=1), "none")
    equal = work_for(sites, mechanism=wanted, weights="equal").public
    plain = of.LdpFl(epsilon_per_weight=2.0)
    assert mechanism(wanted).promise(equal).at_site == mechanism(plain).promise(equal).at_site
    assert "counted as nothing" in mechanism(wanted).promise(equal).composition


def test_an_epsilon_of_the_whole_is_shared_out_over_all_coins():
    plan = mechanism(of.LdpFl(epsilon=8.0)).promise(public(rounds=20)).at_site
    assert plan is not None
    assert 7.99 < plan.epsilon() <= 8.0
    assert plan.epsilon_per_weight is not None
    assert 8.0 / (20 * 23) < plan.epsilon_per_weight < 8.0
    with pytest.raises(UsageError):
        of.LdpFl(epsilon=8.0, epsilon_per_weight=1.0)
    with pytest.raises(UsageError):
        of.LdpFl(epsilon_per_weight=0.0)
