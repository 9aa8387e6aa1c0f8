"""Activations with parameters: nn.PReLU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.privacy.gradients.rules.normalisation import AffineRule
from sfumato.privacy.gradients.rules.registry import Record, no_view, once, one_input, rule


class _PReLU(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.record = record
        return no_view(F.prelu(x, weight))

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        slope = torch.where(x > 0, 0, x * g)  # (R, C, ...)
        if weight.numel() == 1:
            ctx.record(slope.flatten(1).sum(1, keepdim=True))
        else:
            ctx.record(slope.flatten(2).sum(2) if x.dim() > 2 else slope)
        gradient = None
        if ctx.needs_input_grad[1]:
            channels = weight if weight.numel() == 1 else weight.view(-1, *[1] * (x.dim() - 2))
            gradient = torch.where(x > 0, g, channels * g).to(x.dtype)
        return None, gradient, None


@rule(nn.PReLU)
class PReLURule(AffineRule):
    parameters = ("weight",)
    nests = True

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        least = 2 if module.num_parameters > 1 else 1
        (x,) = one_input(module, args, kwargs, least=least)
        return _PReLU.apply(record, x, module.weight)  # type: ignore[return-value]
