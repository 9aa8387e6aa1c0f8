"""What is looked at while a model trains: lines of figures (samples are in ``samples``). [shell]

A watcher is called by the loop and returns nothing; it cannot change what is trained.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sfumato.errors import OutsideError


class Watcher(Protocol):
    """``figures`` comes every few steps, ``picture`` now and then, with the averaged weights in the model."""

    def figures(self, values: dict[str, Any]) -> None: ...

    def picture(self, step: int, model: Any) -> None: ...


class MetricsFile:
    """``metrics.jsonl``: one object a line. Internal: losses are computed from private records and are not released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _drop_half_line(path)

    def figures(self, values: dict[str, Any]) -> None:
        line = json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise OutsideError(
                f"metrics = {self._path} · could not be written ({error})", next="Free some disk space, then --resume."
            ) from None

    def picture(self, step: int, model: Any) -> None:
        """Metrics are numbers only."""


class Board:
    """TensorBoard, where asked for."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from sfumato.errors import MissingDependency

            raise MissingDependency(
                "training.tensorboard = true · tensorboard is not installed", next="pip install 'sfumato[track]'"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def figures(self, values: dict[str, Any]) -> None:
        for name in ("loss", "epsilon", "examples_per_second", "learning_rate"):
            if isinstance(values.get(name), float) and math.isfinite(values[name]):
                self._writer.add_scalar(name, values[name], values["step"])
        self._writer.flush()

    def picture(self, step: int, model: Any) -> None:
        """The grids are in samples/."""


class Line:
    """One line of progress now and then: rate, time left, loss, epsilon spent."""

    def __init__(self, say: Callable[[str], None], *, every_seconds: float = 5.0, unspent: str = "not private") -> None:
        self._say = say
        self._unspent = unspent  # what is said where there is no epsilon
        self._every = every_seconds
        self._last = -math.inf

    def figures(self, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < self._every and values["step"] < values["steps"]:
            return
        self._last = now
        spent = self._unspent
        if values["epsilon"] is not None:
            spent = f"epsilon {values['epsilon']:.2f} of {values['epsilon_planned']:.2f}"
        self._say(
            f"step {values['step']}/{values['steps']} · {values['examples_per_second']:.0f} units/s · "
            f"{_duration(values['seconds_left'])} left · loss {values['loss']:.4f} · {spent}"
        )

    def picture(self, step: int, model: Any) -> None:
        """A line cannot show a picture."""


def _drop_half_line(path: Path) -> None:
    """What a killed attempt left unfinished would swallow the next line."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes}:{rest:02d}"
