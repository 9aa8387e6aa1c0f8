"""Which way to a layer's norms and clipped sum is the cheapest, by the layer's shapes.

Three ways, whose costs are compared with the weight gradient of an ordinary step, 2 n T D O operations, which each of
them also needs or replaces:

- *keep*: the gradient of every unit is formed instead of their sum, and kept until the factors are known;
- *ghost*: two Gram matrices, 2 n T^2 (D + O), on top of the weight gradient;
- *form*: as keep, but thrown away after the norm is taken: for what is too large to be kept; a second weight gradient.

Shapes: n units, T positions of a unit, D inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, int, int, int]  # n, T, D, O

# Relative to one multiplication and addition of a matrix product; measured on one core with AVX-512.
_WRITE = 6.0  # a number of a kept gradient: written, squared, read again
_FORMED = 1.06  # products of matrices unit by unit against one product
_GRAM = 1.25  # small square products, and their elementwise product
_NORM = 30.0  # per weight: squared, multiplied, added
_CALL = 2.5e6  # some calls from Python for one unit


def cheapest(ways: Sequence[str], shape: Shape) -> str:
    """For a linear layer. Args: ways: those that are possible."""
    return min(ways, key=lambda way: _linear_cost(way, shape))


def _linear_cost(way: str, shape: Shape) -> float:
    """Per unit, on top of the ordinary weight gradient."""
    _, positions, width, height = shape
    gradient = positions * width * height
    match way:
        case "ghost":
            return _GRAM * positions * positions * (width + height + 8) if positions > 1 else width + height
        case "keep":
            return (_FORMED - 1) * gradient + _WRITE * width * height
        case _:
            return _FORMED * gradient + _WRITE * width * height


@dataclass(frozen=True, slots=True)
class Pictures:
    """A convolution's sizes. Attributes: positions: T; pixels: the same of the padded input; inputs: C; outputs: O;
    weights: P; kernel: its positions."""

    positions: int
    pixels: int
    inputs: int
    outputs: int
    weights: int
    kernel: int

    @property
    def gradient(self) -> int:
        return self.positions * self.weights


def cheapest_for_pictures(shape: Pictures, *, keep: bool, ghost: bool, on_cpu: bool) -> str:
    """For a convolution: "one by one", "side by side", or "ghost".

    One unit after the other costs a call each, and for every weight a reordering; where pictures are large nothing else
    is on top. Side by side is one call, which is slow for small pictures. Without ``keep`` both come on top.
    """
    costs = {"side by side": _side_by_side(shape)}
    if on_cpu:
        costs["one by one"] = _CALL + (80 + _NORM) * shape.weights
    if not keep:
        costs = {way: cost + shape.gradient for way, cost in costs.items()}
    if ghost:
        shifted = shape.pixels**2 * (2 * shape.inputs + 30 * shape.kernel)
        costs["ghost"] = shifted + shape.positions**2 * (2 * shape.outputs + 60)
    return min(costs, key=lambda way: costs[way])


def _side_by_side(shape: Pictures) -> float:
    slow = 0.2 if shape.positions >= 1024 else 1.0 if shape.positions >= 256 else 9.0
    return slow * shape.gradient + _NORM * shape.weights
