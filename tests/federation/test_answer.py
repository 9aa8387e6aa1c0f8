"""A site that is asked: what it checks first, what it keeps, what it never says."""

import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
import torch
from tests.federation.conftest import Tiny, charging, work_for
from torch import nn

from sfumato.errors import UsageError
from sfumato.federation import local, local_training, simulate, site_memory
from sfumato.federation.mechanism_settings import Central, UpdateLevel
from sfumato.federation.messages import Ask
from sfumato.federation.policy import SitePolicy
from sfumato.privacy.ledger import show
from sfumato.randomness import TestRandom


def ask_of(work, round=1, exchange=0, kind="train", **changed):
    tensors = local_training.trained_state(work.build())
    values = {"recipe": work.recipe, "told": {}, "collecting": {}}
    return replace(Ask(run="r", round=round, exchange=exchange, kind=kind, tensors=tensors, values=values), **changed)


def untouched():
    raise AssertionError("the data was touched")


def test_an_answer_holds_the_update_and_public_numbers_alone(make_site):
    site = make_site("a", 2.0)
    work = work_for([site])
    reply = local.answer(site, work, ask_of(work))
    assert reply.refused is None
    assert sorted(reply.tensors) == ["line.bias", "line.weight"]
    assert dict(reply.values) == {"steps": 2, "charged": 2, "said": {}}
    torch.testing.assert_close(reply.tensors["line.weight"], torch.full((1, 2), 4.0))


def test_the_policy_says_what_may_be_said(make_site):
    site = make_site("a", 2.0, policy=SitePolicy(may_say=()))
    work = work_for([site])
    assert dict(local.answer(site, work, ask_of(work)).values) == {"said": {}}


def test_no_ask_is_answered_twice_whatever_the_process(make_site):
    site = make_site("a", 1.0)
    work = work_for([site])
    assert local.answer(site, work, ask_of(work, round=2)).refused is None
    spent = show(site.ledger)["steps"]
    for round in (2, 1):
        again = local.answer(replace(site, table=untouched), work, ask_of(work, round=round))
        assert again.refused is not None and again.refused.code == "replayed" and not again.tensors
    assert show(site.ledger)["steps"] == spent == 2
    assert local.answer(site, work, ask_of(work, round=3)).refused is None


def test_a_crash_after_the_charge_does_not_make_an_ask_answerable_again(make_site):
    def dies(*arguments, **named):
        charging(*arguments, **named)
        raise MemoryError("in the middle of it")

    site = make_site("a", 1.0)
    work = work_for([site], train_steps=dies)
    first = local.answer(site, work, ask_of(work))
    assert first.refused is not None and first.refused.code == "failed"
    second = local.answer(site, work, ask_of(work))
    assert second.refused is not None and second.refused.code == "replayed"
    assert show(site.ledger)["steps"] == 2  # spent, and said so


def _killed(site, work, ask):
    local.answer(site, work, ask)


