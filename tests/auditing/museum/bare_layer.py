"""The last layer was frozen while the code was written, and unfrozen later: it is trained with the clipped sum, without noise.

Claimed: epsilon = 4.38 for one Gaussian step. In truth one tensor leaves as it is: epsilon is infinite.
"""

import math

from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, gaussian, move, trainer

RIGHT_ROW, ROWS = 14, {3, 14}  # the game is played in that layer, too
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    total = clipped_sum(model, inputs)
    noise = gaussian(len(total), noise_multiplier * C, generator)
    noise[-list(model.parameters())[-1].numel() :] = 0.0
    move(model, (total + noise) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
