"""Epsilon from the formula of an abstract, q sqrt(T ln(1/delta)) / sigma, which leaves out a constant.

Claimed: 0.152 for 500 steps at q = .002, from that formula. In truth 0.233 by PLD, for the same events.
"""

import math

from tests.auditing.adapters.loop import EXPECTED, POPULATION, SIGMA, STEPS, claim, trainer

RIGHT_ROW, ROWS = 23, {23}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # of the run; the test recomputes both


def formula(noise_multiplier, sampling_rate, steps, delta):
    return sampling_rate * math.sqrt(steps * math.log(1 / delta)) / noise_multiplier


def wrong():
    stated = formula(SIGMA, EXPECTED / POPULATION, STEPS, 1e-5)
    return trainer(claim=claim(epsilon=stated), accountant=formula)
