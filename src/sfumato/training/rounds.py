"""The same step as in the main loop, for a few steps at a site of a federation: no checkpoints, no pictures."""

from typing import Any

import torch

from sfumato.errors import UsageError
from sfumato.privacy.engine import make_engine
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import TrainingPlan
from sfumato.randomness import Random
from sfumato.records import UnitTable
from sfumato.training.loop import attached, make_optimizer, set_learning_rate
from sfumato.training.settings import PerformanceSettings, TrainingSettings


class LocalTraining:
    """Trains a model in place for some steps of a site's plan; each step is charged to the site's ledger first.

    The optimizer starts anew in every round: its state is not sent, and not kept.
    """

    def __init__(
        self, settings: TrainingSettings, performance: PerformanceSettings, random: Random | None = None
    ) -> None:
        if performance.processes > 1:
            raise UsageError(
                f"performance.processes = {performance.processes} · a site of a federation trains in one process",
                next="Leave it out, or use `sfumato train`.",
            )
        self._settings = settings
        self._performance = performance
        self._random = random

    def __call__(
        self, model: Any, table: UnitTable, plan: TrainingPlan, ledger: Ledger, *, steps: int, first_step: int
    ) -> None:
        if self._performance.threads is not None:
            torch.set_num_threads(self._performance.threads)
        model.train()
        engine = make_engine(model, plan, ledger=ledger, random=self._random)
        optimizer = make_optimizer(model, self._settings)
        taken = 0
        with attached(engine, optimizer):
            for batch in engine.batches(
                table, steps=steps, max_physical_batch_size=self._performance.max_physical_batch_size
            ):
                model.losses(batch).mean().backward()
                if batch.last:
                    set_learning_rate(optimizer, self._settings, (first_step + taken) / plan.steps, taken)
                    taken += 1
                optimizer.step()
                optimizer.zero_grad()
