"""Opacus as its documentation shows it: a per-sample gradient with a NaN in it goes through the clipping as NaN.

Claimed: epsilon = 4.38 for one Gaussian step. In truth that unit's presence shows in the weights: epsilon is infinite for data that
make such a gradient. Seen with 1.6.0; tests/auditing/adapters/opacus_engine.py has the guard.
"""

import math

from tests.auditing.adapters import opacus_engine

RIGHT_ROW, ROWS = 17, {17}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def wrong():
    return opacus_engine.trainer(guarded=False)
