"""The chance of a loss, made a function of the record alone: the same record loses the same in whatever batch it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BY_SHAPE = (torch.randn, torch.rand)
_LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}
_IN_PLACE = {
    Tensor.normal_: torch.Tensor.normal_,
    Tensor.uniform_: torch.Tensor.uniform_,
    Tensor.exponential_: torch.Tensor.exponential_,
}
_REFUSED = (
    torch.multinomial, torch.normal, torch.poisson, torch.randperm, torch.dropout, torch.bernoulli, Tensor.bernoulli_,
    Tensor.random_, torch.randint_like, torch.nn.functional.gumbel_softmax,
)  # fmt: skip


class ChanceByRecord(TorchFunctionMode):
    """While it is entered, what a loss draws of torch's global generator is, row by row, a function of the record's number
    and of which draw it is. Every draw must have the records as its first dimension: that is a rule of the contract too.

    Args:
      rows: (R,) numbers of the records.
      dtype: what random floats come as; drawn in float32 whatever it is, so that an oracle in float64 sees the same.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._rows, self._dtype, self._draw = [int(row) for row in rows], dtype, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if func in _REFUSED:
            raise AssertionError(
                f"{func} · the contract's chance does not know it: draw with torch.rand or torch.randn"
            )
        if func is torch.nn.functional.dropout:
            p, training = kwargs.get("p", 0.5), kwargs.get("training", True)
            keep = self._stacked(lambda g, one: torch.rand(one, generator=g), args[0].shape) >= p if training else 1.0
            return args[0] * keep / (1 - p if training else 1.0)
        if func in _BY_SHAPE:
            return self._stacked(lambda g, shape: func(shape, generator=g), _shape(args, kwargs)).to(self._dtype)
        if func in _LIKE:
            return self._stacked(lambda g, shape: _LIKE[func](shape, generator=g), args[0].shape).to(args[0].dtype)
        if func is torch.randint:
            numbers, shape = (args[:-1], args[-1]) if not kwargs.get("size") else (args, kwargs["size"])
            low, high = (0, *numbers) if len(numbers) == 1 else numbers
            return self._stacked(lambda g, one: torch.randint(low, high, one, generator=g), shape)
        if func in _IN_PLACE:
            made = self._stacked(
                lambda g, one: _IN_PLACE[func](torch.empty(one), *args[1:], generator=g), args[0].shape
            )
            return args[0].copy_(made)
        return func(*args, **kwargs)

    def _stacked(self, make: Callable[[torch.Generator, tuple[int, ...]], Tensor], shape: Any) -> Tensor:
        shape = tuple(shape)
        if not shape or shape[0] != len(self._rows):
            raise AssertionError(f"chance of shape {shape} · its first dimension must be the {len(self._rows)} records")
        self._draw += 1
        seeds = [1_000_003 * self._draw + row for row in self._rows]
        made = [make(torch.Generator().manual_seed(seed), shape[1:]) for seed in seeds]
        return torch.stack(made) if made else make(torch.Generator(), shape)


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    if "size" in kwargs:
        return tuple(kwargs["size"])
    return tuple(args) if not args or isinstance(args[0], int) else tuple(args[0])
