"""Puts the rules to work on a model: records one backward pass, and sums the clipped gradients from the records.

Shapes: R rows, B units.

Only ``forward`` of the single layers is replaced, on the instance. The model's class, its ``state_dict`` names, its
hooks, ``save`` and ``deepcopy`` are as before; a copy is an ordinary, unprotected model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.gradients.rules import (
    Call,
    RowByRow,
    Rule,
    forward_is_replaced,
    plain_forward,
    rule_for,
    trainable,
)
from sfumato.privacy.gradients.terms import Term

_REFUSED: tuple[tuple[type[nn.Module], str], ...] = (
    (
        nn.modules.batchnorm._BatchNorm,
        "normalises over the batch, so units influence each other and its running averages leave without noise: "
        "use nn.GroupNorm (or nn.LayerNorm)",
    ),
    (nn.RNNBase, "has rows in the second dimension of its states: use nn.GRUCell, nn.LSTMCell, or attention"),
    (
        nn.parallel.DistributedDataParallel,
        "reduces gradients before they are clipped: give the engine the module inside",
    ),
    (nn.DataParallel, "splits rows over replicas that are not recorded: give the engine the module inside"),
)


@dataclass(eq=False)
class Layer:
    """One module that is recorded, and what its backward pass has left."""

    name: str
    module: nn.Module
    rule: Rule
    parameters: list[nn.Parameter]
    calls: list[Call] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name or 'model'} ({type(self.module).__name__})"


class Tape:
    """Records the layers of one model.

    ``rows`` is R: set by the engine for its own batches; in a hand-written loop, the leading dimension of the first
    tensor that the model itself is called with. Nothing is recorded for 0 rows: there is nobody to protect.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = _find_layers(model)
        protected = {id(p) for layer in self.layers for p in layer.parameters}
        self.parameters = {p: name for name, p in model.named_parameters() if id(p) in protected}  # with their names
        self.rows: int | None = None
        self.rows_are_given = False
        self.enabled = True
        self._inside = 0  # depth of modules that are treated as a whole
        self._pass: int | None = None  # which backward pass the records are of
        self._by_module = {id(layer.module): layer for layer in self.layers}
        modules = [layer.module for layer in self.layers]
        if id(model) not in self._by_module:
            modules.append(model)  # its first tensor tells R in a hand-written loop
        for module in modules:
            module.forward = _Forward(self, module)  # type: ignore[method-assign]

    @property
    def has_records(self) -> bool:
        return any(layer.calls for layer in self.layers)

    def detach(self) -> None:
        """Gives the modules their own ``forward`` back."""
        for module in [*(layer.module for layer in self.layers), self.model]:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        self.clear()

    def clear(self) -> None:
        for layer in self.layers:
            layer.calls.clear()
        self._pass = None
        if not self.rows_are_given:
            self.rows = None

    def give_rows(self, rows: int | None) -> None:
        """Says what R is, or (None) that the model's input shows it."""
        self.rows, self.rows_are_given = rows, rows is not None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._by_module.get(id(module))
        recording = self.enabled and not self._inside and torch.is_grad_enabled()
        if recording and module is self.model and not self.rows_are_given:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() > 0]
            self.rows = tensors[0].shape[0] if tensors else None
        if not recording or layer is None or self.rows == 0 or not any(p.requires_grad for p in layer.parameters):
            return plain_forward(module)(*args, **kwargs)
        if not isinstance(layer.rule, RowByRow):
            args = tuple(self._with_rows(x) for x in args)
            return layer.rule.forward(module, _Recorder(self, layer), *args, **kwargs)
        self._inside += 1
        try:
            return layer.rule.forward(module, _Recorder(self, layer), *args, **kwargs)
        finally:
            self._inside -= 1

    def _with_rows(self, x: Any) -> Any:
        """(1, ...) -> (R, ...): what all rows share (position ids) is every row's own input, written once."""
        if isinstance(x, Tensor) and self.rows not in (None, 1) and x.dim() > 1 and x.shape[0] == 1:
            return x.expand(self.rows, *x.shape[1:])
        return x

    def record(self, layer: Layer, tensors: Call) -> None:
        if not self.enabled:
            return
        number = torch._C._current_graph_task_id()
        if self._pass is None:
            self._pass = number
        elif self._pass != number:
            raise UsageError(
                "backward() · was called twice before optimizer.step(): of the same examples, or of others?",
                next="Add the losses up and call backward() once; for large batches use "
                "engine.batches(..., max_physical_batch_size=) and step after every part.",
            )
        layer.calls.append(tensors)

    def take(self) -> tuple[list[Layer], list[list[Term]], int]:
        """The layers that were called, the terms of each, and R; the records are gone afterwards."""
        called = [layer for layer in self.layers if layer.calls]
        terms = [layer.rule.terms(layer.module, layer.calls) for layer in called]
        rows = {term.num_rows for group in terms for term in group}
        if self.rows is not None:
            rows.add(self.rows)
        if len(rows) > 1:
            expected = self.rows
            shown = f", {expected}," if expected else ""
            wrong = [
                f"{layer}: {sorted({t.num_rows for t in group})}"
                for layer, group in zip(called, terms, strict=True)
                if any(t.num_rows != expected for t in group)
            ]
            self.clear()
            raise UnsupportedLayer(
                f"leading dimension · must be the batch's rows{shown} in every layer, but is in " + "; ".join(wrong),
                next="Keep the rows as the leading dimension; put draws and positions after it.",
            )
        self.clear()
        return called, terms, rows.pop() if rows else 0


