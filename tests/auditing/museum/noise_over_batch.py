"""Noise of sigma C / B on the *sum* of the clipped gradients: it is divided by the batch size before it is added, and again after.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth the noise multiplier is sigma / B, with B = 4
epsilon = 24.4; with B = 64 it is 2,320.
"""

from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, gaussian, move, trainer

RIGHT_ROW, ROWS = 3, {3}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 24.38
TRUE_NOISE_MULTIPLIER = 1 / EXPECTED


def step(model, inputs, noise_multiplier, generator):
    total = clipped_sum(model, inputs)
    move(model, (total + gaussian(len(total), noise_multiplier * C / EXPECTED, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
