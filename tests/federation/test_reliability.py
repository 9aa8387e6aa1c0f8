"""kill -9 of a server in the middle of a round, and what is left of it: model, round and accounts of one moment."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from tests.federation.conftest import work_for

from sfumato.errors import LedgerError
from sfumato.federation import rounds, serving, simulate
from sfumato.federation.keeping import Keeper
from sfumato.federation.mechanism_settings import Central
from sfumato.federation.policy import SitePolicy
from sfumato.privacy.ledger import show
from sfumato.randomness import TestRandom

TRUSTING = SitePolicy(allowed_mechanisms=("central",), allow_not_private=True)
NOISE = Central(max_update_norm=100.0, noise_multiplier=0.0)  # none; charged all the same


@pytest.fixture
def three(make_site):
    return [
        make_site(name, value, private=False, policy=TRUSTING) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    ]


def served(sites, work, folder, exchange):
    """What ``simulate`` does, with another exchange."""
    keeper = Keeper(folder)
    server = keeper.load(work.settings, work.public, recipe=work.recipe)
    if server is None:
        server = rounds.begin(work.settings, work.public, simulate.start_of(sites, work), run="r")
    else:
        server = rounds.interrupted(server)
    with simulate.server_ledger(work, "r", folder) as ledger:
        return serving.serve(server, exchange, chance=TestRandom(0), keeper=keeper, ledger=ledger)


def _dies_in_round(number, when, sites, work, folder):
    here = simulate.exchange_here(sites, work)

    def exchange(asked):
        if next(iter(asked.values())).round < number:
            return here(asked)
        if when != "asked":
            here({site: ask for site, ask in asked.items() if site != "c" or when == "all answered"})
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    served(sites, work, folder, exchange)


@pytest.mark.parametrize("when", ["asked", "some answered", "all answered"])
def test_a_server_that_is_killed_in_a_round_resumes_with_the_next_one(three, tmp_path, when):
    work = work_for(three, mechanism=NOISE, rounds=4, weights="equal")
    folder = tmp_path / "server"
    process = multiprocessing.get_context("fork").Process(target=_dies_in_round, args=(2, when, three, work, folder))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert show(folder / "ledger.db")["steps"] == 2  # the round in which it died was charged before anybody was asked

    server = served(three, work, folder, simulate.exchange_here(three, work))
    assert [result.round for result in server.results] == [1, 2, 3, 4]
    assert [bool(result.discarded) for result in server.results] == [False, True, False, False]
    assert not any(out.code == "replayed" for result in server.results for out in result.left_out)
    assert show(folder / "ledger.db")["steps"] == server.charged == 4
    # three rounds of the mean of 2 x 1, 2 x 2, 2 x 3
    torch.testing.assert_close(server.state["line.weight"], torch.tensor([[0.5, -0.5]]) + 3 * 4.0)


def test_a_round_that_was_told_is_kept_even_if_the_server_dies_while_it_is_looked_at(three, tmp_path):
    """Pictures and a loss after a round take seconds, and the line about it has been read by then."""
    work = work_for(three, mechanism=NOISE, rounds=3, weights="equal")

    def dies(result, state):
        if result.round == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        simulate.simulate(three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), on_round=dies)
    rest = simulate.simulate(three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), resume=True)
    assert [bool(r.discarded) for r in rest.rounds] == [False] * 3
    assert show(tmp_path / "server" / "ledger.db")["steps"] == 3


def test_a_stop_that_a_look_asked_for_is_kept_too(three, tmp_path):
    work = work_for(three, mechanism=NOISE, rounds=3, weights="equal")
    told = simulate.simulate(
        three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), on_round=lambda *_: "enough"
    )
    again = simulate.simulate(three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), resume=True)
    assert (told.stopped, again.stopped, len(again.rounds)) == ("enough", "enough", 1)


def test_resumed_without_an_accident_is_as_if_it_had_not_stopped(three, tmp_path, make_site):
    work = work_for(three, mechanism=NOISE, rounds=3)
    pauses = iter([False, True])
    half = simulate.simulate(
        three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), pause=lambda: next(pauses)
    )
    assert not half.finished and len(half.rounds) == 1
    rest = simulate.simulate(three, work, run="r", folder=tmp_path / "server", chance=TestRandom(0), resume=True)
    assert rest.finished and [bool(r.discarded) for r in rest.rounds] == [False] * 3
    others = [replace(site, ledger=tmp_path / f"again-{site.name}" / "ledger.db") for site in three]
    whole = simulate.simulate(others, work, run="r", folder=tmp_path / "other", chance=TestRandom(0))
    torch.testing.assert_close(rest.state["line.weight"], whole.state["line.weight"], rtol=0, atol=1e-6)


def test_an_older_ledger_than_the_checkpoint_is_refused(three, tmp_path):
    """Set back, it would hide what was spent."""
    work = work_for(three, mechanism=NOISE)
    folder = tmp_path / "server"
    pauses = iter([False, False, True])
    simulate.simulate(three, work, run="r", folder=folder, pause=lambda: next(pauses))
    (folder / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="older than the checkpoint"):
        simulate.simulate(three, work, run="r", folder=folder, resume=True)


@pytest.mark.parametrize("older", [1, 2])
def test_an_older_checkpoint_than_the_ledger_is_refused(three, tmp_path, older):
    """Set back by a round or more, or gone, it would have rounds noised a second time that were charged once."""
    work, folder, copies = work_for(three, mechanism=NOISE), tmp_path / "server", []
    for _ in range(2):
        if Keeper(folder).path.exists():
            copies.append(Keeper(folder).path.read_bytes())
        pause = iter([False, True]).__next__
        simulate.simulate(three, work, run="r", folder=folder, resume=bool(copies), pause=pause)
    whole = Keeper(folder).path.read_bytes()
    if older == 1:
        Keeper(folder).path.write_bytes(copies[0])
    else:
        Keeper(folder).path.unlink()
    with pytest.raises(LedgerError, match="missing, or older than the ledger") as refused:
        simulate.simulate(three, work, run="r", folder=folder, resume=True)
    assert refused.value.code == "checkpoint_older_than_ledger"
    Keeper(folder).path.write_bytes(whole)
    assert simulate.simulate(three, work, run="r", folder=folder, resume=True).finished
    assert show(folder / "ledger.db")["steps"] == 3


@pytest.mark.parametrize("last", [False, True], ids=["a round in between", "the last round"])
def test_a_server_that_died_between_its_checkpoint_and_its_ledger_charges_the_round_and_discards_it(
    three, tmp_path, monkeypatch, last
):
    work, folder = work_for(three, mechanism=NOISE, rounds=3), tmp_path / "server"
    asked, here, charge = [], simulate.exchange_here(three, work), serving._charge

    def dies(server, ledger, plan):
        if server.round == (3 if last else 2) and server.open is not None:
            raise KeyboardInterrupt
        charge(server, ledger, plan)

    def exchange(asks):
        asked.append(next(iter(asks.values())).round)
        return here(asks)

    monkeypatch.setattr(serving, "_charge", dies)
    with pytest.raises(KeyboardInterrupt):
        served(three, work, folder, exchange)
    before = show(folder / "ledger.db")["steps"]
    assert before == len(asked) == (2 if last else 1)
    monkeypatch.setattr(serving, "_charge", charge)
    server = served(three, work, folder, exchange)
    assert [bool(result.discarded) for result in server.results] == (
        [False, False, True] if last else [False, True, False]
    )
    assert show(folder / "ledger.db")["steps"] == server.charged == 3


def test_the_server_is_charged_before_a_site_is_asked(three, tmp_path):
    work, folder, seen = work_for(three, mechanism=NOISE), tmp_path / "server", []
    here = simulate.exchange_here(three, work)

    def exchange(asked):
        seen.append(show(folder / "ledger.db")["steps"])
        kept = Keeper(folder).load(work.settings, work.public)
        assert kept is not None and kept.waiting == ("a", "b", "c") and kept.charged == len(seen)
        return here(asked)

    served(three, work, folder, exchange)
    assert seen == [1, 2, 3]


def test_slow_sites_are_left_out_and_their_late_replies_are_refused(three, tmp_path):
    """c answers round 1 when round 2 is asked: it is in neither, and has spent nothing more than it answered."""
    work, kept = work_for(three, mechanism=NOISE, weights="equal"), {}
    here = simulate.exchange_here(three, work)

    def exchange(asked):
        number = next(iter(asked.values())).round
        replies = dict(here(asked))
        kept[number] = replies["c"]
        if number == 1:
            del replies["c"]
        if number == 2:
            replies["c"] = kept[1]
        return replies

    server = served(three, work, tmp_path / "server", exchange)
    assert [[(out.site, out.code) for out in r.left_out] for r in server.results] == [
        [("c", "silent")], [("c", "late_reply")], [],
    ]  # fmt: skip
    # The denominator is 3 in every round.
    torch.testing.assert_close(
        server.state["line.weight"], torch.tensor([[0.5, -0.5]]) + 2 * (2 + 4) / 3 + (2 + 4 + 6) / 3
    )
