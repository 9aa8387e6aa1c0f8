"""The half of an engine that draws batches, private or not: Poisson sampling by unit, in parts, in several processes."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from sfumato import checks
from sfumato.errors import BudgetExhausted, UsageError
from sfumato.privacy.attached import Attached
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import TrainingPlan
from sfumato.privacy.processes import Processes
from sfumato.privacy.sampling import physical_parts, poisson_units
from sfumato.privacy.sources import PhysicalPart, Source, source_of
from sfumato.randomness import Random, SecretRandom

STATE_FORMAT = 1


class Draws(Attached):
    """What the private and the ordinary engine share: drawing batches, and following the optimizer's steps."""

    def __init__(
        self,
        model: nn.Module,
        plan: TrainingPlan | None,
        ledger: Ledger | None,
        random: Random | None,
        processes: Processes | None,
    ) -> None:
        super().__init__(model, Processes.current() if processes is None else processes)
        self._processes_were_found = processes is None
        self.plan = plan
        self.ledger = ledger
        self.random: Random = random if random is not None else SecretRandom()
        self.stopped: Literal["budget", "steps"] | None = None
        self._all_for_release = True  # the chance of the other processes
        self._earlier_for_release = True  # the chance of the attempts before, by a loaded state
        self._iteration: object | None = None  # of ``batches``, the one that was begun last
        self.steps_started = 0  # draws, each of them charged, over all attempts that the state knows of
        self._expected_batch_size: float | None = plan.expected_batch_size if plan is not None else None
        self._sampling_rate: float | None = plan.sampling_rate if plan is not None else None

    @property
    def for_release(self) -> bool:
        """False if chance comes from a test source, in any process or attempt: nothing made with it may be released."""
        return self._own_for_release and self._all_for_release

    @property
    def _own_for_release(self) -> bool:
        return self.random.for_release and self._earlier_for_release

    def _continue_chance(self, state: dict[str, Any]) -> None:
        """What a test source began is not for release, whoever ends it. The states of older versions do not say."""
        self._earlier_for_release = self._earlier_for_release and state.get("for_release", True) is True

    def batches(
        self,
        dataset: Any,
        *,
        expected_batch_size: float | None = None,
        steps: int | None = None,
        unit: Sequence[Any] | None = None,
        max_physical_batch_size: int | None = None,
        records_per_unit: int | None = None,
    ) -> Iterator[Any]:
        """Draws ``steps`` batches by Poisson sampling over units; each is charged before its data is touched.

        Ends early, with ``engine.stopped == "budget"``, when the ledger has no room for another step.

        In several processes all of them give the same whole data set, and each draws from its share of the units.

        Args:
          dataset: a ``UnitTable`` (yields ``Batch``), or any dataset with a length and an index (yields its items,
            collated; then the loss is a mean over rows).
          expected_batch_size: B, in units, over all processes, a public constant; the sampling rate is B / number of units, which is
            thereby declared public. Both come from the plan, if there is one.
          unit: for an ordinary dataset, whose item i is: one name per item. Left out, every item is a unit.
          max_physical_batch_size: at most so many units at once; a batch then comes in parts (``Batch.last`` marks the
            final one). Run the whole loop body for every part: ``optimizer.step()`` adds up, and steps on the last.
          records_per_unit: at most so many rows of a unit take part in a step (1 without a plan).
        """
        with self.processes.agreeing():
            source = source_of(dataset, unit)
            self._set_rate(expected_batch_size, source.num_units)
            limit = records_per_unit
            if self.plan is not None:
                if limit not in (None, self.plan.records_per_unit):
                    raise UsageError(
                        f"records_per_unit = {limit} · the plan says {self.plan.records_per_unit}",
                        next="Leave it to the plan.",
                    )
                limit = self.plan.records_per_unit
            if max_physical_batch_size is not None:
                checks.positive(max_physical_batch_size=max_physical_batch_size)
            self._check_attached(max_physical_batch_size)
            if steps is not None:
                checks.non_negative(steps=steps)
        if steps is None:
            steps = self.processes.decide(self._steps_left)
        if self.processes.together:
            self.processes.require_same(
                "engine.batches",
                num_units=source.num_units,
                sampling_rate=self._sampling_rate,
                expected_batch_size=self._expected_batch_size,
                steps=int(steps),
                steps_started=self.steps_started,
                settings=self._public_settings(),
                records_per_unit=limit,
                max_physical_batch_size=max_physical_batch_size,
                dataset=source.identity(),
            )
        self._draws_batches = True
        self._part = None  # of an iteration that was left
        return self._draw(source, int(steps), max_physical_batch_size, 1 if limit is None else int(limit))

    def _draw(self, source: Source, steps: int, max_physical: int | None, limit: int) -> Iterator[Any]:
        assert self._sampling_rate is not None
        self.stopped = None
        self._iteration = mine = object()
        self._begin_draws(steps)
        own = self.processes.own_units(source.num_units)
        try:
            for number in range(steps):
                with self.processes.agreeing():
                    self._require_stepped()
                self._begin()
                try:
                    sequence = self._reserve(steps - number)
                except BudgetExhausted:
                    self.stopped = "budget"
                    return
                units = own[self._draw_units(len(own))]
                parts = self.processes.equal_parts(physical_parts(units, max_physical))
                for i, part in enumerate(parts):
                    last = i == len(parts) - 1
                    with self.processes.agreeing():
                        self._require_stepped()
                        self._renew_chance()  # a data set may draw too (augmentation)
                        batch, grouping = source.rows(part, limit, self.random, last)
                    self._part = PhysicalPart(grouping, source.loss_is_over_rows, last, sequence)
                    self._expect(self._part)
                    yield batch
            with self.processes.agreeing():
                self._require_stepped()
            self.stopped = "steps"
        finally:
            if self._iteration is mine:  # one that was left, and is collected late, ends nothing of the next
                self._end_draws()

    def _set_rate(self, expected_batch_size: float | None, num_units: int) -> None:
        if expected_batch_size is not None:
            checks.positive(expected_batch_size=expected_batch_size)
            if self._expected_batch_size is not None and self._expected_batch_size != expected_batch_size:
                raise UsageError(
                    f"expected_batch_size = {expected_batch_size} · the engine has {self._expected_batch_size} already",
                    next="Say it in one place.",
                )
            self._expected_batch_size = float(expected_batch_size)
        if self._expected_batch_size is None:
            raise UsageError(
                "expected_batch_size = None · must be a public constant, the mean number of units in a batch",
                next="Give engine.batches(dataset, expected_batch_size=..., steps=...).",
            )
        if self._sampling_rate is None:
            if num_units < 1:
                raise UsageError("dataset · has no units to draw from", next="Give a dataset with records.")
            rate = self._expected_batch_size / num_units
            checks.probability(sampling_rate=rate, next="Make expected_batch_size at most the number of units.")
            self._sampling_rate = rate

    def _steps_left(self) -> int:
        if self.plan is None:
            raise UsageError("steps = None · must be given without a plan", next="Give steps=1_000, for example.")
        return max(0, self.plan.steps - self.steps_started)

    def _join(self, part: str) -> None:
        """Do all processes train the same thing, from different chance?"""
        if self._processes_were_found and Processes.current().size != self.processes.size:
            raise UsageError(
                f"torch.distributed = {Processes.current().size} processes · it was initialised after the engine was made, "
                f"for {self.processes.size}",
                next="Call init_process_group() first, or give the engine processes= to say who trains together.",
            )
        if not self.processes.together:
            return
        with self.processes.agreeing():
            if self.ledger is not None and not self.processes.first:
                raise UsageError(
                    f"ledger = {self.ledger.path} · in process {self.processes.rank}; only process 0 writes it",
                    next="Open the ledger in process 0, and give the others ledger=None.",
                )
        self.processes.require_same("engine", part=part, **self._public_settings())
        if not self._optimizers:
            self.processes.require_different(bytes(self.random.bytes(16)))
            self._all_for_release = not self.processes.anyone(not self._own_for_release)
            self.processes.make_equal(self.model)

    def _public_settings(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        return {
            "engine": type(self).__name__,
            "plan": self.plan,
            "expected_batch_size": self._expected_batch_size,
            "sampling_rate": self._sampling_rate,
        }

    def _require_stepped(self) -> None:
        """Hook: raises if the batch just yielded went backward, but not through optimizer.step()."""

    def noise_variance(self, parameter: nn.Parameter) -> float:
        """Of the noise on each coordinate of the parameter's ``.grad`` in the present step."""
        return 0.0

    def _begin_draws(self, steps: int) -> None:
        """Hook: so many draws will follow each other."""

    def _end_draws(self) -> None:
        """Hook: the iteration ended, or was left."""

    def _renew_chance(self) -> None:
        """Hook: what the loss of the next part draws begins here."""

    def _begin(self) -> None:
        """Hook: a new draw begins."""

    def _draw_units(self, num_units: int) -> np.ndarray:
        """Which of this process's units take part in the step that was begun; int64, ascending."""
        assert self._sampling_rate is not None
        return poisson_units(num_units, self._sampling_rate, self.random)

    def _expect(self, part: PhysicalPart) -> None:
        """Hook: a part is about to be yielded."""

    def _reserve(self, ahead: int) -> int | None:
        """Hook: charges a step, the first of ``ahead`` in a row. Returns: the reservation, for the commit."""
        raise NotImplementedError