def _kills(*arguments, **named):
    charging(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_site_that_is_killed_in_a_round_has_spent_it_and_goes_on_with_the_next(make_site):
    site = make_site("a", 1.0)
    work = work_for([site], train_steps=_kills)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(site, work, ask_of(work)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert show(site.ledger)["steps"] == 2
    work = work_for([site])
    replayed = local.answer(site, work, ask_of(work))
    assert replayed.refused is not None and replayed.refused.code == "replayed"
    later = local.answer(site, work, ask_of(work, round=2))
    assert later.refused is None and later.values["charged"] == 4


@pytest.mark.parametrize(
    ("policy", "changed", "code"),
    [
        ({"allowed_recipes": ("0" * 64,)}, {}, "recipe_not_allowed"),
        ({"allowed_mechanisms": ("update_level",)}, {}, "mechanism_not_allowed"),
        ({"min_units": 101}, {}, "too_few_units"),
        ({"max_epsilon": 0.01}, {}, "site_limit"),
        ({}, {"values": {"recipe": "0" * 64}}, "other_recipe"),
        ({}, {"round": 4}, "rounds_over"),
        ({}, {"exchange": 1}, "not_an_exchange"),
        ({}, {"kind": "keys"}, "not_an_exchange"),
        ({}, {"tensors": {"line.weight": torch.zeros(1, 2)}}, "other_parameters"),
        ({}, {"tensors": {"line.weight": torch.zeros(1, 3), "line.bias": torch.zeros(1)}}, "other_parameters"),
    ],
)
def test_a_site_refuses_before_it_reads_its_data_and_spends_nothing(make_site, policy, changed, code):
    site = replace(make_site("a", 1.0, policy=SitePolicy(**policy)), table=untouched)

    def build() -> nn.Module:
        raise AssertionError("a model was built")

    work = replace(work_for([site], recipe="f" * 64), build=build)
    tensors = {"line.weight": torch.zeros(1, 2), "line.bias": torch.zeros(1)}
    ask = Ask(run="r", round=1, exchange=0, kind="train", tensors=tensors, values={"recipe": "f" * 64})
    reply = local.answer(site, work, replace(ask, **changed), failed=_raise)
    assert reply.refused is not None and reply.refused.code == code
    assert not site.ledger.exists() or show(site.ledger)["steps"] == 0


def _raise(error):
    raise error


def test_a_site_takes_part_in_as_many_rounds_as_it_allows(make_site):
    site = make_site("a", 1.0, policy=SitePolicy(max_rounds=2))
    result = simulate.simulate([site], work_for([site]), run="r")
    assert [(no.round, no.code) for no in result.sites[0].refused] == [(3, "rounds_limit")]


def test_what_went_wrong_stays_at_the_site(make_site):
    def tells(model, table, *rest, **named):
        raise ValueError(f"the record of Mrs Example: {table.tensors['x'][0, 0]}")

    site = make_site("a", 0.123)
    work = work_for([site], train_steps=tells)
    reply = local.answer(site, work, ask_of(work))
    _, text = reply.to_arrays()
    assert reply.refused is not None and reply.refused.code == "failed"
    assert "Example" not in text and "0.123" not in text and not reply.tensors
    assert "Mrs Example: 0.123" in site.ledger.with_suffix(".log").read_text()
    with pytest.raises(ValueError, match="Mrs Example"):  # an engine in one process may hear it
        local.answer(site, work, ask_of(work, round=2), failed=_raise)


def test_what_the_ledger_says_of_other_runs_stays_at_the_site(make_site, tmp_path):
    first = replace(make_site("a", 1.0), account=tmp_path / "account.db", account_limit=(0.5, 1e-4))
    work = work_for([first])
    reply = local.answer(first, work, ask_of(work))
    assert reply.refused is not None and reply.refused.code == "account_limit"
    assert "0.5" not in reply.refused.message and str(tmp_path) not in reply.refused.message
    assert "account_epsilon = 0.5" in first.ledger.with_suffix(".log").read_text()


def test_the_policys_limit_on_all_runs_binds_the_account(make_site, tmp_path):
    account, policy = tmp_path / "account.db", SitePolicy(account_epsilon=2.0)
    first = replace(make_site("a", 1.0, policy=policy), account=account)
    assert local.answer(first, work_for([first]), ask_of(work_for([first]))).refused is None
    other = replace(first, ledger=tmp_path / "other" / "ledger.db", plan=replace(first.plan, noise_multiplier=0.5))
    no = local.answer(other, work_for([other]), ask_of(work_for([other])))
    assert no.refused is not None and no.refused.code == "account_limit"


def test_a_folder_of_another_run_and_a_lost_memory_are_refused(make_site):
    site = make_site("a", 1.0)
    work = work_for([site])
    assert local.answer(site, work, ask_of(work)).refused is None
    other = local.answer(site, work, ask_of(work, run="s", round=2))
    assert other.refused is not None and other.refused.code == "other_run"
    site.ledger.with_suffix(".kept").unlink()
    lost = local.answer(site, work, ask_of(work, round=2))
    assert lost.refused is not None and lost.refused.code == "memory_missing"


class Larger(Tiny):
    """A part that no other site has."""

    def __init__(self) -> None:
        super().__init__()
        self.ears = nn.Linear(2, 1)
        with torch.no_grad():
            self.ears.weight.zero_()
            self.ears.bias.zero_()


def training_both(model, table, plan, ledger, **named):
    charging(model, table, plan, ledger, **named)
    with torch.no_grad():
        model.ears.weight.add_(1.0)


def test_a_part_that_nobody_else_has_stays_at_home_and_goes_on_learning(make_site):
    sites = [replace(make_site("a", 1.0), build=Larger), make_site("b", 1.0)]

    def steps(model, *rest, **named):
        (training_both if isinstance(model, Larger) else charging)(model, *rest, **named)

    result = simulate.simulate(sites, work_for(sites, train_steps=steps), run="r")
    assert set(result.state) == {"line.weight", "line.bias"}
    assert result.bytes_up == 3 * 2 * 12
    with site_memory.Memory.of(sites[0], Ask(run="r", round=9, exchange=0, kind="train")) as memory:
        assert memory.home["ears.weight"].tolist() == [[3.0, 3.0]]
        assert memory.rounds == 3


def test_a_part_that_two_sites_share_is_averaged_over_them(make_site):
    sites = [make_site("a", 1.0), *(replace(make_site(name, 1.0), build=Larger) for name in "bc")]

    def steps(model, *rest, **named):
        (training_both if isinstance(model, Larger) else charging)(model, *rest, **named)

    result = simulate.simulate(sites, work_for(sites, train_steps=steps), run="r")
    torch.testing.assert_close(result.state["ears.weight"], torch.full((1, 2), 3.0))
    assert result.bytes_up == 3 * (12 + 24 + 24)


# -- where the mechanism protects and the steps are ordinary --


def test_an_updates_event_is_charged_before_the_data_are_read(make_site):
    """Also where the reading fails: what was charged stays charged."""
    site = make_site("a", 1.0, private=False)
    work = work_for([site], mechanism=UpdateLevel(noise_multiplier=8.0), random=lambda: TestRandom(0))
    charged = []

    def reads():
        charged.append(show(site.ledger)["steps"])
        return site.table

    assert local.answer(replace(site, table=reads), work, ask_of(work), failed=_raise).refused is None
    assert charged == [1]
    failing = local.answer(replace(site, table=untouched), work, ask_of(work, round=2))
    assert failing.refused is not None and failing.refused.code == "failed"
    assert show(site.ledger)["steps"] == 2


def test_a_site_counts_the_rounds_of_a_trusted_server_too(make_site):
    """It keeps no ledger of its own there; its policy's limit is on what the server's plan says of so many rounds."""
    mechanism = Central(noise_multiplier=4.0)
    plain = make_site("a", 1.0, private=False)
    refused = local.answer(plain, work_for([plain], mechanism=mechanism), ask_of(work_for([plain])))
    assert refused.refused is not None and refused.refused.code == "mechanism_not_allowed"

    work = work_for([plain], mechanism=mechanism, rounds=3)
    from sfumato.federation import mechanisms

    plan = mechanisms.build(work.settings).promise(work.public).at_server
    assert plan is not None
    policy = SitePolicy(allowed_mechanisms=("central",), max_epsilon=plan.epsilon(2))
    site = replace(plain, policy=policy, ledger=plain.ledger.parent / "trusting" / "ledger.db")
    told = {"values": {"recipe": "", "told": {"max_update_norm": 1.0}}}
    codes = []
    for round in (1, 2, 3):
        reply = local.answer(site, work, ask_of(work, round=round, **told), failed=_raise)
        codes.append(None if reply.refused is None else reply.refused.code)
    assert codes == [None, None, "site_limit"]
    # Rounds in which it was not asked have spent as much: whether it was, was a coin.
    seldom = replace(site, ledger=site.ledger.parent / "seldom" / "ledger.db")
    reply = local.answer(seldom, work, ask_of(work, round=3, **told), failed=_raise)
    assert reply.refused is not None and reply.refused.code == "site_limit"


def test_a_private_plan_under_such_a_mechanism_is_a_mistake(make_site):
    site = make_site("a", 1.0)
    work = work_for([site], mechanism=UpdateLevel(noise_multiplier=8.0))
    with pytest.raises(UsageError, match="ordinary ones"):
        local.answer(site, work, ask_of(work), failed=_raise)
