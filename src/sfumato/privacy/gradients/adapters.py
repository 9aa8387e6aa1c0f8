"""Rules for the adapters of ``peft``, without importing it.

A low-rank adapter (LoRA) is made of ordinary layers, which keep their rules. Adapters that hold bare parameters, or read
the weights of their layers, go row by row together with the layer they adapt: what is copied per row is the adapter
alone, for the base is frozen.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.gradients.pretrained import Aliases, RowwiseMethod, is_a
from sfumato.privacy.gradients.rules import (
    Call,
    Record,
    RowByRow,
    Rule,
    _swapped,
    plain_forward,
    rule_finder,
    sum_of,
    trainable,
)
from sfumato.privacy.gradients.rules.registry import once
from sfumato.privacy.gradients.terms import PerRow, Term

_WHOLE = RowByRow(whole=True)


@rule_finder
def find(module: nn.Module) -> Rule | None:
    """The rule of a class of ``peft``."""
    if not any(base.__module__.startswith("peft.") for base in type(module).__mro__) or not trainable(module):
        return None
    if is_a(module, _DORA_LINEAR) or is_a(module, _DORA_CONVOLUTION):
        return DoraRule()
    if _inherits(module, "peft.peft_model.PeftModel"):
        return Prompt() if _shares_a_prompt(module) else None
    if not _inherits(module, "peft.tuners.tuners_utils.BaseTunerLayer"):
        return None
    if any(is_a(module, f"peft.tuners.lora.layer.{name}") for name in ("MultiheadAttention", "ParamWrapper")):
        return ChangesItsBase()
    return None if _is_made_of_layers(module) else _WHOLE


_DORA_LINEAR = "peft.tuners.lora.dora.DoraLinearLayer"
_DORA_CONVOLUTION = "peft.tuners.lora.dora._DoraConvNdLayer"


def _inherits(module: nn.Module, name: str) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == name for base in type(module).__mro__)


def _is_made_of_layers(module: Any) -> bool:
    """LoRA, plain or with DoRA's magnitudes: all that is trained belongs to layers which the adapter calls."""
    if not _inherits(module, "peft.tuners.lora.layer.LoraLayer"):
        return False
    magnitudes = list(module._modules.get("lora_magnitude_vector", nn.ModuleDict()).values())
    variants = list(getattr(module, "lora_variant", {}).values())
    if any(
        type(v).__name__ not in _DORA_VARIANTS and getattr(v, "__name__", "") not in _DORA_VARIANTS for v in variants
    ):
        return False
    if any(
        not (is_a(m, _DORA_LINEAR) or is_a(m, _DORA_CONVOLUTION)) or not hasattr(m, "get_lora_weight")
        for m in magnitudes
    ):
        return False
    return not any(
        isinstance(part, (nn.ParameterDict, nn.ParameterList)) and trainable(part) for part in module.modules()
    )


_DORA_VARIANTS = {"DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant"}


class ChangesItsBase(Aliases):
    """Adapters that put their product into the base's weight for the time of the forward pass."""

    def treats(self, module: nn.Module) -> list[nn.Parameter]:
        return trainable(module)

    def covers(self, module: nn.Module) -> list[nn.Module]:
        return list(module.children())

    def problem(self, module: nn.Module) -> str | None:
        return (
            "changes the weight of its base during the forward pass, so no single row's part in it is seen: target "
            "the projections as layers of their own (target_modules of nn.Linear), not parameters or MultiheadAttention"
        )


# ------------------------------------------------------------------------------------------------------------ DoRA


class _Magnitude(Function):
    """x m, where m (O,) or (1, O, 1, ...) is stretched over x."""

    @staticmethod
    def forward(ctx: Any, record: Record, x: Tensor, magnitude: Tensor) -> Tensor:
        ctx.save_for_backward(x, magnitude)
        ctx.record = record
        return x * magnitude

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (g,) = grad_outputs
        x, magnitude = ctx.saved_tensors
        shape = (1,) * (x.dim() - magnitude.dim()) + tuple(magnitude.shape)
        over = [d for d in range(1, x.dim()) if shape[d] == 1]
        product = g * x if g.dtype == torch.float64 else g.float() * x.float()
        ctx.record((product.sum(over) if over else product).reshape(x.shape[0], *magnitude.shape))
        return None, g * magnitude if ctx.needs_input_grad[1] else None, None


