"""What sites release before the first round: charged once and before the data are read, added with public weights, kept."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.federation.conftest import Tiny, charging
from tests.federation.making import public as make_public

from sfumato.errors import UsageError
from sfumato.federation import history, local, mechanisms, opening, rounds, server_state, simulate
from sfumato.federation.keeping import Keeper
from sfumato.federation.mechanism_settings import Mean, TrimmedMean, UpdateLevel
from sfumato.federation.messages import Ask, Part, Reply
from sfumato.federation.opening import Released
from sfumato.federation.policy import SitePolicy
from sfumato.federation.settings import FederationSettings
from sfumato.federation.sites import Site
from sfumato.privacy.ledger import show
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.warm_planning import in_steps, warmed, with_warm_start
from sfumato.randomness import TestRandom
from sfumato.records import UnitTable

POPULATIONS = {"a": 100, "b": 300, "c": 200}
STD = {"a": {"mean": 0.02, "sounds": 0.04}, "b": {"mean": 0.01, "sounds": 0.02}, "c": {"mean": 0.03}}
SHAPE = {"mean": (5,), "sounds": (2, 3)}
PART = {site: {n: Released(shape=SHAPE[n], noise_std=s) for n, s in of.items()} for site, of in STD.items()}
START = {"w": torch.zeros(2)}


def announced(releases=PART):
    of = make_public(3, shapes={"w": (2,)})
    return opening.announced(
        replace(
            of, populations=POPULATIONS, rates=dict.fromkeys(POPULATIONS, 1.0), weights=dict.fromkeys(POPULATIONS, 1.0),
            holders={"w": tuple(POPULATIONS)},
        ),
        releases,
    )  # fmt: skip


def begin(releases=PART, **settings) -> server_state.ServerState:
    wanted = FederationSettings(**{"sites": 3, "rounds": 3, **settings})
    return rounds.begin(wanted, announced(releases), START, run="r", recipe="f" * 64)


def reply(ask: Ask, site: str, value: float = 0.1, **tensors: torch.Tensor) -> Reply:
    parts = {name: torch.full(SHAPE[name], value, dtype=torch.float64) for name in STD[site]} | tensors
    return Reply.to(ask, site, Part(tensors=parts, values={"said": {"steps": 0, "charged": 0}}))


def opened(server, **values):
    waiting, asked = rounds.asks(server, TestRandom(0))
    return rounds.receive(waiting, {s: reply(ask, s, values.get(s, 0.1)) for s, ask in asked.items()}, TestRandom(0))


def test_by_hand():
    """Each part is the mean over its holders by their public numbers; c has no sounds."""
    server, asked = rounds.asks(begin(), TestRandom(0))
    assert set(asked) == {"a", "b", "c"}
    assert all(
        (ask.round, ask.exchange, ask.kind, dict(ask.tensors)) == (0, 0, "release", {}) for ask in asked.values()
    )
    after = rounds.receive(
        server, {s: reply(ask, s, {"a": 0.1, "b": 0.2, "c": 0.3}[s]) for s, ask in asked.items()}, TestRandom(0)
    )
    mean, sounds = after.released.tensors["mean"], after.released.tensors["sounds"]
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean, torch.full((5,), (100 * 0.1 + 300 * 0.2 + 200 * 0.3) / 600, dtype=torch.float64))
    torch.testing.assert_close(sounds, torch.full((2, 3), (100 * 0.1 + 300 * 0.2) / 400, dtype=torch.float64))
    (result,) = after.results
    assert (result.round, result.sites, result.steps, result.discarded) == (0, ("a", "b", "c"), 0, "")
    assert result.bytes_up == 8 * (3 * 5 + 2 * 6) and result.bytes_down == 0
    assert (after.round, after.open, after.done) == (1, None, False) and after.state["w"].equal(START["w"])
    _, asked = rounds.asks(after, TestRandom(0))
    assert asked["a"].round == 1 and asked["a"].kind == "train" and set(asked["a"].tensors) == {"w"}


def test_the_noise_of_the_mean_is_what_it_is_said_to_be():
    """Against 4,000 sums of drawn noise: an empirical standard deviation is off by 5 of its own in one test of 10^6."""
    server = opened(begin())
    said = opening.noise_std(server.public, server.released)
    generator = torch.Generator().manual_seed(0)
    for name, holders in server.public.releasing.items():
        drawn = {
            site: STD[site][name] * torch.randn(4_000, generator=generator, dtype=torch.float64) for site in holders
        }
        total = sum(POPULATIONS[site] for site in holders)
        mean = torch.stack([POPULATIONS[site] / total * drawn[site] for site in holders]).sum(0)
        assert float(mean.std()) == pytest.approx(said[name], rel=5 / math.sqrt(8_000))


BROKEN = {
    "update_not_finite": {"mean": torch.full((5,), float("nan"), dtype=torch.float64)},
    "update_shape": {"mean": torch.full((4,), 0.1, dtype=torch.float64)},
    "too_long": {"mean": torch.full((5,), -5 * 0.4, dtype=torch.float64)},
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_or_impossible_release_is_left_out_and_said(code):
    server, asked = rounds.asks(begin(), TestRandom(0))
    replies = {s: reply(ask, s) for s, ask in asked.items()}
    replies["b"] = reply(asked["b"], "b", **BROKEN[code])
    after = rounds.receive(server, replies, TestRandom(0))
    (result,) = after.results
    assert result.sites == ("a", "c") and [(out.site, out.code) for out in result.left_out] == [("b", code)]
    assert after.released.values["sites"] == {"mean": ["a", "c"], "sounds": ["a"]}
    said = opening.noise_std(after.public, after.released)
    assert said["mean"] == pytest.approx(math.hypot(100 / 300 * 0.02, 200 / 300 * 0.03)) and said["sounds"] == 0.04


def test_an_honest_release_is_never_too_long():
    """At the length 1 that a mean can have, with its noise, 200 times of 10^9: none is left out."""
    of = announced()
    ask = opening.asks("r", "", of)["a"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        honest = {}
        for name in STD["a"]:
            mean = torch.randn(SHAPE[name], generator=generator, dtype=torch.float64)
            noise = STD["a"][name] * torch.randn(SHAPE[name], generator=generator, dtype=torch.float64)
            honest[name] = mean / mean.norm() + noise
        opening.check("a", reply(ask, "a", **honest), of)


def test_a_site_that_lies_within_the_bound_has_its_own_weight_and_no_more():
    honest, lied = opened(begin()), opened(begin(), a=-1 / math.sqrt(5))
    moved = (lied.released.tensors["mean"] - honest.released.tensors["mean"]).norm()
    assert float(moved) <= POPULATIONS["a"] / 600 * (1 + 0.1 * math.sqrt(5)) + 1e-9


def directions(factor: float, robust: bool = True) -> server_state.ServerState:
    """Four sites of unlike people: what they have in common, and as much of their own; site d sends ``factor`` times that."""
    generator = torch.Generator().manual_seed(2)
    part = {"mean": Released(shape=(5,), noise_std=0.001)}
    names = ("a", "b", "c", "d")
    of = replace(
        make_public(4, shapes={"w": (2,)}), populations=dict.fromkeys(names, 100), rates=dict.fromkeys(names, 1.0),
        weights=dict.fromkeys(names, 1.0), holders={"w": names},
    )  # fmt: skip
    settings = FederationSettings(sites=4, aggregation=TrimmedMean(trimmed=1) if robust else Mean(), least_sites=3)
    server = rounds.begin(settings, opening.announced(of, dict.fromkeys(names, part)), START, run="r")
    waiting, asked = rounds.asks(server, TestRandom(0))
    replies = {}
    for site, ask in asked.items():
        own = torch.randn(5, generator=generator, dtype=torch.float64)
        mean = 0.1 / math.sqrt(5) + 0.1 * own / own.norm()
        replies[site] = Reply.to(ask, site, Part(tensors={"mean": mean * (factor if site == "d" else 1.0)}))
    return rounds.receive(waiting, replies, TestRandom(0))


@pytest.mark.parametrize("factor", [-5.0, -1.0, 4.0])
def test_where_hostile_sites_are_reckoned_with_one_that_disagrees_is_left_out(factor):
    (result,) = directions(factor).results
    assert result.sites == ("a", "b", "c") and [(out.site, out.code) for out in result.left_out] == [("d", "disagrees")]
    (result,) = directions(factor, robust=False).results
    assert result.sites == ("a", "b", "c", "d")


def test_unlike_people_are_no_disagreement():
    (result,) = directions(1.0).results
    assert result.sites == ("a", "b", "c", "d") and not result.left_out


def test_a_site_that_is_all_noise_is_believed():
    """Five standard deviations: of 400 such sites none is left out but once in 10^4 tests."""
    names, numbers = ("a", "b", "c"), 200
    part = {"mean": Released(shape=(numbers,), noise_std=1.0)}
    of = opening.announced(
        replace(
            make_public(3, shapes={"w": (2,)}), populations=dict.fromkeys(names, 100), rates=dict.fromkeys(names, 1.0),
            weights=dict.fromkeys(names, 1.0), holders={"w": names},
        ),
        dict.fromkeys(names, part),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for _ in range(400):
        sent = {s: torch.randn(numbers, generator=generator, dtype=torch.float64) for s in names}
        replies = {s: Reply.to(ask, s, Part(tensors={"mean": sent[s]})) for s, ask in opening.asks("r", "", of).items()}
        assert not opening.disagreeing(of, replies)


def test_too_few_answers_release_nothing_and_training_begins_without():
    server, asked = rounds.asks(begin(least_sites=2), TestRandom(0))
    after = rounds.receive(server, {"a": reply(asked["a"], "a")}, TestRandom(0))
    assert after.results[0].discarded and not after.released.tensors and after.round == 1 and not after.done


def test_an_interrupted_opening_is_over():
    """Sites may have answered: they were charged, and will not be asked a second time."""
    server, _ = rounds.asks(begin(), TestRandom(0))
    after = rounds.interrupted(server)
    assert after.round == 1 and not after.released.tensors and "interrupted" in after.results[0].discarded


def test_a_checkpoint_holds_it(tmp_path):
    server = opened(begin())
    Keeper(tmp_path).keep(server)
    again = Keeper(tmp_path).load(server.settings, server.public, recipe=server.recipe)
    assert again is not None and again.released.values == server.released.values
    assert all(again.released.tensors[name].equal(t) for name, t in server.released.tensors.items())


def test_it_is_of_record_level_only_and_of_one_shape():
    with pytest.raises(UsageError, match="each under its own plan"):
        begin(mechanism=UpdateLevel(max_update_norm=1.0, epsilon=8.0))
    with pytest.raises(UsageError, match="is \\(5,\\) at another site"):
        announced(PART | {"b": {"mean": Released(shape=(6,), noise_std=0.1)}})


# -- at the sites --

STEPS = 6


def plan_of(units: int, epsilon: float = 8.0):
    return with_warm_start(
        epsilon=epsilon,
        share=0.3,
        dimension=5,
        population=units,
        expected_batch_size=units / 5,
        steps=STEPS,
        delta=1e-4,
    )


@pytest.fixture
def make_sites(tmp_path):
    """Sites whose release is their value, exactly; ``read`` says when each looked at its records."""
    read: list[tuple[str, int]] = []

    def make(folder="", **policies: SitePolicy) -> list[Site]:
        def one(name: str, value: float) -> Site:
            whole = plan_of(POPULATIONS[name])
            steps, alone, book = in_steps(whole), warmed(whole), tmp_path / folder / name / "ledger.db"
            assert isinstance(steps, DpSgd)

            def release(plan, random):
                assert plan == alone
                read.append((name, show(book)["steps"]))
                return {"mean": torch.full((5,), value, dtype=torch.float64)}

            units = POPULATIONS[name]
            return Site(
                name=name, plan=steps, opening=alone, release=release, ledger=book,
                table=UnitTable({"x": torch.full((units, 2), value)}, [f"{name}-{i}" for i in range(units)]),
                policy=policies.get(name, SitePolicy()),
            )  # fmt: skip

        return [one(name, value) for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))]

    make.read = read  # type: ignore[attr-defined]
    return make


def work_for(sites, **settings):
    wanted = FederationSettings(**{"sites": 3, "rounds": 3, "local_steps": 2, **settings})
    releases = {
        site.name: {"mean": Released(shape=(5,), noise_std=site.opening.noise_multiplier / site.plan.population)}
        for site in sites
    }
    return simulate.work_of(sites, build=Tiny, train_steps=charging, settings=wanted, releases=releases)


def moved_by(released):
    """The warm weights are a function of what was released, so that the end shows what training began at."""
    return {"line.weight": released.tensors["mean"][:2].float()[None], "line.bias": torch.zeros(1)}


def test_each_site_is_charged_once_before_its_records_are_read_and_training_begins_there(make_sites):
    sites = make_sites()
    work = work_for(sites)
    result = simulate.simulate(sites, work, run="r", opened=moved_by)
    assert make_sites.read == [("a", 1), ("b", 1), ("c", 1)]
    began = (100 * 0.1 + 300 * 0.2 + 200 * 0.3) / 600
    steps = 6 * began  # each step adds the mean of the site's data; sites are weighted by their units
    torch.testing.assert_close(result.state["line.weight"], torch.full((1, 2), began + steps))
    for site in sites:
        assert sorted(event["count"] for event in show(site.ledger)["events"]) == [1, STEPS]
    for site in result.sites:
        assert (site.rounds, site.steps) == (3, STEPS) and site.epsilon is not None and 7.9 < site.epsilon <= 8.0
    promise = mechanisms.build(work.settings).promise(work.public)
    epsilons = {site.name: site.epsilon for site in result.sites}
    told = history.told(result.rounds, sites, promise, work.public, local_steps=2, epsilons=epsilons)
    assert [line["round"] for line in told] == [0, 1, 2, 3]
    for site in sites:
        spent = [line["epsilons"][site.name] for line in told]
        assert site.opening is not None and spent[0] == pytest.approx(site.opening.epsilon(), rel=1e-6)
        assert spent == sorted(spent) and spent[-1] == pytest.approx(epsilons[site.name])
    json.dumps(result.to_dict())


def test_what_is_asked_again_is_refused_and_charged_once(make_sites):
    (a, *_) = sites = make_sites()
    work = work_for(sites)
    ask = opening.asks("r", "", work.public)["a"]
    assert local.answer(a, work, ask).refused is None
    again = local.answer(a, work, ask)
    assert again.refused is not None and again.refused.code == "replayed"
    assert show(a.ledger)["steps"] == 1 and make_sites.read == [("a", 1)]


def test_a_policy_that_forbids_it_refuses_before_anything_is_read_or_charged(make_sites):
    sites = make_sites(b=SitePolicy(max_epsilon=1.0))
    result = simulate.simulate(sites, work_for(sites), run="r", opened=moved_by)
    assert [name for name, _ in make_sites.read] == ["a", "c"]
    b = next(site for site in result.sites if site.name == "b")
    assert (b.epsilon, b.rounds) == (0.0, 0) and {no.code for no in b.refused} == {"site_limit"}
    assert show(sites[1].ledger)["steps"] == 0
    began = (100 * 0.1 + 200 * 0.3) / 300
    torch.testing.assert_close(result.state["line.weight"], torch.full((1, 2), 7 * began))


def test_a_limit_counts_what_was_released(make_sites):
    """A site that allows the steps alone, and not what came before them with them, stops before the end."""
    whole = plan_of(100)
    alone = DpSgd.epsilon(in_steps(whole))  # type: ignore[arg-type]
    sites = make_sites(a=SitePolicy(max_epsilon=(alone + whole.epsilon()) / 2))
    result = simulate.simulate(sites, work_for(sites), run="r", opened=moved_by)
    a = next(site for site in result.sites if site.name == "a")
    assert 0 < a.rounds < 3 and a.epsilon is not None and a.epsilon <= (alone + whole.epsilon()) / 2


def test_a_site_that_fails_after_it_was_charged_stays_charged(make_sites):
    sites = make_sites()

    def fails(plan, random):
        raise OSError("disk")

    sites[1] = replace(sites[1], release=fails)
    work = work_for(sites)
    ask = opening.asks("r", "", work.public)["b"]
    assert local.answer(sites[1], work, ask).refused.code == "failed"  # type: ignore[union-attr]
    assert show(sites[1].ledger)["steps"] == 1


def test_the_warm_weights_are_asked_for_again_until_the_first_round(make_sites, tmp_path):
    sites = make_sites()
    work = work_for(sites)
    stopped = simulate.simulate(sites, work, run="r", folder=tmp_path / "server", opened=lambda released: None)
    assert not stopped.finished and [r.round for r in stopped.rounds] == [0]
    done = simulate.simulate(sites, work, run="r", folder=tmp_path / "server", resume=True, opened=moved_by)
    assert done.finished and len(make_sites.read) == 3
    other = make_sites("other")
    whole = simulate.simulate(other, work_for(other), run="r", opened=moved_by)
    torch.testing.assert_close(done.state["line.weight"], whole.state["line.weight"])
