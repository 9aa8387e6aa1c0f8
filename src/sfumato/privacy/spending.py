"""The epsilon spent so far, live: exact where an interval of steps ends, an upper bound inside it."""

from sfumato.privacy.plan import TrainingPlan


class Spending:
    """Epsilon after n of the plan's steps, without asking the accountant at every step.

    Guarantee: never below the accountant's value; equal to it at the ends of the ``parts`` intervals and at the last step.
    """

    def __init__(self, plan: TrainingPlan, parts: int = 16) -> None:
        self._plan = plan
        self._width = max(1, -(-plan.steps // parts))
        self._known: dict[int, float] = {0: 0.0}

    def after(self, steps: int) -> float:
        """An upper bound on epsilon after ``steps`` steps (infinite without privacy)."""
        end = min(-(-steps // self._width) * self._width, max(self._plan.steps, steps))
        if end not in self._known:
            self._known[end] = self._plan.epsilon(end)
        return self._known[end]
