"""What is counted and timed while a model trains."""

import math

import pytest
import torch
from tests.training.conftest import OPEN, PLAN

from sfumato.privacy.processes import Processes
from sfumato.privacy.spending import Spending
from sfumato.training import meter
from sfumato.training.meter import Meter, RunningMean, Timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    return now


def test_the_mean_is_over_values_and_not_over_batches():
    mean = RunningMean()
    for values in ([1.0, 2.0, 3.0], [10.0], []):
        mean.add(sum(values), len(values))
    assert mean.take() == 4.0
    assert math.isnan(mean.take())  # nothing since it was last asked


def test_a_resumed_run_adds_up_its_seconds_but_not_its_rate(clock):
    """Six of eight steps are charged, in 90 seconds; this attempt took one of them in two seconds."""
    resumed = Meter(PLAN, charged=5, seconds=90.0, units_seen=500)
    clock[0] += 2.0
    for part in (20, 10):
        resumed.add(torch.full((part,), 0.25))
    resumed.add_up(Processes())
    figures = resumed.figures(6, 0.1)
    assert figures["seconds"] == resumed.seconds == 92.0
    assert figures["seconds_left"] == 4.0  # two more
    assert figures["examples_per_second"] == 15.0
    assert resumed.units_seen == 530
    assert (figures["step"], figures["steps"], figures["loss"], figures["learning_rate"]) == (6, 8, 0.25, 0.1)
    assert figures["epsilon"] == PLAN.epsilon(6) < figures["epsilon_planned"] == PLAN.epsilon()


def test_without_privacy_there_is_no_epsilon(clock):
    figures = Meter(OPEN, charged=0, seconds=0.0, units_seen=0).figures(1, 0.1)
    assert (figures["epsilon"], figures["epsilon_planned"]) == (None, None)
    assert math.isfinite(figures["examples_per_second"])  # though no time has passed


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_what_is_said_to_be_spent_is_never_below_what_is(parts):
    spending = Spending(PLAN, parts)
    said = [spending.after(step) for step in range(PLAN.steps + 1)]
    assert said == sorted(said)
    assert all(value >= PLAN.epsilon(step) for step, value in enumerate(said) if step)
    assert said[0] == 0
    assert said[-1] == PLAN.epsilon()
    assert math.isinf(Spending(OPEN).after(1))


def test_checkpoints_come_early_and_then_less_often(clock):
    timer, saved = Timer(30.0), []
    for tick in range(1_200):
        clock[0] = 1000.0 + tick / 10
        if timer.due:
            saved.append(tick / 10)
            timer.restart()
    assert saved == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 62.0, 92.0], abs=0.11)


def test_a_shorter_interval_than_a_second_is_kept(clock):
    assert Timer(0.0).due
    timer = Timer(0.5)
    clock[0] += 0.6
    assert timer.due
