"""A batch is for one step of one process: a fork between its draw and its step releases it once, and not twice."""

import os
from collections.abc import Callable

import pytest
import torch
from tests.oracles import table_of
from tests.privacy.test_step_noise import one_thread as one_thread
from tests.privacy.test_step_noise import refused_in_a_fork
from torch import nn

from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.ledger import Ledger
from sfumato.randomness import SecretRandom

TABLE = table_of({"x": torch.arange(60.0, dtype=torch.float64)[:, None]}, [1] * 60)

pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(**options):
    net = nn.Linear(1, 1).double()
    engine = DifferentialPrivacyEngine(net, max_grad_norm=1.0, noise_multiplier=1.0, random=SecretRandom(), **options)
    optimizer = engine.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    return net, engine, optimizer


def ended_well(act: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("with_ledger", [False, True])
def test_a_batch_that_was_drawn_is_not_stepped_in_a_forked_child(tmp_path, with_ledger):
    """Before and after the backward pass, in the first part of a batch and in the last; the parent goes on."""
    ledger = Ledger.open(tmp_path / "ledger.db", run="r") if with_ledger else None
    net, engine, optimizer = engine_of(ledger=ledger)
    steps = 0
    for batch in engine.batches(TABLE, expected_batch_size=40.0, steps=2, max_physical_batch_size=16):

        def rest(batch=batch) -> None:
            net(batch.tensors["x"]).mean().backward()
            optimizer.step()

        assert refused_in_a_fork(rest)
        net(batch.tensors["x"]).mean().backward()
        assert refused_in_a_fork(optimizer.step)
        optimizer.step()
        optimizer.zero_grad()
        steps += batch.last
    assert steps == 2
    assert sum(event["count"] for event in engine.state_dict()["events"]) == 2
    if ledger is not None:
        ledger.close()


def test_an_iteration_is_not_continued_in_a_forked_child():
    net, engine, optimizer = engine_of()
    batches = engine.batches(TABLE, expected_batch_size=20.0, steps=3)

    def step() -> None:
        net(next(batches).tensors["x"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert refused_in_a_fork(step)
    step()


def test_a_hand_written_step_is_not_released_by_two_processes():
    net, _, optimizer = engine_of(expected_batch_size=6, sampling_rate=0.1)
    x = torch.randn(6, 1, dtype=torch.float64)
    net(x).mean().backward()
    assert refused_in_a_fork(optimizer.step)
    optimizer.step()
    optimizer.zero_grad()


def test_micro_batches_of_a_batch_are_not_released_by_two_processes():
    net, engine, optimizer = engine_of(expected_batch_size=6, sampling_rate=0.1)
    x = torch.randn(6, 1, dtype=torch.float64)

    def micro(more: bool) -> None:
        with engine.accumulate(more=more):
            net(x).mean().backward()
            optimizer.step()

    micro(True)
    assert refused_in_a_fork(lambda: micro(False))
    micro(False)


def test_a_child_may_train_with_an_engine_that_was_not_used_yet():
    net, engine, optimizer = engine_of()

    def act() -> None:
        for batch in engine.batches(TABLE, expected_batch_size=20.0, steps=2):
            net(batch.tensors["x"]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert ended_well(act)
