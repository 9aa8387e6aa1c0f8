"""Every step seeds its noise, "for reproducibility".

Claimed: one Gaussian a step, epsilon = 4.38 for one. In truth the difference of two steps has no noise: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters import loop

RIGHT_ROW, ROWS = 16, {3, 16}  # in the game, too, the noise is known
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    loop.step(model, inputs, noise_multiplier, torch.Generator().manual_seed(42))


def wrong():
    return loop.trainer(step=step, train=None, resume=None)
