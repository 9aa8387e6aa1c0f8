"""The server as a state machine: what a reply may not do, what a round costs, what a checkpoint holds."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from sfumato.errors import UsageError
from sfumato.federation import rounds, server_state
from sfumato.federation.keeping import Keeper
from sfumato.federation.mechanism_settings import Central, Distributed, Median, TrimmedMean
from sfumato.federation.messages import Part, Refusal, Reply
from sfumato.federation.settings import BySize, FederationSettings, Momentum, Uniform
from sfumato.randomness import TestRandom

SHAPES = {"w": (2,), "ears": (3,)}
HELD = {"a": SHAPES, "b": SHAPES, "c": {"w": (2,)}}
POPULATIONS = {"a": 100, "b": 300, "c": 100}
START = {"w": torch.zeros(2), "ears": torch.zeros(3)}


def begin(held=HELD, start=START, **settings) -> server_state.ServerState:
    wanted = FederationSettings(**{"sites": 3, "rounds": 4, **settings})
    public = rounds.make_public(wanted, POPULATIONS, held)
    return rounds.begin(wanted, public, start, run="r", recipe="f" * 64)


def good(ask, site, value=1.0, **values: Any) -> Reply:
    tensors = {name: torch.full_like(tensor, value) for name, tensor in ask.tensors.items()}
    return Reply.to(ask, site, Part(tensors=tensors, values={"steps": 5, "charged": 5 * ask.round, **values}))


def a_round(server, change=lambda replies: replies, value=1.0, chance=None):
    chance = chance or TestRandom(0)
    server, asked = rounds.asks(server, chance)
    replies = {site: good(ask, site, value) for site, ask in asked.items()}
    return rounds.receive(server, change(replies), chance, seconds=2.0)


def test_a_round_by_hand():
    """Parts that a site does not hold are not asked of it, and are averaged over those that do."""
    server, asked = rounds.asks(begin(), TestRandom(0))
    assert {site: sorted(ask.tensors) for site, ask in asked.items()} == {
        "a": ["ears", "w"], "b": ["ears", "w"], "c": ["w"],
    }  # fmt: skip
    assert asked["a"].values["recipe"] == "f" * 64
    replies = {site: good(ask, site, {"a": 1.0, "b": 2.0, "c": 6.0}[site]) for site, ask in asked.items()}
    after = rounds.receive(server, replies, TestRandom(0), seconds=2.0)
    torch.testing.assert_close(after.state["w"], torch.full((2,), (1 * 100 + 2 * 300 + 6 * 100) / 500))
    torch.testing.assert_close(after.state["ears"], torch.full((3,), (1 * 100 + 2 * 300) / 400))
    (result,) = after.results
    assert (result.sites, result.steps, result.seconds) == (("a", "b", "c"), 15, 2.0)
    assert result.bytes_up == result.bytes_down == (5 + 5 + 2) * 4
    assert result.charged == {"a": 5, "b": 5, "c": 5}
    assert (after.round, after.charged, after.open, after.done) == (2, 1, None, False)


def test_asks_and_receive_take_turns_until_the_last_round():
    server = begin(rounds=2)
    with pytest.raises(UsageError, match="waiting = nobody"):
        rounds.receive(server, {}, TestRandom(0))
    waiting, _ = rounds.asks(server, TestRandom(0))
    with pytest.raises(UsageError, match="waits for replies"):
        rounds.asks(waiting, TestRandom(0))
    server = a_round(a_round(server))
    assert server.done
    with pytest.raises(UsageError, match="is over"):
        rounds.asks(server, TestRandom(0))


def named(code):
    return lambda reply: replace(reply, **BROKEN[code](reply))


BROKEN = {
    "update_not_finite": lambda r: {"tensors": {**r.tensors, "w": torch.tensor([1.0, float("nan")])}},
    "update_shape": lambda r: {"tensors": {**r.tensors, "w": torch.ones(3)}},
    "late_reply": lambda r: {"round": r.round - 1},
    "wrong_name": lambda r: {"site": "b"},
    "reply_malformed": lambda r: {"values": {"said": 3}},
}


@pytest.mark.parametrize(
    "code", [*BROKEN, "silent", "missing_name", "extra_name", "integers", "other_run", "other_kind"]
)
def test_a_reply_that_is_not_what_was_asked_is_left_out_and_said(code):
    changes = {
        **BROKEN,
        "missing_name": lambda r: {"tensors": {"w": r.tensors["w"]}},
        "extra_name": lambda r: {"tensors": {**r.tensors, "x": torch.ones(1)}},
        "integers": lambda r: {"tensors": {**r.tensors, "w": torch.ones(2, dtype=torch.int64)}},
        "other_run": lambda r: {"run": "s"},
        "other_kind": lambda r: {"kind": "keys"},
    }

    def change(replies):
        if code == "silent":
            return {site: reply for site, reply in replies.items() if site != "a"}
        return {**replies, "a": replace(replies["a"], **changes[code](replies["a"]))}

    server = a_round(a_round(begin()), change, value=3.0)  # the second round: there is an earlier one to be late from
    wanted = {"missing_name": "update_shape", "extra_name": "update_shape", "integers": "update_not_finite"}
    wanted |= {"other_run": "late_reply", "other_kind": "late_reply"}
    (left_out,) = server.results[1].left_out
    assert (left_out.site, left_out.code) == ("a", wanted.get(code, code))
    assert server.results[1].sites == ("b", "c")
    torch.testing.assert_close(server.state["w"], torch.full((2,), 4.0))


def test_who_was_not_asked_is_not_heard():
    def change(replies):
        return {**replies, "stranger": replace(replies["a"], site="stranger")}

    server = a_round(begin(), change)
    assert [(out.site, out.code) for out in server.results[0].left_out] == [("stranger", "not_asked")]
    torch.testing.assert_close(server.state["w"], torch.ones(2))


def test_a_round_with_too_few_replies_is_discarded_charged_and_counts():
    def two_silent(replies):
        return {"c": replies["c"]}

    server = a_round(begin(least_sites=2, server=Momentum()), two_silent)
    assert server.results[0].discarded == "1 of 3 sites, 2 are needed"
    assert server.results[0].sites == () and server.state["w"].equal(torch.zeros(2)) and not server.optimizer.tensors
    assert (server.charged, server.round) == (1, 2)
    server = a_round(server)
    assert server.state["w"].equal(torch.ones(2)) and server.charged == 2


def test_an_interrupted_round_is_discarded_stays_charged_and_is_not_asked_again(tmp_path):
    keeper = Keeper(tmp_path)
    server = a_round(begin())
    waiting, asked = rounds.asks(server, TestRandom(0))
    keeper.keep(waiting)
    found = keeper.load(waiting.settings, waiting.public, recipe="f" * 64)
    assert found is not None
    again = rounds.interrupted(found)
    assert (again.round, again.charged, again.results[-1].discarded[:11]) == (3, 2, "interrupted")
    _, later = rounds.asks(again, TestRandom(0))
    assert {ask.round for ask in later.values()} == {3} and {ask.round for ask in asked.values()} == {2}


def test_a_checkpoint_is_the_state(tmp_path):
    server, _ = rounds.asks(a_round(begin(server=Momentum())), TestRandom(0))
    Keeper(tmp_path).keep(server)
    back = Keeper(tmp_path).load(server.settings, server.public, recipe=server.recipe)
    assert back is not None
    a, b = server_state.to_part(server), server_state.to_part(back)
    assert a.values == b.values and set(a.tensors) == set(b.tensors)
    assert all(a.tensors[name].equal(b.tensors[name]) for name in a.tensors)
    assert "optimizer/m/w" in a.tensors and json.dumps(dict(a.values))
    for changed in (replace(server.settings, rounds=9), replace(server.settings, least_sites=2)):
        with pytest.raises(UsageError, match="others than the checkpoint's"):
            Keeper(tmp_path).load(changed, server.public, recipe=server.recipe)
    with pytest.raises(UsageError, match="recipe"):
        Keeper(tmp_path).load(server.settings, server.public, recipe="0" * 64)


def test_a_torn_checkpoint_is_refused(tmp_path):
    keeper = Keeper(tmp_path)
    assert keeper.load(begin().settings, begin().public) is None
    keeper.keep(begin())
    keeper.path.write_bytes(keeper.path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="cannot be continued"):
        keeper.load(begin().settings, begin().public, recipe="f" * 64)


def test_the_denominator_does_not_depend_on_who_replies():
    """Central, without noise: one of three silent sites makes the step shorter."""
    mechanism = Central(max_update_norm=1e6, noise_multiplier=0.0)
    options: dict[str, Any] = {"mechanism": mechanism, "weights": "equal"}
    whole = a_round(begin(**options))
    torch.testing.assert_close(whole.state["w"], torch.ones(2))
    torch.testing.assert_close(whole.state["ears"], torch.ones(3))
    some = a_round(begin(**options), lambda replies: {"a": replies["a"], "c": replies["c"]})
    torch.testing.assert_close(some.state["w"], torch.full((2,), 2 / 3))
    torch.testing.assert_close(some.state["ears"], torch.full((3,), 1 / 2))


def test_a_refusal_counts_as_none_whatever_it_calls_itself_and_is_cut():
    def refuses(replies):
        no = Refusal(round=1, code="update_not_finite", message="x" * 10_000)
        return {**replies, "a": replace(replies["a"], tensors={}, refused=no)}

    server = a_round(begin(mechanism=Central(max_update_norm=1.0, noise_multiplier=1.0), least_sites=3), refuses)
    assert server.results[0].discarded == "2 of 3 sites, 3 are needed"
    assert len(server.results[0].left_out[0].message) == 500


def test_under_the_servers_noise_a_broken_reply_is_one_of_the_replies():
    """Whether an update is finite depends on a site's data, which the noise must hide: it may not decide about the round."""

    def broken(replies):
        return {**replies, "a": named("update_not_finite")(replies["a"])}

    mechanism = Central(max_update_norm=1.0, noise_multiplier=1.0)
    assert not a_round(begin(mechanism=mechanism, least_sites=3), broken).results[0].discarded
    assert a_round(begin(least_sites=3), broken).results[0].discarded  # each reply is private by itself


