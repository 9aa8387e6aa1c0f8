"""The epsilon spent so far, live: exact where an interval of steps ends, an upper bound inside it."""

from collections.abc import Sequence

from sfumato.privacy import accounting
from sfumato.privacy.events import Event
from sfumato.privacy.plan import DpSgd, TrainingPlan


class Spending:
    """Epsilon after n of the plan's steps, without asking the accountant at every step.

    Guarantee: never below the accountant's value; equal to it at the ends of the ``parts`` intervals and at the last step.
    """

    def __init__(self, plan: TrainingPlan, parts: int = 16, before: Sequence[Event] = ()) -> None:
        """Args: before: what the same plan's earlier stages have spent."""
        self._plan = plan
        self._before = tuple(before)
        self._width = max(1, -(-plan.steps // parts))
        self._known: dict[int, float] = {}

    def after(self, steps: int) -> float:
        """An upper bound on epsilon after ``steps`` steps (infinite without privacy)."""
        end = min(-(-steps // self._width) * self._width, max(self._plan.steps, steps))
        if end not in self._known:
            self._known[end] = self._epsilon(end)
        return self._known[end]

    def _epsilon(self, steps: int) -> float:
        plan = self._plan
        if not isinstance(plan, DpSgd) or (steps and not self._before):
            return plan.epsilon(steps) if steps else 0.0
        events = [*self._before, plan.event(plan.events_of(steps))]
        value = accounting.epsilon(events, plan.delta, adjacency=plan.adjacency)
        assert value is not None  # PLD always applies
        return value
