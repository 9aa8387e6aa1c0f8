"""Convolutions of one to three dimensions, and transposed ones."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UsageError
from sfumato.privacy.gradients.convolution import Convolution, Geometry, convolution_backward
from sfumato.privacy.gradients.rules.registry import Call, Record, Rule, no_view, once, one_input, rule, sum_of
from sfumato.privacy.gradients.terms import PerRow, Term


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.with_input = weight.requires_grad
        ctx.save_for_backward(x if ctx.with_input else None, weight)
        ctx.record, ctx.geometry = record, geometry
        ctx.kind, ctx.like = x.dtype, x.shape
        return no_view(_convolution(x, weight, bias, geometry))

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(*((x, g) if ctx.with_input else (g,)))
        gradient = None
        if ctx.needs_input_grad[2]:
            like = x.to(g.dtype) if x is not None else g.new_empty(1).expand(ctx.like)  # only its shape is read
            gradient = convolution_backward(g, like, weight.to(g.dtype), ctx.geometry, (True, False))[0].to(ctx.kind)
        return None, None, gradient, None, None


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """By the functions that the layers themselves call: autocast knows them."""
    stride, padding, dilation = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    if not geometry.transposed:
        function: Any = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return function(x, weight, bias, stride, padding, dilation, geometry.groups)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    return function(x, weight, bias, stride, padding, list(geometry.output_padding), geometry.groups, dilation)


class _AnyConvolutionRule(Rule):
    nests = True

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        terms: list[Term] = []
        weight, bias = module.weight, module.bias
        if weight.requires_grad and any(len(call) < 2 for call in calls):
            raise UsageError(
                f"{type(module).__name__} · was frozen in its forward pass, and is not any more",
                next="Unfreeze before the forward pass.",
            )
        if weight.requires_grad:
            terms += [Convolution(weight, call[0], call[-1], self.geometry(module, call)) for call in calls]
        if bias is not None and bias.requires_grad:
            terms.append(PerRow(bias, sum_of([call[-1].flatten(2).sum(2) for call in calls])))
        return terms

    def geometry(self, module: nn.Module, call: Call) -> Geometry:
        """Of a recorded call, which is (input, output gradient)."""
        raise NotImplementedError


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvolutionRule(_AnyConvolutionRule):
    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=module.weight.dim())
        padding = module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros":
            x = F.pad(x, padding, mode=module.padding_mode)
        elif isinstance(module.padding, str) and any(padding):
            x = F.pad(x, padding)
        return _Convolution.apply(record, self.geometry(module, ()), x, module.weight, module.bias)  # type: ignore[return-value]

    def geometry(self, module: Any, call: Call) -> Geometry:
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
        (x,) = one_input(module, args, kwargs, least=module.weight.dim(), others=("output_size",))
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        dimensions = len(module.kernel_size)
        padding = module._output_padding(
            x, size, module.stride, module.padding, module.kernel_size, dimensions, module.dilation
        )
        geometry = replace(self.geometry(module, ()), output_padding=tuple(padding))
        return _Convolution.apply(record, geometry, x, module.weight, module.bias)  # type: ignore[return-value]

    def geometry(self, module: Any, call: Call) -> Geometry:
        plain = Geometry(
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            transposed=True,
            output_padding=module.output_padding,
        )
        if not call:
            return plain
        given, made = call[0].shape[2:], call[-1].shape[2:]  # with output_size= a call has a padding of its own
        values = zip(given, made, module.stride, module.padding, module.dilation, module.kernel_size, strict=True)
        return replace(
            plain,
            output_padding=tuple(out - ((x - 1) * s - 2 * p + d * (k - 1) + 1) for x, out, s, p, d, k in values),
        )
