"""``NotPrivateEngine``: the face of the private engine without its protection, for twins and comparisons."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.privacy.draws import STATE_FORMAT, Draws
from sfumato.privacy.gradients.groups import listed
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import NotPrivate
from sfumato.privacy.processes import Processes, is_sharded
from sfumato.randomness import Random
from sfumato.records import Batch


class NotPrivateEngine(Draws):
    """The same face without protection: ordinary gradients of the mean loss, over the expected batch size.

    The non-private twin of a run: same sampling, same loop, no clipping, no noise; epsilon is infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        expected_batch_size: float | None = None,
        sampling_rate: float | None = None,
        random: Random | None = None,
        plan: NotPrivate | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(model, plan, None, random, processes)
        sharded = [name for name, p in model.named_parameters() if is_sharded(p)]
        if sharded:
            raise UsageError(
                f"{listed(sharded)} · sharded, which the engine without privacy does not treat",
                next="Train without an engine: fully_shard reduces ordinary gradients itself.",
            )
        if expected_batch_size is not None:
            self._expected_batch_size = expected_batch_size
        if sampling_rate is not None:
            self._sampling_rate = sampling_rate
        self._sums: dict[nn.Parameter, Tensor] = {}

    @classmethod
    def from_plan(
        cls,
        model: nn.Module,
        plan: NotPrivate,
        *,
        ledger: Ledger | None = None,
        random: Random | None = None,
        processes: Processes | None = None,
    ) -> "NotPrivateEngine":
        """The twin of ``DifferentialPrivacyEngine.from_plan``; there is no event to write into a ledger."""
        return cls(model, random=random, plan=plan, processes=processes)

    def get_epsilon(self, delta: float, accountant: str = "pld") -> float:
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "steps_started": self.steps_started,
            "for_release": self.for_release,
            "events": [],
            "ledger_sequence": None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_started = int(state["steps_started"])
        self._continue_chance(state)

    def check_independence(self, losses: Callable[[Batch], Tensor], batch: Batch) -> None:
        """Nothing to check: no unit is protected."""

    def _reserve(self, ahead: int) -> None:
        self.steps_started += 1

    def _begin(self) -> None:
        self._sums = {}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes.require_step_allowed()
        part, share = self._part, 1.0  # in a hand-written loop: ordinary training as it is
        if part is not None and part.units is not None and self._expected_batch_size is not None:
            share = (part.units.num_rows if part.over_rows else part.units.num_units) / self._expected_batch_size
        elif self.processes.together:
            raise UsageError(
                "optimizer.step() · in several processes, without a batch of engine.batches",
                next="Use engine.batches, or leave the engine out and average the gradients yourself.",
            )
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None and share:
                    before = self._sums.get(parameter)
                    value = parameter.grad * share if share != 1.0 else parameter.grad
                    self._sums[parameter] = value if before is None else before + value
                parameter.grad = None
            if part is None or part.last:
                public = self._passes.take_public(trained, self.processes)
                self._add_up(trained)
                for parameter in trained:
                    parameter.grad = _added(self._sums.pop(parameter, None), public.get(parameter))

    def _add_up(self, trained: list[nn.Parameter]) -> None:
        """The sum over processes; a parameter that none of them has a gradient of keeps none."""
        if self.processes.together:
            used = self.processes.total([float(p in self._sums) for p in trained])
            for parameter in (p for p, users in zip(trained, used, strict=True) if users):
                self.processes.all_reduce(self._sums.setdefault(parameter, torch.zeros_like(parameter)))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing is charged."""

    def accumulate(self, *, more: bool = True) -> AbstractContextManager[None]:
        raise UsageError(
            "engine.accumulate() · without privacy, how many rows a micro-batch of a hand-written loop has is not known",
            next="Use engine.batches(..., max_physical_batch_size=), or scale and add the losses yourself.",
        )


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