def test_unequal_weights_are_public_and_inverse_to_the_chance_of_being_asked():
    server = begin(selection=BySize(expected_sites=1.0))
    assert server.public.rates == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})
    chance, seen = TestRandom(1), []
    while not seen or len(seen[-1]) < 2:
        server, asked = rounds.asks(begin(selection=BySize(expected_sites=1.0)), chance)
        seen.append(sorted(asked))
    replies = {site: good(ask, site, float("abc".index(site))) for site, ask in asked.items()}
    after = rounds.receive(server, replies, chance)
    # N_k / q_k is the same for all: the plain mean of those who were drawn.
    torch.testing.assert_close(after.state["w"], torch.full((2,), sum("abc".index(s) for s in asked) / len(asked)))


def test_a_part_that_too_few_sent_stays_as_it_is_and_the_round_goes_on():
    """Four sites, a trimmed mean, ``ears`` at three of them: without one of these two are left, and nobody would be after trimming."""
    held = {site: SHAPES if site != "d" else {"w": (2,)} for site in "abcd"}
    wanted = FederationSettings(sites=4, rounds=2, aggregation=TrimmedMean(trimmed=1))
    public = rounds.make_public(wanted, dict.fromkeys("abcd", 100), held)
    server = rounds.begin(wanted, public, START, run="r")
    server = a_round(server, lambda replies: {site: reply for site, reply in replies.items() if site != "a"})
    assert (server.results[0].discarded, server.results[0].sites, server.results[0].unchanged) == (
        "",
        ("b", "c", "d"),
        1,
    )
    assert server.state["w"].equal(torch.ones(2)) and server.state["ears"].equal(torch.zeros(3))
    server = a_round(server)
    assert server.results[1].unchanged == 0 and server.state["ears"].equal(torch.ones(3))
    two = rounds.make_public(wanted, dict.fromkeys("abcd", 100), {**held, "c": {"w": (2,)}})
    with pytest.raises(UsageError, match="ears is held by 2 sites"):
        rounds.begin(wanted, two, START, run="r")


