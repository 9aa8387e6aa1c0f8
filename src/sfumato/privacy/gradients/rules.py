"""One rule per layer type: run the layer without an unclipped weight gradient, and say what its per-row gradients are.

Rows convention: every protected layer's input has the batch's rows R as its leading dimension. A rule's ``forward``
computes what the layer computes; in the backward pass it gives the input its gradient, the parameters none, and hands
what is needed to ``record``. A rule's ``terms`` turn these records into terms, once per step.

The registry is open:

    @rule(MyScale)
    class MyScaleRule(Rule):
        parameters = ("weight",)
        ...

A module that owns trainable parameters and has no rule goes through ``RowByRow``: copies of its parameters, one per
row, mapped over the rows by ``torch.func.vmap``, or in a loop where vmap cannot.
"""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sfumato.errors import UnsupportedLayer, UsageError
from sfumato.privacy.gradients.terms import Convolution, Geometry, Lookup, Outer, PerRow, Term, convolution_backward

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

    def problem(self, module: nn.Module) -> str | None:
        """Why this module cannot be trained privately, with what to do; None if it can."""
        return None

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        """The trainable parameters that this rule answers for: the module's own."""
        return [p for p in module._parameters.values() if p is not None and p.requires_grad]

    def covers(self, module: nn.Module) -> list[nn.Module]:
        """The children that the rule treats with everything below them; rules of their own are not used there."""
        return []

    @abstractmethod
    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any: ...

    @abstractmethod
    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]: ...


_RULES: dict[type[nn.Module], Rule] = {}
_FINDERS: list[Callable[[nn.Module], Rule | None]] = []


def rule(*layer_types: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Registers a rule for layer types."""

    def register(cls: type[Rule]) -> type[Rule]:
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
    """Registers a function that knows rules for classes which cannot be named here, because they are not imported."""
    _FINDERS.append(find)
    return find


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of the module's type, or of a base whose ``forward`` the module still has; None if there is none."""
    if forward_is_replaced(module) or hasattr(module, "parametrizations"):
        return None
    for find in _FINDERS:
        special = find(module)
        if special is not None:
            return special
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


def _once(backward: Callable[..., Any]) -> Any:
    """No second derivative goes through a recorded layer: asking for one raises instead of giving zero."""
    return once_differentiable(backward)


# ---------------------------------------------------------------------------------------------------------- Linear


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return F.linear(x, weight, bias)

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(x, g)
        gradient = (g @ weight.to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return None, gradient, None, None


@rule(nn.Linear)
class LinearRule(Rule):
    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=2)
        return _Linear.apply(record, x, module.weight, module.bias)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        inputs, outputs = ([_flat(call[i]) for call in calls] for i in (0, 1))
        a, g = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (inputs, outputs))
        weight, bias = module.weight, module.bias
        if not weight.requires_grad:
            return [PerRow(bias, g.sum(1))] if bias is not None and bias.requires_grad else []
        return [Outer(weight, bias if bias is not None and bias.requires_grad else None, a, g)]


