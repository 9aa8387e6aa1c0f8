"""A tiny model and a trainer that charges every step, for tests of what is around the private engine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.federation import simulate
from sfumato.federation.policy import SitePolicy
from sfumato.federation.settings import FederationSettings
from sfumato.federation.sites import Site
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.randomness import SecretRandom
from sfumato.records import UnitTable


class Tiny(nn.Module):
    """A line, with one frozen parameter and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(1))
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[0.5, -0.5]]))
            self.line.bias.zero_()


def charging(model, table, plan, ledger, *, steps, first_step):
    """Moves the weights by the mean of the site's data a step, and charges each step first."""
    for step in range(first_step, first_step + steps):
        event = plan.event(1)
        if event is not None:
            ledger.commit(ledger.reserve(event, step))
        with torch.no_grad():
            model.line.weight.add_(table.tensors["x"].mean(0))


@pytest.fixture
def build() -> Callable[[], nn.Module]:
    return Tiny


@pytest.fixture
def train_steps():
    return charging


def work_for(sites, build=Tiny, train_steps=charging, *, random=None, recipe="", **settings):
    """What these sites run: ``settings`` as in a recipe."""
    wanted = FederationSettings(**{"sites": len(sites), "rounds": 3, "local_steps": 2, **settings})
    return simulate.work_of(
        sites, build=build, train_steps=train_steps, settings=wanted, recipe=recipe, random=random or SecretRandom
    )


@pytest.fixture
def make_site(tmp_path: Path):
    """make_site(name, value, units=100, steps=6, policy=None, private=True): a site whose data are all ``value``."""

    def make(
        name: str,
        value: float,
        *,
        units: int = 100,
        steps: int = 6,
        policy: SitePolicy | None = None,
        private: bool = True,
    ) -> Site:
        kind = {"population": units, "expected_batch_size": units / 5, "steps": steps}
        plan: PrivacyPlan = DpSgd(**kind, noise_multiplier=3.0, delta=1e-4) if private else NotPrivate(**kind)
        return Site(
            name=name,
            table=UnitTable({"x": torch.full((units, 2), value)}, [f"{name}-{i}" for i in np.arange(units)]),
            plan=plan,
            ledger=tmp_path / name / "ledger.db",
            policy=policy or SitePolicy(),
        )

    return make
