"""THE MAIN LOOP: from a table of encoded records to trained weights, private or not, top to bottom.

Spend first, then act: ``engine.batches`` has reserved a step in the ledger before it draws that step's units.
Several processes run it side by side (``launch``, ``privacy.processes``); the first of them writes, charges and shows.
Shapes: B units in a batch.
"""

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sfumato.privacy.engine import make_engine
from sfumato.privacy.events import Event
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.plan import NotPrivate, TrainingPlan
from sfumato.randomness import Random
from sfumato.records import UnitTable
from sfumato.training import launch, state
from sfumato.training.dp_adam import DpAdamBC
from sfumato.training.interrupt import interruptible
from sfumato.training.meter import Meter, Timer
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
    processes: int = 1
    others_processor_seconds: float = 0.0  # of all processes but the first
    others_peak_bytes: int = 0


def train(
    model: Any,
    table: UnitTable,
    plan: TrainingPlan,
    settings: TrainingSettings,
    performance: PerformanceSettings,
    *,
    checkpoints: Path,
    ledger: Ledger | None = None,
    watchers: Sequence[Watcher] = (),
    random: Random | None = None,
    before: Sequence[Event] = (),
) -> Trained:
    """Trains ``model`` on ``table`` as ``plan`` says, from its last checkpoint if there is one.

    Guarantee: the weights, their average and every checkpoint are together a release of the events that the ledger
    holds when this returns or dies. Figures given to ``watchers`` (losses, rates) are not covered: they are internal.

    Raises: PrivacyRefused for a layer or loss that couples examples, LedgerError, OutsideError where the disk says no.
    """
    model.train()
    average = state.Average(model, settings.ema_decay)
    with (
        launch.together(
            performance.processes, train, model, table, plan, settings, performance,
            checkpoints=checkpoints, threads=performance.threads,
        ) as processes,
        interruptible() as stop,
        attached(
            make_engine(model, plan, ledger=ledger, random=random, processes=processes), make_optimizer(model, settings)
        ) as (engine, optimizer),
    ):  # fmt: skip
        with processes.agreeing():
            progress = state.restore(checkpoints, model, average, optimizer, engine)
            if progress.step == 0:
                engine.check_independence(model.losses, table.batch(range(min(3, table.num_units)), records_per_unit=1))

        step = first_step = progress.step  # taken by the weights
        steps_left = processes.decide(lambda: _steps_left(plan, ledger, step))
        wasted = plan.steps - steps_left - step  # charged by attempts that died, lost to the weights
        meter = Meter(
            plan, charged=step + wasted, seconds=progress.seconds, units_seen=progress.units_seen, before=before
        )
        pictures, saves = time.monotonic(), Timer(settings.checkpoint_every_seconds)

        def save() -> None:
            if processes.first:
                here = state.Progress(step=step, seconds=meter.seconds, units_seen=meter.units_seen)
                state.save(checkpoints, model, average, optimizer, engine, here)

        after_step = getattr(model, "after_step", lambda step: None)
        for batch in engine.batches(
            table, steps=steps_left, max_physical_batch_size=performance.max_physical_batch_size
        ):
            losses = model.losses(batch)  # (B,): one loss per unit
            losses.mean().backward()
            if batch.last:
                set_learning_rate(optimizer, settings, (step + wasted) / plan.steps, step)
            optimizer.step()
            optimizer.zero_grad()
            meter.add(losses)
            if not batch.last:
                continue

            meter.add_up(processes)
            step += 1
            with engine.frozen():
                after_step(step)  # post-processing, where a family has any
            average.update(model, step - 1)
            charged = step + wasted
            if step % settings.log_every == 0 or step == first_step + 1 or charged == plan.steps:
                figures = meter.figures(charged, float(optimizer.param_groups[0]["lr"]))
                for watcher in watchers:
                    watcher.figures(figures)
            if step == first_step + 10 or time.monotonic() - pictures > settings.picture_every_seconds:
                average.swap(model)
                for watcher in watchers:
                    watcher.picture(charged, model)
                average.swap(model)
                pictures = time.monotonic()
            if saves.due:
                save()
                saves.restart()
            if processes.anyone(stop.is_set()):
                stop.set()
                break
        save()
        used = resource.getrusage(resource.RUSAGE_SELF)
        others = processes.total([0, 0] if processes.first else [used.ru_utime + used.ru_stime, used.ru_maxrss * 1024])

    average.swap(model)
    model.eval()
    return Trained(
        stopped="interrupted" if stop.is_set() else "budget" if engine.stopped == "budget" else "steps",
        step=step,
        charged=plan.steps - _steps_left(plan, ledger, step),
        seconds=meter.seconds,
        units_seen=meter.units_seen,
        for_release=engine.for_release,
        processes=processes.size,
        others_processor_seconds=others[0],
        others_peak_bytes=int(others[1]),
    )


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        case "dp_adam_bc":
            return DpAdamBC(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
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


def _steps_left(plan: TrainingPlan, ledger: Ledger | None, taken: int) -> int:
    """What a crash wasted comes off the remaining steps."""
    if ledger is None or isinstance(plan, NotPrivate):
        return max(0, plan.steps - taken)
    return plan.steps_left(ledger.remaining(plan.event(1)))


@contextmanager
def attached(engine: Any, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, torch.optim.Optimizer]]:
    """However the training ends, the model is an ordinary one afterwards."""
    engine.attach(optimizer)
    if isinstance(optimizer, DpAdamBC):
        optimizer.noise_variance = engine.noise_variance
    try:
        yield engine, optimizer
    finally:
        engine.detach()
