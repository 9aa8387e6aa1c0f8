"""Gaussian noise from a cryptographic source, hardened against attacks on floating-point numbers.

Mironov (2012) and Jin et al. (2022) read the data back from the low bits of noisy floating-point numbers: a generator
reaches only some doubles, and which ones the sum can be tells what was added. Here neither has low bits. Noise and sum
are whole multiples of one power of two, ``spacing(std)``, about 2^-30 standard deviations, and are added exactly: every
release lies on a grid that knows nothing of the data, and rounding a Gaussian to the grid of a value that lies on it is
post-processing of the Gaussian mechanism. Rounding the sum moves neighbouring sums apart by at most one spacing in each
of d coordinates, sqrt(d) spacings in length, which ``widened`` pays for with as much more noise.

The normals come from the Box-Muller transform (1958) in float64, of an angle of 52 bits and a radius from a uniform
number of 52 bits, and 52 more where it is below 2^-20: it has 32 significant bits however small it is, down to 2^-104, so that
radii lie closer than the grid wherever they count: |x| <= 12.0, and a point of the grid within 10 standard deviations is reached in
some 2^50 ways. What is missing is far below any delta. (Exact, at nearly the same cost: ``discrete``.)
"""

import math
from typing import TYPE_CHECKING, Protocol

from sfumato import checks
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor

GRID_BITS = 30

_CHUNK = 1 << 15  # pairs of normals made at once, so that the work stays in the processor's cache
_MANTISSA = (1 << 52) - 1
_SMALL = 2.0**-20
_ONE = 0x3FF0000000000000  # the bits of 1.0; with 52 random bits below, uniform on [1, 2)


def spacing(std: float) -> float:
    """The grid of noise with this standard deviation: the power of two at or just below std / 2^30."""
    return math.ldexp(1.0, math.floor(math.log2(std)) - GRID_BITS)


def widened(std: float, bound: float, dimension: int) -> float:
    """The standard deviation that makes up for rounding a sum of this L2 sensitivity, in so many coordinates."""
    return std * (1.0 + 2.0 * spacing(std) * math.sqrt(dimension) / bound) if std > 0 else 0.0


class Source(Protocol):
    """Where independent noise comes from: ``GaussianSource``, or ``discrete.DiscreteSource``."""

    @property
    def name(self) -> str: ...

    def spacing(self, std: float) -> float:
        """The step of the grid for noise of this standard deviation; at most std / 2^30."""
        ...

    def widened(self, std: float, bound: float, dimension: int) -> float:
        """The standard deviation that makes up for all rounding of a sum of this L2 sensitivity."""
        ...

    def draw(self, count: int, std: float, random: Random, plus: "Tensor | None" = None) -> "Tensor":
        """(count,) float64: noise on its grid, or the sum of it and ``plus``, rounded to the grid."""
        ...

    def whole(self, count: int, std: float, step: float, random: Random) -> "Tensor":
        """(count,) float64: noise in whole steps, each at most about ``std`` / 2^30."""
        ...

    def rounded(self, values: "Tensor", step: float) -> "Tensor":
        """(count,) float64: values in whole steps; two numbers are moved apart by at most 2."""
        ...


class GaussianSource:
    """Normals rounded to the grid: this module."""

    name = "gaussian"

    def spacing(self, std: float) -> float:
        return spacing(std)

    def widened(self, std: float, bound: float, dimension: int) -> float:
        return widened(std, bound, dimension)

    def draw(self, count: int, std: float, random: Random, plus: "Tensor | None" = None) -> "Tensor":
        return gaussian(count, std, random, plus)

    def whole(self, count: int, std: float, step: float, random: Random) -> "Tensor":
        return _whole(count, std / step, random)

    def rounded(self, values: "Tensor", step: float) -> "Tensor":
        return values.double().div(step).round_()


def gaussian(count: int, std: float, random: Random, plus: "Tensor | None" = None) -> "Tensor":
    """Draws ``count`` independent normals with mean 0 and standard deviation ``std``, rounded to their grid.

    Guarantee: no two calls share randomness, as long as ``random`` gives out no byte twice.

    Args: plus: (count,), on the CPU, is rounded to the same grid and added, exactly while it is below 2^22 ``std``; as it is for
        ``std`` = 0.
    Returns: (count,) float64 on the CPU; without ``plus``, exact zeros for ``std`` = 0.
    """
    import torch

    checks.non_negative(count=count, std=std)
    if std == 0:
        return torch.zeros(count, dtype=torch.float64) if plus is None else plus.double()
    step = spacing(std)
    out = _whole(count, std / step, random)
    for start in range(0, count, _CHUNK):
        part = out[start : start + _CHUNK]
        if plus is not None:
            part.add_(plus[start : start + _CHUNK].double().div(step).round_())
        part.mul_(step)
    return out


def _whole(count: int, std: float, random: Random) -> "Tensor":
    """(count,) float64: normals rounded to whole numbers."""
    import torch

    pairs = torch.empty(2, (count + 1) // 2, dtype=torch.float64)  # cosines in row 0, sines in row 1
    for start in range(0, pairs.shape[1], _CHUNK):
        _normal_pairs(pairs[:, start : start + _CHUNK], std, random)
    return pairs.view(-1)[:count]


def _normal_pairs(out: "Tensor", std: float, random: Random) -> None:
    """Fills out (2, n) with whole numbers; the two of a Box-Muller pair go to different rows."""
    import torch

    pairs = out.shape[1]
    unit = _units(2 * pairs, random).view(2, pairs)
    uniform = unit[0].neg_().add_(2.0)  # 2 - [1, 2) is (0, 1], so no logarithm of 0
    small = uniform < _SMALL
    if bool(small.any()):  # about once in 30 chunks; 52 more bits that count there
        uniform[small] += _units(int(small.sum()), random).neg_().add_(1.0).mul_(2.0**-52)
    radius = uniform.log_().mul_(-2.0 * std * std).sqrt_()
    angle = unit[1].mul_(2.0 * math.pi)  # [2 pi, 4 pi)
    torch.mul(angle.cos(), radius, out=out[0]).round_()
    torch.mul(angle.sin_(), radius, out=out[1]).round_()


def _units(count: int, random: Random) -> "Tensor":
    """(count,) float64, uniform on the multiples of 2^-52 in [1, 2)."""
    import torch

    words = torch.frombuffer(random.bytes(8 * count), dtype=torch.int64)
    return words.bitwise_and_(_MANTISSA).bitwise_or_(_ONE).view(torch.float64)