def _flat(x: Tensor) -> Tensor:
    """(R, ..., D) -> (R, L, D)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


# ----------------------------------------------------------------------------------------------------- Convolutions


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record, ctx.geometry = record, geometry
        return _convolution(x, weight, bias, geometry)

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(x, g)
        gradient = None
        if ctx.needs_input_grad[2]:
            weight, like = weight.to(g.dtype), x.to(g.dtype)
            gradient = convolution_backward(g, like, weight, ctx.geometry, (True, False))[0].to(x.dtype)
        return None, None, gradient, None, None


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return torch.convolution(
        x,
        weight,
        bias,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.transposed,
        list(geometry.output_padding),
        geometry.groups,
    )


class _AnyConvolutionRule(Rule):
    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        weight, bias = module.weight, module.bias
        if weight.requires_grad:
            geometry = self.geometry(module)
            terms += [Convolution(weight, x, g, geometry) for x, g in calls]
        if bias is not None and bias.requires_grad:
            terms.append(PerRow(bias, sum_of([g.flatten(2).sum(2) for _, g in calls])))
        return terms

    def geometry(self, module: nn.Module) -> Geometry:
        raise NotImplementedError


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionRule(_AnyConvolutionRule):
    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=module.weight.dim())
        geometry = self.geometry(module)
        padding = module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros":
            x = F.pad(x, padding, mode=module.padding_mode)
        elif isinstance(module.padding, str) and any(padding):
            x = F.pad(x, padding)
        return _Convolution.apply(record, geometry, x, module.weight, module.bias)  # type: ignore[return-value]

    def geometry(self, module: Any) -> Geometry:
        none = (0,) * len(module.kernel_size)
        padded = module.padding_mode != "zeros" or isinstance(module.padding, str)  # in ``forward``
        return Geometry(
            stride=module.stride,
            padding=none if padded else tuple(int(n) for n in module.padding),
            dilation=module.dilation,
            groups=module.groups,
            output_padding=none,
        )


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvolutionRule(_AnyConvolutionRule):
    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=module.weight.dim(), others=("output_size",))
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if size is not None:
            raise UsageError(
                f"{type(module).__name__}.output_size = {size} · is not supported in private training",
                next="Set output_padding when the layer is made.",
            )
        return _Convolution.apply(record, self.geometry(module), x, module.weight, module.bias)  # type: ignore[return-value]

    def geometry(self, module: Any) -> Geometry:
        return Geometry(
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            transposed=True,
            output_padding=module.output_padding,
        )


# -------------------------------------------------------------------------------------------------------- Embedding


class _Embedding(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, words: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(words)
        ctx.record, ctx.padding = record, padding
        return F.embedding(words, weight)

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        (words,) = ctx.saved_tensors
        if ctx.padding >= 0:
            g = g.masked_fill((words == ctx.padding).unsqueeze(-1), 0)
        ctx.record(words, g)
        return None, None, None, None


@rule(nn.Embedding)
class EmbeddingRule(Rule):
    parameters = ("weight",)

    def problem(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "max_norm changes the weights of the words that occur in the batch, without noise: leave it out"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq counts words over the whole batch, so units influence each other: leave it out"
        return None

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (words,) = _one_input(module, args, kwargs, least=1)
        padding = -1 if module.padding_idx is None else module.padding_idx
        return _Embedding.apply(record, words, module.weight, padding)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        words = torch.cat([words.reshape(words.shape[0], -1) for words, _ in calls], 1)
        outputs = torch.cat([_flat(g) for _, g in calls], 1)
        return [Lookup(module.weight, words, outputs)]


# --------------------------------------------------------------------------------------------------- Normalisations


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, record: Record, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.record, ctx.shape = record, shape
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, mean, rstd, weight, bias = ctx.saved_tensors
        normalised = (x - mean) * rstd
        ctx.record(_over_positions(g * normalised, len(ctx.shape)), _over_positions(g, len(ctx.shape)))
        gradient = None
        if ctx.needs_input_grad[1]:
            wanted = [True, False, False]
            gradient = torch.ops.aten.native_layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, wanted)[0]
        return None, gradient, None, None, None, None


def _over_positions(x: Tensor, kept: int) -> Tensor:
    """(R, ..., *shape) -> (R, *shape), the sum over what lies between."""
    between = tuple(range(1, x.dim() - kept))
    return x.sum(between) if between else x


class _AffineRule(Rule):
    """For layers that record (gradient of the weight, gradient of the bias) of every row in the backward pass."""

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        for i, name in enumerate(self.parameters):
            parameter = getattr(module, name)
            if parameter is not None and parameter.requires_grad:
                terms.append(PerRow(parameter, sum_of([call[i] for call in calls]).view(-1, *parameter.shape)))
        return terms


@rule(nn.LayerNorm)
class LayerNormRule(_AffineRule):
    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=1 + len(module.normalized_shape))
        x = x.to(module.weight.dtype)  # under autocast, as torch does
        shape = list(module.normalized_shape)
        return _LayerNorm.apply(record, x, shape, module.weight, module.bias, module.eps)  # type: ignore[return-value]


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, record: Record, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        x = x.contiguous()
        rows, channels, space = x.shape[0], x.shape[1], x.shape[2:].numel()
        ctx.sizes = (rows, channels, space, groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.record = record
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        g = grad_outputs[0].contiguous()
        x, mean, rstd, weight = ctx.saved_tensors
        rows, channels, space, groups = ctx.sizes
        grouped = x.reshape(rows, groups, -1)
        normalised = ((grouped - mean.unsqueeze(2)) * rstd.unsqueeze(2)).view(rows, channels, space)
        by_channel = g.view(rows, channels, space)
        ctx.record((by_channel * normalised).sum(2), by_channel.sum(2))
        gradient = None
        if ctx.needs_input_grad[1]:
            wanted = [True, False, False]
            gradient = torch.ops.aten.native_group_norm_backward(g, x, mean, rstd, weight, *ctx.sizes, wanted)[0]
        return None, gradient, None, None, None, None


@rule(nn.GroupNorm)
class GroupNormRule(_AffineRule):
    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=2)
        x = x.to(module.weight.dtype)
        return _GroupNorm.apply(record, x, module.num_groups, module.weight, module.bias, module.eps)  # type: ignore[return-value]


class _Scale(Function):
    """x weight, where weight has the shape of x's last dimensions."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return x * weight

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(_over_positions(g * x, weight.dim()))
        return None, g * weight if ctx.needs_input_grad[1] else None, None


