"""Normalisations within a row: LayerNorm, GroupNorm, InstanceNorm, RMSNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UsageError
from sfumato.privacy.gradients.rules.registry import Call, Record, Rule, once, one_input, rule, sum_of
from sfumato.privacy.gradients.terms import PerRow, Term


class AffineRule(Rule):
    """For layers that record the gradient of every parameter, row by row, in the order of ``parameters``."""

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        for i, name in enumerate(self.parameters):
            parameter = getattr(module, name)
            if parameter is not None and parameter.requires_grad:
                terms.append(PerRow(parameter, sum_of([call[i] for call in calls]).view(-1, *parameter.shape)))
        return terms


def over_positions(x: Tensor, kept: int) -> Tensor:
    """(R, ..., *shape) -> (R, *shape), the sum over what lies between."""
    between = tuple(range(1, x.dim() - kept))
    return x.sum(between) if between else x


def _as_autocast(x: Tensor) -> Tensor:
    """On a GPU, autocast normalises in float32; on a CPU it leaves the input as it is."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else x


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
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, mean, rstd, weight, bias = ctx.saved_tensors
        normalised = (x - mean) * rstd
        ctx.record(over_positions(g * normalised, len(ctx.shape)), over_positions(g, len(ctx.shape)))
        gradient = None
        if ctx.needs_input_grad[1]:
            wanted = [True, False, False]
            gradient = torch.ops.aten.native_layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, wanted)[0]
        return None, gradient, None, None, None, None


@rule(nn.LayerNorm)
class LayerNormRule(AffineRule):
    nests = True
    any_shape = True

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=1 + len(module.normalized_shape))
        shape = list(module.normalized_shape)
        return _LayerNorm.apply(record, _as_autocast(x), shape, module.weight, module.bias, module.eps)  # type: ignore[return-value]


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
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        g = grad_outputs[0].contiguous()
        x, mean, rstd, weight = ctx.saved_tensors
        rows, channels, space, groups = ctx.sizes
        # with all rows' channels as the channels of one row, the layer's own backward pass gives every row's gradients
        sizes = (1, rows * channels, space, rows * groups)
        each = weight.repeat(rows) if weight is not None else None
        gradient, weights, biases = torch.ops.aten.native_group_norm_backward(
            g, x, mean.view(1, -1), rstd.view(1, -1), each, *sizes, [ctx.needs_input_grad[1], True, True]
        )
        ctx.record(weights.reshape(rows, channels), biases.reshape(rows, channels))
        gradient = gradient.reshape(x.shape) if ctx.needs_input_grad[1] else None
        return None, gradient, None, None, None, None


@rule(nn.GroupNorm)
class GroupNormRule(AffineRule):
    nests = True

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=2)
        groups = module.num_groups
        return _GroupNorm.apply(record, _as_autocast(x), groups, module.weight, module.bias, module.eps)  # type: ignore[return-value]


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(AffineRule):
    """Every channel is a group of its own. (With running averages it is refused before.)"""

    nests = True

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=module._get_no_batch_dim() + 1)
        module._check_input_dim(x)
        if x.shape[2:].numel() == 1:
            raise UsageError(
                f"{type(module).__name__} · got an input of shape {tuple(x.shape)}, with one position per channel",
                next="Give it more than one position, or use nn.LayerNorm.",
            )
        return _GroupNorm.apply(record, _as_autocast(x), x.shape[1], module.weight, module.bias, module.eps)  # type: ignore[return-value]


class Scale(Function):
    """x weight, where weight has the shape of x's last dimensions. Records the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return x * weight

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(over_positions(g * x, weight.dim()))
        return None, (g * weight).to(x.dtype) if ctx.needs_input_grad[1] else None, None


@rule(nn.RMSNorm)
class RMSNormRule(AffineRule):
    parameters = ("weight",)
    nests = True
    any_shape = True

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=1 + len(module.normalized_shape))
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()  # torch rounds once, at the end
        scaled: Any = Scale.apply(record, F.rms_norm(wide, module.normalized_shape, None, eps), module.weight)
        return scaled.to(x.dtype) if x.dtype != wide.dtype else scaled
