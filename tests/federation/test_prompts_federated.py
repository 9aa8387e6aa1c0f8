"""Prompts on the federation's own rounds: what leaves a site, what stays, who is refused, what is charged."""

from dataclasses import replace

import pytest
import torch
from tests.federation.prompting import METHODS, free_plan, model_of, plan_of, table_of

from sfumato.errors import UsageError
from sfumato.federation import local, simulate, site_memory
from sfumato.federation.messages import Ask
from sfumato.federation.policy import SitePolicy
from sfumato.federation.prompts.settings import HOME, DpFpl, PromptFL
from sfumato.federation.prompts.training import PromptSteps
from sfumato.federation.settings import FederationSettings
from sfumato.federation.sites import Site
from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.ledger import show
from sfumato.randomness import TestRandom

NAMES = [f"{m.kind}-{getattr(m, 'residual', '')}" for m in METHODS]
SITES = ("a", "b", "c")


def sites_in(folder, method, *, noise=1.0, free=False):
    settings = model_of(method).settings
    plan = free_plan(20, steps=6) if free else plan_of(20, noise=noise, rate=0.5, steps=6, settings=settings)
    return [
        Site(
            name=name,
            table=table_of(20, seed=number, units=[f"{name}{i}" for i in range(20)]),
            plan=plan,
            ledger=folder / name / "ledger.db",
            policy=SitePolicy(allow_not_private=free),
        )
        for number, name in enumerate(SITES)
    ]


def work_of(sites, method, **settings):
    home = tuple(name for name in HOME if name in model_of(method).trained())
    wanted = {"sites": len(sites), "rounds": 3, "local_steps": 2, "home": home, **settings}
    return simulate.work_of(
        sites,
        build=lambda: model_of(method),
        train_steps=PromptSteps(TestRandom(7)),
        settings=FederationSettings(**wanted),
        random=lambda: TestRandom(1),
    )


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_the_shared_prompt_alone_travels_and_the_rest_goes_on_at_home(method, tmp_path):
    sites = sites_in(tmp_path, method)
    work = work_of(sites, method)
    here, seen, kept = simulate.exchange_here(sites, work), set(), []

    def exchange(asked):
        replies = here(asked)
        for message in (*asked.values(), *replies.values()):
            seen.update(message.tensors)
        kept.append(site_memory.kept_at_home(sites[0]))
        return replies

    result = simulate.simulate(sites, work, run="r", chance=TestRandom(0), exchange=exchange)
    own = set(model_of(method).trained()) - {"p_G"}
    assert seen == {"p_G"} and set(result.state) == {"p_G"}
    assert all(set(home) == own for home in kept) and len(kept) == 3
    for name in own:  # it moves from round to round, at each site its own way
        assert not torch.equal(kept[0][name], kept[1][name]) and not torch.equal(kept[1][name], kept[2][name])
        assert not torch.equal(kept[2][name], site_memory.kept_at_home(sites[1])[name])
    assert result.bytes_up == 3 * 3 * model_of(method).p_G.numel() * 8


def test_each_site_pays_for_all_blocks_together(tmp_path):
    """What the ledger says is the joint mechanism's epsilon; that of the block which is sent, taken alone, is less and not it."""
    sites = sites_in(tmp_path, DpFpl(rank=2), noise=1.0)
    result = simulate.simulate(sites, work_of(sites, DpFpl(rank=2)), run="r", chance=TestRandom(0))

    def spent(sigma):
        event = Event(mechanism="poisson_gaussian", sampling_rate=0.5, noise_multiplier=sigma, count=6)
        return accounting.epsilon([event], 1e-3) or 0.0

    assert result.unit == "record" and show(sites[0].ledger)["steps"] == 6
    assert result.epsilon == pytest.approx(spent(1.0))
    assert (result.epsilon or 0.0) > 1.3 * spent(3**0.5)


def test_without_noise_the_rounds_are_those_of_a_few_lines(tmp_path):
    """PromptFL, everything sampled: the mean of what each site's plain descent gives."""
    sites = sites_in(tmp_path, PromptFL(), free=True)
    result = simulate.simulate(sites, work_of(sites, PromptFL()), run="r", chance=TestRandom(0))
    state = model_of(PromptFL()).p_G.detach().clone()
    for _ in range(3):
        after = []
        for site in sites:
            model = model_of(PromptFL())
            model.p_G.data.copy_(state)
            for _ in range(2):
                told = model.told(model.prompts())
                loss = model.losses(site.table.tensors["image"], site.table.tensors["label"], told).mean()
                (slope,) = torch.autograd.grad(loss, model.p_G)
                model.p_G.data -= 0.1 * slope
            after.append(model.p_G.detach().clone())
        state = torch.stack(after).mean(0)
    torch.testing.assert_close(result.state["p_G"], state, rtol=0, atol=1e-6)


def asked_for(work, *names):
    model = model_of(DpFpl(rank=2))
    tensors = {name: model.trained()[name].detach() for name in names}
    values = {"recipe": work.recipe, "told": {}, "collecting": {}}
    return Ask(run="r", round=1, exchange=0, kind="train", tensors=tensors, values=values)


def test_a_server_that_asks_for_the_residual_is_refused_before_the_data_are_read(tmp_path):
    def untouched():
        raise AssertionError("the data was touched")

    site = sites_in(tmp_path, DpFpl(rank=2))[0]
    work = work_of(sites_in(tmp_path, DpFpl(rank=2)), DpFpl(rank=2))
    for number, names in enumerate([("p_G", "p_L"), ("p_L",), ("p_G", "words")], start=1):
        ask = asked_for(work, *(n for n in names if n != "words"))
        ask = replace(
            ask, round=number, tensors={**ask.tensors, **({"words": torch.zeros(2)} if "words" in names else {})}
        )
        reply = local.answer(replace(site, table=untouched), work, ask)
        assert reply.refused is not None and reply.refused.code == "other_parameters" and not reply.tensors
    assert not site.ledger.exists()
    good = local.answer(site, work, replace(asked_for(work, "p_G"), round=3))
    assert good.refused is None and set(good.tensors) == {"p_G"}


def test_a_home_that_no_site_has_is_refused(tmp_path):
    sites = sites_in(tmp_path, PromptFL())
    with pytest.raises(UsageError, match="home = p_L"):
        work_of(sites, PromptFL(), home=("p_L",))


def test_a_run_that_was_stopped_goes_on_with_what_is_at_home(tmp_path):
    states = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        sites = sites_in(folder, DpFpl(rank=2), noise=0.5)
        work = replace(work_of(sites, DpFpl(rank=2)))
        rounds = iter(range(10))
        pause = (lambda rounds=rounds: next(rounds) == 2) if stop else None
        # every round with chance of its own, so that both runs draw alike
        work = replace(work, train_steps=_per_call())
        result = simulate.simulate(sites, work, run="r", folder=folder / "server", chance=TestRandom(0), pause=pause)
        if stop:
            assert not result.finished
            result = simulate.simulate(
                sites, work, run="r", folder=folder / "server", resume=True, chance=TestRandom(0)
            )
        states.append((result.state["p_G"], site_memory.kept_at_home(sites[2])["p_L"]))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)


def _per_call():
    def steps(model, table, plan, ledger, *, steps, first_step):
        PromptSteps(TestRandom(first_step))(model, table, plan, ledger, steps=steps, first_step=first_step)

    return steps
