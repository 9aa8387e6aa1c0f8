"""What is counted and timed while a model trains: the loss, the rate, epsilon; and when the next checkpoint is due."""

import math
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sfumato.privacy.events import Event
from sfumato.privacy.plan import TrainingPlan
from sfumato.privacy.processes import Processes
from sfumato.privacy.spending import Spending


class RunningMean:
    """Mean over the values since it was last asked; NaN if there were none."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self._total += total
        self._count += count

    def take(self) -> float:
        mean = self._total / self._count if self._count else math.nan
        self._total, self._count = 0.0, 0
        return mean


class Meter:
    """The figures of one attempt at a run. They are computed from private records: internal, never released.

    Args: charged: steps in the ledger when the attempt begins; seconds: of training in earlier attempts; before: what
    the plan's earlier stages have spent.
    """

    def __init__(
        self, plan: TrainingPlan, *, charged: int, seconds: float, units_seen: int, before: Sequence[Event] = ()
    ) -> None:
        self._plan = plan
        self._spending = Spending(plan, before=before)
        self._first = charged
        self._seconds_before = seconds
        self._began = time.monotonic()
        self._units_before = self.units_seen = units_seen
        self._loss = RunningMean()
        self._here = (0.0, 0)  # sum and number of losses of this process, of the present step

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        return self._seconds_before + time.monotonic() - self._began

    def add(self, losses: Tensor) -> None:
        """Args: losses: (B,), of one physical part."""
        total, count = self._here
        self._here = (total + float(losses.detach().sum()), count + losses.numel())

    def add_up(self, processes: Processes) -> None:
        """The step is over: what all processes had of it."""
        total, count = processes.total(self._here)
        self._here = (0.0, 0)
        self.units_seen += int(count)
        self._loss.add(total, int(count))

    def figures(self, charged: int, learning_rate: float) -> dict[str, Any]:
        """One line of ``metrics.jsonl``, after ``charged`` steps of the plan."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        epsilon = self._spending.after(charged)
        private = math.isfinite(epsilon)
        return {
            "step": charged,
            "steps": self._plan.steps,
            "loss": self._loss.take(),
            "epsilon": epsilon if private else None,
            "epsilon_planned": self._spending.after(self._plan.steps) if private else None,
            "seconds": self._seconds_before + elapsed,
            "seconds_left": (self._plan.steps - charged) * elapsed / max(charged - self._first, 1),
            "examples_per_second": (self.units_seen - self._units_before) / elapsed,
            "learning_rate": learning_rate,
        }


class Timer:
    """Due ``every`` so many seconds; at first sooner, after about 1, 2, 4, ... seconds, so that a crash of a young run
    wastes at most half of it."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._began = self._last = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._last >= min(self._every, max(1.0, self._last - self._began))

    def restart(self) -> None:
        self._last = time.monotonic()
