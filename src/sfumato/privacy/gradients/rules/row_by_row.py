"""Every module that has no rule: its forward, row by row, with a copy of its parameters for every row.

The module runs once, under ``torch.func.vmap``, as if the batch had one row; or in a loop over the rows where vmap
cannot. A layer inside that has a rule of its own keeps it: it is called with all rows at once, so that a model with one
bare parameter costs no more than that parameter.

A weight that is computed from parameters (weight norm, spectral norm, an orthogonal map) is computed once, as the
module itself would; what is copied for the rows is the result, and each row's gradient goes back through the
computation. Such a computation sees no data, so what it remembers (a power iteration) needs no noise.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, nn

from sfumato.errors import SfumatoError, UnsupportedLayer
from sfumato.privacy.gradients.rules.copies import copied, quiet, terms_of_copies
from sfumato.privacy.gradients.rules.observing import Observed, agree
from sfumato.privacy.gradients.rules.registry import (
    Call,
    Record,
    Rule,
    plain_forward,
    rule_for,
    trainable,
)
from sfumato.privacy.gradients.rules.vmapped import Lifted, Stays
from sfumato.privacy.gradients.terms import Term

# how a checkpoint around this module ends its work
_StopRecomputation: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


@dataclass(eq=False)
class _Known:
    """What was found out about one module."""

    nests: bool = True  # layers inside keep their rules
    loops: bool = False  # vmap cannot
    shared: dict[str, set[int]] = field(default_factory=dict)  # arguments once seen without the batch's rows
    checked: dict[Any, list[torch.dtype]] = field(default_factory=dict)  # readings, with the types of the results


class RowByRow(Rule):
    """Any module whose rows do not influence each other, with everything below it that has no rule.

    Tensors among the arguments whose leading dimension is R are rows; other tensors are shared by all rows. The first
    time, and whenever another argument looks like rows, the result is compared with that of the module itself.
    """

    piecewise = True

    def __init__(self, *, whole: bool = False) -> None:
        """Args: whole: layers inside lose their rules (they see rows in a list with others, or are not called)."""
        self.whole = whole
        self._known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        if self.whole:
            return trainable(module)
        parts, _ = divided(module)
        found = {id(p): p for part in parts for p in part._parameters.values() if p is not None and p.requires_grad}
        return list(found.values())

    def covers(self, module: nn.Module) -> list[nn.Module]:
        return list(module.children())

    def nested(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers below, at any depth, that keep a rule of their own, with their names."""
        return [] if self.whole else divided(module)[1]

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any:
        known = self._known.setdefault(module, _Known(nests=not self.whole))
        call = _Call(module, record, args, kwargs)
        key = repr(call.shape)
        shared = known.shared.setdefault(key, set())
        call.mapped = [is_row and i not in shared for i, is_row in enumerate(call.mapped)]
        shared |= {i for i, x in enumerate(call.leaves) if isinstance(x, Tensor) and x.dim() and not call.mapped[i]}
        casts = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
        state = (key, module.training, call.rows == 1, *casts)
        if (*state, *call.mapped) not in known.checked:
            own = self._choose(call, known, shared)
            known.checked[(*state, *call.mapped)] = [y.dtype for y in pytree.tree_leaves(own) if isinstance(y, Tensor)]
        result = self._run(call, known)
        return _of_types(result, known.checked[(*state, *call.mapped)])  # under autocast, vmap may forget to cast

    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]:
        return terms_of_copies(trainable(module), calls)

    def _run(self, call: "_Call", known: _Known) -> Any:
        before = Observed(call.module, call.leaves)
        for nesting in (True, False):
            if known.loops or (nesting and not known.nests):
                continue
            try:
                result = call.vmapped(before, nesting=nesting)
                known.nests = nesting
                return result
            except Stays:
                known.nests = False
            except (SfumatoError, _StopRecomputation, torch.OutOfMemoryError):
                raise
            except Exception as error:  # no batching rule, control flow on values: whatever it is, a loop shows it
                _refuse_hooks(call.module, error)
                before.require_untouched()
        result = call.looped(before)
        known.loops = True
        return result

    def _choose(self, call: "_Call", known: _Known, shared: set[int]) -> Any:
        """Tries, without a trace, how the module can be run, until it gives what it gives by itself; returns that."""
        own, other = call.ordinary(seed=0), call.ordinary(seed=1)
        by_chance = not agree(own, other)  # there is nothing to compare but shapes
        failure: Exception | None = None
        doubtful = [i for i in call.doubtful if call.mapped[i] and call.rows > 1]
        for count in range(1 if by_chance else len(doubtful) + 1):
            for constant in combinations(doubtful, count):
                reading = call.reading(constant)
                try:
                    with torch.no_grad(), Observed(call.module, []).restored_afterwards():
                        result = self._run(reading, known)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # said below, if no way works
                    failure = failure or error
                    continue
                if agree(result, own, values=not by_chance) and not (by_chance and doubtful):
                    shared |= set(constant)
                    call.mapped = reading.mapped
                    return own
        if isinstance(failure, SfumatoError):
            raise failure
        said = f" ({type(failure).__name__}: {failure})" if failure is not None else ""
        raise UnsupportedLayer(
            f"{type(call.module).__name__} · gives for a batch something else than for its rows one by one{said}",
            next="Keep rows apart and first in every argument; give what they share without a leading dimension of rows.",
        ) from failure


