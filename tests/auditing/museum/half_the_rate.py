"""The rate that is accounted is B / N with the N of a data set that was counted twice (with its augmentations).

Claimed: q = .001, epsilon = 0.108 for 500 steps. In truth every unit is drawn at q = .002: 0.233.
"""

from tests.auditing.adapters.loop import EXPECTED, POPULATION, SIGMA, STEPS, accountant, claim, trainer

RIGHT_ROW, ROWS = 9, {9}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # of a run; a test recomputes both
CLAIMED_RATE, TRUE_RATE = EXPECTED / (2 * POPULATION), EXPECTED / POPULATION


def wrong():
    return trainer(claim=claim(sampling_rate=CLAIMED_RATE, epsilon=accountant(SIGMA, CLAIMED_RATE, STEPS, 1e-5)))
