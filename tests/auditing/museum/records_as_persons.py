"""Persons are the unit, but every record is clipped for itself.

Claimed: epsilon = 4.38 for one Gaussian step, for all records of a person. In truth a person with k records moves the sum by k C: with
six, the noise multiplier is sigma / 6, epsilon = 42.8.
"""

from tests.auditing.adapters import loop

RIGHT_ROW, ROWS = 20, {20}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 42.84
TRUE_NOISE_MULTIPLIER = 1 / 6


def step_of_persons(model, inputs, owner, noise_multiplier, generator):
    loop.step(model, inputs, noise_multiplier, generator)


def wrong():
    return loop.trainer(claim=loop.claim(unit="person"), step_of_persons=step_of_persons)
