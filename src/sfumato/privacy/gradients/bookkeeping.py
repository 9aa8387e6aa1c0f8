"""Puts the rules to work on a model: records one backward pass, and sums the clipped gradients from the records.

Shapes: R rows, B units.

Only ``forward`` of the single layers is replaced, on the instance. The model's class, its ``state_dict`` names, its
hooks, ``save`` and ``deepcopy`` are as before; a copy is an ordinary, unprotected model.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.gradients import adapters, pretrained  # noqa: F401 (they know rules for classes of others)
from sfumato.privacy.gradients.arithmetic import exact
from sfumato.privacy.gradients.rules import (
    Call,
    Record,
    RowByRow,
    Rule,
    forward_is_replaced,
    plain_forward,
    problem_of_embedding,
    rule_for,
    trainable,
)
from sfumato.privacy.gradients.terms import Term, Units
from sfumato.privacy.processes import gathered, is_fully_sharded, let_go, wrapper_problem

_REFUSED: tuple[tuple[type[nn.Module], str], ...] = (
    (
        nn.modules.batchnorm._BatchNorm,
        "normalises over the batch, so units influence each other and its running averages leave without noise: "
        "use nn.GroupNorm (or nn.LayerNorm)",
    ),
    (nn.RNNBase, "has rows in the second dimension of its states: use nn.GRUCell, nn.LSTMCell, or attention"),
    (
        nn.parallel.DistributedDataParallel,
        "reduces gradients before they are clipped: leave it out; the engine itself reduces over all processes",
    ),
    (nn.DataParallel, "splits rows over replicas that are not recorded: give the engine the module inside"),
    (
        torch.jit.ScriptModule,
        "was compiled by torch.jit, which leaves nothing to record: give the engine the module itself",
    ),
)


@dataclass(eq=False)
class Layer:
    """One module that is recorded, and what its backward pass has left."""

    name: str
    module: nn.Module
    rule: Rule
    parameters: list[nn.Parameter]
    calls: list[Call] = field(default_factory=list)
    awaited: int = 0  # calls of this step that have not come back in the backward pass
    terms: list[Term] = field(default_factory=list)  # of calls whose norms were taken already
    held: list[tuple[Tensor, int]] = field(default_factory=list)  # what these still need, and its version
    alone: bool = True  # no other layer has one of its parameters

    def __post_init__(self) -> None:
        known = {id(parameter) for parameter in self.parameters}
        self._places = [
            (part, name, parameter)
            for part in self.module.modules()
            for name, parameter in part._parameters.items()
            if id(parameter) in known
        ]

    @property
    def has_other_rows(self) -> bool:
        """Its calls were not all with the same rows, so that they cannot be added up row by row."""
        return len({call[-1].shape[0] for call in self.calls if call[-1].dim() > 0}) > 1

    def __str__(self) -> str:
        return f"{self.name or 'model'} ({type(self.module).__name__})"

    def take_terms(self) -> list[Term]:
        """The terms of all calls, in the parameters that the optimizer has.

        While ``fully_shard`` has a layer gathered, other parameters stand in their places.
        """
        before = [(part, name, part._parameters[name]) for part, name, _ in self._places]
        try:
            for part, name, parameter in self._places:
                part._parameters[name] = parameter
            terms = self.rule.terms(self.module, self.calls)
        finally:
            for part, name, parameter in before:
                part._parameters[name] = parameter
        self.calls.clear()
        return terms


class Tape:
    """Records the layers of one model.

    ``rows`` is R: set by the engine for its own batches; in a hand-written loop, the leading dimension of the first
    tensor that the model itself is called with. Nothing is recorded for 0 rows: there is nobody to protect. Then too the
    parameters get no gradient, so that processes with and without rows meet equally often in ``fully_shard``'s hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        let_go(model)
        self.layers = _find_layers(model)
        protected = {id(p) for layer in self.layers for p in layer.parameters}
        self.parameters = {p: name for name, p in model.named_parameters() if id(p) in protected}  # with their names
        self.rows: int | None = None
        self.rows_are_given = False
        self.enabled = True
        self.on_first_call: Callable[[], None] | None = None  # of a step
        self._begun = False
        self.several_passes = False  # those that come now are declared to be of the same rows
        self._inside = 0  # depth of modules that are treated as a whole
        self._pass: int | None = None  # which backward pass the records are of
        self._running: list[int] = []  # backward passes, each started inside the one before, by a checkpoint
        self._outermost: dict[int, int] = {}
        self.units: Units | None = None  # whose the rows are: norms are then taken during the backward pass
        self._by_module = {id(layer.module): layer for layer in self.layers}
        users = Counter(id(p) for layer in self.layers for p in layer.parameters)
        for layer in self.layers:
            layer.alone = all(users[id(p)] == 1 for p in layer.parameters)
        self.call: Callable[..., Any] = torch.compiler.disable(self._call)
        modules = [layer.module for layer in self.layers]
        if id(model) not in self._by_module:
            modules.append(model)  # its first tensor tells R in a hand-written loop
        for module in modules:
            module.forward = _Forward(self, module)  # type: ignore[method-assign]

    @property
    def has_records(self) -> bool:
        return any(layer.calls or layer.terms for layer in self.layers)

    def detach(self) -> None:
        """Gives the modules their own ``forward`` back."""
        for module in [*(layer.module for layer in self.layers), self.model]:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        self.clear()

    def clear(self) -> None:
        for layer in self.layers:
            layer.calls.clear()
            layer.terms = []
            layer.held = []
            layer.awaited = 0
        self._pass = None
        self._begun = False
        self._running.clear()
        self._outermost.clear()
        if not self.rows_are_given:
            self.rows = self.units = None

    def give_units(self, units: Units | None) -> None:
        """Says whose the rows are, or (None) that the model's input shows R and each row is a unit."""
        self.units, self.rows_are_given = units, units is not None
        self.rows = units.num_rows if units is not None else None

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, recorded. Inside torch.compile it runs as it is: a compiled record would be lost."""
        layer = self._by_module.get(id(module))
        if self._current_pass() != -1 and not self.enabled and layer is not None:  # a checkpoint runs its part again
            raise UsageError(
                f"backward() · reached {layer}, whose forward pass was outside of engine.public() or engine.frozen()",
                next="Put the forward pass inside as well, or the backward pass outside; a checkpoint there needs "
                "use_reentrant=False.",
            )
        recording = self.enabled and not self._inside and torch.is_grad_enabled()
        if recording and module is self.model and not self.rows_are_given:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
            self.rows = tensors[0].shape[0] if tensors else None
            self.units = None if self.rows is None else Units(None, self.rows)
        if not recording or layer is None or not any(p.requires_grad for p in layer.parameters):
            return plain_forward(module)(*args, **kwargs)
        if self.rows == 0:
            return _without_rows(module, trainable(module)[0], args, kwargs)
        record = self.recorder_of(layer)
        if not isinstance(layer.rule, RowByRow):
            args, kwargs = layer.rule.over_rows(self._with_rows(), args, kwargs)
            return layer.rule.forward(module, record, *args, **kwargs)
        self._inside += 1
        try:
            return layer.rule.forward(module, record, *args, **kwargs)
        finally:
            self._inside -= 1

    def _with_rows(self) -> Callable[[Tensor], Tensor]:
        """(1, ...) -> (R, ...): what all rows share (position ids) is every row's own input, written once."""
        done: dict[int, Tensor] = {}  # one tensor given twice stays one

        def expanded(x: Tensor) -> Tensor:
            if self.rows in (None, 1) or x.dim() < 2 or x.shape[0] != 1:
                return x
            return done.setdefault(id(x), x.expand(self.rows, *x.shape[1:]))

        return expanded

    def _current_pass(self) -> int:
        """The backward pass that is running; of passes inside one another (reentrant checkpoints) the outermost."""
        number = torch._C._current_graph_task_id()
        if number != -1 and number not in self._outermost:
            running = self._running
            self._outermost[number] = self._outermost[running[-1]] if running else number
            running.append(number)
            torch.autograd.Variable._execution_engine.queue_callback(  # at the end of this pass
                lambda: running.remove(number) if number in running else None
            )
        return self._outermost.get(number, number)

    def recorder_of(self, layer: Layer) -> "_Recorder":
        """For one call of the layer."""
        if not self._begun:
            self._begun = True
            if self.on_first_call is not None:
                self.on_first_call()
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # no checkpointed part, run once more
            layer.awaited += 1
        return _Recorder(self, layer)

    def layer_of(self, module: nn.Module) -> Layer | None:
        return self._by_module.get(id(module))

    def record(self, layer: Layer, tensors: Call) -> None:
        if not self.enabled:
            raise UsageError(
                f"backward() · reached {layer}, whose forward pass was outside of engine.public() or engine.frozen()",
                next="Put the forward pass inside as well, or the backward pass outside.",
            )
        number = self._current_pass()
        if self._pass is None:
            self._pass = number
        elif self._pass != number and not self.several_passes:
            raise UsageError(
                "backward() · was called twice before optimizer.step(): of the same examples, or of others?",
                next="Losses of the same rows: add them up and call backward() once. Several passes over the same units go inside "
                "engine.same_units(), a loss without private data inside engine.public(), a pass that should train "
                "nothing inside engine.frozen(), parts of one batch through max_physical_batch_size= or "
                "engine.accumulate(), each with a step of its own.",
            )
        layer.calls.append(tensors)
        if layer.rule.piecewise:
            return
        layer.awaited -= 1
        if layer.awaited == 0 and layer.alone and self.units is not None and not self.several_passes:
            self._take_norms(layer, self.units)

    @torch.no_grad()
    def _take_norms(self, layer: Layer, units: Units) -> None:
        """While the numbers are in the cache; and what is not needed for the sum is let go before the next layer."""
        if layer.has_other_rows:
            return  # left to ``take``
        calls = list(layer.calls)
        terms = layer.take_terms()
        units = units.to(layer.parameters[0].device)
        used = Counter(id(p) for term in terms for p in term.parameters)
        if any(count > 1 for count in used.values()) or any(term.num_rows != units.num_rows for term in terms):
            layer.calls += calls
            return  # left to ``take``
        with exact(layer.parameters[0].device):
            for term in terms:
                term.squared(units)
        layer.terms += terms
        layer.held += [(tensor, tensor._version) for term in terms for tensor in term.held()]

    def take(self) -> tuple[list[Layer], list[list[Term]], int]:
        """The layers that were called, the terms of each, and R; the records are gone afterwards."""
        called = [layer for layer in self.layers if layer.calls or layer.terms]
        changed = [str(layer) for layer in called if any(tensor._version != v for tensor, v in layer.held)]
        if changed:
            self.clear()
            raise UsageError(
                f"{', '.join(changed[:10])} · its input or the gradient of its output was changed in place between "
                "backward() and optimizer.step(), after its norm was taken",
                next="Step before the batch's tensors are used for something else.",
            )
        others = [str(layer) for layer in called if layer.has_other_rows]
        if others:
            self.clear()
            raise UnsupportedLayer(
                f"{', '.join(others)} · was called with different numbers of rows before one step",
                next="Keep the rows as the leading dimension; a pass over other rows is a step of its own.",
            )
        terms = [layer.terms + (layer.take_terms() if layer.calls else []) for layer in called]
        called, terms = self._to_their_layers(called, terms)
        rows = {term.num_rows for group in terms for term in group}
        if self.rows is not None:
            rows.add(self.rows)
        if len(rows) > 1:
            expected = self.rows
            wrong = [
                f"{layer}: {sorted({t.num_rows for t in group})}"
                for layer, group in zip(called, terms, strict=True)
                if any(t.num_rows != expected for t in group)
            ]
            shown = f", {expected}," if expected else ""
            self.clear()
            raise UnsupportedLayer(
                f"leading dimension · must be the batch's rows{shown} in every layer, but is in " + "; ".join(wrong),
                next="Keep the rows as the leading dimension; put draws and positions after it.",
            )
        self.clear()
        return called, terms, rows.pop() if rows else 0

    def _to_their_layers(self, called: list[Layer], terms: list[list[Term]]) -> tuple[list[Layer], list[list[Term]]]:
        """A module that went row by row as a whole also tells of the layers inside it: their terms go to them."""
        found = dict(zip((id(layer) for layer in called), terms, strict=True))
        owners = {id(p): layer for layer in reversed(self.layers) for p in layer.parameters}
        for layer in called:
            own = {id(p) for p in layer.parameters}
            foreign = [term for term in found[id(layer)] if id(term.parameters[0]) not in own]
            for term in foreign:
                found[id(layer)].remove(term)
                found.setdefault(id(owners[id(term.parameters[0])]), []).append(term)
        layers = [layer for layer in self.layers if id(layer) in found]
        return layers, [found[id(layer)] for layer in layers]


