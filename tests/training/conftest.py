"""A tiny table, a tiny model and a tiny plan, and a training of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.models.conftest import SHAPE, TINY, records

from sfumato.models import model as models
from sfumato.models.generative import Generative
from sfumato.models.settings import ModelSettings
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import DpSgd, NotPrivate, PrivacyPlan
from sfumato.training import loop
from sfumato.training.loop import Trained
from sfumato.training.settings import PerformanceSettings, TrainingSettings

UNITS = 40
PLAN = DpSgd(population=UNITS, expected_batch_size=10, steps=8, noise_multiplier=20.0, delta=1e-3)
OPEN = NotPrivate(population=UNITS, expected_batch_size=10, steps=8)


class Watch:
    """Remembers what it was shown, and may do something about it."""

    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.pictured: list[int] = []
        self._at = at or {}

    def figures(self, values: dict[str, Any]) -> None:
        self.lines.append(values)
        if values["step"] in self._at:
            self._at[values["step"]]()

    def picture(self, step: int, model: Any) -> None:
        self.pictured.append(step)


class Runs:
    """One run's folder, trained in one or more attempts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger_path = folder / "ledger.db"
        self.checkpoints = folder / "checkpoints"
        self.model: Generative | None = None

    def attempt(
        self,
        plan: PrivacyPlan = PLAN,
        *,
        watchers: Sequence[Any] = (),
        settings: ModelSettings = TINY,
        spoil: Any = None,
        random: Any = None,
        **training: Any,
    ) -> Trained:
        """Opens the ledger and trains, from the last checkpoint if there is one. ``spoil(model)`` may change the model."""
        self.model = model = models.build(settings, picture_shape=SHAPE)
        if spoil is not None:
            spoil(model)
        table = model.encode(records([1] * UNITS))
        physical = training.pop("max_physical_batch_size", None)
        values = {
            "steps": plan.steps,
            "log_every": 1,
            "warmup_steps": 2,
            "checkpoint_every_seconds": 3600.0,
            **training,
        }
        arguments: dict[str, Any] = {
            "checkpoints": self.checkpoints,
            "watchers": watchers,
            "random": random,
        }
        performance = PerformanceSettings(max_physical_batch_size=physical)
        if isinstance(plan, NotPrivate):
            return loop.train(model, table, plan, TrainingSettings(**values), performance, **arguments)
        with Ledger.open(self.ledger_path, run="tiny/v1", plan=plan) as ledger:
            return loop.train(model, table, plan, TrainingSettings(**values), performance, ledger=ledger, **arguments)

    @property
    def spent(self) -> int:
        with Ledger.open(self.ledger_path, run="tiny/v1") as ledger:
            return ledger.spent_steps


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


def learning_rate(settings: TrainingSettings, done: float, taken: int) -> float:
    """Written out: a straight warm-up, then half a cosine wave."""
    return (
        settings.learning_rate * min(1, (taken + 1) / (settings.warmup_steps + 1)) * (1 + math.cos(math.pi * done)) / 2
    )