def test_nobody_drawn_is_a_round_too():
    server = begin(selection=Uniform(rate=1e-9))
    after = a_round(server)
    assert (after.results[0].asked, after.round, after.charged) == ((), 2, 1)
    assert after.results[0].discarded and after.state["w"].equal(torch.zeros(2))


def test_under_a_secret_draw_how_many_were_drawn_decides_nothing():
    """Nobody drawn: noise alone, as wide as ever; a discarded round would show in the model, and the charge is of a secret coin.
    40 numbers of standard deviation 5 / (3 sites x 1e-3 expected): chi-square, false alarm 2e-6."""
    central, coin = Central(noise_multiplier=5.0, max_update_norm=1.0), Uniform(rate=1e-3)
    held = {site: {"w": (40,)} for site in POPULATIONS}
    server = begin(held, {"w": torch.zeros(40)}, selection=coin, mechanism=central, weights="equal")
    after = a_round(server)
    assert (after.results[0].asked, after.results[0].discarded, after.charged) == ((), "", 1)
    square = float((after.state["w"].double() / (5.0 / 3e-3)).square().sum())
    assert chi2.ppf(1e-6, 40) < square < chi2.ppf(1 - 1e-6, 40)
    with pytest.raises(UsageError, match="least_sites = 2"):
        begin(selection=coin, mechanism=central, least_sites=2)
    begin(selection=coin, least_sites=2)  # each site's own noise: nothing is secret


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aggregation": Median(), "mechanism": Central(noise_multiplier=1.0)}, "median"),
        ({"least_sites": 4}, "least_sites = 4"),
        ({"selection": BySize(expected_sites=4.0)}, "expected_sites = 4"),
        ({"selection": Uniform(rate=0.5), "mechanism": Distributed(noise_multiplier=1.0)}, "everyone"),
    ],
)
def test_what_has_no_guarantee_is_refused_before_the_first_round(settings, words):
    with pytest.raises(UsageError) as refused:
        begin(**settings)
    assert words in str(refused.value)


def test_names_are_the_contract_between_sites():
    with pytest.raises(UsageError, match=r"w = .* at b · is"):
        begin(held={"a": {"w": (2,)}, "b": {"w": (3,)}, "c": {"w": (2,)}})
    with pytest.raises(UsageError, match="state: ears"):
        begin(start={"w": torch.zeros(2)})


def test_a_state_that_would_not_be_finite_is_not_taken():
    server = a_round(a_round(begin(), value=3e38), value=3e38)
    assert "finite" in server.results[1].discarded
    assert server.state["w"].isfinite().all()
