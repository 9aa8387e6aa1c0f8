from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.federation.conftest import Tiny, work_for
from torch import nn

from sfumato.errors import BudgetExhausted, UsageError
from sfumato.federation import selection, simulate
from sfumato.federation.mechanism_settings import Central
from sfumato.federation.messages import Part
from sfumato.federation.policy import SitePolicy
from sfumato.federation.rates import rates
from sfumato.federation.settings import ByChargedLoss, BySize, Everyone, FederationSettings, Uniform
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.plan import DpSgd
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable
from sfumato.training.rounds import charged_loss

SIZES = {"a": 100, "b": 300, "c": 100}


def test_rates_of_everyone_uniform_and_by_size():
    assert rates(Everyone(), SIZES) == {"a": 1, "b": 1, "c": 1}
    assert rates(Uniform(rate=0.25), SIZES) == {"a": 0.25, "b": 0.25, "c": 0.25}
    assert rates(BySize(expected_sites=1), SIZES) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})
    assert rates(BySize(expected_sites=2), SIZES) == pytest.approx({"a": 0.5, "b": 1.0, "c": 0.5})
    assert rates(BySize(expected_sites=3), SIZES) == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})
    with pytest.raises(UsageError, match="expected_sites = 4"):
        rates(BySize(expected_sites=4), SIZES)


def test_every_site_is_drawn_by_its_own_coin_as_often_as_its_rate_says():
    """20,000 rounds, six figures within 5 standard errors: a false alarm has probability below 6 x 5.8e-7 = 3.5e-6."""
    rates, chance, rounds = {"a": 0.5, "b": 0.9, "c": 0.1}, TestRandom(5), 20_000
    drawn = [selection.draw(Uniform(), rates, Part(), chance) for _ in range(rounds)]
    seen = np.array([[site in sites for site in "abc"] for sites in drawn], dtype=float)
    q = np.array([0.5, 0.9, 0.1])
    assert (abs(seen.mean(0) - q) < 5 * np.sqrt(q * (1 - q) / rounds)).all()
    both = (seen[:, [0, 0, 1]] * seen[:, [1, 2, 2]]).mean(0)
    p = q[[0, 0, 1]] * q[[1, 2, 2]]
    assert (abs(both - p) < 5 * np.sqrt(p * (1 - p) / rounds)).all()  # the coins are independent


def test_everyone_is_everyone():
    assert selection.draw(Everyone(), {"b": 1.0, "a": 1.0}, Part(), TestRandom(0)) == ("a", "b")


def test_the_highest_loss_comes_first_and_who_never_told_before_that():
    rates = dict.fromkeys("abcd", 1.0)
    memory = Part(values={"a": 0.5, "b": 2.0, "c": 1.0})
    chosen = [selection.draw(ByChargedLoss(asked=n), rates, memory, TestRandom(0)) for n in (1, 2, 3, 4)]
    assert chosen == [("d",), ("b", "d"), ("b", "c", "d"), ("a", "b", "c", "d")]


def test_a_choice_by_loss_is_refused_where_the_site_is_what_is_hidden():
    with pytest.raises(UsageError, match="depends on the sites' data"):
        FederationSettings(selection=ByChargedLoss(), mechanism=Central(noise_multiplier=1.0))
    with pytest.raises(UsageError, match="there are 2 sites"):
        selection.check(ByChargedLoss(asked=3), sites=2)
    selection.check(ByChargedLoss(asked=2), sites=2)