class _Recorder:
    """What a rule's backward pass calls."""

    def __init__(self, tape: Tape, layer: Layer) -> None:
        self._tape, self._layer = tape, layer

    @property
    def rows(self) -> int | None:
        return self._tape.rows

    def __call__(self, *tensors: Tensor) -> None:
        self._tape.record(self._layer, tensors)


class _Forward:
    """The ``forward`` of one recorded module. Copies and pickles of the module get the plain one."""

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        self.tape, self.module = tape, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tape.call(self.module, args, kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module]]:
        return plain_forward, (self.module,)


def _find_layers(model: nn.Module) -> list[Layer]:
    """Which module is treated by which rule. Raises UnsupportedLayer that names every layer that cannot be treated."""
    problems: list[str] = []
    layers: list[Layer] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, covered: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        inside: set[int] = set()  # children that this module's rule treats
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        problem = _problem_of(module, bool(own))
        found = rule_for(module)
        if problem is None and found is not None and found.treats(module):
            problem = found.problem(module)
        if problem is not None:
            problems.append(f"{name or 'model'} ({type(module).__name__}): {problem}")
        elif not covered:
            if found is None and (own or (hasattr(module, "parametrizations") and trainable(module))):
                found = RowByRow()
            treated = found.treats(module) if found is not None else []
            if found is not None and treated:
                layers.append(Layer(name, module, found, treated))
                inside = {id(child) for child in found.covers(module)}
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, covered or id(child) in inside)

    visit("", model, covered=False)
    if problems:
        raise UnsupportedLayer(
            f"{len(problems)} layer{'s' * (len(problems) > 1)} cannot be trained privately: " + "; ".join(problems),
            next="Change each as its line says.",
        )
    return layers


def _problem_of(module: nn.Module, owns_trainable: bool) -> str | None:
    for kind, reason in _REFUSED:
        if isinstance(module, kind):
            return reason
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "keeps running averages of private data, which leave without noise: set track_running_stats=False"
    if getattr(module, "batch_first", True) is False:
        return "has positions before rows: set batch_first=True"
    if isinstance(vars(module).get("forward"), _Forward):
        return "is recorded by another engine already: call its detach() first"
    if owns_trainable and forward_is_replaced(module):
        return "has a forward that was replaced on the instance: give its class that forward"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        return "has no parameters yet: run the model once before the engine is made"
    return None
