"""The federation with the real private engine: what the pieces promise, together."""

from dataclasses import replace

import pytest
import torch
from tests.federation.conftest import work_for
from torch import nn

from sfumato.federation.simulate import simulate
from sfumato.federation.sites import Site
from sfumato.privacy.engine import make_engine
from sfumato.privacy.plan import DpSgd
from sfumato.records import UnitTable

TRUTH = torch.tensor([2.0, -1.0, 0.5])


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.line.weight)

    def losses(self, batch):
        return batch.per_unit((self.line(batch.tensors["x"])[:, 0] - batch.tensors["y"]) ** 2)


def private_steps(model, table, plan, ledger, *, steps, first_step):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = make_engine(model, plan, ledger=ledger)
    engine.attach(optimizer)
    for batch in engine.batches(table, steps=steps):
        model.losses(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()


@pytest.fixture
def sites(tmp_path):
    made = []
    for index, units in enumerate((900, 400)):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(units * 2, 3, generator=generator)
        names = [f"{index}-{i // 2}" for i in range(units * 2)]
        plan = DpSgd(
            population=units, expected_batch_size=units / 4, steps=15, noise_multiplier=2.0, delta=1e-4, unit="person",
            records_per_unit=2, max_grad_norm=1.0,
        )  # fmt: skip
        table = UnitTable({"x": x, "y": x @ TRUTH}, names)
        made.append(Site(name=f"s{index}", table=table, plan=plan, ledger=tmp_path / f"s{index}.db"))
    return made


def test_three_private_rounds_learn_and_spend_what_the_plans_say(sites):
    """Noise 2 over batches of 225 and 100 moves a weight by .01 to .02 a step; the start is 2.3 away from the truth."""
    result = simulate(sites, work_for(sites, Line, private_steps, rounds=3, local_steps=5), run="r")
    assert (result.state["line.weight"][0] - TRUTH).norm() < 0.4
    for site, given in zip(result.sites, sites, strict=True):
        assert (site.rounds, site.steps) == (3, 15)
        assert site.epsilon == pytest.approx(given.plan.epsilon(), rel=1e-9)


@pytest.mark.parametrize(("bands", "events"), [(4, 6), (3, 9)])
def test_rounds_with_correlated_noise_charge_whole_cycles_and_are_used(sites, bands, events):
    """Three rounds of 8 steps, each a block of its own: 2 or 3 events a round. 3 does not divide 8, and the plan has room for it."""
    first_steps = []

    def noting(*arguments, first_step, **rest):
        first_steps.append(first_step)
        private_steps(*arguments, first_step=first_step, **rest)

    site = replace(sites[0], plan=replace(sites[0].plan, steps=events * bands, bands=bands))
    assert isinstance(site.plan, DpSgd)
    result = simulate([site], work_for([site], Line, noting, rounds=4, local_steps=8), run="r")
    assert first_steps == [0, events * bands // 3, events * bands * 2 // 3]
    shown = result.sites[0]
    assert (shown.rounds, shown.steps, [no.code for no in shown.refused]) == (3, events * bands, ["budget_exhausted"])
    assert shown.epsilon == pytest.approx(site.plan.epsilon(), rel=1e-9)
    assert (result.state["line.weight"][0] - TRUTH).norm() < 0.6
