"""Several backward passes in one step: which of them is private, and for which parameters.

An undeclared second backward pass is an error, because its rows could be of the same units or of others. The contexts
here say it. None of them changes what is charged.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from sfumato.errors import UsageError
from sfumato.privacy.gradients.bookkeeping import Tape


class Passes:
    """What the engine's contexts have said. ``tape`` is None where nothing is recorded (the engine without privacy).

    ``public`` holds gradients that the user declared to be of public data, until the next step adds them.
    """

    def __init__(self, tape: Tape | None, parameters: Callable[[], Iterable[nn.Parameter]]) -> None:
        self.public: dict[nn.Parameter, Tensor] = {}
        self.accumulating = False
        self.part: str | None = None  # whose training it is
        self._tape = tape
        self._parameters = parameters
        self._plain: list[str] = []  # the contexts, innermost last, in which layers run without being recorded

    def require_step_allowed(self) -> None:
        if self._plain:
            raise UsageError(
                f"optimizer.step() · was called inside engine.{self._plain[-1]}()",
                next="Leave the context before the step.",
            )

    @contextmanager
    def of_same_units(self) -> Iterator[None]:
        tape = self._tape
        if tape is None:
            yield
            return
        if tape.has_records:
            raise UsageError(
                "engine.same_units() · came after a backward()", next="Put all backward passes of the batch inside it."
            )
        tape.several_passes = True
        try:
            yield
        finally:
            tape.several_passes = False

    @contextmanager
    def of_public_data(self) -> Iterator[None]:
        """Gradients that come about inside are kept; those from before are put back, also if something fails."""
        parameters = list(self._parameters())
        before = {p: p.grad for p in parameters}
        for p in parameters:
            p.grad = None
        try:
            with self._unrecorded("public"):
                yield
            for p in parameters:
                if p.grad is not None:
                    held = self.public.get(p)
                    self.public[p] = p.grad.detach() if held is None else held + p.grad.detach()
        finally:
            for p, gradient in before.items():
                p.grad = gradient

    @contextmanager
    def of_frozen_model(self) -> Iterator[None]:
        with _frozen(self._parameters()), self._unrecorded("frozen"):
            yield

    @contextmanager
    def of_part(self, name: str, others: Iterable[nn.Parameter]) -> Iterator[None]:
        if self.part is not None:
            raise UsageError(
                f"engine.training({name!r}) · inside engine.training({self.part!r})", next="Train one part at a time."
            )
        if self._tape is not None and self._tape.has_records:
            raise UsageError(
                f"engine.training({name!r}) · came before the step of an earlier backward()",
                next="Step that part's optimizer first.",
            )
        self.part = name
        try:
            with _frozen(others):
                yield
        finally:
            self.part = None

    @contextmanager
    def of_one_batch(self, more: bool) -> Iterator[None]:
        if self.accumulating:
            raise UsageError("engine.accumulate() · inside engine.accumulate()", next="Enter it once per micro-batch.")
        self.accumulating = more
        try:
            yield
        finally:
            self.accumulating = False

    @contextmanager
    def _unrecorded(self, name: str) -> Iterator[None]:
        self._plain.append(name)
        enabled = self._tape.enabled if self._tape is not None else False
        if self._tape is not None:
            self._tape.enabled = False
        try:
            yield
        finally:
            self._plain.pop()
            if self._tape is not None:
                self._tape.enabled = enabled


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    held = [p for p in parameters if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)
