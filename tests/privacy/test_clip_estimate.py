"""Choosing C from a private quantile of the gradients' norms: one plan, one epsilon, two kinds of events."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.oracles import table_of
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy import accounting, clip_estimate
from sfumato.privacy.engine import DifferentialPrivacyEngine, make_engine
from sfumato.privacy.estimate import Column, figures
from sfumato.privacy.gradients.reference import per_unit_gradients
from sfumato.privacy.guarantee import guarantee
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.norms import GradientNorms, estimated_bound
from sfumato.privacy.plan import Composition, DpSgd, Estimate
from sfumato.privacy.plan_json import plan_from_dict, plan_to_dict
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable

WHOM = {"population": 400, "delta": 1e-4, "unit": "person", "records_per_unit": 2}
STEPS = {"expected_batch_size": 40.0, "steps": 20, **WHOM}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def people(scale: float = 1.0, count: int = 400) -> UnitTable:
    generator = torch.Generator().manual_seed(1)
    counts = [1 + i % 3 for i in range(count)]
    x = torch.randn(sum(counts), 6, generator=generator)
    y = scale * torch.randn(sum(counts), 2, generator=generator)
    return table_of({"x": x, "y": y}, counts)


def losses_of(model: nn.Module):
    def losses(batch: Batch) -> Tensor:
        return batch.per_unit((model(batch.tensors["x"]) - batch.tensors["y"]).square().mean(1))

    return losses


def plan() -> Composition:
    return clip_estimate.with_estimated_bound(epsilon=4.0, share=0.05, quantile=0.5, **STEPS)


def both_of(plan: Composition) -> tuple[Estimate, DpSgd]:
    both = clip_estimate.estimated(plan)
    assert both is not None
    return both


def test_the_norms_are_those_of_gradients_taken_one_by_one():
    model, table = net(), people(count=30)
    units = np.array([3, 4, 9, 17, 29])
    norms = GradientNorms(
        model, losses_of(model), table, records_per_unit=3, random=TestRandom(0), max_physical_batch_size=2
    )
    found = norms.column(units)
    batch = table.batch(units, records_per_unit=3)
    slow = per_unit_gradients(model, losses_of(model), batch).norm(dim=1).numpy()
    assert found.values == pytest.approx(slow, rel=1e-5) and found.units.tolist() == units.tolist()
    assert all(p.grad is None for p in model.parameters()) and all(
        "forward" not in vars(module) for module in model.modules()
    )
    assert len(norms.column(units[:0]).values) == 0


def test_one_plan_spends_epsilon_on_both_and_what_is_left_on_the_steps():
    whole = plan()
    estimate, steps = whole.stages
    assert isinstance(estimate, Estimate) and isinstance(steps, DpSgd)
    assert 0.199 < estimate.epsilon() <= 0.2
    assert 3.99 < whole.epsilon() <= 4.0
    alone = DpSgd.calibrated(epsilon=4.0, **STEPS)
    assert 1.0 < steps.noise_multiplier / alone.noise_multiplier < 1.01  # what 5 % of epsilon costs, measured
    assert steps.max_grad_norm == "estimated"
    assert plan_from_dict(plan_to_dict(whole)) == whole
    assert clip_estimate.estimated(whole) == (estimate, steps)
    assert clip_estimate.estimated(alone) is None
    assert clip_estimate.spent_before(whole) == estimate.events() and clip_estimate.spent_before(alone) == ()


def test_the_bound_changes_no_event_and_not_the_plan():
    whole = plan()
    steps = whole.stages[1]
    assert isinstance(steps, DpSgd)
    for bound in (1e-3, 0.7, 50.0):
        chosen = clip_estimate.with_bound(steps, bound)
        assert chosen.events() == steps.events() and chosen.max_grad_norm == bound
    assert steps.max_grad_norm == "estimated"


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_bound_follows_the_gradients_and_not_the_recipe(scale):
    model, table = net(), people(scale)
    estimate, _ = both_of(plan())
    norms = GradientNorms(model, losses_of(model), table, records_per_unit=2, random=TestRandom(1))
    found = estimated_bound(estimate, norms, ledger=None, random=TestRandom(2))
    true = float(np.median(norms.column(np.arange(400)).values))
    assert true / 1.6 < found.value < true * 1.6
    assert found.low <= found.value <= found.high


def test_from_plan_to_claim(tmp_path):
    """The whole way: ledger, estimate, steps, claim."""
    model, table, whole = net(), people(), plan()
    estimate, steps = both_of(whole)
    with Ledger.open(tmp_path / "ledger.db", run="auto", plan=whole) as ledger:
        norms = GradientNorms(model, losses_of(model), table, records_per_unit=2, random=TestRandom(1))
        bound = estimated_bound(estimate, norms, ledger=ledger, random=TestRandom(2))
        assert ledger.spent() == list(estimate.events())
        chosen = clip_estimate.with_bound(steps, bound.value)
        engine = make_engine(model, chosen, ledger=ledger, random=TestRandom(3))
        assert isinstance(engine, DifferentialPrivacyEngine) and engine.max_grad_norm == bound.value
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        for batch in engine.batches(table, steps=steps.steps):
            losses_of(model)(batch).mean().backward()
            optimizer.step()
        engine.detach()
        claim = guarantee(whole, ledger.spent(), boundary=[])
        assert engine.get_epsilon(whole.delta) == claim.epsilon == whole.epsilon()
    names = [stage["name"] for stage in claim.mechanism["stages"]]
    assert names == ["estimate", "dp_sgd"]
    assert claim.mechanism["stages"][1]["max_grad_norm"] == "estimated"
    assert claim.mechanism["stages"][1]["steps_spent"] == 20
    (released,) = figures({"value": bound}, estimate)
    assert released["covered_by"] == "charged" and released["value"] == bound.value


def test_the_wrong_way_of_free_knowledge_is_convicted():
    """C as the median without noise: one unit more moves it, so the steps' noise sigma C tells of the unit itself."""
    estimate, _ = both_of(plan())
    quiet = replace(estimate, noise_multiplier=0.0, sampling_rate=1.0)
    cells = []
    for ours in ([1.0] * 50 + [5.0] * 50, [1.0] * 50 + [5.0] * 51):
        column = Column(np.array(ours), np.arange(len(ours)))
        cells.append(estimated_bound(quiet, column, ledger=None, random=TestRandom(0)).value)
    assert cells[0] < 1.1 and cells[1] > 4.9
    assert accounting.epsilon(quiet.events(), 1e-4) == math.inf


