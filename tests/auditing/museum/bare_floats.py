"""Ordinary float64 noise, with the claim that it resists attacks on the low bits.

Claimed: epsilon = 4.38 for one Gaussian step, on floating-point numbers. In truth which doubles can come out depends on the sum
(Mironov 2012): epsilon is infinite for somebody who knows the generator.
"""

import math

from tests.auditing.adapters.loop import claim, trainer

RIGHT_ROW, ROWS = 15, {15}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def wrong():
    return trainer(claim=claim(hardened_noise=True))
