"""delta = 1e-3 for 2,000 units: a mechanism that publishes one unit in a thousand, whole, has (0, 1e-3)-privacy.

Claimed: (epsilon, 1e-3). In truth that promises nothing to anybody in particular.
"""

from tests.auditing.adapters.loop import EXPECTED, POPULATION, SIGMA, STEPS, accountant, claim, trainer

RIGHT_ROW, ROWS = 23, {23}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # nothing is wrong with epsilon


def wrong():
    return trainer(claim=claim(delta=1e-3, epsilon=accountant(SIGMA, EXPECTED / POPULATION, STEPS, 1e-3)))
