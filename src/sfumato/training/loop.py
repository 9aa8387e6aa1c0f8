"""THE MAIN LOOP: from a table of encoded records to trained weights, private or not, top to bottom.

Spend first, then act: ``engine.batches`` has reserved a step in the ledger before it draws that step's units.
Shapes: B units in a batch.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sfumato.privacy.engine import make_engine
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import NotPrivate, PrivacyPlan
from sfumato.privacy.spending import Spending
from sfumato.randomness import Random
from sfumato.records import UnitTable
from sfumato.training import state
from sfumato.training.settings import PerformanceSettings, TrainingSettings
from sfumato.training.watch import Watcher


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How a training ended. The model holds the averaged weights."""

    stopped: Literal["steps", "budget", "interrupted"]
    step: int  # steps taken by the weights
    charged: int  # steps in the ledger; more than ``step`` after a crash
    seconds: float
    units_seen: int  # internal
    for_release: bool  # False if chance came from a test source


def train(
    model: Any,
    table: UnitTable,
    plan: PrivacyPlan,
    settings: TrainingSettings,
    performance: PerformanceSettings,
    *,
    checkpoints: Path,
    ledger: Ledger | None = None,
    watchers: Sequence[Watcher] = (),
    random: Random | None = None,
) -> Trained:
    """Trains ``model`` on ``table`` as ``plan`` says, from its last checkpoint if there is one.

    Guarantee: the weights, their average and every checkpoint are together a release of the events that the ledger
    holds when this returns or dies. Figures given to ``watchers`` (losses, rates) are not covered: they are internal.

    Raises: PrivacyRefused for a layer or loss that couples examples, LedgerError, OutsideError where the disk says no.
    """
    if performance.threads is not None:
        torch.set_num_threads(performance.threads)
    model.train()
    engine = make_engine(model, plan, ledger=ledger, random=random)
    optimizer = make_optimizer(model, settings)
    engine.attach(optimizer)
    average = state.Average(model, settings.ema_decay)
    progress = state.restore(checkpoints, model, average, optimizer, engine)
    if progress.step == 0:
        engine.check_independence(model.losses, table.batch(range(min(3, table.num_units)), records_per_unit=1))

    spending = Spending(plan)
    wasted = plan.steps - _steps_left(plan, ledger, progress.step) - progress.step  # charged by attempts that died
    step, units_seen, losses_seen = progress.step, progress.units_seen, _Mean()
    began = pictured = saved = time.monotonic()
    first_step, first_units = step, units_seen
    interrupted = False

    with _interruptible() as stop:
        for batch in engine.batches(
            table,
            steps=_steps_left(plan, ledger, step),
            max_physical_batch_size=performance.max_physical_batch_size,
        ):
            losses = model.losses(batch)  # (B,): one loss per unit
            losses.mean().backward()
            if batch.last:
                set_learning_rate(optimizer, settings, (step + wasted) / plan.steps, step)
            optimizer.step()
            optimizer.zero_grad()
            losses_seen.add(losses.detach())
            units_seen += batch.num_units
            if not batch.last:
                continue

            average.update(model, step)
            step += 1
            now = time.monotonic()
            done = step + wasted >= plan.steps
            if step % settings.log_every == 0 or done or step == first_step + 1:
                rate = (step - first_step) / (now - began)
                epsilon = spending.after(step + wasted)
                values = {
                    "step": step + wasted,
                    "steps": plan.steps,
                    "loss": losses_seen.take(),
                    "epsilon": epsilon if math.isfinite(epsilon) else None,
                    "epsilon_planned": spending.after(plan.steps) if math.isfinite(epsilon) else None,
                    "seconds": progress.seconds + now - began,
                    "seconds_left": (plan.steps - step - wasted) / rate,
                    "examples_per_second": (units_seen - first_units) / (now - began),
                    "learning_rate": float(optimizer.param_groups[0]["lr"]),
                }
                for watcher in watchers:
                    watcher.figures(values)
            if step == first_step + 10 or now - pictured > settings.picture_every_seconds:
                average.swap(model)
                for watcher in watchers:
                    watcher.picture(step + wasted, model)
                average.swap(model)
                pictured = time.monotonic()
            if now - saved > settings.checkpoint_every_seconds:
                here = state.Progress(step=step, seconds=progress.seconds + now - began, units_seen=units_seen)
                state.save(checkpoints, model, average, optimizer, engine, here)
                saved = time.monotonic()
            if stop.is_set():
                interrupted = True
                break

    seconds = progress.seconds + time.monotonic() - began
    here = state.Progress(step=step, seconds=seconds, units_seen=units_seen)
    state.save(checkpoints, model, average, optimizer, engine, here)
    engine.detach()
    average.swap(model)
    model.eval()
    return Trained(
        stopped="interrupted" if interrupted else "budget" if engine.stopped == "budget" else "steps",
        step=step,
        charged=ledger.spent_steps if ledger is not None else step,
        seconds=seconds,
        units_seen=units_seen,
        for_release=engine.for_release,
    )


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        case "sgd":
            return torch.optim.SGD(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, done: float, steps_taken: int
) -> None:
    """Linear warm-up over the first steps of this run's weights, then the schedule over the share ``done`` of the plan."""
    warm = min(1.0, (steps_taken + 1) / (settings.warmup_steps + 1))
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * warm * share


def _steps_left(plan: PrivacyPlan, ledger: Ledger | None, taken: int) -> int:
    """What a crash wasted comes off the remaining steps."""
    if ledger is None or isinstance(plan, NotPrivate):
        return max(0, plan.steps - taken)
    return max(0, ledger.remaining_steps)


class _Mean:
    """Mean over the units since it was last asked."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        self._total += float(values.sum())
        self._count += values.numel()

    def take(self) -> float:
        mean = self._total / self._count if self._count else math.nan
        self._total, self._count = 0.0, 0
        return mean


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C lets the step finish and sets the event; the second raises KeyboardInterrupt as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
