"""Show 1: with noise off, the same rounds by every engine are the same as a few lines that know nothing of messages.

Add a mechanism to ``MECHANISMS`` (a tolerance says how far its rounding, its coins or its clip may move it), an engine to
``engines.ENGINES``.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federation import prompting
from tests.federation.conftest import Tiny, charging, work_for
from tests.federation.engines import ENGINES
from tests.federation.secure_rounds import Sites

from sfumato.federation import local_training, site_memory
from sfumato.federation.mechanism_settings import (
    Central,
    Distributed,
    FedLora,
    LdpFl,
    LocalAndGlobal,
    Mechanism,
    RecordLevel,
    UpdateLevel,
)
from sfumato.federation.messages import State
from sfumato.federation.policy import SitePolicy
from sfumato.federation.prompts.settings import DpFpl, FedPGP
from sfumato.federation.secure.keys import Identity
from sfumato.federation.settings import Momentum
from sfumato.federation.sites import Work
from sfumato.privacy.plan import DpSgd
from sfumato.randomness import TestRandom

OFF = 0.0
VALUES = {"a": 0.5, "b": 1.0, "c": 2.0, "d": -1.0}
UNITS = {"a": 100, "b": 250, "c": 50, "d": 200}


class Adapter(torch.nn.Module):
    """Two low-rank matrices, named as peft names them."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Module()
        self.line.lora_A = torch.nn.Linear(2, 1, bias=False)
        self.line.lora_B = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.line.lora_A.weight.copy_(torch.tensor([[0.5, -0.5]]))
            self.line.lora_B.weight.fill_(0.25)


def adapting(model, table, plan, ledger, *, steps, first_step):
    """As ``charging``, both matrices; nothing is charged step by step."""
    with torch.no_grad():
        for _ in range(steps):
            model.line.lora_A.weight.add_(table.tensors["x"].mean(0))
            model.line.lora_B.weight.add_(table.tensors["x"].mean(0)[0])


@dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    tolerance: float = 1e-6
    settings: Any = None  # besides, as in a recipe
    build: Any = Tiny
    train_steps: Any = charging
    prompt: Any = None  # the method, where sites learn a prompt

    def work(self, sites) -> Work:
        build, steps = self.build, self.train_steps
        if self.prompt is not None:
            build, steps = prompting.building(self.prompt), prompting.steps_of_their_own
        return work_for(
            sites, build, steps, mechanism=self.mechanism, random=lambda: TestRandom(1), **(self.settings or {})
        )


COIN = 40.0  # epsilon of a coin that errs once in e^40
MECHANISMS: dict[str, Case] = {
    "record_level": Case(RecordLevel()),
    "record_level, momentum": Case(RecordLevel(), settings={"server": Momentum(momentum=0.5)}),
    "update_level": Case(UpdateLevel(max_update_norm=1e3, noise_multiplier=OFF), tolerance=1e-5),
    "fed_lora": Case(
        FedLora(max_a_norm=1e3, max_b_norm=1e3, noise_multiplier=OFF),
        tolerance=1e-5,
        build=Adapter,
        train_steps=adapting,
    ),
    "central": Case(Central(max_update_norm=1e3, noise_multiplier=OFF), tolerance=1e-5),
    "local_and_global": Case(
        LocalAndGlobal(max_update_norm=1e3, noise_multiplier=OFF, server_noise_multiplier=OFF), tolerance=1e-5
    ),
    # Without noise it is the sign of every number, r long; of a number that does not change, a fair coin.
    "ldp_fl": Case(LdpFl(epsilon_per_weight=COIN, radius=0.5, adaptive_range=False)),
    "ldp_fl, shuffled": Case(
        LdpFl(epsilon_per_weight=COIN, radius=0.5, adaptive_range=False, shuffled=True), settings={"weights": "equal"}
    ),
    # By secure aggregation, with a step of 2^-23 or so: what is lost is the rounding to whole numbers.
    "distributed": Case(
        Distributed(max_update_norm=16.0, noise_multiplier=OFF, bits=32), tolerance=1e-6, settings={"weights": "equal"}
    ),
    # A part of the model stays at each site, from round to round.
    "prompts, DP-FPL": Case(RecordLevel(), settings={"home": ("p_L",)}, prompt=DpFpl(rank=2)),
    "prompts, FedPGP": Case(RecordLevel(), settings={"home": ("u", "v")}, prompt=FedPGP(rank=2, contrast=0.0)),
}


