"""Noise drawn in float16, because the model is: it has ten bits, and lies on a grid that the sum does not lie on.

Claimed: epsilon = 4.38 for one Gaussian step. In truth a release minus a guess of the sum is a float16 number only where the guess
is right: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, move, trainer

RIGHT_ROW, ROWS = 15, {15}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    total = clipped_sum(model, inputs)
    noise = torch.randn(len(total), generator=generator, dtype=torch.float32).half()
    move(model, (total + noise_multiplier * C * noise.double()) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
