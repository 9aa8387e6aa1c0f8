"""Which way to a layer's norms and clipped sum is the cheapest, by the layer's shapes.

Three ways, whose costs are compared with the weight gradient of an ordinary step, 2 n T D O operations, which each of
them also needs or replaces:

- *keep*: the gradient of every unit is formed instead of their sum, and kept until the factors are known;
- *ghost*: two Gram matrices, 2 n T^2 (D + O), on top of the weight gradient;
- *form*: as keep, but thrown away after the norm is taken: for what is too large to be kept; a second weight gradient.

Shapes: n units, T positions of a unit, D inputs, O outputs.
"""

from collections.abc import Sequence

from torch import Tensor

Shape = tuple[int, int, int, int]  # n, T, D, O

# Relative to one multiplication and addition of a matrix product; measured on one core with AVX-512.
_WRITE = 6.0  # a number of a kept gradient: written, squared, read again
_FORMED = 1.06  # products of matrices unit by unit against one product
_GRAM = 1.25  # small square products, and their elementwise product


def cheapest(ways: Sequence[str], shape: Shape, like: Tensor) -> str:
    """For a linear layer. Args: ways: those that are possible; like: a tensor of the kind that is multiplied."""
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


def cheapest_convolution(ways: Sequence[str], shape: Shape, like: Tensor) -> str:
    """The same for a convolution: unit by unit it is slow where the picture is small. D: inputs x kernel."""
    return min(ways, key=lambda way: _convolution_cost(way, shape))


def _convolution_cost(way: str, shape: Shape) -> float:
    _, positions, width, height = shape
    gradient = positions * width * height
    slow = 1.3 if positions >= 256 else 4.0
    match way:
        case "ghost":
            return _GRAM * positions * positions * (width + height + 8) + 4 * positions * width
        case "keep":
            return (slow - 1) * gradient + _WRITE * width * height
        case _:
            return slow * gradient + _WRITE * width * height
