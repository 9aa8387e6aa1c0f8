"""What must never pass in silence: a gradient that was not clipped, a tensor that changes without noise."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sfumato.errors import LedgerError, UnsupportedLayer
from sfumato.privacy.gradients.bookkeeping import Tape
from sfumato.privacy.gradients.groups import listed
from sfumato.privacy.gradients.rules import buffers_of_weights


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """For a look at private rows that trains nothing: what it changes in the model is put back, and refused by name.

    A parameter that is initialised from the first rows it sees, or a running mean, would keep them without noise; it is
    compared by value, because ``.data`` can be written without a trace.
    """
    held = {name: (t, t.detach().clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    try:
        yield
    finally:
        changed = [name for name, (t, before) in held.items() if not torch.equal(_bits(t), _bits(before))]
        with torch.no_grad():
            for name in changed:
                held[name][0].data.copy_(held[name][1])
    if changed:
        raise UnsupportedLayer(
            f"{listed(changed)} · changed in a forward pass over private records, without noise",
            next="Initialise it beforehand, from nothing or from public records, and keep no running figures.",
        )


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes: NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Gradients:
    """Which gradients the engine has written itself; all others are leaks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: dict[nn.Parameter, tuple[Tensor, int]] = {}  # the .grad that we wrote, and its version

    def write(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient
        self._given[parameter] = (gradient, gradient._version)

    def check(self, tape: Tape, optimizer: torch.optim.Optimizer) -> None:
        """No trainable parameter may be unknown to us, or have a gradient that did not come through the records."""
        protected = tape.parameters
        others = [(name, p) for name, p in self._model.named_parameters() if p not in protected]
        unknown = [name for name, p in others if p.requires_grad]
        if unknown:
            tape.clear()
            raise UnsupportedLayer(
                f"{listed(unknown)} · became trainable after the engine was made, and would train unprotected",
                next="Freeze it, or call engine.detach() and make a new engine.",
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stopped = [name for p, name in protected.items() if id(p) in held and not p.requires_grad]
        if stopped:
            tape.clear()
            raise UnsupportedLayer(
                f"{listed(stopped)} · was frozen after the engine was made, and would be moved by noise alone",
                next="Unfreeze it, or call engine.detach() and make a new engine.",
            )
        frozen = [name for name, p in others if p.grad is not None and id(p) in held]
        if frozen:
            raise UnsupportedLayer(
                f"{listed(frozen)} · is frozen, but has a gradient, with which an optimizer would move it",
                next="Call zero_grad() after freezing it.",
            )
        leaked = [name for p, name in protected.items() if p.grad is not None and not self._is_ours(p)]
        if leaked:
            tape.clear()
            for p in protected:
                p.grad = None
            raise UnsupportedLayer(
                f"{listed(leaked)} · got a gradient that was not clipped: it is used outside its module's forward()",
                next="Call the module instead of reading its weight (or call zero_grad() if you changed .grad).",
            )

    def _is_ours(self, parameter: nn.Parameter) -> bool:
        gradient, version = self._given.get(parameter, (None, -1))
        return parameter.grad is gradient and gradient is not None and gradient._version == version


class Watch:
    """One batch, from its draw to its step. It is for one process; and buffers and frozen parameters, which no clipping and
    no noise protects, must stay as they are while it is used.

    Remembers the unprotected tensors of a model, and says which of them were changed. It looks at torch's version
    counters, not at the numbers: that costs nothing, an assignment of the same number counts as a change, and one through
    ``.data`` is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._process = os.getpid()
        self._model = model
        self._kinds: dict[str, str] = {}
        self._held: list[tuple[str, Tensor, int]] = []
        of_weights = buffers_of_weights(model)
        buffers = ((name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in of_weights)
        frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
        for kind, named in (("buffer", buffers), ("frozen parameter", frozen)):
            for name, tensor in named:
                self._kinds[name] = kind
                self._held.append((name, tensor, tensor._version))

    def require_process(self) -> None:
        """Raises LedgerError in a process that was forked since the batch was drawn: it would be released a second time, with
        other noise, and the two together have less noise than the one event that was charged says."""
        if os.getpid() != self._process:
            raise LedgerError(
                f"process = {os.getpid()} · was forked from process {self._process}, which has drawn and charged this batch: a "
                "batch is for one step of one process",
                next=f"Step in process {self._process}; in another, make a new engine and draw new batches.",
                code="ledger_forked",
            )

    def check_forward(self) -> None:
        """Raises UnsupportedLayer if something was changed, or exchanged, since the watch began."""
        now = dict([*self._model.named_buffers(), *self._model.named_parameters()])
        self._refuse(
            [name for name, tensor, version in self._held if tensor._version != version or now.get(name) is not tensor],
            "the forward pass changed with private data",
        )

    def check_step(self) -> None:
        """The same after the optimizer's step, without looking for what was exchanged."""
        changed = [name for name, tensor, version in self._held if tensor._version != version]
        self._refuse(changed, "changed between the draw of its batch and the end of the step")

    def _refuse(self, changed: list[str], how: str) -> None:
        if changed:
            kinds = " or ".join(sorted({self._kinds[name] for name in changed}))
            raise UnsupportedLayer(
                f"{listed(changed)} · a {kinds} that {how}, without noise",
                next="Use a layer without running averages; unfreeze what should be trained.",
            )
