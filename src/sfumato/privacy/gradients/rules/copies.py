"""Copies of parameters, one for each row, and where a module keeps what is replaced by them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sfumato.privacy.gradients.rules.registry import Call, Record, once, sum_of, trainable
from sfumato.privacy.gradients.terms import PerRow, Term

Place = tuple[dict[str, Any], str]  # where a module keeps a tensor


class Copies(Function):
    """A parameter once for every row, (R, *shape) without a copy; the gradients of the rows are recorded."""

    @staticmethod
    def forward(ctx: Any, record: Record, index: int, rows: int, parameter: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        return parameter.detach().expand(rows, *parameter.shape)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        ctx.record(torch.tensor(ctx.index), grad_outputs[0])
        return None, None, None, None


class _ComputedCopies(Function):
    """The same for a tensor that was computed from parameters; records the gradients of these."""

    @staticmethod
    def forward(ctx: Any, record: Record, sources: list[tuple[int, Tensor]], rows: int, computed: Tensor) -> Tensor:
        ctx.record, ctx.sources, ctx.computed = record, sources, computed
        return computed.detach().expand(rows, *computed.shape)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        gradients = _back_through(ctx.computed, [parameter for _, parameter in ctx.sources], grad_outputs[0])
        for (index, _), gradient in zip(ctx.sources, gradients, strict=True):
            if gradient is not None:
                ctx.record(torch.tensor(index), gradient)
        return None, None, None, None


def _back_through(computed: Tensor, parameters: list[Tensor], rows: Tensor) -> list[Tensor | None]:
    """Gradients (R, *shape) of the parameters, from gradients (R, *) of what was computed from them."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        with quiet():
            return list(torch.autograd.grad(computed, parameters, rows, is_grads_batched=True, **options))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operator whose backward has no batching rule
        found = [torch.autograd.grad(computed, parameters, row, **options) for row in rows]
        return [None if gradients[0] is None else torch.stack(gradients) for gradients in zip(*found, strict=True)]


def terms_of_copies(parameters: list[Any], calls: list[Call]) -> list[Term]:
    """Of calls (index of the parameter, gradients of the rows)."""
    terms: list[Term] = []
    for i, parameter in enumerate(parameters):
        gradients = [g for index, g in calls if int(index) == i]
        if gradients:
            shape = parameter.shape or (1,)  # a number has a dimension here
            gradients = [g.reshape(g.shape[0], *shape) for g in gradients]
            terms.append(PerRow(parameter, sum_of(gradients)))
    return terms


def computed_by_hooks(module: nn.Module) -> list[str]:
    """The tensors that a hook of torch.nn.utils (weight_norm, spectral_norm, prune) makes before every forward."""
    found = []
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            found.append(hook.name)
        elif isinstance(hook, BasePruningMethod):
            found.append(hook._tensor_name)
    return found


def buffers_of_weights(model: nn.Module) -> set[int]:
    """The ids of buffers that a weight is computed with (power iteration): they never see data."""
    found: set[int] = set()
    for module in model.modules():
        parametrizations: Any = getattr(module, "parametrizations", None)
        if parametrizations is not None:
            found |= {id(buffer) for buffer in parametrizations.buffers()}
        for name in computed_by_hooks(module):
            found |= {id(x) for key, x in module._buffers.items() if key.startswith(f"{name}_")}
    return found


Put = Callable[[list[Tensor]], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def copied(module: nn.Module, record: Record, rows: int) -> Iterator[tuple[list[Any], Put]]:
    """Copies (R, ...) of everything that is trained, and what puts one row's tensors into their places for a while.

    (Also of layers with a rule of their own: the module may read their weights instead of calling them.)
    """
    parts = list(module.modules())
    index = {id(p): i for i, p in enumerate(trainable(module))}
    copies: list[Any] = []
    places: list[list[Place]] = []

    def computed(tensor: Tensor, parameters: list[nn.Parameter], place: Place) -> None:
        sources = [(index[id(p)], p) for p in parameters if id(p) in index]
        if tensor.requires_grad and sources:
            copies.append(_ComputedCopies.apply(record, sources, rows, tensor))
            places.append([place])

    inside: set[int] = set()  # parametrizations: computed once, for all rows
    for part in parts:
        parametrizations: Any = getattr(part, "parametrizations", None)
        if parametrizations is not None:
            inside |= {id(below) for below in parametrizations.modules()}
            for name, parametrization in parametrizations.items():
                place = (parametrizations._modules, name)
                computed(getattr(part, name), list(parametrization.parameters()), place)
    for name in computed_by_hooks(module):  # of the module itself: its hooks have run, those of parts run inside
        computed(vars(module)[name], list(module._parameters.values()), (vars(module), name))  # type: ignore[arg-type]
    by_parameter: dict[int, list[Place]] = {}
    for part in parts:
        for name, parameter in part._parameters.items():
            if id(parameter) in index and id(part) not in inside:
                by_parameter.setdefault(id(parameter), []).append((part._parameters, name))  # type: ignore[arg-type]
    for key, found in by_parameter.items():
        copies.append(Copies.apply(record, index[key], rows, trainable(module)[index[key]]))
        places.append(found)

    @contextlib.contextmanager
    def put(own: list[Tensor]) -> Iterator[None]:
        pairs = [(place, value) for found, value in zip(places, own, strict=True) for place in found]
        before = [holder[name] for (holder, name), _ in pairs]
        made = [(vars(part), name) for part in parts for name in computed_by_hooks(part) if name in vars(part)]
        made_before = [holder[name] for holder, name in made]
        for (holder, name), value in pairs:
            holder[name] = _Standing(value) if isinstance(holder.get(name), nn.Module) else value
        try:
            yield
        finally:
            for ((holder, name), _), value in zip(pairs, before, strict=True):
                holder[name] = value
            for (holder, name), value in zip(made, made_before, strict=True):
                holder[name] = value

    yield copies, put


class _Standing:
    """Stands for a parametrization: gives what was computed."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def __call__(self) -> Tensor:
        return self._value


@contextlib.contextmanager
def swapped(module: nn.Module, parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """The module with other tensors in all places of its parameters."""
    new = {id(parameter): value for parameter, value in zip(parameters, values, strict=True)}
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if id(parameter) in new
    ]
    for part, name, parameter in places:
        part._parameters[name] = new[id(parameter)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning of an operator that loops inside vmap."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield
