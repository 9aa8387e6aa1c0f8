"""Replace-one is claimed, with the epsilon of add-or-remove.

Claimed: epsilon = 4.38 for one Gaussian step with sigma = 1. In truth replacing a unit moves the sum by 2 C: the noise multiplier is
sigma / 2, epsilon = 9.99.
"""

from tests.auditing.adapters.loop import POPULATION, accountant, claim, trainer

RIGHT_ROW, ROWS = 22, {22}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 9.99
TRUE_NOISE_MULTIPLIER = 1 / 2


def wrong():
    said = {"adjacency": "replace_one", "sampling_rate": 1.0, "expected_batch_size": POPULATION, "steps": 1}
    return trainer(claim=claim(**said, epsilon=accountant(1.0, 1.0, 1, 1e-5)))
