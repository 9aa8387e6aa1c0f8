"""Layers that keep their own rule inside a module that ``torch.func.vmap`` runs as if its batch had one row.

Such a layer gets tensors (1, ...) or (...) that stand for all rows. Here the R rows behind them are taken out, the
layer's rule is called with them as on any other batch, and its result is put back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._C._functorch import (  # type: ignore[import]
    _add_batch_dim,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from sfumato.privacy.gradients.rules.registry import Record, Rule


class Stays(Exception):
    """A layer cannot be taken out of the vmap: its parameters are copied for the rows, as the module's own are."""


class Lifted:
    """Layers, with the parameters they have before copies for single rows take their places."""

    def __init__(self, layers: list[nn.Module], rows: int) -> None:
        self._layers, self._rows = layers, rows
        self._parameters = [
            [(part._parameters, name, p) for part in layer.modules() for name, p in part._parameters.items()]
            for layer in layers
        ]

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Inside, calls of the layers go to their rules, for all rows together."""
        if not self._layers:
            yield
            return
        before = [vars(layer).get("forward") for layer in self._layers]
        served: list[tuple[Rule, Callable[[], Record]]] = []
        for forward in before:
            found = forward.served() if hasattr(forward, "served") else None  # type: ignore[union-attr]
            if found is None:
                raise Stays
            served.append(found)
        level = _level()
        for layer, parameters, how in zip(self._layers, self._parameters, served, strict=True):
            vars(layer)["forward"] = functools.partial(_call, layer, parameters, how, self._rows, level)
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                vars(layer)["forward"] = forward


def _level() -> int:
    stack = get_interpreter_stack() or []
    if len(stack) != 1:  # the caller's own vmap or grad is around ours, or inside
        raise Stays
    return stack[0].level()


@contextlib.contextmanager
def _in_place(parameters: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    before = [holder[name] for holder, name, _ in parameters]
    for holder, name, parameter in parameters:
        holder[name] = parameter
    try:
        yield
    finally:
        for (holder, name, _), value in zip(parameters, before, strict=True):
            holder[name] = value


def _call(
    layer: nn.Module,
    parameters: list[tuple[dict[str, Any], str, Any]],
    served: tuple[Rule, Callable[[], Record]],
    rows: int,
    level: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    rule, new_record = served
    if _level() != level:
        raise Stays
    leading: set[bool] = set()  # whether the tensors had a 1 for the row
    done: dict[int, Tensor] = {}  # one tensor given twice stays one

    def take_out(x: Tensor) -> Tensor:
        if id(x) not in done:
            if is_functorch_wrapped_tensor(x):
                bdim = maybe_get_bdim(x)
                if maybe_get_level(x) != level or bdim < 0:
                    raise Stays
                y = get_unwrapped(x).movedim(bdim, 0)
            else:
                y = x.expand(rows, *x.shape)
            has_row = x.dim() > 0 and x.shape[0] == 1
            leading.add(has_row)
            done[id(x)] = y.squeeze(1) if has_row else y
        return done[id(x)]

    args, kwargs = rule.over_rows(take_out, args, kwargs)
    left = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and is_functorch_wrapped_tensor(x)]
    if left or len(leading) != 1 or not (rule.any_shape or leading == {True}):
        raise Stays
    with temporarily_clear_interpreter_stack(), _in_place(parameters):
        result = rule.forward(layer, new_record(), *args, **kwargs)

    def put_back(y: Tensor) -> Tensor:
        return _add_batch_dim(y.unsqueeze(1) if leading == {True} else y, 0, level)

    return pytree.tree_map_only(Tensor, put_back, result)