PEOPLE = Sites(tuple(VALUES))
IDENTITIES = {name: Identity(public=PEOPLE.identities[name], sign=PEOPLE.keys[name].sign) for name in VALUES}


def sites_in(make_site, folder: Path, case: Case):
    if case.prompt is not None:
        return prompting.sites_of(case.prompt, list(VALUES), folder)
    free = case.mechanism.kind != "record_level"
    policy = SitePolicy(allowed_mechanisms=None, allow_not_private=True)
    made = [make_site(name, VALUES[name], units=UNITS[name], private=not free, policy=policy) for name in VALUES]
    return [
        replace(
            site,
            ledger=folder / site.name / "ledger.db",
            plan=replace(site.plan, noise_multiplier=0.0) if isinstance(site.plan, DpSgd) else site.plan,
            identity=IDENTITIES[site.name],
        )
        for site in made
    ]


def three_rounds_by_hand(sites, case: Case) -> State:
    """McMahan's algorithm on this trainer: every local step adds the site's mean; the weighted mean of the differences."""
    if case.prompt is not None:
        return {"p_G": prompting.rounds_by_hand(sites, case.prompt, rounds=3, steps=2)[0]}
    state = local_training.trained_state(case.build())
    momentum, before = (case.settings or {}).get("server"), torch.zeros(1, 2)
    equal = (case.settings or {}).get("weights") == "equal"
    weights = {name: 1 if equal else units for name, units in UNITS.items()}
    total = sum(weights.values())
    coins = case.mechanism.kind == "ldp_fl"
    for _ in range(3):
        moved = {s.name: 2 * s.table.tensors["x"].mean(0)[None] for s in sites}
        if coins:
            moved = {name: 0.5 * change.sign() for name, change in moved.items()}
        mean = sum((weights[name] / total * change for name, change in moved.items()), torch.zeros(1, 2))
        before = mean + (momentum.momentum * before if momentum is not None else 0)
        if case.build is Adapter:
            a, b = "line.lora_A.weight", "line.lora_B.weight"
            state = {a: state[a] + before, b: state[b] + before[:, :1]}
            continue
        state = {**state, "line.weight": state["line.weight"] + before}
        if coins:  # at every site the same chance, so the same side
            side = 1.0 if TestRandom(1).uniform(1)[0] < 0.5 else -1.0
            state["line.bias"] = state["line.bias"] + 0.5 * side
    return state


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_same_rounds_by_every_engine(name, engine, make_site, tmp_path):
    case = MECHANISMS[name]
    sites = sites_in(make_site, tmp_path / engine, case)
    work = case.work(sites)
    found = ENGINES[engine](sites, work, tmp_path / engine / "server")
    for parameter, tensor in three_rounds_by_hand(sites, case).items():
        torch.testing.assert_close(found[parameter], tensor, rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("name", MECHANISMS)
def test_engines_agree_with_each_other_to_a_millionth(name, make_site, tmp_path):
    """The same chance in both: whatever a mechanism rounds, it rounds alike."""
    case, states = MECHANISMS[name], []
    for engine, run in ENGINES.items():
        sites = sites_in(make_site, tmp_path / engine, case)
        work = case.work(sites)
        states.append(run(sites, work, tmp_path / engine / "server"))
    for other in states[1:]:
        for parameter, tensor in states[0].items():
            torch.testing.assert_close(other[parameter], tensor, rtol=0, atol=1e-6)


def test_every_mechanism_that_there_is_has_a_case():
    from typing import get_args

    kinds = {kind.__name__ for kind in get_args(get_args(Mechanism)[0])}
    assert kinds == {type(case.mechanism).__name__ for case in MECHANISMS.values()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name, case in MECHANISMS.items() if case.prompt is not None])
def test_what_stays_at_home_is_the_same_by_every_engine(name, engine, make_site, tmp_path):
    case = MECHANISMS[name]
    sites = sites_in(make_site, tmp_path, case)
    found = ENGINES[engine](sites, case.work(sites), tmp_path / "server")
    _, homes = prompting.rounds_by_hand(sites, case.prompt, rounds=3, steps=2)
    assert set(found) == {"p_G"}
    for site in sites:
        kept = site_memory.kept_at_home(site)
        assert set(kept) == set(case.settings["home"])
        for parameter, tensor in kept.items():
            torch.testing.assert_close(tensor, homes[site.name][parameter], rtol=0, atol=case.tolerance)
