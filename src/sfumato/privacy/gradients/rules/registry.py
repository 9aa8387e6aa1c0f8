"""One rule per layer type: run the layer without an unclipped weight gradient, and say what its per-row gradients are.

Rows convention: every protected layer's input has the batch's rows R as its leading dimension. A rule's ``forward``
computes what the layer computes; in the backward pass it gives the input its gradient, the parameters none, and hands
what is needed to ``record``. A rule's ``terms`` turn these records into terms, once per step.

The registry is open:

    @rule(MyScale)
    class MyScaleRule(Rule):
        parameters = ("weight",)
        ...

A module that owns trainable parameters and has no rule goes through ``RowByRow`` (row_by_row.py).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.gradients.terms import Term

Call = tuple[Tensor, ...]  # what one call of a layer handed to ``record`` in the backward pass


class Record(Protocol):
    """Takes what a layer's backward pass has seen. ``rows`` is R where it is known before the backward pass."""

    @property
    def rows(self) -> int | None: ...

    def __call__(self, *tensors: Tensor) -> None: ...


class Rule(ABC):
    """(Expected) guarantees: the output equals the layer's own; the parameters get no gradient from autograd; the terms
    of a row depend on that row's input and output gradient only."""

    parameters: tuple[str, ...] = ("weight", "bias")  # all that this rule treats; others send the module to RowByRow
    piecewise: bool = False  # a call has several records: one for each parameter, or for each part
    nests: bool = False  # also serves inside a module that goes row by row, called with tensors (1, ...) of one row
    any_shape: bool = False  # these tensors may also lack the leading 1

    def problem(self, module: nn.Module) -> str | None:
        """Why this module cannot be trained privately, with what to do; None if it can."""
        return None

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters that this rule answers for: the module's own."""
        return [p for p in module._parameters.values() if p is not None and p.requires_grad]

    def covers(self, module: nn.Module) -> list[nn.Module]:
        """The children that the rule treats with everything below them; rules of their own are not used there."""
        return []

    def nested(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Layers below what ``covers`` says, at any depth, that keep rules of their own all the same; with names."""
        return []

    def over_rows(
        self, change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with ``change`` done to every tensor that has rows."""

        def changed(x: Any) -> Any:
            if isinstance(x, Tensor):
                return change(x)
            return pytree.tree_map_only(Tensor, change, x) if isinstance(x, (tuple, list, dict)) else x

        return tuple(changed(x) for x in args), {name: changed(x) for name, x in kwargs.items()}

    @abstractmethod
    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]: ...


AnyRule = TypeVar("AnyRule", bound=Rule)

_RULES: dict[type[nn.Module], Rule] = {}
_FINDERS: list[Callable[[nn.Module], Rule | None]] = []


def rule(*layer_types: type[nn.Module]) -> Callable[[type[AnyRule]], type[AnyRule]]:
    """Registers a rule for layer types."""

    def register(cls: type[AnyRule]) -> type[AnyRule]:
        for layer_type in layer_types:
            if layer_type in _RULES:
                raise UsageError(
                    f"rule for {layer_type.__name__} = {cls.__name__} · there is one already, "
                    f"{type(_RULES[layer_type]).__name__}",
                    next="Register a rule for your own subclass.",
                )
            _RULES[layer_type] = cls()
        return cls

    return register


def rule_finder(find: Callable[[nn.Module], Rule | None]) -> Callable[[nn.Module], Rule | None]:
    """Registers a function that knows rules for classes which cannot be named here, because they are not imported.

    It is asked about modules whose type is not registered, and answers None where it knows nothing.
    """
    _FINDERS.append(find)
    return find


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's type, or of a base whose ``forward`` the module still has; None if there is none."""
    if forward_is_replaced(module) or hasattr(module, "parametrizations"):
        return None
    found = _registered_rule_for(module)
    for find in _FINDERS if found is None else ():
        found = find(module)
        if found is not None:
            break
    return found


def _registered_rule_for(module: nn.Module) -> Rule | None:
    for base in type(module).__mro__:
        found = _RULES.get(base)
        if found is not None:
            code = ("forward", "_conv_forward")
            same = all(getattr(type(module), name, None) is getattr(base, name, None) for name in code)
            trainable = {name for name, p in module.named_parameters() if p.requires_grad}
            return found if same and trainable <= set(found.parameters) else None
    return None


def known_layers() -> list[str]:
    return sorted(layer_type.__name__ for layer_type in _RULES)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """No second derivative goes through a recorded layer: asking for one is refused, instead of giving zero."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedLayer(
                "create_graph = True · a second derivative (a gradient penalty) has no per-unit gradient here",
                next="Differentiate once; bound the function by its layers (spectral_norm, weight clipping) instead.",
            )
        return backward(ctx, *grad_outputs)

    return checked


class Labelled:
    """A record for one of several parts of a layer: puts a number before what it is given."""

    def __init__(self, record: Record, label: int) -> None:
        self._record, self._label = record, label

    @property
    def rows(self) -> int | None:
        return self._record.rows

    def __call__(self, *tensors: Tensor) -> None:
        self._record(torch.tensor(self._label), *tensors)


def labelled_with(label: int, calls: list[Call]) -> list[Call]:
    """What a ``Labelled`` recorded, without the number."""
    return [call[1:] for call in calls if int(call[0]) == label]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters at or below the module, each once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, whatever was put on the instance."""
    return type(module).forward.__get__(module)


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's. (A recorded module, and a copy of it, have theirs.)"""
    own = vars(module).get("forward")
    return own is not None and not hasattr(own, "served") and getattr(own, "__func__", None) is not type(module).forward


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Over the calls of a layer. Of one shape: broadcasting would add one row's numbers to another's."""
    if len({tensor.shape for tensor in tensors}) > 1:
        raise RuntimeError(f"gradients of the shapes {[tuple(tensor.shape) for tensor in tensors]} cannot be added")
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def no_view(y: Tensor) -> Tensor:
    """The same memory, but no view to autograd, which lets nobody change a view from a custom function in place."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def flat(x: Tensor) -> Tensor:
    """(R, ..., D) -> (R, L, D)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def one_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, least: int, others: tuple[str, ...] = ()
) -> tuple[Tensor]:
    """The tensor that the layer was called with. Raises where it has no dimension for the rows."""
    given = list(args[:1]) or [value for name, value in kwargs.items() if name in ("input", "x")]
    unknown = set(kwargs) - {"input", "x", *others}
    if not given or unknown or len(args) > 1 + len(others):
        raise UsageError(
            f"{type(module).__name__}(...) = {len(args)} positional, {sorted(kwargs)} · expected one tensor",
            next="Call the layer with its input alone.",
        )
    x = given[0]
    if x.dim() < least:
        raise UnsupportedLayer(
            f"{type(module).__name__} · got an input of shape {tuple(x.shape)}; needs {least} dimensions, rows first",
            next="Keep the batch's rows as the leading dimension.",
        )
    return (x,)
