"""Divide by the size of the batch that was drawn, sum and noise alike.

Claimed: epsilon = 4.38 for one Gaussian step. In truth the analysis is for a constant divisor: how loud the noise is tells how
many units were drawn. A batch of one unit or of none: the noise is twice as loud in one of two; from d coordinates that is
seen with certainty, so that epsilon is infinite as d grows.
"""

import math

from tests.auditing.adapters.loop import C, clipped_sum, gaussian, move, trainer

RIGHT_ROW, ROWS = 8, {8}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    total = clipped_sum(model, inputs)
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / max(len(inputs), 1))


def wrong():
    return trainer(step=step, train=None)
