"""A real training, killed at every boundary of its steps: between the reservation, the draw, the noise, the checkpoint, the
commit and the end. The children are forked from a process that has loaded torch, and kill themselves."""

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.privacy.test_ledger_faults import dying, spent
from tests.training.conftest import UNITS, Runs

from sfumato.privacy import engine, spending
from sfumato.privacy.ledger import Ledger, show
from sfumato.privacy.plan import DpSgd
from sfumato.training import loop

PLAN = DpSgd(population=UNITS, expected_batch_size=10, steps=4000, noise_multiplier=400.0, delta=1e-3)
ENGINE = engine.DifferentialPrivacyEngine
STEPS = {  # boundaries of a step: around what
    "drawing": (ENGINE, "_draw_units"),
    "adding noise": (ENGINE, "_release"),
    "reserving": (Ledger, "reserve"),
    "committing": (Ledger, "commit"),
    "saving": (loop.state, "save"),
    "restoring": (loop.state, "restore"),
}
WITHIN = ("writing entries", "transaction", "releasing")  # the ledger, as in its own test
BOUNDARIES = [f"{when} {name}" for name in (*STEPS, *WITHIN) for when in ("before", "after")] + ["inside transaction"]


def _train(folder: Path, boundary: str, after: int, most: int) -> None:
    """In a child: resumes the run; dies at the boundary, when it is reached for the ``after``-th time; is interrupted, and
    ends well, after ``most`` steps."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that forks has it switched off
    left = most
    reach = dying(boundary, after)
    for name, (owner, attribute) in STEPS.items():
        setattr(owner, attribute, _around(getattr(owner, attribute), name, reach))
    draw = ENGINE._draw_units
    touched = os.open(folder / "touched", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(self: Any, num_units: int) -> Any:
        nonlocal left
        os.write(touched, b"x")  # from here on the data of the step is touched
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, num_units)

    ENGINE._draw_units = counted  # type: ignore[method-assign]
    spending.Spending.after = lambda self, steps: 0.0  # type: ignore[method-assign] # takes long, and is not looked at
    Runs(folder).attempt(PLAN, log_every=10**6, picture_every_seconds=3600.0, checkpoint_every_seconds=0.1)


def _around(original: Any, name: str, reach: Any) -> Any:
    def around(*args: Any, **kwargs: Any) -> Any:
        reach(f"before {name}")
        result = original(*args, **kwargs)
        reach(f"after {name}")
        return result

    return around


def taken(folder: Path) -> int:
    """Steps in the weights of the last checkpoint."""
    state = folder / "checkpoints" / "last" / "state.json"
    return json.loads(state.read_text())["step"] if state.exists() else 0


@pytest.mark.slow
def test_two_hundred_deaths_of_a_training_hide_nothing(tmp_path):
    """No step without its charge, every resume goes on, and what the deaths wasted comes off the rest of the plan."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "safetensors.torch", __name__])
    chance, ledger = random.Random(3), tmp_path / "ledger.db"
    died: dict[str, int] = {}
    wasted = computed = 0

    def child(boundary: str, after: int, most: int) -> int | None:
        process = context.Process(target=_train, args=(tmp_path, boundary, after, most))
        process.start()
        process.join(600)
        return process.exitcode

    for number in range(200):
        boundary = BOUNDARIES[number % len(BOUNDARIES)]
        once = boundary.endswith(("saving", "restoring", "releasing", "transaction", "writing entries"))
        code = child(boundary, 1 if once else chance.randint(1, 12), 30)
        assert code in (0, -signal.SIGKILL), boundary
        died[boundary] = died.get(boundary, 0) + (code != 0)
        computed = (tmp_path / "touched").stat().st_size if (tmp_path / "touched").exists() else 0
        charged = spent(ledger) if ledger.exists() else 0
        assert computed <= charged <= PLAN.steps and taken(tmp_path) <= computed
        wasted = charged - taken(tmp_path)
    assert child("never", 1, PLAN.steps + 1) == 0
    assert spent(ledger) == PLAN.steps
    assert taken(tmp_path) == PLAN.steps - wasted
    assert show(ledger)["epsilon"] == PLAN.epsilon()
    assert min(died.get(boundary, 0) for boundary in BOUNDARIES) > 5, died
