"""Products of matrices, by whichever of the two libraries inside torch is the faster one for the shape on this machine.

torch gives float32 products on a processor to MKL, which on some processors (AMD's among them) runs at less than half of
what oneDNN reaches; torch has oneDNN too, for convolutions. A layer that is recorded is ours to compute, so the first
time a shape occurs both are timed, and the faster one is used from then on. Both round as float32 products do.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 2**24  # multiplications: below, the call itself is what costs
_LEAST_OF_ONE = 2**19  # the same where units are multiplied one after the other
SUM_OF = 512  # products of a sum whose rounding is bounded
_FASTER = 0.9  # oneDNN must need at most this share of the time
_TRIES = 3

_Result = TypeVar("_Result", Tensor, list[Tensor])

_Key = tuple[str | int, ...]  # which product, log2 of the rows, sizes, strides: a layout may have no fast kernel
_chosen: dict[_Key, bool] = {}  # whether oneDNN is the faster one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D), weight (O, D), bias (O,) -> (..., O)."""
    if not _possible(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    key = _key("forward", rows.shape[0], rows[:1], weight)
    return _either(
        key,
        lambda: F.linear(x, weight, bias),
        lambda: _one_dnn(rows, weight, bias).view(*x.shape[:-1], weight.shape[0]),
    )


def input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """g (..., O), weight (O, D) -> (..., D)."""
    if not _possible(g, weight):
        return g @ weight
    rows = g.reshape(-1, g.shape[-1])
    key = _key("input", rows.shape[0], rows[:1], weight)
    return _either(
        key, lambda: g @ weight, lambda: _one_dnn(rows, weight.t(), None).view(*g.shape[:-1], weight.shape[1])
    )


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (M, O), x (M, D) -> (O, D)."""
    if not _possible(g, x):
        return g.t() @ x
    key = _key("weight", g.shape[0], g[:1], x[:1])
    return _either(key, lambda: g.t() @ x, lambda: _one_dnn(g.t(), x.t(), None))


def unit_gradients(g: Tensor, x: Tensor, block: int) -> list[Tensor]:
    """g (n, T, O), x (n, T, D) -> n matrices (O, D) in order, in blocks (k, O, D) of at most ``block``."""
    parts = range(0, g.shape[0], block)
    usual = lambda: [torch.bmm(g[i : i + block].transpose(1, 2), x[i : i + block]) for i in parts]  # noqa: E731
    if not _possible(g, x) or g[0].numel() * x.shape[2] < _LEAST_OF_ONE:
        return usual()
    other = lambda: [_one_dnn(a.t(), b.t(), None).unsqueeze(0) for a, b in zip(g, x, strict=True)]  # noqa: E731
    return _either(_key("units", 0, g, x), usual, other)


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """x (n, S, D), y (n, T, D) -> (n, S, T), the products of all positions of one with all of the other.

    Guarantee: each is off by at most ``roundings(D)`` u times the product of the norms, in whatever order a library adds:
    long sums are made of short ones.
    """
    total: Tensor | None = None
    for start in range(0, x.shape[2], SUM_OF):
        part = _short_pairs(x[:, :, start : start + SUM_OF], y[:, :, start : start + SUM_OF])
        total = part if total is None else total.add_(part)
    return total if total is not None else x.new_zeros(x.shape[0], x.shape[1], y.shape[1])


def roundings(width: int) -> int:
    """How many roundings a number of ``pairs`` has gone through at most."""
    return min(width, SUM_OF) + -(-width // SUM_OF)


def _short_pairs(x: Tensor, y: Tensor) -> Tensor:
    usual = lambda: torch.bmm(x, y.transpose(1, 2))  # noqa: E731
    if not _possible(x, y) or x[0].numel() * y.shape[1] < _LEAST_OF_ONE:
        return usual()
    other = lambda: torch.stack([_one_dnn(a, b, None) for a, b in zip(x, y, strict=True)])  # noqa: E731
    return _either(_key("pairs", 0, x, y), usual, other)


def grams(x: Tensor) -> Tensor:
    """(n, T, D) -> (n, T, T), the products of all positions with each other."""
    return pairs(x, x)


def _one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _possible(a: Tensor, b: Tensor) -> bool:
    """float32 on the processor, large enough, and nothing that watches operators (autocast, DTensor)."""
    plain = type(a) is Tensor and type(b) in (Tensor, torch.nn.Parameter)
    return (
        plain
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and _dense(a)
        and _dense(b)
        and a.numel() * max(b.shape) >= _LEAST
        and not torch.is_autocast_enabled("cpu")
        and _AVAILABLE
    )


def _dense(x: Tensor) -> bool:
    """Whole, or the transpose of what is: of slices oneDNN makes products number by number."""
    return x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous())


def _key(name: str, rows: int, *tensors: Tensor) -> _Key:
    layout = (number for tensor in tensors for number in (*tensor.shape[-2:], *tensor.stride()[-2:]))
    return name, rows.bit_length(), *layout


def _either(key: _Key, usual: Callable[[], _Result], other: Callable[[], _Result]) -> _Result:
    if key not in _chosen:
        seconds = [min(_seconds(way) for _ in range(_TRIES)) for way in (usual, other)]
        _chosen[key] = seconds[1] <= _FASTER * seconds[0]
    return other() if _chosen[key] else usual()


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _find() -> bool:
    """Whether this build of torch has oneDNN's product, and it is right: it is not a public operator."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        found = torch.equal(_one_dnn(x, weight, bias), F.linear(x, weight, bias))
        return found and torch.equal(_one_dnn(x.t(), weight[:2].t(), None), x.t() @ weight[:2])
    except (AttributeError, RuntimeError, TypeError):  # other builds: no such operator, or with other arguments
        return False


_AVAILABLE = _find()
