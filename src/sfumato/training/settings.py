"""The loop's settings, and those that cannot change the guarantee."""

from dataclasses import dataclass
from typing import Literal

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    steps: int = 800
    expected_batch_size: int = 2048  # units; the public constant in every formula
    optimizer: Literal["adamw", "sgd", "dp_adam_bc"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    ema_decay: float = 0.99  # ramped up from 0 as (1 + step) / (10 + step)
    seed: int = 0  # of the initial weights and of sample grids; never of sampling or noise
    log_every: int = 10  # steps
    picture_every_seconds: float = 30.0
    checkpoint_every_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        checks.positive(
            steps=self.steps,
            expected_batch_size=self.expected_batch_size,
            learning_rate=self.learning_rate,
            log_every=self.log_every,
        )
        checks.non_negative(
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            picture_every_seconds=self.picture_every_seconds,
            checkpoint_every_seconds=self.checkpoint_every_seconds,
        )
        checks.probability(ema_decay=self.ema_decay)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceSettings:
    """Changes speed and memory, never the mechanism."""

    max_physical_batch_size: int | None = None  # units at once; None: the whole sampled batch
    threads: int | None = None  # of each process; None: torch's default, or each process's share of the cores
    processes: int = 1  # on this machine, sharing every batch

    def __post_init__(self) -> None:
        if self.max_physical_batch_size is not None:
            checks.positive(max_physical_batch_size=self.max_physical_batch_size)
        if self.threads is not None:
            checks.positive(threads=self.threads)
        checks.positive(processes=self.processes)
