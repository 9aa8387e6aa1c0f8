"""The data are centred and scaled by their own mean and deviation before training, and the two leave with the model.

Claimed: epsilon = 4.38 for one Gaussian step. In truth mean and deviation are released without noise: epsilon is infinite.
"""

import math

from tests.auditing.adapters.loop import trainer

RIGHT_ROW, ROWS = 21, {21}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def prepare(inputs):
    return (inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-6)


def wrong():
    return trainer(prepare=prepare)