class _Call:
    """One call of a module, to be run row by row."""

    def __init__(self, module: nn.Module, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self.record = module, record
        self.leaves, self.shape = pytree.tree_flatten((args, kwargs))
        state = next((x for x in self.leaves if type(x).__name__.endswith("Cache")), None)
        if state is not None:
            raise UnsupportedLayer(
                f"{type(module).__name__} · goes row by row, but got a {type(state).__name__} that one row would fill "
                "and the next would read",
                next="Call the model with use_cache=False.",
            )
        self.rows = self._rows()
        self.mapped = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == self.rows for x in self.leaves]
        if not any(self.mapped):
            raise UnsupportedLayer(
                f"{type(module).__name__} · got no tensor with the batch's {self.rows} rows as its leading dimension",
                next="Give it the rows first (batch_first=True), and expand what all rows share.",
            )
        self.doubtful = [i for i, is_row in enumerate(self.mapped) if is_row][1:]  # by chance as long as the batch?

    def reading(self, constant: tuple[int, ...]) -> "_Call":
        """The same call on copies of its arguments, some of them taken as shared by all rows."""
        args, kwargs = pytree.tree_unflatten(self._copies(), self.shape)
        other = _Call(self.module, self.record, args, kwargs)
        other.mapped = [is_row and i not in constant for i, is_row in enumerate(self.mapped)]
        return other

    def _copies(self) -> list[Any]:
        return [x.detach().clone() if isinstance(x, Tensor) else x for x in self.leaves]

    def vmapped(self, before: Observed, *, nesting: bool) -> Any:
        inner = Lifted([layer for _, layer in divided(self.module)[1]] if nesting else [], self.rows)
        with copied(self.module, self.record, self.rows) as (copies, put):
            made: list[Any] = []

            def one_row(own: list[Tensor], row: list[Tensor]) -> tuple[Tensor, ...]:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(put(own))
                    stack.enter_context(inner.calls())
                    found, shape = pytree.tree_flatten(self._of_one_row(row))
                before.require_nothing_kept(alone=False)
                tensors = [_only_row(self.module, y) for y in found if isinstance(y, Tensor)]
                made[:] = [shape, [_ROWS if isinstance(y, Tensor) else _constant(self.module, y) for y in found]]
                return tuple(tensors)

            row_values = [x for x, is_row in zip(self.leaves, self.mapped, strict=True) if is_row]
            with quiet(), _no_hooks():
                tensors = iter(torch.func.vmap(one_row, randomness="different")(copies, row_values))
        shape, found = made
        return pytree.tree_unflatten([next(tensors) if y is _ROWS else y for y in found], shape)

    def looped(self, before: Observed) -> Any:
        with copied(self.module, self.record, self.rows) as (copies, put):
            results = []
            for i in range(self.rows):
                row = [x[i] for x, is_row in zip(self.leaves, self.mapped, strict=True) if is_row]
                with put([copy[i] for copy in copies]), _no_hooks():
                    results.append(self._of_one_row(row))
                before.require_untouched()
                before.require_nothing_kept(alone=True)
        flattened = [pytree.tree_flatten(result) for result in results]
        shape = flattened[0][1]
        if any(other != shape for _, other in flattened):
            raise _unequal(self.module)
        joined = []
        for values in zip(*(found for found, _ in flattened), strict=True):
            if all(isinstance(y, Tensor) for y in values):
                joined.append(torch.stack([_only_row(self.module, y) for y in values]))
            elif len({_constant(self.module, y) for y in values}) == 1:
                joined.append(values[0])
            else:
                raise _unequal(self.module)
        return pytree.tree_unflatten(joined, shape)

    def ordinary(self, seed: int) -> Any:
        """What the module itself gives, without a gradient and without a trace."""
        args, kwargs = pytree.tree_unflatten(self._copies(), self.shape)
        before = Observed(self.module, [])
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with before.restored_afterwards():
                return plain_forward(self.module)(*args, **kwargs)

    def _of_one_row(self, row: list[Tensor]) -> Any:
        values = iter(row)
        full = [next(values).unsqueeze(0) if m else x for x, m in zip(self.leaves, self.mapped, strict=True)]
        args, kwargs = pytree.tree_unflatten(full, self.shape)
        return plain_forward(self.module)(*args, **kwargs)

    def _rows(self) -> int:
        if self.record.rows is not None:
            return self.record.rows
        for x in self.leaves:
            if isinstance(x, Tensor) and x.dim() > 0:
                return x.shape[0]
        raise UnsupportedLayer(
            f"{type(self.module).__name__} · is called without a tensor, so its rows are unknown",
            next="Give the layer the batch's rows as its first tensor.",
        )


