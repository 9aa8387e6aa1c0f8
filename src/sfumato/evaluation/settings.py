"""What is measured after training."""

from dataclasses import dataclass

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    samples: int = 2_000  # generated records that are measured
    judge_seconds: float = 90.0  # training time of the classifier that reads pictures
    twin: bool = False  # also train a non-private twin of the same budget, to say what privacy cost

    def __post_init__(self) -> None:
        checks.positive(samples=self.samples, judge_seconds=self.judge_seconds)
