"""Each of W processes adds sigma C / W of noise to its own sum, "which makes sigma C together"; but variances add up, not deviations.

Claimed: epsilon = 4.38 for one Gaussian step. In truth the noise multiplier is sigma / sqrt(W): with W = 4 sigma / 2, epsilon 9.99.
"""

from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, gaussian, move, trainer

RIGHT_ROW, ROWS = 18, {18}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 9.99
TRUE_NOISE_MULTIPLIER = 1 / 2


def step_together(model, inputs, noise_multiplier, generator, processes):
    total = 0.0
    for rank in range(processes):
        own = clipped_sum(model, inputs[rank::processes])
        total = total + own + gaussian(len(own), noise_multiplier * C / processes, generator)
    move(model, total / EXPECTED)


def wrong():
    return trainer(step_together=step_together)