class Losses(nn.Module):
    """A unit's loss is its number; some are no number, or far away."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def losses(self, batch):
        return batch.per_unit(batch.tensors["x"])


VALUES = torch.tensor([0.5, 1.0, 3.0, -2.0, float("nan"), float("inf"), 1e9, 0.25] * 25)  # cut to [0, 2]: mean 1.21875


def loss_of(tmp_path, noise, rate=1.0, seed=0, values=VALUES):
    plan = DpSgd(
        population=200, expected_batch_size=200 * rate, steps=3, noise_multiplier=noise, delta=1e-4, max_grad_norm=7.0
    )
    table = UnitTable({"x": values}, [f"u{i:03d}" for i in range(len(values))])
    with Ledger.open(tmp_path / f"{noise}-{seed}-{len(values)}.db", run="r", plan=plan) as ledger:
        told = charged_loss(
            Losses(), lambda: table, plan, ledger, largest_loss=2.0, random=TestRandom(seed), max_physical_batch_size=33
        )
        return told, ledger.spent()


def test_a_told_loss_is_cut_summed_and_divided_by_a_public_number(tmp_path):
    told, spent = loss_of(tmp_path, 0.0)
    assert told == pytest.approx((0.5 + 1 + 2 + 0 + 2 + 2 + 2 + 0.25) / 8)
    assert [(event.mechanism, event.count) for event in spent] == [("poisson_gaussian", 1)]
    # One unit less moves it by largest_loss / B at most, and the denominator stays.
    without, _ = loss_of(tmp_path, 0.0, values=VALUES[:-2])
    assert told - without == pytest.approx((2.0 + 0.25) / 200)


def test_its_noise_is_that_of_a_step(tmp_path):
    """400 draws of noise 3 x 2 / 100 at rate 1/2. Variance of the sum of 100 of 200 units besides: sum x^2 / 4. The ratio of sample to
    true variance is outside 1 +- 0.36 with probability below 1e-6 (chi-squared, 399 degrees of freedom: 5.1 standard deviations)."""
    plan = DpSgd(population=200, expected_batch_size=100.0, steps=400, noise_multiplier=3.0, delta=1e-4)
    table, chance = UnitTable({"x": VALUES}, [f"u{i:03d}" for i in range(200)]), TestRandom(7)
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:
        told = [
            charged_loss(Losses(), lambda: table, plan, ledger, largest_loss=2.0, random=chance) for _ in range(400)
        ]
        assert ledger.spent_steps == 400
    cut = torch.nan_to_num(VALUES.double(), nan=2.0).clamp(0, 2)
    variance = (float(cut.square().sum()) / 4 + (3.0 * 2.0) ** 2) / 100**2
    assert abs(np.var(told, ddof=1) / variance - 1) < 0.36
    assert abs(np.mean(told) - float(cut.mean())) < 5.1 * (variance / 400) ** 0.5


def test_a_site_is_charged_before_its_loss_is_looked_at_and_stops_where_the_plan_does(tmp_path):
    plan = DpSgd(population=200, expected_batch_size=100.0, steps=1, noise_multiplier=3.0, delta=1e-4)
    with Ledger.open(tmp_path / "ledger.db", run="r", plan=plan) as ledger:

        def read():
            assert ledger.spent_steps == 1
            return UnitTable({"x": VALUES}, [f"u{i:03d}" for i in range(200)])

        charged_loss(Losses(), read, plan, ledger, largest_loss=2.0, random=TestRandom(0))
        with pytest.raises(BudgetExhausted):
            charged_loss(Losses(), read, plan, ledger, largest_loss=2.0, random=TestRandom(0))


class WithLoss(Tiny):
    def losses(self, batch):
        return batch.per_unit(batch.tensors["x"].mean(1))


def test_the_sites_that_lose_most_are_asked_and_their_losses_are_charged(make_site):
    """Losses 3, 1, 2, told with little noise: after everybody was asked once, the first and the third are. Noise 3 x 4 / 20 is 0.6 in
    the first test's plan; here it is 1e-3, so that the order is sure."""
    policy = SitePolicy(may_say=("steps", "charged", "loss"))
    sites = []
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        site = make_site(name, value, steps=5 * 3, policy=policy)
        plan = replace(site.plan, noise_multiplier=1e-3, expected_batch_size=100.0)
        sites.append(replace(site, plan=plan))
    work = work_for(sites, WithLoss, rounds=5, selection=ByChargedLoss(asked=2), random=lambda: TestRandom(0))
    result = simulate.simulate(sites, work, run="r")
    assert [r.asked for r in result.rounds][:2] == [("a", "b"), ("a", "c")]
    assert [r.asked for r in result.rounds][2:] == [("a", "c")] * 3
    assert [show(site.ledger)["steps"] for site in sites] == [15, 3, 12]  # two steps and a loss a round
    silent = [replace(s, policy=SitePolicy(), ledger=s.ledger.parent / "x" / "ledger.db") for s in sites]
    simulate.simulate(silent, work_for(silent, WithLoss, rounds=1, selection=ByChargedLoss(asked=2)), run="r")
    assert show(silent[0].ledger)["steps"] == 2  # who may not tell a loss neither asks nor charges it
