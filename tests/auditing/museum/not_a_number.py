"""min(1, C / norm) without a look at what is not finite: one NaN in one unit's gradient, and all weights are NaN.

Claimed: epsilon = 4.38 for one Gaussian step. In truth that unit's presence shows: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import EXPECTED, C, gaussian, gradient_of, move, trainer

RIGHT_ROW, ROWS = 17, {17}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        gradient = gradient_of(model, inputs[row : row + 1]).double()
        total += gradient * (C / gradient.norm().clamp(min=C))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