class DoraRule(Rule):
    """magnitude / ||W + s B A|| (W x + s B A x) - W x, the norm held constant (arXiv:2402.09353, section 4.3).

    A and B are layers, called as such. On the first call the formula is compared with what the module computes.
    """

    parameters = ("weight",)

    def __init__(self) -> None:
        self._compared = False

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        if not self._compared:
            _compare(module, args[0], kwargs)
            self._compared = True
        stretched, result = _without_magnitude(module, args[0], kwargs)
        return _Magnitude.apply(record, stretched, module.weight) - result  # type: ignore[operator]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        return [PerRow(module.weight, sum_of([gradient for (gradient,) in calls]))]


def _without_magnitude(module: Any, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """((W x + s B A x) / ||W + s B A||, W x)."""
    from peft.utils.integrations import dequantize_module_weight

    base, scaling, result = kwargs["base_layer"], kwargs["scaling"], kwargs.get("base_result")
    lora_a, lora_b = kwargs["lora_A"], kwargs["lora_B"]
    with torch.no_grad():
        weight = dequantize_module_weight(base).to(x.dtype)
        change = module.get_lora_weight(lora_A=lora_a, lora_B=lora_b).to(x.dtype)
        if weight.dim() > 2:
            change = change.reshape(weight.shape)
        norm = module.get_weight_norm(weight=weight, lora_weight=change, scaling=scaling)
    if result is not None:
        if base.bias is not None:
            result = result - (base.bias if weight.dim() == 2 else base.bias.view(1, -1, *[1] * (x.dim() - 2)))
    elif weight.dim() > 2:
        result = module.conv_fn(x, weight, None, base.stride, base.padding, base.dilation, base.groups)
    else:
        result = F.linear(x, weight.t() if module.fan_in_fan_out else weight)
    return (result + lora_b(lora_a(x)) * scaling) / norm, result


def _compare(module: Any, x: Tensor, kwargs: dict[str, Any]) -> None:
    """One row, with other magnitudes and another B than the ones at hand, for these begin as 1 and 0."""
    lora_a, lora_b = copy.deepcopy((kwargs["lora_A"], kwargs["lora_B"]))
    result = kwargs.get("base_result")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in lora_b.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        magnitude = module.weight * (1 + torch.rand(module.weight.shape, generator=generator).to(module.weight))
        others = {"lora_A": lora_a, "lora_B": lora_b, "base_result": None if result is None else result[:1]}
        stretched, plain = _without_magnitude(module, x[:1], {**kwargs, **others})
        with _swapped(module, [module.weight], [magnitude]):
            expected = plain_forward(module)(x[:1], **{**kwargs, **others})
        value = stretched * magnitude - plain
    allowed = 1e-4 if value.dtype in (torch.float32, torch.float64) else 5e-2
    if value.shape != expected.shape or float((value - expected).norm()) > allowed * float(expected.norm()):
        raise UnsupportedLayer(
            f"{type(module).__name__} · computes something else than DoRA's formula",
            next="Use LoraConfig(use_dora=False), or the release of peft that requirements.lock names.",
        )


# ---------------------------------------------------------------------------------------------------------- prompts


class Prompt(RowwiseMethod):
    """Prompt tuning and p-tuning: the prompt is computed once, and repeated for the rows; here, once for every row."""

    def __init__(self) -> None:
        super().__init__("get_prompt", "prompt_encoder")

    def call(self, module: nn.Module, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("batch_size", None)
        return method(1, *args[1:], **kwargs)


def _shares_a_prompt(module: Any) -> bool:
    """Whether the prompt does not pass through the rows already, as it does for prefix tuning."""
    encoder, config = module._modules.get("prompt_encoder"), getattr(module, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    return encoder is not None and bool(trainable(encoder)) and kind in ("PROMPT_TUNING", "P_TUNING")