class _Recorder:
    """What a rule's backward pass calls."""

    def __init__(self, tape: Tape, layer: Layer) -> None:
        self._tape, self._layer = tape, layer

    @property
    def rows(self) -> int | None:
        return self._tape.rows

    def __call__(self, *tensors: Tensor) -> None:
        self._tape.record(self._layer, tensors)


class _NoRows(Function):
    """Ties outputs that have no rows to the graph. Whatever came in has a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, count: int, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.inputs = tensors[:count], tensors[count:]
        ctx.count = count
        ctx.mark_non_differentiable(*(y for y in outputs if not y.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2 + ctx.count :]
        zeros = [torch.zeros_like(x) if wants else None for x, wants in zip(ctx.inputs, wanted, strict=True)]
        return None, None, *[None] * ctx.count, *zeros


def _without_rows(module: nn.Module, anchor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the module gives for 0 rows; a gradient passes through, and leaves the parameters alone."""
    with torch.no_grad():
        result = plain_forward(module)(*args, **kwargs)
    leaves, shape = pytree.tree_flatten(result)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
    outputs: Any = _NoRows.apply(len(places), anchor, *(leaves[i].view_as(leaves[i]) for i in places), *inputs)
    for i, output in zip(places, outputs, strict=True):
        leaves[i] = output
    return pytree.tree_unflatten(leaves, shape)