@rule(nn.RMSNorm)
class RMSNormRule(_AffineRule):
    parameters = ("weight",)

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = _one_input(module, args, kwargs, least=1 + len(module.normalized_shape))
        normalised = F.rms_norm(x, module.normalized_shape, None, module.eps)
        return _Scale.apply(record, normalised, module.weight)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------- every other module, row by row


class _Copies(Function):
    """A parameter as R equal copies, one per row, whose gradients are recorded one by one."""

    @staticmethod
    def forward(ctx: Any, record: Record, index: int, rows: int, parameter: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        return parameter.detach().expand(rows, *parameter.shape).clone()

    @staticmethod
    @_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        ctx.record(torch.tensor(ctx.index), grad_outputs[0])
        return None, None, None, None


class RowByRow(Rule):
    """Any module whose rows do not influence each other, with everything below it.

    Tensors among the arguments whose leading dimension is R are rows; other tensors are shared by all rows.
    """

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return trainable(module)

    def covers(self, module: nn.Module) -> list[nn.Module]:
        return list(module.children())

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Any:
        leaves, shape = pytree.tree_flatten((args, kwargs))
        rows = record.rows
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if rows is None:
            if not tensors:
                raise UnsupportedLayer(
                    f"{type(module).__name__} · is called without a tensor, so its rows are unknown",
                    next="Give the layer the batch's rows as its first tensor.",
                )
            rows = tensors[0].shape[0]
        mapped = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows for leaf in leaves]
        if not any(mapped):
            raise UnsupportedLayer(
                f"{type(module).__name__} · got no tensor with the batch's {rows} rows as its leading dimension",
                next="Give it the rows first (batch_first=True), and expand what all rows share.",
            )
        parameters = trainable(module)
        copies: list[Any] = [_Copies.apply(record, i, rows, parameter) for i, parameter in enumerate(parameters)]

        def one_row(own: list[Tensor], row: list[Tensor]) -> Any:
            values = iter(row)
            full = [next(values).unsqueeze(0) if is_row else leaf for leaf, is_row in zip(leaves, mapped, strict=True)]
            a, k = pytree.tree_unflatten(full, shape)
            with _swapped(module, parameters, own):
                result = plain_forward(module)(*a, **k)
            return pytree.tree_map_only(Tensor, lambda y: _only_row(module, y), result)

        row_values = [leaf for leaf, is_row in zip(leaves, mapped, strict=True) if is_row]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # an operator that loops inside vmap
                return torch.func.vmap(one_row, randomness="different")(copies, row_values)
        except (RuntimeError, ValueError):  # an operator without a batching rule, control flow, an in-place change
            results = [one_row([c[i] for c in copies], [v[i] for v in row_values]) for i in range(rows)]
            return pytree.tree_map(lambda *ys: _stack(ys), *results)

    def terms(self, module: nn.Module, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        for i, parameter in enumerate(trainable(module)):
            gradients = [g for index, g in calls if int(index) == i]
            if gradients:
                terms.append(PerRow(parameter, sum_of(gradients)))
        return terms


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters at or below the module, each once."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, whatever was put on the instance."""
    return type(module).forward.__get__(module)


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's. (Copies of a recorded module have their class's.)"""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


@contextlib.contextmanager
def _swapped(module: nn.Module, parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
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


def _only_row(module: nn.Module, y: Tensor) -> Tensor:
    if y.dim() == 0 or y.shape[0] != 1:
        raise UnsupportedLayer(
            f"{type(module).__name__} · gave an output of shape {tuple(y.shape)} for one row, expected the row first",
            next="Return tensors whose leading dimension is the batch's rows.",
        )
    return y.squeeze(0)


def _stack(values: tuple[Any, ...]) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values[0]


def sum_of(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _one_input(
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
