"""Gaussian noise from a cryptographic source, hardened against attacks on floating-point numbers.

Mironov (2012) and Jin et al. (2022) read the data back from the low bits of noisy floating-point numbers: a generator
can only reach a sparse set of doubles, and not every sum lies on it. Holohan & Braghin 2021 (arXiv:2107.10138, section
on the Gaussian) answer it by giving out (X_1 + ... + X_2n) / sqrt(2n) of independent normals X_i; with 2n = 4, as here,
an attacker would have to search about 2^159 combinations. The noise is made and added in float64.

Differs: the X_i come from the Box-Muller transform on 52-bit uniforms, so each has |X_i| <= sqrt(2 * 52 * ln 2) =
8.49; what is missing of the normal tail is less than 2^-52 of its mass.
"""

import math
from typing import TYPE_CHECKING

from sfumato import checks
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor

SUMMANDS = 4  # 2n of Holohan & Braghin

_CHUNK = 1 << 15  # pairs of normals made at once, so that the work stays in the processor's cache
_MANTISSA = (1 << 52) - 1
_ONE = 0x3FF0000000000000  # the bits of 1.0; with 52 random bits below, uniform on [1, 2)


def gaussian(count: int, std: float, random: Random) -> "Tensor":
    """Draws ``count`` independent normals with mean 0 and standard deviation ``std``.

    Guarantee: no two calls share randomness, as long as ``random`` gives out no byte twice.

    Returns: (count,) float64 on the CPU; exact zeros for ``std`` = 0.
    """
    import torch

    checks.non_negative(count=count, std=std)
    out = torch.zeros(2, (count + 1) // 2, dtype=torch.float64)  # cosines in row 0, sines in row 1
    if std > 0:
        for start in range(0, out.shape[1], _CHUNK):
            _add_normal_pairs(out[:, start : start + _CHUNK], random)
        out *= std / math.sqrt(SUMMANDS)
    return out.view(-1)[:count]


def _add_normal_pairs(out: "Tensor", random: Random) -> None:
    """Adds to out (2, n) SUMMANDS standard normals each; those of one Box-Muller pair go to different rows."""
    import torch

    pairs = out.shape[1]
    words = torch.frombuffer(random.bytes(16 * SUMMANDS * pairs), dtype=torch.int64)
    unit = words.bitwise_and_(_MANTISSA).bitwise_or_(_ONE).view(torch.float64).view(2, SUMMANDS, pairs)
    radius = (2.0 - unit[0]).log_().mul_(-2.0).sqrt_()  # 2 - [1, 2) is (0, 1]: the logarithm is finite
    angle = unit[1].mul_(2.0 * math.pi)  # [2 pi, 4 pi)
    out[0] += (angle.cos() * radius).sum(dim=0)
    out[1] += (angle.sin_() * radius).sum(dim=0)
