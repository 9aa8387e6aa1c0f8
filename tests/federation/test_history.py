"""What a report says of each round: epsilon as the ledgers have it, and who was left out; nothing of secret coins."""

from dataclasses import replace

import pytest
from tests.federation.conftest import work_for

from sfumato.federation import history, mechanisms, simulate
from sfumato.federation.mechanism_settings import Central, UpdateLevel
from sfumato.federation.policy import SitePolicy
from sfumato.federation.rounds import is_secret
from sfumato.federation.server_state import LeftOut
from sfumato.federation.settings import Uniform
from sfumato.privacy import accounting


def ran(sites, build, train_steps, *, folder=None, **settings):
    work = work_for(sites, build, train_steps, **settings)
    result = simulate.simulate(sites, work, run="r", folder=folder)
    promise = mechanisms.build(work.settings).promise(work.public)
    return work, result, promise


def told(sites, work, result, promise, **more):
    return history.told(
        result.rounds,
        sites,
        promise,
        work.public,
        local_steps=work.settings.steps_per_round,
        epsilons={site.name: site.epsilon for site in result.sites},
        **more,
    )


def test_each_round_says_what_each_ledger_had_spent(make_site, build, train_steps):
    sites = [
        make_site("a", 1.0, units=300),
        make_site("b", 5.0, steps=4),
    ]  # b planned two rounds, and refuses the third
    work, result, promise = ran(sites, build, train_steps)
    rounds = told(sites, work, result, promise)
    a, b = (site.plan for site in sites)
    expected = [{"a": a.epsilon(2 * r), "b": b.epsilon(min(4, 2 * r))} for r in (1, 2, 3)]
    for round_, epsilons in zip(rounds, expected, strict=True):
        assert round_["epsilons"] == pytest.approx(epsilons, rel=1e-9)
        assert round_["epsilon"] == pytest.approx(max(epsilons.values()), rel=1e-9)
    assert [(r["round"], len(r["sites"]), r["bytes_up"] > 0) for r in rounds] == [
        (1, 2, True),
        (2, 2, True),
        (3, 1, True),
    ]
    assert rounds[0]["lengths"] == {
        "a": pytest.approx(2.0 * 2**0.5),
        "b": pytest.approx(10.0 * 2**0.5),
    }  # 2 steps of 1 and 5
    assert rounds[0]["cosines"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    (no,) = history.left_out(rounds)
    assert (no["site"], no["code"], no["rounds"]) == ("b", "budget_exhausted", [3])


def test_a_round_that_was_not_answered_counts_up_to_what_the_ledger_said_in_the_end(make_site, build, train_steps):
    sites = [make_site("a", 1.0)]
    _, result, promise = ran(sites, build, train_steps)
    silent = replace(result.rounds[1], sites=(), charged={}, left_out=(LeftOut(site="a", code="silent", message="no"),))
    results = (result.rounds[0], silent, result.rounds[2])
    after = history.epsilon_after(results, sites, promise, local_steps=2, epsilons={"a": result.sites[0].epsilon})
    plan = sites[0].plan
    assert [e["a"] for e in after] == pytest.approx([plan.epsilon(2), plan.epsilon(4), plan.epsilon(6)], rel=1e-9)
    bounded = history.epsilon_after(results, sites, promise, local_steps=2, epsilons={"a": plan.epsilon(2)})
    assert [e["a"] for e in bounded] == pytest.approx([plan.epsilon(2)] * 3, rel=1e-9)


def test_a_site_that_says_it_spent_more_than_its_plan_is_counted_with_its_plan(make_site, build, train_steps):
    sites = [make_site("a", 1.0)]
    _, result, promise = ran(sites, build, train_steps)
    lying = tuple(replace(round_, charged={"a": 10**12}) for round_ in result.rounds)
    after = history.epsilon_after(lying, sites, promise, local_steps=2, epsilons={"a": result.sites[0].epsilon})
    assert after[0]["a"] == pytest.approx(sites[0].plan.epsilon(6), rel=1e-9)


def test_updates_are_counted_by_rounds(make_site, build, train_steps):
    sites = [make_site(name, 1.0, private=False) for name in ("a", "b")]
    work, result, promise = ran(sites, build, train_steps, mechanism=UpdateLevel(noise_multiplier=2.0))
    plan = promise.at_site
    assert plan is not None
    assert [r["epsilons"]["b"] for r in told(sites, work, result, promise)] == pytest.approx(
        [plan.epsilon(r) for r in (1, 2, 3)], rel=1e-9
    )


def test_who_was_drawn_by_secret_coins_is_not_told(make_site, build, train_steps, tmp_path):
    sites = [make_site(name, 1.0, private=False) for name in "abcd"]
    mechanism, coins = Central(noise_multiplier=3.0), Uniform(rate=0.5)
    work, result, promise = ran(
        sites, build, train_steps, mechanism=mechanism, selection=coins, folder=tmp_path / "server"
    )
    assert is_secret(promise, work.public)
    rounds = told(sites, work, result, promise, looks=[{"step": 2, "public_loss": 1.5}])
    assert all(set(round_) == {"round", "quality", "epsilon", "discarded"} for round_ in rounds)
    assert rounds[1]["quality"] == {"public_loss": 1.5}
    plan = promise.at_server
    assert plan is not None
    expected = accounting.epsilon([plan.event(2)], plan.delta, adjacency=plan.adjacency)
    assert rounds[1]["epsilon"] == pytest.approx(expected, rel=1e-9)

    assert not any(round_.lengths or round_.cosines for round_ in result.rounds)  # nor what a single site sent
    everyone, result, promise = ran(sites, build, train_steps, mechanism=mechanism, folder=tmp_path / "again")
    assert not is_secret(promise, everyone.public)


def test_without_a_guarantee_no_epsilon_is_told(make_site, build, train_steps):
    sites = [make_site("a", 1.0, private=False, policy=SitePolicy(allow_not_private=True))]
    work, result, promise = ran(sites, build, train_steps)
    assert [(r["epsilon"], r["epsilons"]) for r in told(sites, work, result, promise)] == [(None, {})] * 3


def test_of_many_sites_the_one_that_has_spent_most_is_followed(make_site, build, train_steps):
    sites = [make_site(f"s{i:02d}", 1.0, units=100 + i) for i in range(history.MOST_SITES + 1)]
    _, result, promise = ran(sites, build, train_steps, rounds=1)
    epsilons = {site.name: site.epsilon for site in result.sites}
    (after,) = history.epsilon_after(result.rounds, sites, promise, local_steps=2, epsilons=epsilons)
    worst = max(epsilons, key=lambda name: epsilons[name] or 0.0)
    assert after == {worst: pytest.approx(epsilons[worst], rel=1e-9)}
