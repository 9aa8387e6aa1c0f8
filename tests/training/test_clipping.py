"""The main loop with every way of clipping that a plan can ask for."""

import json
import math
from dataclasses import replace

import pytest

from sfumato.errors import UsageError
from sfumato.privacy.plan import DpSgd
from sfumato.privacy.settings import PartSettings

from .conftest import UNITS, Runs, Watch

PLAN = DpSgd(population=UNITS, expected_batch_size=20, steps=6, noise_multiplier=1.5, delta=1e-3)
PARTS = (
    PartSettings(name="text", modules=("text_encoder",), max_grad_norm=0.3, share=0.25),
    PartSettings(name="picture", modules=("denoiser",), max_grad_norm=0.4, share=0.75),
)


@pytest.mark.parametrize(
    "plan",
    [
        replace(PLAN, clipping="per_layer"),
        replace(PLAN, clipping="automatic"),
        replace(PLAN, clipping="adaptive"),
        replace(PLAN, parts=PARTS, max_grad_norm=0.5),
    ],
)
def test_a_run_is_charged_as_its_plan_says_however_it_clips(runs: Runs, plan: DpSgd):
    trained = runs.attempt(plan, max_physical_batch_size=8)
    assert (trained.stopped, trained.step, runs.spent) == ("steps", 6, 6)
    state = json.loads((runs.checkpoints / "last" / "state.json").read_text())["engine"]
    assert state["events"] == [plan.event().to_dict()]
    assert ("max_grad_norm" in state) == (plan.clipping == "adaptive")


def test_a_resumed_run_goes_on_with_the_bound_that_it_had(runs: Runs):
    plan = replace(PLAN, clipping="adaptive")

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        runs.attempt(plan, watchers=[Watch({4: stop})], checkpoint_every_seconds=1e-9)
    state = json.loads((runs.checkpoints / "last" / "state.json").read_text())["engine"]
    assert 0 < state["max_grad_norm"] != 1.0 and math.isfinite(state["max_grad_norm"])
    assert runs.attempt(plan).charged == 6
    after = json.loads((runs.checkpoints / "last" / "state.json").read_text())["engine"]
    assert abs(math.log(after["max_grad_norm"] / state["max_grad_norm"])) < 3 * 0.2 * 2  # a few steps on, no new start


def test_parts_that_are_not_the_models_are_refused_before_a_step(runs: Runs):
    with pytest.raises(UsageError, match=r"denoiser\..*in no part"):
        runs.attempt(replace(PLAN, parts=(replace(PARTS[0], share=1.0),), max_grad_norm=0.3))
    assert runs.spent == 0