def test_losses_that_look_at_other_units_are_refused_before_anything_is_charged():
    model, table = net(), people(count=10)

    def coupled(batch: Batch) -> Tensor:
        out = model(batch.tensors["x"])
        return batch.per_unit((out - out.mean(0)).square().mean(1))

    with pytest.raises(UnsupportedLayer, match="another unit's loss"):
        GradientNorms(model, coupled, table, records_per_unit=1, random=TestRandom(0))
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(UnsupportedLayer, match="BatchNorm1d"):
        GradientNorms(normed, losses_of(normed), table, records_per_unit=1, random=TestRandom(0))


def test_a_plan_whose_bound_is_not_found_yet_trains_nobody():
    steps = plan().stages[1]
    assert isinstance(steps, DpSgd)
    with pytest.raises(UsageError, match="max_grad_norm = estimated"):
        make_engine(net(), steps, random=TestRandom(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip_estimate.with_estimated_bound(epsilon=4.0, share=0.0, quantile=0.5, **STEPS),
        lambda: clip_estimate.with_estimated_bound(epsilon=4.0, share=1.0, quantile=0.5, **STEPS),
        lambda: clip_estimate.with_estimated_bound(epsilon=4.0, share=0.1, quantile=1.0, **STEPS),
        lambda: DpSgd(noise_multiplier=1.0, max_grad_norm="guessed", **STEPS),  # pyright: ignore
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(make):
    with pytest.raises((UsageError, TypeError)):
        make()
