"""A bound that follows a quantile of the norms: it moves as the paper says, both its noises are of the promised size, and
what is charged pays for the count too (test_sensitivity.py measures the same from outside)."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tests.oracles import joined, relative, table_of, vector
from torch import Tensor, nn

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy.accounting import Event, joint_noise_multiplier
from sfumato.privacy.adaptive import RANGE, AdaptiveClip
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.reference import clipped_sum, per_unit_gradients
from sfumato.privacy.plan import DpSgd
from sfumato.randomness import TestRandom
from sfumato.records import Batch, UnitTable


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    x = batch.tensors["x"]
    return batch.per_unit((model(x) - x[:, :2]).square().sum(1))


def people(units: int, rows: int = 2) -> UnitTable:
    torch.manual_seed(9)
    return table_of({"x": torch.randn(units * rows, 5, dtype=torch.float64)}, [rows] * units)


def attached(model: nn.Module, **options) -> tuple[DifferentialPrivacyEngine, torch.optim.Optimizer]:
    engine = DifferentialPrivacyEngine(model, **{"clipping": "adaptive", "random": TestRandom(3), **options})
    return engine, engine.attach(torch.optim.SGD(model.parameters(), lr=0.5))


@pytest.mark.parametrize("physical", [None, 5])
def test_the_bound_and_the_sum_are_those_of_the_paper_without_noise(physical):
    """Six steps against a loop over units; all parts of a batch are clipped to the same C, and are counted once."""
    clip = AdaptiveClip(quantile=0.3, learning_rate=0.7)
    model, bound = make(), 2.0
    engine, optimizer = attached(model, clipping=clip, max_grad_norm=bound, noise_multiplier=0.0)
    before, plain, parts, bounds = vector(model), copy.deepcopy(make()), [], []
    for part in engine.batches(
        people(40), expected_batch_size=16, steps=6, records_per_unit=2, max_physical_batch_size=physical
    ):
        assert engine.max_grad_norm == pytest.approx(bound, rel=1e-9)
        losses(model, part).mean().backward()
        optimizer.step()
        parts.append(part)
        if part.last:
            batch = joined(parts)
            gradients = per_unit_gradients(plain, lambda batch: losses(plain, batch), batch)  # noqa: B023
            assert relative((before - vector(model)) * 16 / 0.5, clipped_sum(gradients, bound)) <= 1e-6
            count = sum(0.5 if gradient.norm() <= bound else -0.5 for gradient in gradients)
            bound *= math.exp(-0.7 * (count / 16 + 0.5 - 0.3))
            before, plain, parts = vector(model), nn.Sequential(*copy.deepcopy(list(model))), []
            for layer in plain:
                vars(layer).pop("forward", None)
            bounds.append(bound)
    assert engine.max_grad_norm == pytest.approx(bound, rel=1e-9)
    assert len(bounds) == 6 == len(set(bounds))


def test_both_noises_have_the_promised_size_and_make_the_event_that_is_charged():
    """300 empty batches: chi-square of the gradient's noise over z C_t, and of the count's over b; false alarm 1e-6 each,
    seed fixed; the two are not correlated (false alarm 1e-6)."""
    sigma, size, clip = 1.5, 2e-6, AdaptiveClip(count_noise=1.0, learning_rate=1e-8)
    model = make()
    engine, optimizer = attached(model, clipping=clip, max_grad_norm=0.3, noise_multiplier=sigma)
    z = (sigma**-2 - 2.0**-2) ** -0.5
    gradients, counts = [], []
    for batch in engine.batches(people(50), expected_batch_size=size, steps=300):
        before, bound = vector(model), engine.max_grad_norm
        losses(model, batch).sum().backward()
        optimizer.step()
        assert batch.num_units == 0
        gradients.append((before - vector(model)) / 0.5 * size / (z * bound))
        counts.append(-math.log(engine.max_grad_norm / bound) / clip.learning_rate * size)
    noise = torch.stack(gradients)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], noise.numel())
    assert low < float(noise.square().sum()) < high
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(counts))
    assert low < float(np.square(counts).sum()) < high
    assert abs(np.corrcoef(noise[:, 0].numpy(), counts)[0, 1]) < 4.9 / math.sqrt(300)
    assert joint_noise_multiplier([z, 2.0]) == pytest.approx(sigma)
    assert engine.state_dict()["events"] == [
        Event(sampling_rate=size / 50, noise_multiplier=sigma, count=300).to_dict()
    ]


def test_the_bound_finds_the_quantile():
    """Norms of a fixed model are fixed: C goes from a hundredth of their median to within the 20 and 40 % quantiles."""
    x = torch.linspace(1, 9, 400, dtype=torch.float64).unsqueeze(1)
    model = nn.Linear(1, 1, bias=False).double()
    engine = DifferentialPrivacyEngine(
        model, max_grad_norm=0.05, noise_multiplier=1.0, clipping=AdaptiveClip(quantile=0.3), random=TestRandom(0)
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for batch in engine.batches(table_of({"x": x}, [1] * 400), expected_batch_size=100, steps=120):
        model(batch.tensors["x"]).sum(1).mean().backward()  # a unit's gradient is its x
        optimizer.step()
    low, high = np.quantile(x.numpy(), [0.2, 0.4])
    assert low < engine.max_grad_norm < high


def test_the_default_noise_of_the_count_is_a_twentieth_of_the_batch():
    clip = AdaptiveClip()
    assert (clip.quantile, clip.learning_rate, clip.count_std(1.0, 64.0)) == (0.5, 0.2, 3.2)
    assert clip.gradient_noise_multiplier(1.0, 64.0) == pytest.approx((1 - 6.4**-2) ** -0.5)
    assert clip.gradient_noise_multiplier(0.0, 64.0) == clip.count_std(0.0, 64.0) == 0.0


def test_a_count_that_would_cost_more_than_the_whole_is_refused_before_anything_is_charged():
    engine, _ = attached(make(), max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(PrivacyRefused, match=r"noise_multiplier = 1 · counting with noise 0\.5 alone.*below 1"):
        engine.batches(people(40), expected_batch_size=10, steps=1)
    assert engine.state_dict()["events"] == []
    with pytest.raises(PrivacyRefused, match="count_noise"):
        attached(make(), max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=10, sampling_rate=0.1)


@pytest.mark.parametrize(
    "values", [{"quantile": 0.0}, {"quantile": 1.5}, {"learning_rate": 0.0}, {"count_noise": -1.0}]
)
def test_values_that_make_no_sense_are_refused(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        AdaptiveClip(**values)


def test_no_noise_makes_the_bound_zero_or_infinite():
    clip = AdaptiveClip()
    for count in (1e300, -1e300, 1e5, -1e5):
        bound = 2.0
        for _ in range(50):
            bound = clip.next_bound(bound, count, 10.0, 2.0)
        assert bound in (2.0 * RANGE, 2.0 / RANGE)


def test_a_resumed_run_goes_on_with_the_bound_and_with_fresh_noise():
    engine, optimizer = attached(make(), max_grad_norm=1.0, noise_multiplier=1.0)
    for batch in engine.batches(people(60), expected_batch_size=30, steps=3):
        losses(engine.model, batch).mean().backward()
        optimizer.step()
    state = engine.state_dict()
    assert state["max_grad_norm"] == engine.max_grad_norm != 1.0
    assert set(state) == {"format", "steps_started", "for_release", "events", "ledger_sequence", "max_grad_norm"}
    again, _ = attached(make(), max_grad_norm=1.0, noise_multiplier=1.0, sampling_rate=0.5, expected_batch_size=30)
    again.load_state_dict(state)
    assert again.max_grad_norm == engine.max_grad_norm
    flat, _ = attached(make(), clipping="flat", max_grad_norm=1.0, noise_multiplier=1.0)
    for other, given in ((flat, state), (again, flat.state_dict()), (again, {**state, "max_grad_norm": math.nan})):
        with pytest.raises(UsageError):
            other.load_state_dict(given)


def test_a_plan_with_an_adaptive_bound_is_what_the_engine_does():
    plan = DpSgd(
        population=60, expected_batch_size=30.0, steps=2, noise_multiplier=1.2, delta=1e-3, clipping="adaptive"
    )
    engine = DifferentialPrivacyEngine.from_plan(make(), plan, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.1))
    for batch in engine.batches(people(60, rows=1)):
        losses(engine.model, batch).mean().backward()
        optimizer.step()
    assert engine.max_grad_norm != plan.max_grad_norm
    assert engine._partition.noise_multiplier == pytest.approx((1.2**-2 - 3.0**-2) ** -0.5)
    assert engine.get_epsilon(plan.delta) == plan.epsilon()