# --------------------------------------------------------------------------------------------- parts and their copies


def divided(module: nn.Module) -> tuple[list[nn.Module], list[tuple[str, nn.Module]]]:
    """The modules that go row by row with this one (it is the first), and the layers below that keep their own rules."""
    parts: list[nn.Module] = []
    layers: dict[int, tuple[str, nn.Module]] = {}
    seen: set[int] = set()

    def visit(name: str, part: nn.Module, whole: bool) -> None:
        if id(part) in seen:
            return
        found = rule_for(part) if parts and not whole else None
        if found is not None and found.treats(part):
            if found.nests:
                layers.setdefault(id(part), (name, part))
                return
            whole = True
        seen.add(id(part))
        parts.append(part)
        for child_name, child in part.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, whole or hasattr(part, "parametrizations"))

    visit("", module, False)
    return parts, [layer for key, layer in layers.items() if key not in seen]


# ------------------------------------------------------------------------------------------------- what comes back


_ROWS = object()  # in the place of a tensor


def _constant(module: nn.Module, y: Any) -> Any:
    """A part of a result that is no tensor, and so is the same for all rows."""
    if y is None or isinstance(y, (bool, int, float, complex, str, Enum, torch.dtype, torch.device, torch.Size)):
        return y
    raise UnsupportedLayer(
        f"{type(module).__name__} · returned a {type(y).__name__}, in which its rows cannot be seen",
        next="Return tensors, or tuples, lists and dicts of them.",
    )


def _of_types(result: Any, kinds: list[torch.dtype] | None) -> Any:
    found, shape = pytree.tree_flatten(result)
    tensors = [i for i, y in enumerate(found) if isinstance(y, Tensor)]
    for i, kind in zip(tensors, kinds or (), strict=False):
        if found[i].is_floating_point() and kind.is_floating_point:
            found[i] = found[i].to(kind)
    return pytree.tree_unflatten(found, shape)


def _unequal(module: nn.Module) -> UnsupportedLayer:
    return UnsupportedLayer(
        f"{type(module).__name__} · gave results of several kinds for the rows of one batch",
        next="Return the same kind of result for every row.",
    )


def _only_row(module: nn.Module, y: Tensor) -> Tensor:
    if y.dim() == 0 or y.shape[0] != 1:
        raise UnsupportedLayer(
            f"{type(module).__name__} · gave an output of shape {tuple(y.shape)} for one row, expected the row first",
            next="Return tensors whose leading dimension is the batch's rows.",
        )
    return y.squeeze(0)


_HOOKED = "sfumato: saved tensors are hooked inside a module that goes row by row"


@contextlib.contextmanager
def _no_hooks() -> Iterator[None]:
    """A checkpoint inside would run its part again in the backward pass, when the rows' own tensors are gone."""
    hooks: Any = torch._C._autograd  # type: ignore[attr-defined]
    before = hooks._saved_tensors_hooks_get_disabled_error_message()
    hooks._saved_tensors_hooks_disable(_HOOKED, False)  # those around this module stay
    try:
        yield
    finally:
        if before is None:
            hooks._saved_tensors_hooks_enable()
        else:
            hooks._saved_tensors_hooks_disable(before, False)


def _refuse_hooks(module: nn.Module, error: Exception) -> None:
    if _HOOKED in str(error):
        raise UnsupportedLayer(
            f"{type(module).__name__} · has a checkpoint (or another hook on saved tensors) inside, and goes row by row",
            next="Checkpoint the whole of it, or give its own parameters a module of their own.",
        ) from error
