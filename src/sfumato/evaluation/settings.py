"""What is measured, while a model trains and after."""

from dataclasses import dataclass
from typing import Literal

from sfumato import checks


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """Attributes:
    directions: which of the model's are measured, such as "text→image" (or "text->image"); none: all of them.
    usefulness: networks that learn from generated records and are tested on real ones; none: left out.
    retrieval: also where facts are known (it costs the training of two more heads).
    watch: measure the public loss while training, keep the best weights by it in checkpoints/best, and say where it rises.
    watch_seconds: training time of the reader that also watches known facts; 0 watches the loss alone.
    """

    samples: int = 2_000  # generated records that are measured, in each direction
    judge_seconds: float = 90.0  # training time of each network that reads
    twin: bool = False  # also train a non-private twin of the same budget, to say what privacy cost
    directions: tuple[str, ...] = ()
    usefulness: tuple[Literal["cnn", "mlp", "logistic_regression"], ...] = ("logistic_regression",)
    retrieval: bool = False
    watch: bool = True
    watch_seconds: float = 0.0

    def __post_init__(self) -> None:
        checks.positive(samples=self.samples, judge_seconds=self.judge_seconds)
        checks.non_negative(watch_seconds=self.watch_seconds)
