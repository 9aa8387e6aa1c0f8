"""nn.Linear on any leading shape."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UsageError
from sfumato.privacy.gradients import products
from sfumato.privacy.gradients.rules.registry import Call, Record, Rule, flat, no_view, once, one_input, rule
from sfumato.privacy.gradients.terms import Outer, PerRow, Term


class Linear(Function):
    """Records (input, output gradient); only the output gradient where the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.with_input = weight.requires_grad
        ctx.save_for_backward(x if ctx.with_input else None, weight)  # a frozen layer's input may change afterwards
        ctx.record, ctx.kind = record, x.dtype
        return no_view(products.linear(x, weight, bias))

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        ctx.record(*((x, g) if ctx.with_input else (g,)))
        gradient = products.input_gradient(g, weight.to(g.dtype)).to(ctx.kind) if ctx.needs_input_grad[1] else None
        return None, gradient, None, None


@rule(nn.Linear)
class LinearRule(Rule):
    nests = True
    any_shape = True

    def forward(self, module: nn.Module, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = one_input(module, args, kwargs, least=2)
        return Linear.apply(record, x, module.weight, module.bias)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        return linear_terms(module.weight, module.bias, calls)


def linear_terms(weight: nn.Parameter, bias: nn.Parameter | None, calls: list[Call]) -> list[Term]:
    """Of what ``Linear`` recorded, in calls of any lengths."""
    g = beside([call[-1] for call in calls])
    if weight.requires_grad and any(len(call) < 2 for call in calls):
        raise UsageError(
            "a linear layer · was frozen in its forward pass, and is not any more",
            next="Unfreeze before the forward pass.",
        )
    bias = bias if bias is not None and bias.requires_grad else None
    if not weight.requires_grad:
        return [PerRow(bias, g.sum(1))] if bias is not None else []
    return [Outer(weight, bias, beside([call[0] for call in calls]), g)]


def beside(tensors: list[Tensor]) -> Tensor:
    """Tensors (R, ..., D) -> (R, L, D), one after the other."""
    found = [flat(x) for x in tensors]
    return found[0] if len(found) == 1 else torch.cat(found, 1)