class _Forward:
    """The ``forward`` of one recorded module. Copies and pickles of the module get the plain one."""

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        self.tape, self.module = tape, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tape.call(self.module, args, kwargs)

    def served(self) -> tuple[Rule, Callable[[], Record]] | None:
        """The rule of this layer, and what makes a record of one call; None where it is not a recorded layer."""
        layer = self.tape.layer_of(self.module)
        return None if layer is None else (layer.rule, lambda: self.tape.recorder_of(layer))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module]]:
        return plain_forward, (self.module,)


def _find_layers(model: nn.Module) -> list[Layer]:
    """Which module is treated by which rule. Raises UnsupportedLayer that names every layer that cannot be treated."""
    problems: list[str] = []
    layers: list[Layer] = []
    seen: dict[int, bool] = {}  # whether only as a part of another layer

    def visit(name: str, module: nn.Module, covered: bool) -> None:
        if not seen.get(id(module), True) or (covered and id(module) in seen):
            return
        seen[id(module)] = covered
        inside: set[int] = set()  # children that this module's rule treats
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
        problem = _problem_of(module, bool(own))
        with gathered(module):  # rules try out what a module computes
            found = rule_for(module) if problem is None else None
            if problem is None and found is not None and found.treats(module):
                problem = found.problem(module)
        if problem is not None:
            said = f"{name or 'model'} ({type(module).__name__}): {problem}"
            problems.extend([said] if said not in problems else [])
        elif not covered:
            if found is None and (own or (hasattr(module, "parametrizations") and trainable(module))):
                found = RowByRow()
            treated = found.treats(module) if found is not None else []
            if found is not None and treated:
                layers.append(Layer(name, module, found, treated))
                inside = {id(child) for child in found.covers(module)}
                torn = [part for child in found.covers(module) for part in child.modules() if is_fully_sharded(part)]
                if torn:
                    problems.append(
                        f"{name or 'model'} ({type(module).__name__}): is treated as a whole, but fully_shard was applied "
                        f"inside it, to {type(torn[0]).__name__}: apply it to the whole"
                    )
                for below_name, below in found.nested(module):
                    visit(f"{name}.{below_name}" if name else below_name, below, False)
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
    wrapper = wrapper_problem(module)
    if wrapper is not None:
        return wrapper
    for kind, reason in _REFUSED:
        if isinstance(module, kind):
            return reason
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "keeps running averages of private data, which leave without noise: set track_running_stats=False"
    if getattr(module, "batch_first", True) is False:
        return "has positions before rows: set batch_first=True"
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return "was compiled by torch.compile, which leaves nothing to record: give the engine the module itself"
    if isinstance(module, nn.EmbeddingBag) and owns_trainable:
        return problem_of_embedding(module)
    if any(p is not None and p.requires_grad and p.is_complex() for p in module._parameters.values()):
        return "has complex parameters, whose gradients have no norm here: hold real and imaginary parts"
    if isinstance(vars(module).get("forward"), _Forward):
        return "is recorded by another engine already: call its detach() first"
    if owns_trainable and forward_is_replaced(module):
        return "has a forward that was replaced on the instance: give its class that forward"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        return "has no parameters yet: run the model once before the engine is made"
    return None
