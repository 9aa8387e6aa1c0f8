"""Root-mean-square norms, by whatever name: x / sqrt(mean(x^2) + eps) (weight + offset) over the last dimension.

``transformers`` alone has some two hundred classes of this formula (arXiv:1910.07467, eq. 4), which differ in where they
round, and some of similar names that compute another. Whether a module computes it is found out by numbers: inputs large
and small, in three precisions, and a weight of no pattern. A module that fails goes row by row.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from sfumato.errors import UnsupportedLayer
from sfumato.privacy.gradients.rules import Call, Record, Rule, _swapped, plain_forward, sum_of
from sfumato.privacy.gradients.rules.normalisation import over_positions
from sfumato.privacy.gradients.rules.registry import once
from sfumato.privacy.gradients.terms import PerRow, Term


@dataclass(frozen=True, slots=True)
class Style:
    """What the classes differ in: the precision of each operation, and whether the weight is a difference from one."""

    single_sums: bool  # the mean of squares in float32
    single_product: bool  # and what is divided by it
    between: str  # what the normalised input is cast to: "nothing", the "input"'s type, the "weight"'s if that is half
    after: bool  # the result is cast to the input's type
    offset: float  # the input is multiplied by weight + offset
    single_weight: bool  # weight + offset in float32

    def run(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(output, normalised input before any cast, 1 / root mean square, weight + offset)."""
        h = x.float() if self.single_product else x
        squared = (x.float() if self.single_sums else x).pow(2)
        scale = torch.rsqrt(squared.mean(-1, keepdim=True) + eps)
        normalised = h * scale
        n = normalised
        if self.between == "input":
            n = n.to(x.dtype)
        elif self.between == "weight" and weight.dtype in (torch.float16, torch.bfloat16):
            n = n.to(weight.dtype)
        factor = weight.float() if self.single_weight else weight
        if self.offset:
            factor = factor + self.offset
        y = n * factor
        return (y.to(x.dtype) if self.after else y), normalised, scale, factor


_STYLES = [
    Style(sums, product, between, after, offset, single)
    for sums, product in ((True, True), (True, False), (False, False))
    for between in ("input", "nothing", "weight")
    for after in (False, True)
    for offset, single in ((0.0, False), (1.0, True), (1.0, False))
]
_STYLE_OF: dict[type[nn.Module], Style] = {}  # the last that fitted: tried first on the next module of the class


class _RootMeanSquare(Function):
    @staticmethod
    def forward(ctx: Any, record: Record, style: Style, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, scale, _ = style.run(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.record, ctx.style = record, style
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, scale, weight = ctx.saved_tensors
        style: Style = ctx.style
        g = grad_outputs[0]
        g = g if g.dtype == torch.float64 else g.float()
        normalised = ((x.float() if style.single_product else x) * scale).to(g.dtype)
        ctx.record(over_positions(g * normalised, 1))
        gradient = None
        if ctx.needs_input_grad[2]:
            g = g * (weight.to(g.dtype) + style.offset)
            gradient = scale * (g - normalised * (g * normalised).mean(-1, keepdim=True))
            gradient = gradient.to(x.dtype)
        return None, None, gradient, None, None


class RootMeanSquareRule(Rule):
    """x / sqrt(mean(x^2) + eps) (weight + offset), over the last dimension; arXiv:1910.07467, eq. 4."""

    def __init__(self, style: Style, eps: float) -> None:
        self.style, self.eps = style, eps

    def forward(self, module: Any, record: Record, *args: Any, **kwargs: Any) -> Tensor:
        x = one_tensor(module, args, kwargs, least=2)
        return _RootMeanSquare.apply(record, self.style, x, module.weight, self.eps)  # type: ignore[return-value]

    def terms(self, module: Any, calls: list[Call]) -> list[Term]:
        return [PerRow(module.weight, sum_of([gradient for (gradient,) in calls]))]


def root_mean_square(module: Any) -> RootMeanSquareRule | None:
    """The rule, if the module computes this formula to rounding on inputs large and small, in three precisions."""
    eps = next((v for n in ("variance_epsilon", "eps", "epsilon") if (v := getattr(module, n, None)) is not None), None)
    plain = not module._modules and not module._buffers and len(module._parameters) <= 2
    if not plain or not isinstance(eps, float) or module.weight.dim() != 1 or module.weight.is_meta:
        return None
    if getattr(module, "bias", None) is not None or len(_required(module)) != 1 or len(_accepted(module)) != 1:
        return None
    known = _STYLE_OF.get(type(module))
    if known is None or _error(module, known, eps) is None:
        fits = [(error, i) for i, s in enumerate(_STYLES) if (error := _error(module, s, eps)) is not None]
        if not fits:
            return None
        known = _STYLE_OF[type(module)] = _STYLES[min(fits)[1]]
    return RootMeanSquareRule(known, eps)


def _error(module: Any, style: Style, eps: float) -> float | None:
    """The largest relative deviation in units of what is allowed (at least 1e-9); None where it is not allowed."""
    width, worst = module.weight.shape[0], 1e-9
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        weight = probe(1, width, module.weight)[0].to(kind)
        for size in (1.0, 3 * eps**0.5, 30.0):
            x = (probe(6, width, module.weight).view(3, 2, width) * size).to(kind)
            with torch.no_grad(), _swapped(module, [module.weight], [weight]):
                expected = plain_forward(module)(x)
            y = style.run(x, weight, eps)[0]
            if not isinstance(expected, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
                return None
            allowed = 2e-2 if kind == torch.bfloat16 else 1e-6
            off = (y.double() - expected.double()).norm() / expected.double().norm()
            worst = max(worst, float(off) / allowed)
    return worst if worst <= 1 else None


def _required(module: nn.Module) -> list[str]:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return [p.name for p in list(parameters)[1:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def _accepted(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def one_tensor(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, least: int) -> Tensor:
    """The only tensor that the layer was called with, rows first."""
    values = [*args, *kwargs.values()]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() < least:
        shown = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in values]
        raise UnsupportedLayer(
            f"{type(module).__name__} · got {shown}; needs one tensor of at least {least} dimensions, rows first",
            next="Keep the batch's rows as the leading dimension.",
        )
    return values[0]


def probe(rows: int, width: int, like: Tensor) -> Tensor:
    """(rows, width): fixed numbers without a pattern, on the parameter's device, in its type."""
    generator = torch.Generator().manual_seed(rows * 1009 + width)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
